"""Tests stage `search` without a cluster: objectives of plans, identity of a search, resuming from records."""

from __future__ import annotations

import sys

import pytest

from layerboost.evaluation.evaluate import text_scores
from layerboost.plan import Treatment
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.results.sensitivity import cost_matrix
from orchestrator.run.context import RunContext
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import TRIALS
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState
from orchestrator.stages.search import search
from tasks.cluster.resources import WorkerResources
from tasks.pool.finished import Finished, WorkerInfo
from tasks.pool.pool import UnitFailure

COSTS = {Treatment.NONE: [0.1, 0.3, 0.2], Treatment.LINEAR_WINDOW: [0.05, 0.1, 0.15]}
SETTINGS = ("search.speed=bytes", "quality.tasks=[]", "sensitivity.treatments=[none, linear_window]")


@pytest.fixture
def stage(inputs, monkeypatch):
    """Gives a function that runs the stage on plans whose layers cost as COSTS says.

    It returns the stage's context and the plans that it evaluated.
    """
    module = sys.modules["orchestrator.stages.search"]
    monkeypatch.setattr(module, "cost_matrix", lambda folder, state: COSTS)
    monkeypatch.setattr(RunContext, "workers", lambda run: WorkerResources(1, 1, 0))

    def run_stage(*overrides, fails=(), dies_after=None):
        evaluated = []

        def run_here(state, make_evaluator, resources, *, on_plan, on_failure, **_):
            while (plan := state.next_plan()) is not None:
                if len(evaluated) == dies_after:
                    raise KeyboardInterrupt
                evaluated.append(plan)
                if str(plan) in fails:
                    state.finish(plan, None, "it failed")
                    on_failure(UnitFailure(plan, "it failed", 1))
                else:
                    values = {"quality": 0.5, "quality_stderr": 0.0, "scores": _scores(plan), "evaluation_s": 1.0}
                    state.finish(plan, values)
                    on_plan(Finished(plan, values, 1.0, WorkerInfo("here", "node", 1)))
            return state.results()

        monkeypatch.setattr(module, "run_search", run_here)
        recipe = load_recipe(inputs.recipe, [*SETTINGS, *overrides])
        folder = RunFolder(inputs.folder.parent / "out")
        run = RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, RunState("m", 3, "nll", {}), Progress())
        try:
            search(run)
        except KeyboardInterrupt:
            assert dies_after is not None
        return run, evaluated

    return run_stage


def _scores(plan):
    loss = sum(
        COSTS.get(treatment, [0.4] * 3)[i] for i, treatment in enumerate(plan.treatments) if treatment != "softmax"
    )
    return text_scores([1.0 + loss, 2.0 + loss], [loss / 2] * 2, primary=True).to_dict()


@pytest.mark.parametrize("method", ["thresholds", "knapsack", "evolution", "swaps"])
def test_trials_have_both_objectives_and_a_killed_search_resumes(stage, method):
    settings = (f"search.method={method}", "search.trials=6", "constraints.pin={1: softmax}", "search.plans=[NNL]")
    killed, first = stage(*settings, dies_after=5)
    run, rest = stage(*settings)
    assert not killed.state.trials and not set(first) & set(rest)
    trials = run.state.trials
    assert [trial.origin for trial in trials[:5]] == [
        "base", "all_none", "all_window", "all_linear_window", "given"
    ]  # fmt: skip
    assert len(trials) > 5
    for trial in trials:
        plan = trial.plan
        loss = float(_scores(plan)["metrics"][0]["value"]) - 1.5
        assert trial.objective == pytest.approx(-loss, abs=1e-9)
        assert trial.speedup == run.inputs.predicted_speedup(plan)
        assert 0 < trial.quality <= 1 and trial.status == "ok"
        assert (trial.remove_below is not None) == (trial.origin == "search" and method == "thresholds")
        if trial.origin == "search":
            assert plan.treatments[1] is Treatment.SOFTMAX
    again, evaluated = stage(*settings)
    assert not evaluated and again.state.trials == trials


def test_the_objective_may_be_the_quality(stage):
    run, _ = stage("search.objective=quality", "search.method=knapsack", "search.trials=4")
    assert all(trial.objective == trial.quality for trial in run.state.trials)


def test_a_failed_plan_is_named_and_tried_again_by_the_next_run(stage):
    run, _ = stage("search.method=knapsack", fails={"NNN"})
    failed = next(trial for trial in run.state.trials if str(trial.plan) == "NNN")
    assert (failed.status, failed.objective, failed.quality, failed.speedup) == ("failed", None, None, None)
    assert [failure.name for failure in run.state.failures] == [{"plan": "NNN"}]
    again, evaluated = stage("search.method=knapsack")
    assert [str(plan) for plan in evaluated] == ["NNN"] and again.state.trials[1].objective < 0


def test_without_the_base_no_trial_has_an_objective(stage):
    run, _ = stage("search.method=evolution", fails={"SSS"})
    assert {trial.status for trial in run.state.trials} == {"failed"}
    assert run.folder.records(TRIALS) == []


def test_what_changes_the_way_is_part_of_the_identity(inputs):
    def key(*overrides, costs=COSTS, models=()):
        recipe = load_recipe(inputs.recipe, [*SETTINGS, *overrides])
        facts = preflight(recipe, RunFolder(inputs.folder.parent / "out"))
        return unit_key(RunInputs(recipe, facts).search(costs, models))

    keys = [
        key(),
        *(
            key(f"search.{setting}")
            for setting in ("method=swaps", "objective=quality", "trials=3", "seed=1", "window=4", "plans=[SNS]")
        ),
        key("constraints.pin={0: softmax}"),
        key("constraints.at_most={n_softmax: 1}"),
        key("constraints.at_most={kv_bytes_per_token: 64}"),
        key("throughput.concurrency=[2]"),
        key(costs={**COSTS, Treatment.LINEAR_WINDOW: [0.05, 0.1, 0.151]}),
        key(models=[{"concurrency": 1}]),
    ]
    assert len(set(keys)) == len(keys)
    assert key("placement.workers=2") == key("healing.tokens=2048") == key()


def test_costs_of_what_was_not_measured_are_infinite(tmp_path, monkeypatch):
    rows = [
        {"layer": 0, "treatment": "none", "task": "mean", "drop": 0.1},
        {"layer": 0, "treatment": "none", "task": "text", "drop": 0.7},
        {"layer": 1, "treatment": "window", "task": "mean", "drop": -0.2},
    ]
    monkeypatch.setattr(sys.modules["orchestrator.results.sensitivity"], "sensitivity_rows", lambda *_, **__: rows)
    inf = float("inf")
    assert cost_matrix(RunFolder(tmp_path), RunState("m", 2, "nll", {})) == {"none": [0.1, inf], "window": [inf, -0.2]}
