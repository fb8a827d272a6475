"""Tests halving without a cluster: rungs from records, failures, lost records and its tables."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from layerboost.evaluation.evaluate import text_scores
from layerboost.healing.training import CurveRow
from layerboost.plan import Plan
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.results.halving import fidelity_rows, halving_rows
from orchestrator.results.reading import RecordReader
from orchestrator.run.context import RunContext
from orchestrator.run.entries import HealedEntry, Trial
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.inputs import RunInputs
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState
from orchestrator.stages import halving
from tasks.cluster.resources import WorkerResources
from tasks.healing.run import HealingResult
from tasks.pool.finished import Finished, WorkerInfo
from tasks.pool.pool import UnitFailure

BASE = Plan.parse("SSS")
PLANS = [Plan.parse(text, 8) for text in ("SSL", "SLL", "LLL", "NLL", "NNL", "NNN")]
LOST = {str(plan): 0.1 * n for n, plan in enumerate(PLANS)}
"""The NLL that each plan loses after any healing; before healing the order of the plans is reversed."""


class Cluster:
    """Heals and judges immediately, and notes the requests."""

    def __init__(self, run, monkeypatch, fails=()):
        self.run, self.fails, self.healed, self.judged = run, fails, [], []
        monkeypatch.setattr("tasks.healing.rungs.heal_all", self.heal_all)
        monkeypatch.setattr("tasks.cluster.resources.jobs_at_once", lambda workers, nodes: 1)
        monkeypatch.setattr("tasks.cluster.connection.resources", tuple)
        monkeypatch.setattr(run, "healing_workers", lambda n_jobs: WorkerResources(1, 1.0, 0.0))
        monkeypatch.setattr(run, "evaluate", self.evaluate)

    def heal_all(self, jobs, *, on_result, **_):
        failures = []
        for job in jobs:
            if str(job.plan) in self.fails:
                failures.append(UnitFailure(job, "RuntimeError: out of memory", 1))
                continue
            steps = job.spec.steps
            rows = tuple(CurveRow("heal", n, n * job.spec.tokens_per_step, 1.0 / n) for n in range(1, steps + 1))
            url = f"{job.snapshots.url}/{steps}.safetensors"
            self.run.folder.write_text(f"snapshots/{job.name}/{steps}.safetensors", "trained")
            result = HealingResult(None, rows[-1].tokens, rows, 0.5, 1.0, snapshots={steps: url})
            on_result(Finished(job, result, 1.0, WorkerInfo("here", "node", 1)))
            self.healed.append((str(job.plan), job.spec.tokens))
        return failures

    def evaluate(self, stage, spec, units, keys):
        for unit in units:
            identity = self.run.inputs.scores(unit, spec, keys[unit])
            if self.run.recorded(identity) is None:
                assert self.run.folder.exists(f"snapshots/{keys[unit].replace('@', '/')}.safetensors")
                record(self.run, stage, identity, 2.0 + LOST[str(unit.plan)])
                self.judged.append(str(unit.plan))


def record(run, stage, identity, nll) -> None:
    scores = text_scores([nll + 0.01 * n for n in range(4)], [0.0] * 4, primary=True)
    run.record(stage, identity, {"scores": scores.to_dict(), "duration_s": 1.0})


@pytest.fixture
def run(inputs) -> RunContext:
    overrides = ("quality.tasks=[]", "healing.candidates=2", "healing.halving={plans: 6, first: 0.125, rungs: 2}")
    recipe = load_recipe(inputs.recipe, overrides)
    folder = RunFolder(inputs.folder.parent / "out")
    run = RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, RunState("m", 3, "nll", {}), Progress())
    spec = run.inputs.search_quality_spec
    base = run.inputs.plan_scores(BASE, spec)
    record(run, "evaluate", base, 2.0)
    run.state.base_key = unit_key(base)
    run.state.trials = [
        Trial(plan, "search", speedup=1.1 + 0.1 * n, objective=0.1 * n - 1, quality=0.3) for n, plan in enumerate(PLANS)
    ]
    base_key = run.state.base_key
    run.state.trials.append(Trial(BASE, "base", speedup=1.0, quality=0.5, objective=0.0, key=base_key))
    return run


def test_rungs_heal_fewer_plans_on_more_tokens_and_leave_no_files(run, monkeypatch):
    run.progress = Progress(told := io.StringIO())
    cluster = Cluster(run, monkeypatch)
    chosen = halving.halve(run, PLANS)
    # A step has 64 tokens, so the rungs end after 2 and after 5 of the budget's 16 steps.
    survived = [str(plan) for plan in PLANS if (str(plan), 362) in cluster.healed]
    assert cluster.healed == [(str(plan), 128) for plan in PLANS] + [(plan, 362) for plan in map(str, _second(run))]
    assert len(survived) == 3 and len(chosen) == 2 and set(map(str, chosen)) < set(survived)
    assert "halving: 6 plans, 3,776 tokens in all, 61% of healing all fully" in told.getvalue()
    assert 'rungs="6x0.125 3x0.354 2x1"' in told.getvalue()
    assert not list(Path(run.folder.place("snapshots")).glob("*/*"))

    first = [entry for entry in run.state.halving if entry.rung == 1]
    assert [entry.plan for entry in first] == PLANS
    assert [entry.objective for entry in first] == pytest.approx([-LOST[str(plan)] for plan in PLANS])
    assert [entry.tokens for entry in run.state.halving] == [128] * 6 + [320] * 3
    assert [entry.survived for entry in run.state.halving].count(True) == 3 + 2

    # A second call does no work and gives the same result.
    before, cluster.healed, cluster.judged = list(run.state.halving), [], []
    assert halving.halve(run, PLANS) == chosen
    assert (run.state.halving, cluster.healed, cluster.judged) == (before, [], [])


def _second(run) -> list[Plan]:
    return [entry.plan for entry in run.state.halving if entry.rung == 2]


def test_a_killed_run_goes_on_and_what_lost_its_file_is_healed_again(run, monkeypatch):
    cluster = Cluster(run, monkeypatch)
    monkeypatch.setattr(run, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        halving.halve(run, PLANS)
    spec = run.inputs.healing_spec_at(0.125)
    run.folder.remove(f"snapshots/{unit_key(run.inputs.healing(PLANS[1], spec))}")
    monkeypatch.setattr(run, "evaluate", cluster.evaluate)
    cluster.healed = []
    halving.halve(run, PLANS)
    assert [plan for plan, tokens in cluster.healed if tokens == 128] == [str(PLANS[1])]


def test_a_plan_that_fails_is_named_and_does_not_go_on(run, monkeypatch):
    cluster = Cluster(run, monkeypatch, fails={"SSL"})
    chosen = halving.halve(run, PLANS)
    assert len(chosen) == 2 and PLANS[0] not in chosen
    (failure,) = run.state.failures
    assert (failure.stage, failure.name["plan"], failure.name["rung"]) == ("halving", "SSL", 1)
    failed = next(entry for entry in run.state.halving if str(entry.plan) == "SSL")
    assert [getattr(failed, name) for name in ("objective", "tokens", "quality_key", "survived")] == [
        None,
        None,
        None,
        False,
    ]
    cluster.fails = set(map(str, PLANS))
    run.folder.remove("records/halving")
    assert halving.halve(run, PLANS) == []


def test_with_no_more_plans_than_candidates_there_is_nothing_to_choose(run, monkeypatch):
    cluster = Cluster(run, monkeypatch)
    assert halving.halve(run, PLANS[:2]) == PLANS[:2]
    assert cluster.healed == []


def test_tables_of_halving_come_from_the_records(run, monkeypatch):
    Cluster(run, monkeypatch)
    chosen = halving.halve(run, PLANS)
    for plan in chosen:
        identity = run.inputs.scores(
            halving.snapshot_unit(run, plan, "k", 1, run.inputs.healing_spec), run.inputs.full_spec, f"final {plan}"
        )
        record(run, "measure", identity, 2.0 + 0.01 * PLANS.index(plan))
        run.state.healed.append(HealedEntry(plan, "search", "k", unit_key(identity)))
    rows = list(halving_rows(RecordReader(run.folder), run.state))
    assert len(rows) == 9
    assert {row["plan"] for row in rows if row["final_quality"] is not None} == {str(plan) for plan in chosen}
    assert all(0 < row["quality_retained"] <= 1 and row["quality_stderr"] > 0 for row in rows)
    assert rows[0]["plan_id"] == PLANS[0].plan_id and rows[0]["speedup"] == pytest.approx(1.1)

    found = {(row["rung_a"], row["of"]): row for row in fidelity_rows(RecordReader(run.folder), run.state)}
    assert found[0, "objective"]["spearman"] == pytest.approx(-1)
    assert (found[0, "objective"]["n_plans"], found[0, "objective"]["share_b"]) == (6, 0.125)
    assert found[0, "objective"]["spearman_high"] < 0
    assert found[0, "quality"]["spearman"] is None, "all alike before healing"
    assert found[1, "quality"]["spearman"] == pytest.approx(1)
    assert (found[1, "quality"]["n_plans"], found[1, "quality"]["spearman_low"]) == (3, None)
    assert (found[2, "quality"]["share_b"], found[2, "quality"]["n_plans"]) == (1.0, 2)
    assert (2, "objective") not in found
    run.state.halving = []
    assert list(fidelity_rows(RecordReader(run.folder), run.state)) == []
