"""Tests that stages list, run and count the same units before, during and after a run.

The stages run completely, with a cluster that returns every result immediately.
"""

from __future__ import annotations

import io
import sys

import pytest

import orchestrator.costs.measure as calibration
from layerboost.evaluation.evaluate import text_scores
from layerboost.healing.training import CurveRow
from layerboost.plan import Plan
from orchestrator import pipeline
from orchestrator.checks.preflight import preflight
from orchestrator.costs.ahead import units_ahead
from orchestrator.costs.estimate import StageEstimate, estimate_stages
from orchestrator.recipe.load import load_recipe
from orchestrator.results.cost import cost_table
from orchestrator.results.estimates import estimate_rows
from orchestrator.results.reading import RecordReader
from orchestrator.run.context import RunContext
from orchestrator.run.disk import needed_mib
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import KINDS, SCORES
from orchestrator.run.live_files import watching
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState, load_state
from orchestrator.stages import evaluate, heal, measure, search, sensitivity
from tasks.cluster.resources import NodeResources, WorkerResources
from tasks.healing.run import HealingResult
from tasks.pool.finished import Finished, WorkerInfo
from tasks.sweep import CountUnit, SweepUnit
from tests.orchestrator.costs.test_estimate import COSTS
from tests.orchestrator.stages.test_speed_stage import FakeMachine

HERE = WorkerInfo("here", "node", 1)
SETTINGS = (
    *("quality.tasks=[]", "healing.baselines=[last]", "healing.curve=[0.5]", "sensitivity.shares=2"),
    *("sensitivity.treatments=[none, linear_window]", "search.trials=4"),
)
HALVING = "healing.halving={plans: 3, first: 0.25, rungs: 1}"
LOSS = {"softmax": 0.0, "none": 0.4, "linear_window": 0.1, "window": 0.2}


def loss(plan: Plan | None) -> float:
    return 1.0 + sum(LOSS[t.value] * (1 + n) for n, t in enumerate(plan.treatments if plan else ()))


def scores(plan: Plan | None) -> dict:
    return text_scores([loss(plan) + 0.01 * n for n in range(4)], [0.1] * 4, primary=True).to_dict()


class Cluster:
    """Returns every result immediately, and starts nothing."""

    def __init__(self, monkeypatch):
        self.machine = FakeMachine(monkeypatch)
        node = NodeResources("here", "localhost", 1.0, 0.0)
        monkeypatch.setattr(calibration, "find_nodes", lambda address: (node,))
        monkeypatch.setattr(RunContext, "connect", lambda run: None)
        for name in ("workers", "healing_workers"):
            monkeypatch.setattr(RunContext, name, lambda run, n_jobs=1: WorkerResources(1, 1.0, 0.0))
        for module, name in (
            ("run.context", "evaluate_units"),
            ("stages.sensitivity", "sweep_units"),
            ("stages.search", "run_search"),
            ("stages.heal", "heal_on_cluster"),
        ):
            monkeypatch.setattr(sys.modules[f"orchestrator.{module}"], name, getattr(self, name))
        monkeypatch.setattr("tasks.healing.rungs.heal_all", self.heal_all)
        monkeypatch.setattr("tasks.cluster.connection.resources", lambda: (node,))

    def evaluate_units(self, todo, source, spec, workers, *, on_result, **_):
        for unit in todo:
            result = {"cosine": [[0.1]] * 3} if unit.kind == "cosine" else {"scores": scores(unit.plan)}
            on_result(Finished(unit, result, 2.0, HERE))
        return []

    def sweep_units(self, todo, source, spec, workers, *, on_result, more_units, on_results_end, **_):
        while todo:
            for unit in todo:
                on_result(Finished(unit, self._swept(unit), 3.0, HERE))
            on_results_end()
            todo = more_units()
        return []

    def _swept(self, unit):
        if isinstance(unit, CountUnit):
            return {"costs": [32] * 4, "tasks": {"text": 4}, "generating": []}
        if isinstance(unit, SweepUnit):
            items = range(unit.share.start, unit.share.stop)
            return {"nll": [[loss(p) + 0.01 * n for n in items] for p in unit.plans], "kl": [[0.1] * len(items)] * 7}
        return {"cosine": [[0.1, 0.2]] * 3}

    def run_search(self, state, make_evaluator, resources, *, on_plan, **_):
        while (plan := state.next_plan()) is not None:
            values = {"quality": 0.5, "quality_stderr": 0.0, "scores": scores(plan), "evaluation_s": 1.0}
            state.finish(plan, values)
            on_plan(Finished(plan, values, 2.0, HERE))
        return state.results()

    def heal_on_cluster(self, job, *, on_progress):
        rows = tuple(CurveRow("heal", n, n * job.spec.tokens_per_step, 1.0) for n in range(1, job.spec.steps + 1))
        steps = [job.spec.steps // 2] if job.output is not None else [job.spec.steps]
        for step in steps:
            RunFolder(job.snapshots.url).write_text(f"{step}.safetensors", "trained")
        written = {step: f"{job.snapshots.url}/{step}.safetensors" for step in steps}
        return HealingResult("there", rows[-1].tokens, rows, 0.5, 1.0, snapshots=written)

    def heal_all(self, jobs, *, on_result, **_):
        for job in jobs:
            on_result(Finished(job, self.heal_on_cluster(job, on_progress=None), 4.0, HERE))
        return []


@pytest.fixture
def cluster(monkeypatch) -> Cluster:
    return Cluster(monkeypatch)


def context(inputs, *overrides: str) -> RunContext:
    recipe = load_recipe(inputs.recipe, [*SETTINGS, *overrides])
    folder = RunFolder(inputs.folder.parent / "out")
    state = RunState("m", 3, recipe.sensitivity.score, {})
    return RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, state, Progress(io.StringIO()))


def finished(inputs, *overrides: str) -> tuple[RunContext, dict[str, tuple[int, int]]]:
    """Runs all stages; returns the run, and each stage's numbers of units and finished units from progress."""
    run = context(inputs, *overrides)
    ended: list[dict] = []
    run.progress.listeners.append(lambda event: ended.append(event) if event["what"] == "end" else None)
    with run.folder.lock(), watching(run.folder, run.progress):
        run.state.estimates = estimate_stages(run, COSTS)
        for stage in (evaluate.evaluate, sensitivity.sensitivity, search.search, heal.heal, measure.measure):
            assert stage(run)
        run.save()
    assert run.state.failures == []
    return run, {event["stage"]: (event["units"], event["finished"]) for event in ended}


def estimates(run: RunContext) -> dict[str, StageEstimate]:
    return {stage.stage: stage for stage in estimate_stages(run, COSTS)}


def test_what_stages_do_is_what_is_listed_and_counted(inputs, cluster):
    before = units_ahead(context(inputs))
    run, ended = finished(inputs)
    after = units_ahead(context(inputs))
    assert list(before) == list(after) == list(ended)
    for stage, listing in after.items():
        assert ended[stage] == (listing.n_expected, listing.n_expected), stage
        assert listing.is_complete and listing.n_recorded == len(listing.units), stage
        assert run.state.units[stage] == listing.keys(), stage
    assert {stage: listing.n_open for stage, listing in before.items() if listing.n_open} == {
        "sensitivity": 2,
        "search": 3,
        "heal": 2,
        "curve": 3,
        "measure": 3,
        "throughput": 2,
    }
    assert [before[stage].n_expected for stage in ("evaluate", "speed")] == [1, len(after["speed"].units)]
    table = cost_table(RecordReader(run.folder), load_state(run.folder)).set_index("stage")["units"].to_dict()
    timings = ("speed", "throughput")
    counted = {stage: len(listing.units) for stage, listing in after.items() if stage not in timings}
    assert table == counted | {"throughput": sum(len(after[stage].units) for stage in timings)}


def test_each_record_belongs_to_one_stage(inputs, cluster):
    run, _ = finished(inputs)
    listed = [(unit.kind, key) for units in run.state.units.values() for unit in units for key in unit.keys]
    assert len(listed) == len(set(listed))
    recorded = {(name, key) for name in KINDS for key in run.folder.record_keys(name)}
    assert recorded == set(listed) | {("search-trials", key) for key in run.folder.record_keys("search-trials")}


@pytest.mark.parametrize(
    "change", ["healing.tokens=2048", "quality.limit=3", "quality.sequences=3", "search.trials=30", HALVING]
)
def test_after_a_change_of_the_recipe_healing_is_to_do(inputs, cluster, change, capsys, monkeypatch):
    finished(inputs)
    monkeypatch.setattr(calibration, "calibrate", lambda inputs, nodes: iter([("load", COSTS)]))
    run = context(inputs, change)
    assert pipeline.dry_run(run.inputs.recipe, run.folder, run.inputs.facts) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["heal"][2] == "0" and int(rows["heal"][1]) == 2
    found = estimates(run)["heal"]
    assert found.tokens == 2 * run.inputs.healing_spec.tokens and found.seconds > 0
    if "halving" in change:
        assert rows["halving"][1:3] == ["3", "0"]
    if "quality" in change:
        assert (rows["evaluate"][2], rows["search"][2], rows["measure"][2]) == ("0", "0", "0")
    if "trials" in change:
        assert 0 < int(rows["search"][2]) < int(rows["search"][1]), "the search begins as the one before"


def test_halving_is_counted_once(inputs, cluster):
    fresh = estimates(context(inputs, HALVING))
    run, ended = finished(inputs, HALVING)
    after = units_ahead(context(inputs, HALVING))
    assert (fresh["halving"].units, fresh["halving"].n_open) == (3, 3)
    assert all(listing.is_complete for listing in after.values())
    assert ended["halving rung 1"] == ended["halving scores"] == (3, 3) == (after["halving"].n_recorded,) * 2
    assert ended["curve"] == (after["curve"].n_recorded,) * 2
    table = cost_table(RecordReader(run.folder), run.state).set_index("stage")
    assert table["units"]["halving"] == 3 and table["units"]["curve"] == after["curve"].n_recorded
    assert table["worker seconds"]["halving"] == 3 * 4.0 + 3 * 2.0, "with what judged them"
    spec = run.inputs.healing_spec_at(0.25)
    assert table["healing tokens"]["halving"] == 3 * spec.steps * spec.tokens_per_step


def write_foreign_records(folder: RunFolder) -> None:
    """Writes records of another run into every folder that holds or once held records."""
    result = {"duration_s": 1e6, "tokens": 10**9, "scores": scores(None), "snapshots": []}
    for name in (*KINDS, *SCORES.earlier):
        for number in range(30):
            folder.write_record(name, {"unit": "made up", "number": number}, result)


@pytest.mark.parametrize("until", ["nothing", "everything"])
def test_records_of_other_runs_change_no_count(inputs, cluster, until):
    run = finished(inputs)[0] if until == "everything" else context(inputs)
    run.state.estimates = run.state.estimates or estimate_stages(run, COSTS)

    def counts():
        estimated = estimate_rows(run.folder, run.state)
        table = cost_table(RecordReader(run.folder), run.state).to_csv()
        return estimate_stages(context(inputs), COSTS), needed_mib(run), table, estimated

    before = counts()
    write_foreign_records(run.folder)
    assert counts() == before
    tokens = {row["stage"]: row["actual_tokens"] for row in before[3]}["heal"]
    assert tokens == (2 * run.inputs.healing_spec.tokens if until == "everything" else None)


def test_the_disk_needs_room_for_the_healings_that_are_left(inputs, cluster):
    run = context(inputs)
    run.state.estimates = estimate_stages(run, COSTS)
    whole = needed_mib(run)
    done, _ = finished(inputs)
    done.state.estimates = run.state.estimates
    assert needed_mib(done) < whole
    half = done.listings["heal"].units[0]
    done.folder.remove(f"records/heal/{half.key}.json")
    assert needed_mib(done) - needed_mib(context(inputs)) == pytest.approx((whole - needed_mib(context(inputs))) / 2)


def test_records_of_earlier_versions_are_found(inputs, cluster):
    run, _ = finished(inputs)
    stages = ("evaluate", "sensitivity", "search", "measure")
    for number, record in enumerate(run.folder.records("scores")):
        run.folder.write_record(stages[number % len(stages)], record.identity, record.result)
    run.folder.remove("records/scores")
    assert all(listing.is_complete for listing in units_ahead(context(inputs)).values())
    again, ended = finished(inputs)
    assert not run.folder.exists("records/scores"), "nothing is done again"
    assert again.state.trials == run.state.trials and all(units == done for units, done in ended.values())
