"""Tests the race of stage `search` without a cluster: who is judged on all items, what is listed, and resuming."""

from __future__ import annotations

import functools
import math
import sys

import pytest

from layerboost.evaluation.evaluate import text_scores
from layerboost.evaluation.scores import QualityError
from layerboost.plan import Plan, Treatment
from orchestrator.checks.preflight import preflight
from orchestrator.recipe.load import load_recipe
from orchestrator.report.candidates_page import race_sentences
from orchestrator.report.tables import candidates_table
from orchestrator.results.plans import candidate_rows
from orchestrator.results.reading import RecordReader
from orchestrator.run.context import RunContext
from orchestrator.run.entries import Trial
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import RunInputs
from orchestrator.run.progress import Progress
from orchestrator.run.state import RunState
from orchestrator.stages.candidates import candidates
from orchestrator.stages.heal import units as heal_units
from orchestrator.stages.search import _with_refined, search, units
from tasks.cluster.resources import WorkerResources
from tasks.pool.finished import Finished, WorkerInfo
from tasks.pool.pool import UnitFailure

COSTS = {Treatment.NONE: [0.1, 0.3, 0.2], Treatment.LINEAR_WINDOW: [0.05, 0.1, 0.15]}
SETTINGS = (
    "search.speed=bytes",
    "quality.tasks=[]",
    "quality.sequences=8",
    "sensitivity.treatments=[none, linear_window]",
    "search.method=swaps",
    "search.trials=20",
    "search.race={first: 0.5, confidence: 0.95}",
    "healing.candidates=1",
)


@pytest.fixture
def stage(inputs, monkeypatch):
    """Gives a function that runs the stage; it returns the context, and the plans judged on some and on all items."""
    module, racing = sys.modules["orchestrator.stages.search"], sys.modules["orchestrator.stages.race"]
    monkeypatch.setattr(module, "cost_matrix", lambda folder, state: COSTS)
    monkeypatch.setattr(RunContext, "workers", lambda run: WorkerResources(1, 1, 0))
    worker = WorkerInfo("here", "node", 1)

    def run_stage(*overrides, fails=(), dies_after_units=None):
        first, full = [], []

        def search_here(state, make_evaluator, resources, *, on_plan, on_failure, **_):
            while (plan := state.next_plan()) is not None:
                first.append(plan)
                values = {"quality": 0.5, "quality_stderr": 0.0, "scores": _scores(plan, 4), "evaluation_s": 1.0}
                state.finish(plan, values)
                on_plan(Finished(plan, values, 1.0, worker))
            return state.results()

        def sweep_here(todo, source, spec, resources, *, on_result, **_):
            failures = []
            for number, unit in enumerate(todo):
                if number == dies_after_units:
                    raise KeyboardInterrupt
                assert unit.spec == spec and spec.n_sequences == 8 and len(unit.plans) <= 8
                if set(map(str, unit.plans)) & set(fails):
                    failures.append(UnitFailure(unit, "it failed", 1))
                    continue
                full.append(unit.plans)
                on_result(Finished(unit, {"scores": [_scores(plan, 8) for plan in unit.plans]}, 1.0, worker))
            return failures

        monkeypatch.setattr(module, "run_search", search_here)
        monkeypatch.setattr(racing, "sweep_units", sweep_here)
        recipe = load_recipe(inputs.recipe, [*SETTINGS, *overrides])
        folder = RunFolder(inputs.folder.parent / "out")
        run = RunContext(RunInputs(recipe, preflight(recipe, folder)), folder, RunState("m", 3, "nll", {}), Progress())
        try:
            search(run)
        except KeyboardInterrupt:
            assert dies_after_units is not None
        return run, first, full

    return run_stage


def _scores(plan, n_sequences):
    """Returns scores in which layers add up, plans differ a little from item to item, and the first items are easy."""
    loss = sum(
        COSTS.get(treatment, [0.4] * 3)[i] for i, treatment in enumerate(plan.treatments) if treatment != "softmax"
    )
    nll = [1.0 + 0.1 * n + loss * (1 + 0.01 * (n % 3)) for n in range(n_sequences)]
    return text_scores(nll, [loss / 2] * n_sequences, primary=True).to_dict()


def test_reference_plans_and_the_most_promising_are_judged_in_full(stage):
    run, first, full = stage()
    trials = {trial.plan: trial for trial in run.state.trials}
    in_full = {plan: trial for plan, trial in trials.items() if trial.share == 1}
    assert set(first) == set(trials) and {trial.status for trial in trials.values()} == {"ok"}
    assert [str(plan) for unit in full for plan in unit] == sorted(map(str, in_full))
    assert {str(plan) for plan, trial in in_full.items()} == {"SSS", "NNN", "WWW", "LLL", "NSS", "NSN"}
    assert run.inputs.n_leaders == 4, "but all other plans are slower than the base, or beaten"
    assert {trial.origin for trial in trials.values()} - {"search"} <= {trial.origin for trial in in_full.values()}
    for trial in in_full.values():
        loss = float(_scores(trial.plan, 8)["metrics"][0]["value"]) - 1.35
        assert trial.objective == pytest.approx(-loss, abs=1e-9), "on all items"
        assert trial.quality == pytest.approx(math.exp(-1.35 - loss)) and trial.beaten_by is None
        assert trial.key is not None
    assert candidates(run)[0] in in_full


def test_the_others_have_the_values_of_the_first_items(stage):
    run, _, _ = stage()
    by_id = {trial.plan.plan_id: trial for trial in run.state.trials}
    partly = [trial for trial in by_id.values() if trial.share < 1]
    assert len(partly) > 5 and {trial.share for trial in partly} == {0.5}
    for trial in partly:
        loss = float(_scores(trial.plan, 4)["metrics"][0]["value"]) - 1.15
        assert trial.objective == pytest.approx(-loss, abs=1e-9) and trial.key is None
        assert trial.quality == pytest.approx(math.exp(-1.35 - loss)), "what it keeps of the base on all items"
        assert 0 <= trial.quality_stderr < 0.01 and trial.speedup == run.inputs.predicted_speedup(trial.plan)
    beaten = [trial for trial in partly if trial.beaten_by is not None]
    assert len(beaten) > 5
    for trial in beaten:
        winner = by_id[trial.beaten_by]
        assert trial.origin == winner.origin == "search", "reference plans neither drop out nor win"
        assert winner.speedup >= trial.speedup
    rows = {row["plan_id"]: row for row in candidate_rows(RecordReader(run.folder), run.state, lambda *_: None)}
    assert {rows[plan_id]["share"] for plan_id in by_id} == {0.5, 1.0}
    assert {rows[trial.plan.plan_id]["beaten_by"] for trial in beaten} <= set(by_id)
    text = " ".join(race_sentences(candidates_table(rows.values())))
    assert f"{len(partly)} of {len(by_id)} plans" in text and f"{len(beaten)} of them are beaten" in text


def test_as_many_plans_are_judged_in_full_as_may_be_healed(stage, monkeypatch):
    def in_full(*overrides):
        run, _, _ = stage(*overrides)
        return {trial.plan for trial in run.state.trials if trial.origin == "search" and trial.share == 1}, run

    def not_reference(plans):
        return {plan for plan in plans if len(set(plan.treatments)) > 1}

    most, run = in_full("healing.candidates=8", "search.race={first: 0.5, leaders: 1}")
    assert len(not_reference(most)) == 8 == len(candidates(run)), "beaten plans too, if there are not enough others"
    halved, _ = in_full("healing.halving={plans: 8, first: 0.25, rungs: 1}", "search.race={first: 0.5, leaders: 1}")
    assert halved == most
    nobody = lambda speeds, losses, rivals, *, confidence: [None] * len(speeds)  # noqa: E731
    monkeypatch.setattr(sys.modules["orchestrator.stages.race"], "winners", nobody)
    few, run = in_full("healing.candidates=2", "search.race={first: 0.5, leaders: 1}")
    more, _ = in_full("healing.candidates=2", "search.race={first: 0.5, leaders: 3}")
    assert len(not_reference(few)) == 2 and len(not_reference(more)) == 6 and few < more


def test_a_race_that_was_killed_judges_the_same_plans_together(stage):
    _, _, begun = stage(dies_after_units=1)
    assert len(begun) == 1
    run, first, rest = stage()
    assert not first and not set(begun) & set(rest)
    again, first, full = stage()
    assert not first and not full and again.state.trials == run.state.trials


def test_a_plan_that_fails_in_the_race_takes_no_other_with_it_and_is_tried_again(stage):
    run, _, full = stage(fails={"NSN"})
    failed = {str(trial.plan): trial for trial in run.state.trials if trial.status == "failed"}
    assert list(failed) == ["NSN"] and failed["NSN"].error == "it failed" and failed["NSN"].quality is None
    assert [(failure.stage, failure.name) for failure in run.state.failures] == [("race", {"plans": "NSN"})]
    assert len(full) == 5 and {len(unit) for unit in full} == {1}, "the others are judged one by one"
    again, first, full = stage()
    assert not first and len(full) == 1 and not any(trial.status == "failed" for trial in again.state.trials)


def test_a_plan_without_a_number_on_all_items_has_failed(stage, monkeypatch):
    module = sys.modules["orchestrator.stages.race"]
    monkeypatch.setattr(module, "_not_finite", functools.partial(_with_nan, module._not_finite, module))
    run, _, _ = stage()
    failed = [trial for trial in run.state.trials if trial.status == "failed"]
    assert [str(trial.plan) for trial in failed] == ["NSS"] and "is nan" in failed[0].error
    assert [failure.name for failure in run.state.failures] == [{"plan": "NSS"}]


def _with_nan(not_finite, module, run, plans):
    """Has one plan lose nan on all items."""
    keep = module.objective
    lost = float(_scores(Plan.parse("NSS"), 8)["metrics"][0]["value"])
    module.objective = lambda run, base, scores: math.nan if scores.get("text", "nll").value == lost else 0.0
    try:
        return not_finite(run, plans)
    finally:
        module.objective = keep


def test_what_refinement_finds_is_judged_on_all_items():
    left, other = (Trial(Plan.parse(letters), "search", share=0.25, beaten_by="a") for letters in ("NSS", "SNS"))
    refined = Trial(left.plan, "refined")
    assert _with_refined([left, other], [refined]) == [Trial(left.plan, "search"), other, refined]


def test_healings_are_open_while_the_race_is_not_run(stage, monkeypatch):
    run, _, _ = stage(dies_after_units=0)
    monkeypatch.setattr(sys.modules["orchestrator.stages.search"], "_is_scored", lambda run: True)
    ahead = RunContext(run.inputs, run.folder, RunState("m", 3, "nll", {}), Progress(), is_ahead=True)
    units(ahead)
    heal_units(ahead)
    assert not ahead.listings["race"].is_complete and ahead.listings["heal"].n_open >= 1
    done, _, _ = stage()
    after = RunContext(done.inputs, done.folder, RunState("m", 3, "nll", {}), Progress(), is_ahead=True)
    units(after)
    heal_units(after)
    assert after.listings["race"].is_complete and not after.listings["heal"].n_open


def test_an_objective_without_items_beats_nobody(stage, monkeypatch):
    def no_items(base, scores, score):
        raise QualityError(f"sensitivity.score: '{score}' has no items of its own; choose another one")

    monkeypatch.setattr(sys.modules["orchestrator.stages.race"], "item_drops", no_items)
    run, _, full = stage()
    assert {trial.beaten_by for trial in run.state.trials} == {None}
    assert len([plan for unit in full for plan in unit]) == 8


def test_units_are_listed_ahead_as_they_are_done(stage, monkeypatch):
    run, _, _ = stage()
    monkeypatch.setattr(sys.modules["orchestrator.stages.search"], "_is_scored", lambda run: True)
    ahead = RunContext(run.inputs, run.folder, RunState("m", 3, "nll", {}), Progress(), is_ahead=True)
    units(ahead)
    assert ahead.state.trials == run.state.trials
    for name in ("search", "race"):
        assert ahead.listings[name].is_complete and ahead.listings[name].keys() == run.listings[name].keys()


def test_without_a_race_all_plans_are_judged_in_full_at_once(stage):
    run, _, full = stage("search.race={first: 0.99}", "quality.sequences=4")
    assert not run.inputs.races and run.inputs.first_share == 1.0
    assert not full and "race" not in run.listings and {trial.status for trial in run.state.trials} == {"ok"}


@pytest.mark.parametrize(
    ("race", "field"),
    [
        ("{first: 0}", "search.race.first"),
        ("{first: 1}", "search.race.first"),
        ("{confidence: 0.5}", "search.race.confidence"),
        ("{confidence: 1}", "search.race.confidence"),
        ("{share: 0.1}", "search.race.share"),
    ],
)
def test_wrong_settings_are_named(inputs, race, field):
    with pytest.raises(ValueError, match=field):
        load_recipe(inputs.recipe, [f"search.race={race}"])


def test_first_items_are_a_share_of_what_the_search_judges_by(inputs):
    def spec(*overrides):
        recipe = load_recipe(inputs.recipe, ["search.race={first: 0.25}", *overrides])
        found = RunInputs(recipe, preflight(recipe, RunFolder(inputs.folder.parent / "out")))
        return found.first_quality_spec, found.first_share

    first, share = spec("quality.sequences=40", "quality.limit=100", "sensitivity.compare=true")
    assert (first.n_sequences, first.limit, share) == (10, 25, 0.25)
    first, share = spec("quality.sequences=40", "quality.limit=100")
    assert (first.n_sequences, first.tasks) == (10, ())
    first, share = spec("quality.sequences=10", "search.objective=quality", "quality.limit=20")
    assert (first.text, first.limit, share) == (None, 16, 0.8), "no fewer than say something"
    first, share = spec("search.objective=quality", "quality.limit=null")
    assert (first.limit, share) == (None, 1.0), "how many there are is not known"
