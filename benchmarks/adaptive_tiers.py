"""Measures how many items a sweep needs that ends early, and how often its tiers differ from those by all items.

    layerboost run recipes/default.yaml --out DIR --until sensitivity
    python benchmarks/adaptive_tiers.py DIR --removed 4 --middle 4

For each ranking of the run the recorded items are drawn in many random orders; no model is computed. `wrong` counts the
orders whose tiers differ from those by all items; `spent` is the part of layers x items that was scored. The rule
`adaptive` is that of `sensitivity.adaptive`, for removal alone. The rules `stable` are that of `sensitivity.stable_at`:
all layers and treatments are scored on the first items that give reliable rankings; `spread` is the largest difference
of a layer's place in a ranking from its place by all items.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from layerboost.evaluation.scores import SCORES
from layerboost.evaluation.shares import mixed_tasks
from layerboost.sensitivity.adaptive_tiers import AdaptiveTiers, TierRule
from layerboost.sensitivity.ranking import DropMatrix, reliability
from orchestrator.results.ablations import Ablations
from orchestrator.results.rankings import View, views
from orchestrator.results.reading import RecordReader
from orchestrator.run.folder import RunFolder
from orchestrator.run.state import load_state
from orchestrator.stages.sensitivity import FIRST_SEQUENCES


def adaptive(matrix: DropMatrix, rule: TierRule, error: float, first_items: int, seed: int) -> tuple[list[str], float]:
    """Returns the tiers and the part of the items spent, for one random order of the items."""
    rng = np.random.default_rng(seed)
    counts = {task: drops.shape[1] for task, drops in matrix.tasks.items()}
    order = mixed_tasks(counts)
    shuffled = {task: drops[:, rng.permutation(drops.shape[1])] for task, drops in matrix.tasks.items()}
    taken = dict.fromkeys(counts, 0)
    columns = []
    for task in order:
        columns.append(shuffled[task][:, taken[task]])
        taken[task] += 1
    drops = np.stack(columns, axis=1)  # (n_layers, n_items)
    weights = [len(order) / (len(counts) * counts[task]) for task in order]
    tiers = AdaptiveTiers(matrix.n_layers, len(order), rule, error=error, first_items=first_items, weights=weights)
    while (request := tiers.next_request()) is not None:
        layers, start, stop = request
        tiers.observe({layer: drops[layer, start:stop] for layer in layers})
    found = tiers.tiers()
    assert found is not None
    return [str(tier) for tier in found], tiers.spent


def stable(matrices: dict[str, DropMatrix], reliable: float, seed: int) -> tuple[dict[str, DropMatrix], float]:
    """Returns the drops of the first items that rank reliably, by treatment, and their part of all items."""
    (task,) = next(iter(matrices.values())).tasks
    n_items = next(iter(matrices.values())).n_items
    order = np.random.default_rng(seed).permutation(n_items)
    for n in range(FIRST_SEQUENCES, n_items + 1):
        first = {treatment: matrix.take({task: order[:n]}) for treatment, matrix in matrices.items()}
        if n == n_items or min(map(reliability, first.values())) >= reliable:
            return first, n / n_items
    raise ValueError(f"{n_items} items are fewer than the first {FIRST_SEQUENCES}")


def place_spread(few: DropMatrix, all_items: DropMatrix) -> int:
    """Returns the largest difference of a layer's places in two rankings."""
    places = [np.argsort(np.argsort(matrix.sensitivity(), kind="stable")) for matrix in (few, all_items)]
    return int(np.abs(places[0] - places[1]).max())


def stable_rows(found: list[View], rule: TierRule, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each text, score and reliability."""
    texts: dict[str, dict[str, DropMatrix]] = {}
    for view in found:
        if SCORES[view.score].ranks_texts and view.context_tokens is not None:
            texts.setdefault(view.name, {})[view.treatment] = view.matrix
    for (name, matrices), reliable in itertools.product(texts.items(), args.stable_at):
        whole = rule.tiers(matrices["none"].sensitivity())
        drawn = [stable(matrices, reliable, seed) for seed in range(args.seeds)]
        spent = [part for _, part in drawn]
        yield {
            "ranking": name,
            "rule": f"stable {reliable:g}",
            "treatments": " ".join(matrices),
            "n_items": matrices["none"].n_items,
            "removed": args.removed,
            "middle": args.middle,
            "error": None,
            "seeds": args.seeds,
            "wrong": sum(list(rule.tiers(first["none"].sensitivity())) != list(whole) for first, _ in drawn),
            "spent_mean": round(float(np.mean(spent)), 3),
            "spent_max": round(float(np.max(spent)), 3),
            "spread": max(place_spread(first[name], matrices[name]) for first, _ in drawn for name in matrices),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --out of a run")
    parser.add_argument("--removed", type=int, default=4)
    parser.add_argument("--middle", type=int, default=4)
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--first-items", type=int, default=16)
    parser.add_argument("--stable-at", type=float, nargs="*", default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args()
    folder = RunFolder(args.folder)
    rule = TierRule(n_removed=args.removed, n_middle=args.middle)
    state = load_state(folder)
    found_views = views(Ablations(RecordReader(folder), state), state)
    rows = []
    for view in found_views:
        if view.treatment != "none" or view.matrix.n_items < args.first_items:
            continue
        whole = [str(tier) for tier in rule.tiers(view.matrix.sensitivity())]
        found = [adaptive(view.matrix, rule, args.error, args.first_items, seed) for seed in range(args.seeds)]
        spent = [part for _, part in found]
        rows.append(
            {
                "ranking": view.name,
                "rule": "adaptive",
                "treatments": "none",
                "n_items": view.matrix.n_items,
                "removed": args.removed,
                "middle": args.middle,
                "error": args.error,
                "seeds": args.seeds,
                "wrong": sum(tiers != whole for tiers, _ in found),
                "spent_mean": round(float(np.mean(spent)), 3),
                "spent_max": round(float(np.max(spent)), 3),
                "spread": None,
            }
        )
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    for row in stable_rows(found_views, rule, args):
        print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        rows.append(row)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
