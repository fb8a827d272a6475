"""Measures how many items adaptive tiers need, and how often they differ from the tiers by all items of a run.

    layerboost run recipes/default.yaml --out DIR --until sensitivity
    python benchmarks/adaptive_tiers.py DIR --removed 4 --middle 4

For each ranking of the run the recorded items are drawn in many random orders; no model is computed. `wrong` counts the
orders whose tiers differ from those by all items; `spent` is the part of layers x items that was scored.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np

from layerboost.evaluation.shares import mixed_tasks
from layerboost.sensitivity.adaptive_tiers import AdaptiveTiers, TierRule
from layerboost.sensitivity.ranking import DropMatrix
from orchestrator.results.rankings import views
from orchestrator.run.folder import RunFolder
from orchestrator.run.state import load_state


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --out of a run")
    parser.add_argument("--removed", type=int, default=4)
    parser.add_argument("--middle", type=int, default=4)
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--first-items", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args()
    folder = RunFolder(args.folder)
    rule = TierRule(n_removed=args.removed, n_middle=args.middle)
    rows = []
    for view in views(folder, load_state(folder)):
        if view.treatment != "none":
            continue
        whole = [str(tier) for tier in rule.tiers(view.matrix.sensitivity())]
        found = [adaptive(view.matrix, rule, args.error, args.first_items, seed) for seed in range(args.seeds)]
        spent = [part for _, part in found]
        rows.append(
            {
                "ranking": view.name,
                "n_items": view.matrix.n_items,
                "removed": args.removed,
                "middle": args.middle,
                "error": args.error,
                "seeds": args.seeds,
                "wrong": sum(tiers != whole for tiers, _ in found),
                "spent_mean": round(float(np.mean(spent)), 3),
                "spent_max": round(float(np.max(spent)), 3),
            }
        )
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
