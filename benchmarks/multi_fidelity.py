"""Compares healing many plans on few tokens and the best of them on all with healing every plan on all tokens.

    python benchmarks/multi_fidelity.py --model DIR --train A.txt --val B.txt --work RUNS --name NAME

A pool of plans, several at each of a few speeds, is healed three ways: on the whole budget; on shares of it by separate
complete healings (`restart`); on the first shares of the whole run (`prefix`). From these runs any schedule of
successive halving can be replayed. Plans are chosen by the even sequences of the text and judged by the odd ones;
quality is the likelihood that is retained, exp(NLL of the base - NLL). Errors are bootstrapped over the sequences, with
the choices made again each time. They do not include the randomness of training, since each healing has one seed.

The benchmark writes `multi_fidelity_{pool,ranks,schedules}_NAME.csv` and a picture. Every run is a file under --work:
the same command continues an earlier one.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import combinations, product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from healing import (
    Run,
    Setting,
    about,
    perform_all,
    plan_by_scores,
    refined,
    selection_sequences,
    single_layer_costs,
)
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from layerboost import Plan, Treatment
from layerboost.checkpoint import load_model
from layerboost.healing.spec import HealingSpec
from layerboost.search.baselines import baseline_plans
from layerboost.search.pareto import choose_spread, front, hypervolume
from layerboost.search.refinement import predicted_drop
from layerboost.sensitivity.cosine import cosine_scores
from orchestrator.report.canvas import STYLE

matplotlib.use("Agg")

LEVELS = ((8, 2, 2), (6, 3, 3), (4, 4, 4), (3, 4, 5), (2, 5, 5), (1, 5, 6))
"""Layers of softmax, linear_window and none, for the plans of each speed of a model with twelve layers."""
UNGUIDED = ("first", "cosine", "random", "first", "cosine", "first")
"""Rule of the one plan at each level that is not chosen by scores."""
REFINED_PLANS = 16
RESTARTS, PREFIXES = (1 / 12, 1 / 6, 1 / 3), (0.1, 0.2, 1 / 3, 0.5)

Fidelity = tuple[str, float]
"""The way in which a plan was measured (`before`, `restart`, `prefix` or `full`), and the share of the budget."""
BEFORE, FULL = ("before", 0.0), ("full", 1.0)

CORNERS = ("kept", "rung")
"""Reference corner of the hypervolume by which a rung's plans are chosen, at speed-up 1. `kept` uses the worst quality
of the first choice for all later ones, `rung` the worst quality of each rung."""


@dataclass(frozen=True)
class Measured:
    """Holds the pool and everything that was measured of it.

    Attributes:
        speedup: (plans,), predicted speed-up.
        level: (plans,), index into LEVELS.
        nll: (plans, sequences) for each fidelity.
        base: (sequences,), NLL of the untouched model.
    """

    speedup: np.ndarray
    level: np.ndarray
    nll: dict[Fidelity, np.ndarray]
    base: np.ndarray

    def quality(self, fidelity: Fidelity, sequences: np.ndarray) -> np.ndarray:
        """Returns the likelihood retained on those sequences, (plans,)."""
        return np.exp(self.base[sequences].mean() - self.nll[fidelity][:, sequences].mean(axis=1))


@dataclass(frozen=True)
class Schedule:
    """Describes successive halving: each rung is a number of plans and a share; the last rung is the whole budget.

    If the first rung has fewer plans than the pool, they are chosen by quality before healing.
    """

    way: str
    rungs: tuple[tuple[int, float], ...]

    @property
    def tokens(self) -> float:
        """The cost in whole healings. A prefix continues from where the rung before it ended; a restart does not."""
        shares = [0.0] + [share for _, share in self.rungs]
        spent_before = shares[:-1] if self.way == "prefix" else [0.0] * len(self.rungs)
        return sum(n * (share - before) for (n, share), before in zip(self.rungs, spent_before, strict=True))

    def __str__(self) -> str:
        return " > ".join(f"{n}@{share:.3g}" for n, share in self.rungs)


def schedules(n: int) -> list[Schedule]:
    """Returns the schedules that are compared, for a pool of `n` plans."""
    third, half = n // 3, n // 2
    found = [Schedule("before", ((third, 1.0),))]
    for final in (3, 4, 5, 6):
        end = (final, 1.0)
        found.append(Schedule("before", (end,)))
        for first in (1 / 12, 1 / 6):
            found.append(Schedule("restart", ((n, first), end)))
            found.append(Schedule("restart", ((half, first), end)))
        found.append(Schedule("restart", ((n, 1 / 12), (third, 1 / 6), end)))
        found.append(Schedule("restart", ((n, 1 / 12), (third, 1 / 3), end)))
        found.append(Schedule("restart", ((half, 1 / 12), (min(2 * final, half), 1 / 3), end)))
        found.append(Schedule("prefix", ((n, 0.1), end)))
        found.append(Schedule("prefix", ((n, 0.2), end)))
        found.append(Schedule("prefix", ((n, 0.1), (third, 1 / 3), end)))
    return found


def survivors(schedule: Schedule, measured: Measured, sequences: np.ndarray, corner: str) -> list[int]:
    """Returns the plans that a schedule heals on the whole budget, chosen by what is measured on `sequences`.

    Args:
        schedule: The schedule.
        measured: The pool.
        sequences: Indices of the sequences to choose by.
        corner: Reference corner of the hypervolumes that choose a rung's plans; see CORNERS.
    """
    alive, fidelity, worst = list(range(len(measured.speedup))), BEFORE, None
    for n, share in schedule.rungs:
        if n < len(alive):
            quality = measured.quality(fidelity, sequences)[alive].tolist()
            worst = min(quality) if worst is None or corner == "rung" else worst
            points = list(zip(quality, measured.speedup[alive].tolist(), strict=True))
            alive = [alive[index] for index in choose_spread(points, n, (worst, 1.0))]
        fidelity = (schedule.way, share)
    return sorted(alive)


def judged(
    schedule: Schedule, measured: Measured, corner: str, choosing: np.ndarray, judging: np.ndarray
) -> dict[str, float]:
    """Compares the survivors with the front of the pool, all of it healed on the whole budget.

    Returns:
        `hypervolume` and `best_hypervolume`: those of the survivors, and of the best choice of equally many plans, as
        shares of the pool's; measured from the pool's worst quality and speed-up 1. `gain_over_before`: gain in
        hypervolume over equally many plans chosen by quality before healing. `largest_shortfall`: over the speeds of
        the survivors, the largest gap in quality between the best survivor and the best plan of the pool that are at
        least as fast.
    """
    chosen = survivors(schedule, measured, choosing, corner)
    points = list(zip(measured.quality(FULL, judging).tolist(), measured.speedup.tolist(), strict=True))
    reference = (min(quality for quality, _ in points), 1.0)
    whole = hypervolume(points, reference)
    on_front = [point for point, kept in zip(points, front(points), strict=True) if kept]
    subsets = combinations(on_front, min(len(chosen), len(on_front)))
    at_once = Schedule("before", ((len(chosen), 1.0),))
    kept, unhealed = ([points[i] for i in found] for found in (chosen, survivors(at_once, measured, choosing, corner)))

    def best(among: Sequence[tuple[float, float]], speed: float) -> float:
        return max(quality for quality, speedup in among if speedup >= speed)

    return {
        "hypervolume": hypervolume(kept, reference) / whole,
        "gain_over_before": (hypervolume(kept, reference) - hypervolume(unhealed, reference)) / whole,
        "best_hypervolume": max(hypervolume(subset, reference) for subset in subsets) / whole,
        "largest_shortfall": max(best(points, speed) - best(kept, speed) for _, speed in kept),
    }


def predictive(fidelity: Fidelity, measured: Measured, choosing: np.ndarray, judging: np.ndarray) -> dict[str, float]:
    """Says how well a fidelity predicts quality after healing.

    Returns:
        Spearman's correlation over the pool, and its mean over the levels; `regret`: the mean over the levels of the
        quality that is lost by choosing the plan that the fidelity ranks best.
    """
    found, final = measured.quality(fidelity, choosing), measured.quality(FULL, judging)
    levels = [measured.level == level for level in np.unique(measured.level)]
    return {
        "spearman": float(spearmanr(found, final).statistic),
        "spearman_within_levels": float(np.mean([spearmanr(found[at], final[at]).statistic for at in levels])),
        "regret": float(np.mean([final[at].max() - final[at][found[at].argmax()] for at in levels])),
    }


def resampled(n_sequences: int, n_resamples: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the sequences to choose by and to judge by: first as they are, then each half resampled from itself."""
    halves = np.arange(0, n_sequences, 2), np.arange(1, n_sequences, 2)
    yield halves
    rng = np.random.default_rng(seed)
    for _ in range(n_resamples):
        yield rng.choice(halves[0], len(halves[0])), rng.choice(halves[1], len(halves[1]))


def with_errors(estimates: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the first of the estimates, and the standard deviation of the others beside each value."""
    row: dict[str, float] = {}
    for name, value in estimates[0].items():
        row |= {name: value, f"{name}_stderr": float(np.std([other[name] for other in estimates[1:]], ddof=1))}
    return row


def pool_of_plans(setting: Setting, window: int, per_level: int, work: Path) -> list[dict[str, Any]]:
    """Returns the plans with level and origin, from the file of an earlier call if it exists."""
    what = [setting.model, setting.train, setting.sequence_tokens, window, LEVELS, UNGUIDED, per_level]
    file = work / f"pool-{sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        torch.set_num_threads(setting.threads)
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make_pool(setting, window, per_level)))
    return [{**entry, "plan": Plan.from_dict(entry["plan"])} for entry in json.loads(file.read_text())]


def make_pool(setting: Setting, window: int, per_level: int) -> list[dict[str, Any]]:
    """Chooses plans at each level: by removal scores, the best sum of single costs, swaps from it, and a plain rule.

    If two of them coincide, swaps of the refined plan follow, those with the smallest sum of single costs first.
    """
    model, sequences = load_model(setting.model), selection_sequences(setting)
    base, costs = single_layer_costs(model, sequences, window)
    cosine = cosine_scores(model, sequences).mean(dim=1).tolist()
    pool = []
    for level, (counts, rule) in enumerate(zip(LEVELS, UNGUIDED, strict=True)):
        best_sum = additive_optimum(costs, counts, window)
        after_swaps = refined(model, sequences, best_sum, base, costs, REFINED_PLANS)
        unguided = baseline_plans(rule, len(best_sum), window=window, budget=best_sum, cosine=cosine, seed=level)
        candidates = [
            ("scores", plan_by_scores(costs[Treatment.NONE], counts, window)),
            ("additive", best_sum),
            ("refined", after_swaps),
            (rule, unguided[rule]),
            *(("swap", plan) for plan in swaps(after_swaps, costs)),
        ]
        origins: dict[Plan, str] = {}
        for origin, plan in candidates:
            if plan not in origins and len(origins) < per_level:
                origins[plan] = origin
            elif plan in origins and origin != "swap":
                origins[plan] += f", {origin}"
        pool += [{"level": level, "origin": origin, "plan": plan.to_dict()} for plan, origin in origins.items()]
    return pool


def additive_optimum(costs: dict[Treatment, list[float]], counts: Sequence[int], window: int) -> Plan:
    """Returns the plan with the smallest sum of single-layer costs among those with these counts of each treatment."""
    slots = [
        t
        for t, n in zip((Treatment.SOFTMAX, Treatment.LINEAR_WINDOW, Treatment.NONE), counts, strict=True)
        for _ in range(n)
    ]
    rows = {**costs, Treatment.SOFTMAX: [0.0] * len(slots)}
    layers, taken = linear_sum_assignment(np.array([rows[treatment] for treatment in slots]).T)
    return Plan(tuple(slots[slot] for _, slot in sorted(zip(layers, taken, strict=True))), window)


def swaps(plan: Plan, costs: dict[Treatment, list[float]]) -> list[Plan]:
    """Returns all plans that differ by a swap of two layers, the smallest sum of single-layer costs first."""
    found = []
    for i, j in combinations(range(len(plan)), 2):
        if plan.treatments[i] is not plan.treatments[j]:
            found.append(plan.with_layer(i, plan.treatments[j]).with_layer(j, plan.treatments[i]))
    return sorted(found, key=lambda other: predicted_drop(other, costs))


def measure(pool: Sequence[dict[str, Any]], setting: Setting, spec: HealingSpec, args: argparse.Namespace) -> Measured:
    """Heals the pool in every way and returns what was measured."""
    plans = [entry["plan"] for entry in pool]
    runs: dict[Fidelity, list[Run]] = {
        BEFORE: [Run("before", plan) for plan in plans],
        FULL: [Run("full", plan, spec, marks=PREFIXES) for plan in plans],
    }
    for share in RESTARTS:
        small = replace(spec, tokens=round(spec.tokens * share))
        runs["restart", share] = [Run(f"restart {share:.3g}", plan, small) for plan in plans]
    base = Run("base", Plan.uniform(Treatment.SOFTMAX, len(plans[0])))
    every = [base, *(run for group in runs.values() for run in group)]
    found = dict(zip(every, perform_all(every, setting, args.work, args.processes), strict=True))
    metric = f"nll {Path(setting.val[0]).stem}"

    def nll(group: Sequence[Run], share: float = 1.0) -> np.ndarray:
        return np.array([next(j[metric] for j in found[run]["judged"] if j["share"] == share) for run in group])

    scores = {fidelity: nll(group) for fidelity, group in runs.items()}
    scores |= {("prefix", share): nll(runs[FULL], share) for share in PREFIXES}
    config = load_model(setting.model).config
    speedup = [about(plan, config, setting.sequence_tokens)["predicted_speedup"] for plan in plans]
    return Measured(np.array(speedup), np.array([entry["level"] for entry in pool]), scores, nll([base])[0])


def label(fidelity: Fidelity) -> str:
    way, share = fidelity
    return f"{way}_{share:.3g}" if way in ("restart", "prefix") else way


def pool_rows(pool: Sequence[dict[str, Any]], measured: Measured) -> list[dict[str, Any]]:
    """Returns one row for each plan, with its quality on all sequences by each fidelity."""
    everything = np.arange(len(measured.base))
    quality = {fidelity: measured.quality(fidelity, everything) for fidelity in measured.nll}
    on_front = front(list(zip(quality[FULL].tolist(), measured.speedup.tolist(), strict=True)))
    rows = []
    for i, entry in enumerate(pool):
        plan = entry["plan"]
        row = {"origin": entry["origin"], "plan": str(plan), "window": plan.window}
        row |= {f"n_{t.value}": plan.count(t) for t in (Treatment.SOFTMAX, Treatment.LINEAR_WINDOW, Treatment.NONE)}
        row |= {"predicted_speedup": measured.speedup[i]}
        row |= {f"quality_{label(fidelity)}": values[i] for fidelity, values in quality.items()}
        rows.append({**row, "on_front": on_front[i]})
    return rows


def draw(measured: Measured, ranks: Sequence[dict[str, Any]], schedule: Schedule, file: Path) -> None:
    """Draws rank correlations over the share of the tokens, and the pool's front with what a schedule finds of it."""
    colours = {"restart": "#1f6f8b", "prefix": "#c8553d"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        before = next(row for row in ranks if row["way"] == "before")
        for name, style in (("spearman", "-"), ("spearman_within_levels", "--")):
            where = "all plans" if name == "spearman" else "plans of one speed"
            for way, colour in colours.items():
                rows = [before, *(row for row in ranks if row["way"] == way)]
                left.errorbar(
                    [100 * row["share"] for row in rows],
                    [row[name] for row in rows],
                    [row[f"{name}_stderr"] for row in rows],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=f"{way}, {where}",
                )
        left.set(xlabel="tokens of a rung, % of the budget (0: before healing)", ylim=(None, 1.02))
        left.set_ylabel("rank correlation with quality after healing")
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        choosing, judging = next(resampled(len(measured.base), 0))
        quality, kept = 100 * measured.quality(FULL, judging), survivors(schedule, measured, choosing, CORNERS[0])
        on_front = front(list(zip(quality.tolist(), measured.speedup.tolist(), strict=True)))
        order = sorted(np.flatnonzero(on_front), key=lambda i: measured.speedup[i])
        right.plot(
            measured.speedup, 100 * measured.quality(BEFORE, judging), "x", color="#999999", label="before healing"
        )
        right.plot(measured.speedup, quality, "o", color="#bbbbbb", markersize=5, label="healed on the whole budget")
        right.step(measured.speedup[order], quality[order], where="pre", color="#222222", label="front of the pool")
        right.plot(
            measured.speedup[kept],
            quality[kept],
            "D",
            color=colours["restart"],
            markersize=7,
            label=f"{schedule.way} {schedule} ({100 * schedule.tokens / len(quality):.0f} % of the tokens)",
        )
        right.set(xlabel="predicted speed-up", ylabel="likelihood retained, %")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for axes in (left, right):
            axes.grid(True)
        figure.savefig(file, dpi=150)


def write(rows: Sequence[dict[str, Any]], file: Path) -> None:
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {name: round(float(v), 5) if isinstance(v, float) else v for name, v in row.items()}
            writer.writerow(rounded)
            print(json.dumps(rounded, default=str))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--name", required=True, help="of the model, in the files that are written")
    parser.add_argument("--val-sequences", type=int, default=64)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--batch-sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, help="default: what HealingSpec takes for the model")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--plans-per-level", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    setting = Setting(
        args.model,
        ((args.train, 1.0),),
        (args.val,),
        (),
        args.val_sequences,
        args.dtype,
        args.threads,
        args.sequence_tokens,
    )
    spec = HealingSpec(
        tokens=args.tokens,
        sequence_tokens=args.sequence_tokens,
        batch_sequences=args.batch_sequences,
        rank=args.rank,
        learning_rate=args.learning_rate,
    )
    pool = pool_of_plans(setting, args.window, args.plans_per_level, args.work)
    measured = measure(pool, setting, spec, args)
    draws = list(resampled(args.val_sequences, args.resamples))
    ranks = [
        {"way": fidelity[0], "share": fidelity[1], **with_errors([predictive(fidelity, measured, *d) for d in draws])}
        for fidelity in sorted(measured.nll, key=lambda fidelity: (fidelity[0] == "full", *fidelity))
    ]
    found = []
    for corner, schedule in product(CORNERS, schedules(len(pool))):
        kept = survivors(schedule, measured, draws[0][0], corner)
        row: dict[str, Any] = {"corner": corner, "way": schedule.way, "schedule": str(schedule)}
        row |= {"tokens_share": schedule.tokens / len(pool)}
        row |= with_errors([judged(schedule, measured, corner, *d) for d in draws])
        found.append(row | {"plans": " ".join(str(pool[i]["plan"]) for i in kept)})
    for what, rows in (("pool", pool_rows(pool, measured)), ("ranks", ranks), ("schedules", found)):
        write(rows, args.results / f"multi_fidelity_{what}_{args.name}.csv")
    n = len(pool)
    shown = Schedule("restart", ((n, 1 / 12), (len(LEVELS), 1.0)))
    draw(measured, ranks, shown, args.pictures / f"multi_fidelity_{args.name}.png")


if __name__ == "__main__":
    main()
