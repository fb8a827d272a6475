"""Compares decode throughput predicted from a few measured plans with what other plans measure.

    python benchmarks/throughput_model.py --model layerboost/smallworld/model --concurrency 16 --out embedded.csv
    python benchmarks/throughput_model.py --shape 12x768 --concurrency 2 --prompt-tokens 128 --new-tokens 16

The plans of `design_plans` are timed and a `SpeedModel` is fitted, as in a run. Then random plans that are not in the
fit are timed in groups together with the untouched model, which cancels a machine's drift. Every third plan has the
same number of layers of each treatment as the one before, in other places. `--work` keeps the timings: the same command
continues where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerboost import Plan, Treatment, convert
from layerboost.checkpoint import load_model
from layerboost.families import native_windows
from layerboost.speed.decoding import DecodeMeasurement, measure_together
from layerboost.speed.speed_model import SpeedModel, counts, design_plans

SHAPES = {
    # Entries are layers, hidden size, heads, key/value heads, head dimension, MLP, vocabulary; weights are random.
    "12x768": (12, 768, 12, 4, 64, 2048, 16_384),  # 350 MB in fp32: far above a CPU's caches
    "36x2560": (36, 2560, 32, 8, 128, 9728, 151_936),  # the shape of Qwen3-4B, for a GPU
}
GROUP = 6
"""Plans that are timed side by side with the untouched model."""


def build(shape: str, dtype: torch.dtype, device: str):
    """Builds a model of a shape with random weights."""
    layers, hidden, heads, kv_heads, head_dim, mlp, vocabulary = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=32_768,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_plans(n_layers: int, window: int, n: int, native: tuple[int | None, ...], taken: list[Plan]) -> list[Plan]:
    """Draws plans with other counts than those taken; every third has the counts of the one before, shuffled."""
    rng = random.Random(0)
    found: list[Plan] = []
    met = {counts(plan, native) for plan in taken}
    while len(found) < n:
        if len(found) % 3 == 2:
            plan = Plan(tuple(rng.sample(found[-1].treatments, n_layers)), window)
            if plan in found:
                continue
        else:
            weights = [rng.random() for _ in Treatment]
            plan = Plan(tuple(rng.choices(list(Treatment), weights, k=n_layers)), window)
            if counts(plan, native) in met or len(set(plan.treatments)) == 1:
                continue
        met.add(counts(plan, native))
        found.append(plan)
    return found


class Timings:
    """Holds timings by plan, scaled to the speed of the untouched model's first timing, and keeps them in a file."""

    def __init__(self, base, condition: dict[str, int], work: Path | None):
        self._base, self._condition, self._work = base, condition, work
        self._base_plan = Plan.uniform(Treatment.SOFTMAX, base.config.num_hidden_layers)
        about = {"model": base.config.to_json_string(), "dtype": str(base.dtype), **condition}
        kept: dict[str, Any] = {"about": about, "timed": []}
        if work is not None and work.exists():
            kept = json.loads(work.read_text())
        if kept["about"] != about:
            raise SystemExit(f"--work: {work} holds timings of another model or condition; give another file")
        self._kept = kept
        self.measured = {
            Plan.from_dict(entry): DecodeMeasurement.from_dict(entry["measured"]) for entry in kept["timed"]
        }

    def time(self, plans: list[Plan], per_group: int) -> None:
        """Times the plans that are not timed yet, in groups with the untouched model."""
        todo = [plan for plan in plans if plan not in self.measured and plan != self._base_plan]
        for first in range(0, len(todo), per_group):
            group = [self._base_plan, *todo[first : first + per_group]]
            models = [self._base, *(convert(self._base, plan) for plan in group[1:])]
            timed = measure_together(models, **self._condition)
            speeds = [self.measured.get(self._base_plan, timed[0]), timed[0]]
            factor = speeds[0].output_throughput_tok_per_s / speeds[1].output_throughput_tok_per_s
            for plan, measured in zip(group, timed, strict=True):
                if plan not in self.measured:
                    self.measured[plan] = measured.scaled(factor)
                    self._kept["timed"].append({**plan.to_dict(), "measured": self.measured[plan].to_dict()})
                    tok_per_s = self.measured[plan].output_throughput_tok_per_s
                    print(f"{plan} {tok_per_s:.1f} tok/s, machine at {1 / factor:.2f} of its first speed", flush=True)
            if self._work is not None:
                self._work.write_text(json.dumps(self._kept))


def step_s(measured: DecodeMeasurement) -> tuple[float, float]:
    """Returns the seconds of a step and their standard error."""
    throughput = measured.output_throughput_tok_per_s
    seconds = measured.concurrency / throughput
    return seconds, seconds * measured.output_throughput_stderr / throughput


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a folder or hub name")
    source.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of passes in each group")
    parser.add_argument("--fit-plans", type=int, default=8)
    parser.add_argument("--plans", type=int, default=32, help="plans that are not in the fit")
    parser.add_argument("--work", type=Path, help="JSON file that keeps what is timed (default: none)")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.shape:
        base = build(args.shape, dtype, args.device)
    else:
        base = load_model(args.model, dtype=dtype).to(args.device).eval()
    condition = {name: getattr(args, name) for name in ("concurrency", "prompt_tokens", "new_tokens", "repeats")}
    timings, native = Timings(base, condition, args.work), native_windows(base.config)
    n_layers = base.config.num_hidden_layers
    design = design_plans(n_layers, tuple(Treatment), args.window, args.fit_plans, native_windows=native)
    timings.time(design, len(design))
    points = [(plan, *step_s(timings.measured[plan])) for plan in design]
    model = SpeedModel.fit(points, concurrency=args.concurrency, native_windows=native)
    others = random_plans(n_layers, args.window, args.plans, native, design)
    timings.time(others, GROUP)

    rows = []
    for plan in (*design, *others):
        predicted, measured = model.predict(plan), timings.measured[plan]
        assert predicted is not None
        throughput = measured.output_throughput_tok_per_s
        rows.append(
            {
                "model": Path(args.model).name if args.model else args.shape,
                **plan.to_dict(),
                **condition,
                "in_fit": str(plan in design).lower(),
                "output_throughput_tok_per_s": throughput,
                "output_throughput_stderr": measured.output_throughput_stderr,
                "predicted_throughput_tok_per_s": predicted[0],
                "predicted_throughput_stderr": predicted[1],
                "relative_error": predicted[0] / throughput - 1,
                "hardware": measured.hardware,
                "dtype": measured.dtype,
                "threads": measured.threads,
            }
        )
    held_out = rows[len(design) :]
    errors = np.array([row["relative_error"] for row in held_out])
    inside = np.mean(
        [
            abs(row["predicted_throughput_tok_per_s"] - row["output_throughput_tok_per_s"])
            < 2 * np.hypot(row["predicted_throughput_stderr"], row["output_throughput_stderr"])
            for row in held_out
        ]
    )
    moved = [
        timings.measured[other].output_throughput_tok_per_s / timings.measured[one].output_throughput_tok_per_s - 1
        for one, other in pairwise(others)
        if counts(one, native) == counts(other, native)
    ]
    print(
        f"{args.model or args.shape}, concurrency {args.concurrency}: {len(design)} measured plans predict "
        f"{len(others)} others with a median error of {np.median(abs(errors)):.1%}, 90 % within "
        f"{np.quantile(abs(errors), 0.9):.1%} (bias {np.median(errors):+.1%}); {inside:.0%} within two stderr; the "
        f"same counts in other places differ by {np.median(np.abs(moved)) if moved else float('nan'):.1%}"
    )
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
