"""Compares three ways in which a search judges its plans by the likelihood of a text.

    layerboost run RECIPE --out DIR --until search
    python benchmarks/racing.py DIR --orders 3 --work WORK --out NAME.csv

`everything` measures the divergence from the untouched model and the calibration beside the NLL, `likelihood` the NLL
alone, and `race` as `search.race` does: the NLL of the first sequences, and then of all for the plans that lead. All
propose plans as the run's search does, from its layers' costs and its predicted speeds. Each order draws the sequences
anew, so that the race begins with other ones.

`hypervolume` is that of (exp(-NLL drop), predicted speed-up) over the corner (0, 1), of all plans of a search. For the
comparison those of a race are judged on the whole text too; that is not counted in its seconds, which count all other
passes, one plan at a time while plans are proposed and eight at a time at the end. Those of `everything` are measured
on some plans, in turn with those of `likelihood`, and scaled. `wrong` counts plans that are beaten by a plan which
loses more on the whole text, and `chosen_ratio` compares the hypervolumes of the plans that would be healed. What was
read is kept under --work: the same command continues an earlier one.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_csv import write_rows

from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.race import winners
from layerboost.plan import Plan, Treatment
from layerboost.search.loop import SearchState, fixed_points
from layerboost.search.pareto import hypervolume
from layerboost.search.proposers import make_proposer
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.results.sensitivity import cost_matrix
from orchestrator.run.context import RunContext
from orchestrator.run.entries import Trial
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import RunInputs
from orchestrator.run.progress import Progress
from orchestrator.run.state import RECIPE_FILE, load_state
from orchestrator.stages.candidates import most_promising
from orchestrator.stages.search import _rest_time
from orchestrator.stages.speed import layer_times, speedup

PLANS_AT_ONCE, PLANS_TIMED, SEQUENCES_TIMED = 8, 16, 4
REFERENCE = (0.0, 1.0)


class Reader:
    """Reads sequences under plans, and keeps their NLL and the seconds that it took in a file."""

    def __init__(self, evaluation: PlanEvaluation, file: Path):
        self._evaluation, self._file = evaluation, file
        lines = file.read_text().splitlines() if file.exists() else []
        self._known = {(row["plans"], tuple(row["sequences"])): row for row in map(json.loads, lines)}

    def nll(self, plans: Sequence[Plan], sequences: Sequence[int]) -> tuple[np.ndarray, float]:
        """Returns the NLL of each sequence under each plan, (n_plans, n_sequences), and the seconds."""
        key = " ".join(map(str, plans)), tuple(sequences)
        if key not in self._known:
            start = time.perf_counter()
            nll = self._evaluation.read_text(plans, torch.tensor(list(sequences))).nll.tolist()
            row = {"plans": key[0], "sequences": key[1], "nll": nll, "seconds": time.perf_counter() - start}
            self._known[key] = row
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return np.array(self._known[key]["nll"]), self._known[key]["seconds"]


class Searches:
    """Runs searches with the proposals and speeds of a finished run."""

    def __init__(self, run: RunContext, reader: Reader):
        self._run, self._reader = run, reader
        self._spec, self._n_layers = run.inputs.search_spec, run.inputs.n_layers
        self._base = Plan.uniform(Treatment.SOFTMAX, self._n_layers)

    def search(self, sequences: Sequence[int]) -> tuple[dict[Plan, np.ndarray], float]:
        """Returns the drop of each plan on each sequence, in the order of the search, and the seconds."""
        run, spec = self._run, self._spec
        costs, times = cost_matrix(run.folder, run.state), layer_times(run)
        seconds, nll = 0.0, {}

        def judge(plan: Plan, values: Any, base: Any) -> tuple[float, float]:
            return float(np.mean(nll[self._base] - nll[plan])), speedup(run, plan)

        state = SearchState(spec, make_proposer(spec, costs, times, _rest_time(run, times)), judge, {})
        while (plan := state.next_plan()) is not None:
            found, took_s = self._reader.nll([plan], sequences)
            nll[plan], seconds = found[0], seconds + took_s
            state.finish(plan, {"quality": 0.0})
        return {plan: values - nll[self._base] for plan, values in nll.items()}, seconds

    def race(self, first: Sequence[int], every: Sequence[int], confidence: float, leaders: int) -> dict[str, Any]:
        """Returns all plans with their drops on all sequences, what became of each of them, and the seconds."""
        drops, seconds = self.search(first)
        plans, fixed = list(drops), [plan for _, plan in fixed_points(self._spec, self._n_layers)]
        beaten_by = winners(
            [speedup(self._run, plan) for plan in plans],
            [{"text": drops[plan]} for plan in plans],
            [plan not in fixed for plan in plans],
            confidence=confidence,
        )
        beaten = {plan: plans[by] for plan, by in zip(plans, beaten_by, strict=True) if by is not None}
        leading = self.chosen({plan: drops[plan] for plan in plans if plan not in beaten}, leaders)
        in_full, rest = ([plan for plan in plans if (plan in {*leading, *fixed}) == is_in] for is_in in (True, False))
        nll, counted_s = self._groups(in_full, every)
        others, _ = self._groups(rest, every)
        whole = {plan: values - nll[self._base] for plan, values in (nll | others).items()}
        return {"whole": whole, "beaten": beaten, "in_full": in_full, "seconds": seconds + counted_s}

    def _groups(self, plans: Sequence[Plan], sequences: Sequence[int]) -> tuple[dict[Plan, np.ndarray], float]:
        """Returns the NLL of plans that are read together in groups, and the seconds."""
        nll, seconds, plans = {}, 0.0, sorted(plans, key=str)
        for start in range(0, len(plans), PLANS_AT_ONCE):
            group = plans[start : start + PLANS_AT_ONCE]
            found, took_s = self._reader.nll(group, sequences)
            nll |= dict(zip(group, found, strict=True))
            seconds += took_s
        return nll, seconds

    def chosen(self, drops: dict[Plan, np.ndarray], n: int) -> list[Plan]:
        """Returns the plans that a run would heal."""
        fixed = {plan for _, plan in fixed_points(self._spec, self._n_layers)}
        entries = [
            Trial(plan, "search", objective=-float(values.mean()), speedup=speedup(self._run, plan))
            for plan, values in drops.items()
            if plan not in fixed and speedup(self._run, plan) > 1
        ]
        return [entries[index].plan for index in most_promising(self._run, entries, n)]

    def points(self, drops: dict[Plan, np.ndarray]) -> list[tuple[float, float]]:
        return [(math.exp(-float(values.mean())), speedup(self._run, plan)) for plan, values in drops.items()]


def ratios(plans: Sequence[Plan], everything: PlanEvaluation, likelihood: PlanEvaluation) -> list[float]:
    """Returns how many times longer measuring everything takes for some plans, each timed in turn on some sequences."""
    found = []
    for plan in plans[:: max(1, len(plans) // PLANS_TIMED)]:
        seconds = []
        for evaluation in (likelihood, everything):
            start = time.perf_counter()
            evaluation.read_text([plan], torch.arange(SEQUENCES_TIMED))
            seconds.append(time.perf_counter() - start)
        found.append(seconds[1] / seconds[0])
    return found


def open_run(folder: RunFolder) -> RunContext:
    """Returns the context of a finished run, with its recipe as it was resolved."""
    recipe = load_recipe(Path(folder.place(RECIPE_FILE)), [])
    inputs = RunInputs(recipe, preflight(recipe, folder))
    return RunContext(inputs, folder, load_state(folder), Progress(io.StringIO()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the --out of a run that has searched")
    parser.add_argument("--orders", type=int, default=3)
    parser.add_argument("--first", type=float, default=0.25)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--leaders", type=int, default=4, help="plans judged in full for each one that is healed")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    run = open_run(RunFolder(args.folder))
    source, everything = run.inputs.source, run.inputs.text_spec
    model, tokenizer = source.load(), source.load_tokenizer()
    evaluation = PlanEvaluation(model, tokenizer, replace(everything, likelihood_only=True))
    assert evaluation.sequences is not None
    n_sequences = len(evaluation.sequences)
    searches = Searches(run, Reader(evaluation, args.work / "nll.jsonl"))
    full, full_s = searches.search(range(n_sequences))
    ratio = statistics.median(ratios(list(full), PlanEvaluation(model, tokenizer, everything), evaluation))
    whole = hypervolume(searches.points(full), REFERENCE)
    n_first = max(4, math.ceil(args.first * n_sequences))
    rows = []
    for order in range(args.orders):
        drawn = np.random.default_rng(order).permutation(n_sequences).tolist()
        n_healed = run.inputs.n_healed
        found = searches.race(drawn[:n_first], range(n_sequences), args.confidence, args.leaders * n_healed)
        area = hypervolume(searches.points(found["whole"]), REFERENCE)
        healed = searches.chosen({plan: found["whole"][plan] for plan in found["in_full"]}, n_healed)
        areas = [
            hypervolume(searches.points({plan: of_plans[plan] for plan in plans}), REFERENCE)
            for of_plans, plans in ((found["whole"], healed), (full, searches.chosen(full, n_healed)))
        ]
        rows.append(
            {
                "order": order,
                "sequences": n_sequences,
                "first_sequences": n_first,
                "confidence": args.confidence,
                "plans": len(found["whole"]),
                "in_full": len(found["in_full"]),
                "beaten": len(found["beaten"]),
                "wrong": sum(
                    found["whole"][plan].mean() < found["whole"][by].mean() for plan, by in found["beaten"].items()
                ),
                "hypervolume_full": round(whole, 5),
                "hypervolume_race": round(area, 5),
                "hypervolume_ratio": round(area / whole, 4),
                "chosen_ratio": round(areas[0] / areas[1], 4),
                "everything_s": round(ratio * full_s, 1),
                "likelihood_s": round(full_s, 1),
                "race_s": round(found["seconds"], 1),
                "likelihood_over_everything": round(1 / ratio, 3),
                "race_over_everything": round(found["seconds"] / (ratio * full_s), 3),
                "race_over_likelihood": round(found["seconds"] / full_s, 3),
            }
        )
        print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
