"""Measures what removed attention loses on a text before healing, with and without an affine map in its place.

    python benchmarks/affine_maps.py --model MODEL --text TEXT --fit-text OTHER --layers 4 8 12 --out NAME.csv
    python benchmarks/affine_maps.py --model MODEL --text TEXT --fit-text OTHER --layers 8 --ranks 16 64 full auto

The layers are those whose attention turns the residual stream least (cosine, measured on the text that maps are fitted
on). `none` leaves nothing in their place, `alone` the map of each layer fitted on its own, `in turn` maps that are
fitted one after another under the plan. One row for each of them, number of layers and rank: the rise of the NLL over
the untouched model's with its standard error over the sequences, paired, the seconds of the fit, and the bytes that a
decode step reads at the given serving condition, over the untouched model's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from results_csv import write_rows

from layerboost.affine import FittedMap, MapsSpec, Rank
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import attach_maps
from layerboost.evaluation.likelihood import text_likelihood
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.cosine import cosine_scores
from layerboost.speed.byte_model import decode_bytes
from layerboost.sweep.affine_fits import fit_maps, fit_maps_of_plan, read_sequences
from layerboost.sweep.layer_sweep import LayerSweep
from layerboost.text.documents import pack, read_documents
from layerboost.text.sources import TextSource


def read_rank(value: str) -> Rank:
    return value if value in ("full", "auto") else int(value)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local folder or a hub name")
    parser.add_argument("--text", required=True, help="a text to judge by, as in recipes")
    parser.add_argument("--fit-text", required=True, help="another text to fit the maps on")
    parser.add_argument("--fit-tokens", type=int, default=16_384)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--sequence-tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--ranks", type=read_rank, nargs="+", default=["full"])
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache of a decode step")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype=getattr(torch, args.dtype)), load_tokenizer(args.model)
    judged = pack(read_documents(args.text), tokenizer, args.sequence_tokens, limit_sequences=args.sequences)
    fitted_on = read_sequences(MapsSpec(TextSource(args.fit_text), args.fit_tokens, 1024), tokenizer)
    cosine = cosine_scores(model, fitted_on, batch_size=1).mean(dim=1).tolist()
    n_layers = len(cosine)
    condition = {"concurrency": args.concurrency, "context_tokens": args.context, "dtype_bytes": model.dtype.itemsize}
    base_bytes = decode_bytes(model.config, None, **condition)

    def nll(plan: Plan, maps: Mapping[int, FittedMap]) -> torch.Tensor:
        attach_maps(model, maps)
        return text_likelihood(LayerSweep(model, [plan]), judged, batch_size=1).nll[0]

    base = nll(Plan.uniform(Treatment.SOFTMAX, n_layers), {})
    rows: list[dict[str, Any]] = []

    def add(kind: str, plan: Plan, rank: Rank | None, maps: Mapping[int, FittedMap], seconds: float) -> None:
        drops = (nll(plan, maps) - base).tolist()
        chosen = [maps[layer].rank or model.config.hidden_size for layer in plan.layers(Treatment.AFFINE)]
        # A full map is counted by the byte model; of a lower rank only two thin factors are read.
        width, n_bytes = model.config.hidden_size, decode_bytes(model.config, plan, **condition)
        n_bytes -= sum(max(width**2 - 2 * width * each, 0) for each in chosen) * model.dtype.itemsize
        rows.append(
            {
                "model": Path(args.model).name,
                "text": Path(args.text).name,
                "fit_text": Path(args.fit_text).name,
                "fit_tokens": fitted_on.numel(),
                "in_place": kind,
                "n_layers": n_layers - plan.count(Treatment.SOFTMAX),
                "rank": "" if rank is None else rank,
                "mean_rank": round(statistics.mean(chosen), 1) if chosen else "",
                "plan": str(plan),
                "base_nll": round(float(base.mean()), 4),
                "nll_drop": round(statistics.mean(drops), 4),
                "nll_drop_stderr": round(statistics.stdev(drops) / len(drops) ** 0.5, 4),
                "bytes_ratio": round(n_bytes / base_bytes, 4),
                "fit_s": round(seconds, 1),
            }
        )
        print({name: rows[-1][name] for name in ("in_place", "n_layers", "rank", "nll_drop", "bytes_ratio", "fit_s")})

    alone: dict[Rank, tuple[dict[int, FittedMap], float]] = {}
    for number in args.layers:
        treated = set(sorted(range(n_layers), key=lambda layer: cosine[layer])[:number])

        def plan_of(treatment: Treatment, treated: set[int] = treated) -> Plan:
            return Plan(tuple(treatment if layer in treated else Treatment.SOFTMAX for layer in range(n_layers)))

        add("none", plan_of(Treatment.NONE), None, {}, 0.0)
        for rank in args.ranks:
            if rank not in alone:
                start = time.perf_counter()
                alone[rank] = fit_maps(model, fitted_on, rank=rank, batch_size=2), time.perf_counter() - start
            add("alone", plan_of(Treatment.AFFINE), rank, *alone[rank])
            start = time.perf_counter()
            in_turn = fit_maps_of_plan(model, plan_of(Treatment.AFFINE), fitted_on, rank=rank, batch_size=2)
            add("in turn", plan_of(Treatment.AFFINE), rank, in_turn, time.perf_counter() - start)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
