"""Measures what windows lose on a text before healing, with and without sinks.

    python benchmarks/sinks.py --model MODEL --text TEXT --windows 64 128 --sinks 0 1 4 --out NAME.csv

One row for each window, number of sinks and choice of layers: the rise of the NLL over the untouched model's, with its
standard error over the sequences, paired. `--layers all` puts a window into every layer, `half` into every second one,
and a number into that many layers, those whose attention turns the residual stream least (cosine). The sinks are part
of the window, so that plans of one window keep the same cache. With `--treatment linear_window` the layers also have
the linear branch, with its untrained feature map.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from results_csv import write_rows

from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.evaluation.likelihood import text_likelihood
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.cosine import cosine_scores
from layerboost.sweep.layer_sweep import LayerSweep
from layerboost.text.documents import pack, read_documents


def treated_layers(choice: str, cosine: list[float]) -> set[int]:
    """Returns the layers that get a window: `all`, `half`, or a number of those with the least cosine distance."""
    n_layers = len(cosine)
    if choice == "all":
        return set(range(n_layers))
    if choice == "half":
        return set(range(1, n_layers, 2))
    return set(sorted(range(n_layers), key=lambda layer: cosine[layer])[: int(choice)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local folder or a hub name")
    parser.add_argument("--text", required=True, help="a text to judge by, as in recipes")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--sequence-tokens", type=int, default=1024)
    parser.add_argument("--treatment", default="window", choices=("window", "linear_window"))
    parser.add_argument("--windows", type=int, nargs="+", default=[64])
    parser.add_argument("--sinks", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--layers", nargs="+", default=["all", "half", "8"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model = load_model(args.model, dtype=getattr(torch, args.dtype))
    sequences = pack(
        read_documents(args.text), load_tokenizer(args.model), args.sequence_tokens, limit_sequences=args.sequences
    )
    cosine = cosine_scores(model, sequences, batch_size=1).mean(dim=1).tolist()
    treatment, n_layers = Treatment(args.treatment), len(cosine)
    about: list[dict[str, Any]] = []
    plans = [Plan.uniform(Treatment.SOFTMAX, n_layers)]
    for choice in args.layers:
        treated = treated_layers(choice, cosine)
        treatments = tuple(treatment if layer in treated else Treatment.SOFTMAX for layer in range(n_layers))
        for window in args.windows:
            for sinks in args.sinks:
                if sinks < window:
                    about.append({"layers": choice, "n_layers": len(treated), "window": window, "sinks": sinks})
                    plans.append(Plan(treatments, window, sinks))
    base, *nll = text_likelihood(LayerSweep(model, plans), sequences, batch_size=1).nll
    rows = []
    for row, plan, of_plan in zip(about, plans[1:], nll, strict=True):
        drops = (of_plan - base).tolist()
        stderr = statistics.stdev(drops) / len(drops) ** 0.5 if len(drops) > 1 else float("nan")
        rows.append(
            {
                "model": Path(args.model).name,
                "text": Path(args.text).name,
                "treatment": args.treatment,
                **row,
                "plan": str(plan),
                "sequences": len(sequences),
                "sequence_tokens": args.sequence_tokens,
                "base_nll": round(float(base.mean()), 4),
                "nll_drop": round(statistics.mean(drops), 4),
                "nll_drop_stderr": round(stderr, 4),
            }
        )
        print({name: rows[-1][name] for name in ("layers", "window", "sinks", "nll_drop", "nll_drop_stderr")})
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
