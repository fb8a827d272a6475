"""Measures how good a front of quality against speed each search method finds, over the number of plans it evaluates.

    python benchmarks/searchers.py --model DIR --text TRAIN.txt --val VAL.txt --work DIR --out NAME.csv --picture P.png

Every method gets single layers' NLL drops over 32 sequences of the text, drawn again for each seed, and judges plans by
the NLL over other sequences of it. The plans that it considers its front are judged again on sequences of the
validation text. Hypervolume is that of (exp(-NLL drop), predicted speed-up) over the corner (0, 1). NAME.csv has a row
for each method, seed and number of evaluations, NAME_summary.csv one for each method. Losses are kept under --work: the
same command continues an earlier one.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
import optuna
import torch
import transformers

from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import convert
from layerboost.evaluation.likelihood import score_sequences, score_text
from layerboost.plan import Plan, Treatment, plan_from_thresholds
from layerboost.search.front_swaps import FrontSwaps
from layerboost.search.knapsack import knapsack_front, spread_order
from layerboost.search.pareto import front, hypervolume
from layerboost.search.plan_space import PlanSpace
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.speed.byte_model import decode_bytes, predicted_speedup
from layerboost.sweep.layer_sweep import LayerSweep
from layerboost.text.documents import pack, read_documents

CONDITION = {"concurrency": 32, "context_tokens": 512, "dtype_bytes": 2}
TREATMENTS = (Treatment.SOFTMAX, Treatment.LINEAR_WINDOW, Treatment.NONE)
SEQUENCE_TOKENS, COST_SEQUENCES = 256, 32
REFERENCE = (0.0, 1.0)
LAG = 8  # plans that are evaluated at the same time, as in a run
MARKS = (25, 50, 100)
COUNTS = (*range(5, 30, 5), *range(30, 1001, 10))  # numbers of evaluations at which curves have points
MOST_DRAWS = 8  # draws for each distinct plan that is asked for; the thresholds have few distinct plans

Point = tuple[float, float]


class Proposer(Protocol):
    def ask(self) -> Plan | None: ...

    def tell(self, plan: Plan, point: Point | None) -> None: ...


class Losses:
    """Returns NLL drops of plans over some sequences, reading from a file those that are known."""

    def __init__(self, model, sequences: torch.Tensor, folder: Path, identity: Sequence[Any]):
        self._model, self._sequences = model, sequences
        self._file = folder / f"{sha256(json.dumps([*identity, sequences.tolist()]).encode()).hexdigest()[:16]}.jsonl"
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._nll = {(row["plan"], row["window"]): row["nll"] for row in map(json.loads, lines)}

    def drop(self, plan: Plan) -> float:
        return self._of(plan) - self._of(Plan.uniform(Treatment.SOFTMAX, len(plan)))

    def _of(self, plan: Plan) -> float:
        key = (str(plan), plan.window)
        if key not in self._nll:
            is_base = plan.count(Treatment.SOFTMAX) == len(plan)
            model = self._model if is_base else convert(self._model, plan).eval()
            self._nll[key] = float(np.mean(score_sequences(model, self._sequences, batch_size=32).nll))
            with self._file.open("a") as file:
                file.write(json.dumps({**plan.to_dict(), "nll": self._nll[key]}) + "\n")
        return self._nll[key]


class Listed:
    """Proposes plans in a given order."""

    def __init__(self, plans: Sequence[Plan]):
        self._plans = deque(plans)

    def ask(self) -> Plan | None:
        return self._plans.popleft() if self._plans else None

    def tell(self, plan: Plan, point: Point | None) -> None:
        """Changes nothing."""


class Swaps:
    def __init__(self, search: FrontSwaps):
        self._search = search

    def ask(self) -> Plan | None:
        return self._search.next_plan()

    def tell(self, plan: Plan, point: Point | None) -> None:
        if point is not None:
            self._search.observe(plan, -float(np.log(point[0])))


class Sampled:
    """Proposes plans by an Optuna sampler over numbers or categories, which `read` turns into a plan."""

    def __init__(self, sampler, names: dict[str, optuna.distributions.BaseDistribution], read: Callable[[dict], Plan]):
        self.study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
        self._names, self._read = names, read
        self._out: deque[tuple[Plan, optuna.trial.Trial]] = deque()

    def ask(self) -> Plan | None:
        trial = self.study.ask(self._names)
        self._out.append((self._read(trial.params), trial))
        return self._out[-1][0]

    def tell(self, plan: Plan, point: Point | None) -> None:
        found, trial = next(item for item in self._out if item[0] == plan)
        self._out.remove((found, trial))
        failed = optuna.trial.TrialState.FAIL if point is None else None
        self.study.tell(trial, point, state=failed)


def thresholds(drops: Sequence[float], window: int, sampler) -> Sampled:
    """Samples two thresholds as places in the ranking of layers; the second is relative to the first."""
    ordered = sorted(drops)
    cuts = [-np.inf, *((low + high) / 2 for low, high in pairwise(ordered)), np.inf]

    def read(drawn: dict[str, float]) -> Plan:
        n = len(drops)
        removed = round(drawn["removed"] * n)
        softened = removed + round(drawn["middle"] * (n - removed))
        return plan_from_thresholds(drops, cuts[removed], cuts[softened], Treatment.LINEAR_WINDOW, window)

    unit = optuna.distributions.FloatDistribution(0.0, 1.0)
    return Sampled(sampler, {"removed": unit, "middle": unit}, read)


def evolution(space: PlanSpace, seeds: Sequence[Plan], sampler) -> Sampled:
    """Samples one category for each layer, starting from given plans."""
    choice = optuna.distributions.CategoricalDistribution([treatment.value for treatment in space.treatments])
    names = {f"layer_{layer}": choice for layer in range(space.n_layers)}
    found = Sampled(sampler, names, lambda drawn: space.plan([Treatment(drawn[name]) for name in names]))
    for plan in seeds:
        found.study.enqueue_trial({name: t.value for name, t in zip(names, plan.treatments, strict=True)})
    return found


def random_plans(space: PlanSpace, n: int, seed: int) -> list[Plan]:
    """Draws treatments independently, with random proportions for each plan so that all speeds occur."""
    rng = np.random.default_rng(seed)
    draws = (rng.choice(len(space.treatments), space.n_layers, p=rng.dirichlet([1, 1, 1])) for _ in range(n))
    return [space.plan([space.treatments[code] for code in codes]) for codes in draws]


def search(proposer: Proposer, judge: Callable[[Plan], Point], n: int, distinct: bool) -> list[Plan]:
    """Returns the distinct plans in the order of evaluation; with `distinct`, repeated plans are told as failed."""
    evaluated: dict[Plan, None] = {}
    out: deque[tuple[Plan, bool]] = deque()
    for _ in range(MOST_DRAWS * n):
        plan = proposer.ask() if len(evaluated) < n else None
        if plan is not None:
            out.append((plan, distinct and plan in evaluated))
            evaluated.setdefault(plan)
        if not out:
            break
        if plan is None or len(out) >= LAG:
            told, is_useless = out.popleft()
            proposer.tell(told, None if is_useless else judge(told))
    return list(evaluated)


def costs_of(model, sequences: torch.Tensor, window: int, file: Path) -> dict[Treatment, list[float]]:
    """Returns the NLL drop of each layer treated alone, from the file if it exists."""
    if not file.exists():
        n_layers = model.config.num_hidden_layers
        single = [single_layer_plan(n_layers, i, t, window) for t in TREATMENTS[1:] for i in range(n_layers)]
        plans = [Plan.uniform(Treatment.SOFTMAX, n_layers), *single]
        nll = score_text(LayerSweep(model, plans), sequences, base=0).nll.mean(dim=1)
        drops = (nll[1:] - nll[0]).view(len(TREATMENTS) - 1, n_layers)
        file.write_text(json.dumps(dict(zip(TREATMENTS[1:], drops.tolist(), strict=True))))
    return {Treatment(name): drops for name, drops in json.loads(file.read_text()).items()}


def proposers(
    space: PlanSpace, costs: dict, times: dict, rest: float, n: int, seed: int
) -> dict[str, tuple[Proposer, bool]]:
    """Returns the methods, and for each whether repeated plans must be told to it as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def best_alone(n_plans: int) -> list[Plan]:
        plans = knapsack_front(space, costs, times, n_plans)
        return [plans[index] for index in spread_order(len(plans))]

    population = n // 4
    nsga2, tpe = optuna.samplers.NSGAIISampler, optuna.samplers.TPESampler
    by_generations = nsga2(seed=seed, population_size=population)
    drops, window = costs[Treatment.NONE], space.window
    assert window is not None
    return {
        "random": (Listed(random_plans(space, n, seed)), False),
        "thresholds, TPE": (thresholds(drops, window, tpe(seed=seed)), False),
        "thresholds, NSGA-II": (thresholds(drops, window, nsga2(seed=seed, population_size=n // 5)), False),
        "knapsack": (Listed(best_alone(n)), False),
        "plans, NSGA-II": (evolution(space, best_alone(population + LAG), by_generations), True),
        "front swaps": (Swaps(FrontSwaps(space, costs, times, rest_time=rest)), False),
    }


def fronts(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the curves and of the summary; both are written after each seed."""
    model, tokenizer = load_model(args.model).eval(), load_tokenizer(args.model)
    n_layers = model.config.num_hidden_layers
    pool = pack(read_documents(args.text), tokenizer, SEQUENCE_TOKENS, limit_sequences=1024)
    val = pack(read_documents(args.val), tokenizer, SEQUENCE_TOKENS, limit_sequences=args.val_sequences)
    identity = [args.model, str(model.dtype)]
    held_out = Losses(model, val, args.work, identity)
    space = PlanSpace(n_layers, TREATMENTS, args.window)
    rest = float(decode_bytes(model.config, None, **CONDITION))
    times = {
        t: [
            decode_bytes(model.config, single_layer_plan(n_layers, layer, t, args.window), **CONDITION) - rest
            for layer in range(n_layers)
        ]
        for t in TREATMENTS
    }
    curves: list[dict[str, Any]] = []
    kept: dict[tuple[str, int], list[Point]] = {}
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).permutation(len(pool))
        selection, own = pool[order[:COST_SEQUENCES]], pool[order[COST_SEQUENCES:][: args.sequences]]
        key = sha256(json.dumps([*identity, args.window, selection.tolist()]).encode()).hexdigest()[:16]
        costs = costs_of(model, selection, args.window, args.work / f"costs-{key}.json")
        losses = Losses(model, own, args.work, identity)

        def point(plan: Plan, of: Losses) -> Point:
            return float(np.exp(-of.drop(plan))), predicted_speedup(model.config, plan, **CONDITION)

        for method, (proposer, distinct) in proposers(space, costs, times, rest, args.evaluations, seed).items():
            plans = search(proposer, lambda plan, of=losses: point(plan, of), args.evaluations, distinct)
            points = [point(plan, losses) for plan in plans]
            for n in (count for count in COUNTS if count <= args.evaluations):
                on_front = [plan for plan, keep in zip(plans[:n], front(points[:n])) if keep]
                kept[method, seed] = [point(plan, held_out) for plan in on_front]
                curves.append(
                    {
                        "method": method,
                        "seed": seed,
                        "n_evaluations": n,
                        "n_distinct": len(plans[:n]),
                        "hypervolume_search": hypervolume(points[:n], REFERENCE),
                        "hypervolume_held_out": hypervolume(kept[method, seed], REFERENCE),
                    }
                )
            last = curves[-1]
            print(
                f"seed {seed}, {method}: {last['hypervolume_search']:.3f} by the search's own sequences, "
                f"{last['hypervolume_held_out']:.3f} held out",
                file=sys.stderr,
                flush=True,
            )
        summary = summarize(curves, kept)
        write(args.out, curves)
        write(args.out.with_name(f"{args.out.stem}_summary.csv"), summary)
        draw(curves, summary, args)
    return curves, summary


def summarize(curves: list[dict[str, Any]], kept: dict[tuple[str, int], list[Point]]) -> list[dict[str, Any]]:
    """Returns a row for each method: means over the seeds, and how far it ends below the best points of all methods.

    The best front is that of all kept points on the held-out sequences. A gap is the quality of one of its plans minus
    the best quality that a method's final front has at that speed or above.
    """
    everything = sorted({point for points in kept.values() for point in points})
    best = [point for point, keep in zip(everything, front(everything)) if keep]
    rows = []
    for method in dict.fromkeys(row["method"] for row in curves):
        seeds = [seed for name, seed in kept if name == method]
        row: dict[str, Any] = {"method": method, "seeds": len(seeds)}
        for mark in MARKS:
            found = [c for c in curves if c["method"] == method and c["n_evaluations"] == mark]
            for name in ("hypervolume_held_out", "hypervolume_search"):
                values = [c[name] for c in found]
                row[f"{name}_at_{mark}"] = np.mean(values) if values else None
                row[f"{name}_at_{mark}_stderr"] = (
                    np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
                )
            row[f"n_distinct_at_{mark}"] = np.mean([c["n_distinct"] for c in found]) if found else None
        last = [c["hypervolume_held_out"] for c in curves if c["method"] == method]
        last = last[len(last) // len(seeds) - 1 :: len(last) // len(seeds)]
        row["share_of_best"] = np.mean(last) / hypervolume(best, REFERENCE)
        gaps = [
            [quality - max((q for q, s in kept[method, seed] if s >= speed), default=0.0) for quality, speed in best]
            for seed in seeds
        ]
        row["gap_max"] = np.mean([max(of_seed) for of_seed in gaps])
        row["gap_median"] = np.mean([np.median(of_seed) for of_seed in gaps])
        rows.append(row)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw(curves: list[dict[str, Any]], summary: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Draws the mean hypervolume on the held-out sequences, with a band of one standard error."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for row in summary:
        found = [c for c in curves if c["method"] == row["method"]]
        counts = sorted({c["n_evaluations"] for c in found})
        values = np.array([[c["hypervolume_held_out"] for c in found if c["n_evaluations"] == n] for n in counts])
        mean, stderr = (
            values.mean(axis=1),
            values.std(axis=1, ddof=min(1, values.shape[1] - 1)) / values.shape[1] ** 0.5,
        )
        (line,) = axes.plot(counts, mean, label=row["method"])
        axes.fill_between(counts, mean - stderr, mean + stderr, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set_xlabel("plans evaluated")
    axes.set_ylabel("hypervolume on held-out sequences")
    axes.set_title(
        f"{Path(args.model).name if args.title is None else args.title}, mean and s.e. of {row['seeds']} draws"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.picture, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="text that costs and searches take their sequences from")
    parser.add_argument("--val", required=True, help="text that fronts are judged on again")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=100, help="distinct plans that each method may evaluate")
    parser.add_argument("--sequences", type=int, default=8, help="sequences (256 tokens) per evaluation of a search")
    parser.add_argument("--val-sequences", type=int, default=12)
    parser.add_argument("--work", type=Path, required=True, help="folder of the losses")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write; the summary goes beside it")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--title", help="name of the model in the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    _, summary = fronts(args)
    for row in summary:
        print(" ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
