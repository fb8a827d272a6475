"""Measures how reporting on a run, and resuming it, scale with the number of records.

    python benchmarks/report_scaling.py --work DIR --out benchmarks/results/report_scaling.csv
    python benchmarks/report_scaling.py --work DIR --trials 45 --sweep-records 104 --python OTHER/bin/python --code old

The benchmark writes run folders of the default recipe whose sensitivity and search are finished. They hold every record
of such a run, under its real identity and with as many values as the default recipe's items give, drawn from a fixed
seed. The sweep may have more shares than items, because only the number of records matters here. Then, each in a
separate process, `layerboost run --until search` resumes the finished run (it computes nothing and ends with the
report), and `layerboost report` writes the report again. A row holds the processor time of the whole command, the part
of it for importing the project, and the memory that the command uses above what the process holds after the import.

`--python` measures the code of another environment, which may be an earlier version, on the same folders.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from results_csv import write_rows

from layerboost.evaluation.scores import MetricScore, QualitySpec, Scores, mean_score
from layerboost.plan import Plan, Treatment
from layerboost.speed.hardware import hardware_name
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.recipe.recipe import Recipe
from orchestrator.results.sensitivity import cost_matrix
from orchestrator.run.context import RunContext
from orchestrator.run.entries import StageEstimate
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import TEXT_SOURCE, RunInputs
from orchestrator.run.kinds import SENSITIVITY, SWEEP, TRIALS
from orchestrator.run.progress import Progress
from orchestrator.run.state import RECIPE_FILE, RunState
from orchestrator.run.versions import environment
from orchestrator.stages.sensitivity import Sweep
from tasks.evaluation import base_unit, cosine_unit

RECIPE = Path(__file__).parents[1] / "recipes" / "default.yaml"
ABOUT = {"duration_s": 0.5, "evaluation_s": 0.5, "worker": {"gpus": [], "node": "here", "node_id": "0" * 56, "pid": 1}}
CHOICES, PREDICTIONS_OF_A_GAP = 4, 3
RECORDS_AT_ONCE = 256


class SyntheticRun:
    """Writes the records of a run whose sensitivity and search are finished.

    Args:
        recipe: The recipe; `sensitivity.shares` and `search.trials` determine the number of records.
        folder: The folder to write to.
        seed: Seed of all drawn values.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, seed: int = 0):
        self._folder, self._draw = folder, np.random.default_rng(seed)
        facts = preflight(recipe, folder)
        self._inputs = RunInputs(recipe, facts)
        state = RunState(facts.path, facts.n_layers, recipe.sensitivity.score, environment())
        self._run = RunContext(self._inputs, folder, state, Progress(io.StringIO()))
        n_layers, treatments = facts.n_layers, [treatment.value for treatment in Treatment]
        self._losses = {name: np.abs(self._draw.normal(0, 0.05, n_layers)) for name in treatments}
        self._losses[Treatment.SOFTMAX.value][:] = 0.0

    def write(self) -> None:
        """Writes the records and `run.json`, which lists what `layerboost run` resumes from."""
        inputs, state = self._inputs, self._run.state
        softmax = Plan.uniform(Treatment.SOFTMAX, inputs.n_layers)
        self._write(
            "evaluate", iter([(inputs.scores(base_unit(), inputs.full_spec), self._scores(softmax, inputs.full_spec))])
        )
        self._write(SENSITIVITY, self._ablations())
        self._write(SWEEP, self._counts())
        self._write(SWEEP, self._shares())
        plans = self._searched()
        spec = inputs.search_quality_spec
        self._write("search", ((inputs.plan_scores(plan, spec), self._scores(plan, spec)) for plan in plans))
        state.sensitivity = list(Sweep(self._run, inputs.sweep_sources).entries())
        nothing = {"remove_below": None, "keep_above": None, "status": "ok", "error": None}
        trials = [{**plan.to_dict(), "origin": origin, **nothing} for plan, origin in plans.items()]
        self._run.record(TRIALS, inputs.search(cost_matrix(self._folder, state), []), {"trials": trials})
        # With estimates of an earlier call the next one skips its calibration.
        state.estimates = [StageEstimate("evaluate", 1, 0, 1.0, 0, 0.0, 1.0)]
        self._folder.write_text(RECIPE_FILE, inputs.recipe.resolved_yaml())
        self._run.save()

    def _write(self, stage: str, results: Iterator[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        batch: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for result in results:
            batch.append(result)
            if len(batch) == RECORDS_AT_ONCE:
                self._folder.write_records(stage, batch)
                batch = []
        self._folder.write_records(stage, batch)

    def _searched(self) -> dict[Plan, str]:
        """Returns the uniform plans and as many other plans as the recipe tries, each with its origin."""
        space, n_layers = self._inputs.plan_space, self._inputs.n_layers
        fixed = {treatment: Plan.uniform(treatment, n_layers, space.window) for treatment in Treatment}
        found = {plan: "base" if name is Treatment.SOFTMAX else f"all_{name.value}" for name, plan in fixed.items()}
        n_plans = len(found) + self._inputs.search_spec.trials
        while len(found) < n_plans:
            drawn = self._draw.choice(np.array([t.value for t in space.treatments]), n_layers)
            found.setdefault(Plan(tuple(Treatment(str(name)) for name in drawn), space.window), "search")
        return found

    def _ablations(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        inputs = self._inputs
        for source in inputs.sweep_sources:
            for plans in inputs.sweep_plans.values():
                for plan in plans:
                    yield inputs.plan_scores(plan, source.spec), self._scores(plan, source.spec)
            if source.name == TEXT_SOURCE:
                cosine = self._draw.uniform(0, 0.2, (inputs.n_layers, source.spec.n_sequences or 1))
                yield inputs.scores(cosine_unit(), source.spec), {"cosine": cosine.tolist(), **ABOUT}

    def _counts(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yields counts of as many items as the recipe has shares, so that each share holds one item."""
        n_shares = self._inputs.recipe.sensitivity.shares
        assert isinstance(n_shares, int)
        for source in self._inputs.sweep_sources:
            tasks = source.spec.tasks or (TEXT_SOURCE,)
            counts = {Path(task).stem: n_shares // len(tasks) for task in tasks}
            counts[Path(tasks[0]).stem] += n_shares % len(tasks)
            count = {"costs": [256] * n_shares, "tasks": counts, "generating": []}
            yield self._inputs.count(source.spec), {**count, **ABOUT}

    def _shares(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        sweep = Sweep(self._run, self._inputs.sweep_sources)
        for source in self._inputs.sweep_sources:
            for share in sweep._shares(source):
                for plans in self._inputs.sweep_plans.values():
                    yield (
                        self._inputs.sweep(source.spec, share, plans),
                        {**self._answers(source.spec, len(plans)), **ABOUT},
                    )

    def _answers(self, spec: QualitySpec, n_plans: int) -> dict[str, Any]:
        """Draws plans' answers for a share, with about as many requests or sequences as in the default recipe."""
        if not spec.tasks:
            nll, kl = self._draw.normal(2.0, 0.3, (n_plans, 2)), self._draw.uniform(0, 0.1, (n_plans, 2))
            return {"nll": nll.tolist(), "kl": kl.tolist()}
        n_requests = 10 * CHOICES
        log_p = self._draw.normal(-6.0, 2.0, (n_plans, n_requests))
        return {"log_p": log_p.tolist(), "greedy": (log_p > -5.0).tolist()}

    def _scores(self, plan: Plan, spec: QualitySpec) -> dict[str, Any]:
        """Draws the scores of a plan that loses the sum of its layers' losses, with independent noise for each item."""
        loss = sum(self._losses[treatment.value][layer] for layer, treatment in enumerate(plan.treatments))
        found: list[MetricScore] = []
        for task in spec.tasks:
            name, n_items = Path(task).stem, spec.limit or 1
            margins = self._draw.normal(2.0 - loss, 2.0, n_items)
            found.append(mean_score(name, "acc", (margins > 0).astype(float).tolist(), True, primary=True))
            found += [mean_score(name, "margin", margins.tolist(), True), self._calibration(name, n_items)]
        if spec.text is not None:
            n_items = spec.n_sequences or 1
            nll, kl = self._draw.normal(1.2 + loss, 0.2, n_items), np.abs(self._draw.normal(loss, 0.01, n_items))
            found.append(mean_score(TEXT_SOURCE, "nll", nll.tolist(), False, primary=not spec.tasks))
            found.append(mean_score(TEXT_SOURCE, "kl", (kl if loss else 0.0 * kl).tolist(), False))
            if spec.tasks:
                found.append(self._calibration(TEXT_SOURCE, n_items))
        return {"scores": Scores(found).to_dict(), **ABOUT}

    def _calibration(self, task: str, n_items: int) -> MetricScore:
        values = self._draw.normal(0, 0.2, (n_items, PREDICTIONS_OF_A_GAP))
        gaps = [[[float(place), value] for place, value in enumerate(row)] for row in values.tolist()]
        return MetricScore(
            task, "ece", float(np.abs(values.mean(axis=0)).sum()), 0.01, False, n_items=n_items, gaps=gaps
        )


MEASURED = """
import json, resource, sys
import psutil
import orchestrator.pipeline
from orchestrator.cli import main
def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
measured = {"import_cpu_s": cpu_s(), "start_mib": psutil.Process().memory_info().rss / 2**20}
code = main(sys.argv[2:])
measured["cpu_s"] = cpu_s()
measured["above_start_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - measured["start_mib"]
with open(sys.argv[1], "w") as file:
    json.dump(measured, file)
sys.exit(code)
"""
"""Program that runs a command of the project and measures it. Earlier versions also have the two modules it imports."""


def measured(python: str, command: Sequence[str]) -> dict[str, float]:
    """Measures a command of the project in a process of its own.

    Returns:
        `cpu_s` of the whole process, `import_cpu_s` of its imports, `wall_s`, `start_mib` after the imports, and
        `above_start_mib` at the peak.
    """
    with tempfile.TemporaryDirectory() as work:
        found, start = Path(work, "measured.json"), time.perf_counter()
        # The command runs in another folder, or this checkout would shadow the code of the other environment.
        subprocess.run(
            [python, "-c", MEASURED, str(found), *command],
            check=True,
            cwd=work,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        wall_s = time.perf_counter() - start
        took = json.loads(found.read_text())
    return {name: took[name] for name in ("cpu_s", "import_cpu_s", "start_mib", "above_start_mib")} | {"wall_s": wall_s}


def write_recipe(path: Path, n_trials: int, n_sweep_records: int) -> list[str]:
    """Writes the default recipe with resolved paths, and returns the settings for these numbers of records."""
    path.write_text(yaml.safe_dump(load_recipe(RECIPE).model_dump(mode="json"), sort_keys=False))
    recipe = load_recipe(path)
    n_fixed = len(Treatment)
    of_share = 2 * (1 + len(recipe.sensitivity.treatments))  # per source: the treatments and the base
    n_shares, rest = divmod(n_sweep_records - 2, of_share)
    if rest or n_trials <= n_fixed:
        raise SystemExit(
            f"--trials {n_trials} --sweep-records {n_sweep_records}: give more than {n_fixed} trials, and 2 records "
            f"more than a multiple of {of_share}"
        )
    return [f"search.trials={n_trials - n_fixed}", f"sensitivity.shares={n_shares}", "search.speed=bytes"]


def sizes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each size and command."""
    for n_trials, n_sweep_records in zip(args.trials, args.sweep_records, strict=True):
        work = args.work / f"{n_trials}"
        work.mkdir(parents=True, exist_ok=True)
        folder, recipe = work / "run", work / "recipe.yaml"
        settings = write_recipe(recipe, n_trials, n_sweep_records)
        shutil.rmtree(folder, ignore_errors=True)
        SyntheticRun(load_recipe(recipe, settings), RunFolder(folder)).write()
        overrides = [part for setting in settings for part in ("--set", setting)]
        resume = ["run", str(recipe), "--out", str(folder), "--until", "search", *overrides]
        n_bytes = sum(file.stat().st_size for file in (folder / "records").rglob("*.json"))
        for name, command in (("resume", resume), ("report", ["report", str(folder)])):
            yield {
                "code": args.code,
                "command": name,
                "trials": n_trials,
                "sweep_records": n_sweep_records,
                "records_mib": n_bytes / 2**20,
                **measured(args.python, command),
                "hardware": hardware_name("cpu"),
            }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the run folders")
    parser.add_argument("--trials", type=int, nargs="+", default=[45, 414, 4104], help="points of each run's search")
    parser.add_argument("--sweep-records", type=int, nargs="+", default=[104, 1022, 10202], help="per run")
    parser.add_argument("--python", default=sys.executable, help="python whose code is measured")
    parser.add_argument("--code", default="this checkout", help="name of that code in the rows")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    rows = []
    for row in sizes(args):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        rows.append(row)
    if args.out is not None:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
