"""Tests the search: it takes one path whatever is known, and evaluates each plan once; objectives against the base."""

import os
import random
import signal
import sys
import time

import pytest
from ray import cloudpickle

from layerboost.plan import Plan, PlanError, Treatment
from layerboost.search.loop import SearchSpec, SearchState, Suggestion, fixed_points
from layerboost.search.plan_space import Limit, PlanSpace
from layerboost.search.proposers import make_proposer
from tasks.cluster.resources import WorkerResources
from tasks.pool.watch import UNWATCHED, Watch
from tasks.search import run_search

cloudpickle.register_pickle_by_value(sys.modules[__name__])

COSTS = {
    Treatment.NONE: [0.03, 0.21, 0.05, 0.04, 0.06, 0.035, 0.08, 0.1],
    Treatment.LINEAR_WINDOW: [0.01, 0.05, 0.02, 0.025, 0.01, 0.015, 0.02, 0.07],
}
TIMES = {Treatment.SOFTMAX: [5.0] * 8, Treatment.LINEAR_WINDOW: [2.0] * 8, Treatment.NONE: [1.0] * 8}
SPACE = PlanSpace(8, tuple(TIMES), 64)
PINNED = PlanSpace(
    8,
    tuple(TIMES),
    64,
    {0: Treatment.SOFTMAX, 6: Treatment.WINDOW},
    (Limit("n_softmax", {t: (float(t is Treatment.SOFTMAX),) * 8 for t in Treatment}, 4.0),),
)
METHODS = ["thresholds", "knapsack", "evolution", "swaps"]


def _values(plan):
    """Returns what a plan's layers keep, changed a little where neighbours have the same treatment."""
    cost = sum(COSTS[t][i] for i, t in enumerate(plan.treatments) if t in COSTS) + 0.02 * plan.count(Treatment.WINDOW)
    alike = sum(a is b is Treatment.NONE for a, b in zip(plan.treatments, plan.treatments[1:], strict=False))
    return {"quality": 0.9 - cost - 0.02 * alike}


def _judge(plan, values, base):
    times = TIMES | {Treatment.WINDOW: [1.5] * 8}
    speedup = 50.0 / (10.0 + sum(times[treatment][layer] for layer, treatment in enumerate(plan.treatments)))
    return values["quality"] - base["quality"], speedup


def _state(spec, known=None):
    return SearchState(spec, make_proposer(spec, COSTS, TIMES, 10.0), _judge, known or {})


def _drive(spec, known=None, n_workers=1, order=None, fails=(), state=None):
    """Runs a search without Ray; results come back in the order that `order` draws.

    Returns the results and the evaluated plans.
    """
    state = state or _state(spec, known)
    running, evaluated = [], []
    while True:
        while len(running) < n_workers and (plan := state.next_plan()) is not None:
            running.append(plan)
        if not running:
            assert state.exhausted
            return state.results(), evaluated
        plan = running.pop(order.randrange(len(running)) if order else 0)
        evaluated.append(plan)
        if str(plan) in fails:
            state.finish(plan, None, "it failed")
        else:
            state.finish(plan, _values(plan))


def _way(results):
    return [(point.origin, str(point.plan), point.remove_below, point.keep_above, point.values) for point in results]


def _searched(results):
    return [point.plan for point in results if point.origin == "search"]


@pytest.mark.parametrize("space", [SPACE, PINNED])
@pytest.mark.parametrize("method", [*METHODS, "nsga2"])
def test_the_way_does_not_depend_on_workers_order_or_what_is_known(method, space):
    settings = {"sampler": "nsga2"} if method == "nsga2" else {"method": method}
    spec = SearchSpec(space, trials=16, seed=random.randrange(1000), lag=4, **settings)
    undisturbed, evaluated = _drive(spec)
    assert len(evaluated) == len({plan.plan_id for plan in evaluated}) == len({p.plan.plan_id for p in undisturbed})
    for n_workers in (2, 7):
        again, _ = _drive(spec, n_workers=n_workers, order=random.Random())
        assert _way(again) == _way(undisturbed)
    # After a driver's death with any number of records the search takes the same path and evaluates only new plans.
    n_recorded = random.randrange(1, len(evaluated))
    for recorded in (evaluated[:n_recorded], evaluated[n_recorded:]):  # the second part lacks the base
        known = {plan.plan_id: _values(plan) for plan in recorded}
        resumed, rest = _drive(spec, known=known, n_workers=3, order=random.Random())
        assert _way(resumed) == _way(undisturbed)
        assert set(rest) == set(evaluated) - set(recorded)
    assert _drive(spec, known={plan.plan_id: _values(plan) for plan in evaluated})[1] == []


@pytest.mark.parametrize("method", METHODS)
def test_searched_plans_honour_the_space_and_the_budget(method):
    for space in (SPACE, PINNED):
        spec = SearchSpec(space, method=method, trials=20, lag=3)
        results, evaluated = _drive(spec)
        searched = _searched(results)
        assert all(space.contains(plan) for plan in searched)
        fixed = [plan for _, plan in fixed_points(spec, 8)]
        if method == "thresholds":
            assert len(searched) == 20
        else:
            assert len(searched) == len(set(searched)) >= 10
            assert len(set(searched) - set(fixed)) <= 20 and len(evaluated) <= 24


def test_another_seed_or_lag_goes_another_way():
    for method in ("thresholds", "evolution"):
        specs = [SearchSpec(SPACE, method, trials=30, seed=seed, lag=lag) for seed, lag in ((0, 4), (1, 4), (0, 9))]
        ways = [_way(_drive(spec)[0]) for spec in specs]
        assert ways[0] != ways[1] and ways[0] != ways[2]


class _Proposer:
    """Proposes some plans, waits after each for its value, and writes down what it is told."""

    def __init__(self, plans):
        self.plans, self.calls = [Plan.parse(plan, 64) for plan in plans], []

    def suggest(self, trial):
        self.calls.append(("suggest", trial))
        told = sum(call[0] == "tell" for call in self.calls)
        return Suggestion(self.plans[trial]) if trial < len(self.plans) and told >= trial else None

    def tell(self, trial, outcome):
        self.calls.append(("tell", trial, outcome))


def test_a_proposer_that_waits_is_told_one_trial_more_and_asked_again():
    proposer = _Proposer(["SSSSSSSN", "NNNNNNNN", "SSSSSSNN"])
    spec = SearchSpec(SPACE, "swaps", trials=9, lag=4)
    state = SearchState(spec, proposer, _judge, {})
    results, evaluated = _drive(spec, n_workers=3, order=random.Random(), state=state)
    assert [call[:2] for call in proposer.calls] == [
        *(("suggest", 0), ("suggest", 1), ("tell", 0)),
        *(("suggest", 1), ("suggest", 2), ("tell", 1)),
        *(("suggest", 2), ("suggest", 3), ("tell", 2), ("suggest", 3)),
    ]
    outcomes = [call[2] for call in proposer.calls if call[0] == "tell"]
    assert outcomes[0] == (pytest.approx(-0.1), pytest.approx(50 / 46))
    assert [plan.plan_id for plan in evaluated].count(Plan.parse("NNNNNNNN").plan_id) == 1
    assert [(p.values["objective"], p.values["speedup"]) for p in results if p.origin == "search"] == outcomes


def test_no_trial_is_told_before_the_untouched_model_is_judged():
    proposer = _Proposer(["SSSSSSSN", "SSSSSSNN"])
    state = SearchState(SearchSpec(SPACE, lag=1), proposer, _judge, {})
    plans = [state.next_plan() for _ in range(5)]
    for plan in plans[1:]:
        state.finish(plan, _values(plan))
    assert state.next_plan() is None and not state.exhausted and proposer.calls == [("suggest", 0)]
    assert state.results() == []
    state.finish(plans[0], _values(plans[0]))
    assert str(state.next_plan()) == "SSSSSSNN"
    assert [point.values["objective"] for point in state.results()][:1] == [0.0]


def test_without_the_untouched_model_the_search_ends_and_nothing_has_an_objective():
    for method in METHODS:
        results, evaluated = _drive(SearchSpec(SPACE, method, trials=20, lag=4), fails={"SSSSSSSS"})
        assert len(evaluated) <= 4 + 4 and len(results) >= 4
        assert all(point.values is None and point.error is not None for point in results)
        assert results[0].error == "it failed" and "untouched model" in results[1].error


def test_an_outcome_that_is_not_finite_is_a_failure():
    proposer = _Proposer(["SSSSSSSN"])
    spec = SearchSpec(SPACE)
    state = SearchState(spec, proposer, lambda plan, *_: (float("nan") if "N" in str(plan) else 0.0, 1.0), {})
    results, _ = _drive(spec, state=state)
    assert ("tell", 0, None) in proposer.calls
    failed = {str(point.plan): point.error for point in results if point.error is not None}
    assert failed == dict.fromkeys(("NNNNNNNN", "SSSSSSSN"), "objective: nan is not a finite number")


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_plan_is_a_point_and_not_tried_twice(method):
    spec = SearchSpec(SPACE, method, trials=20)
    good, _ = _drive(spec)
    bad = str(next(plan for plan in _searched(good) if str(plan) not in ("SSSSSSSS", "NNNNNNNN")))
    results, evaluated = _drive(spec, fails={bad, "NNNNNNNN"})
    assert [str(plan) for plan in evaluated].count(bad) == 1
    failed = [point for point in results if point.error is not None]
    assert {str(point.plan) for point in failed} == {bad, "NNNNNNNN"}
    assert all(point.values is None and point.error == "it failed" for point in failed)
    if method == "thresholds":
        assert len(results) == 4 + 20


def test_the_fixed_points_are_there_once():
    given = (Plan.parse("SNSN"), Plan.parse("NNNN"), Plan.parse("SLWN", 5), Plan.parse("SNSN"))
    spec = SearchSpec(PlanSpace(4, tuple(TIMES), 8), plans=given)
    points = fixed_points(spec, 4)
    assert [(origin, str(plan)) for origin, plan in points] == [
        ("base", "SSSS"),
        ("all_none", "NNNN"),
        ("all_window", "WWWW"),
        ("all_linear_window", "LLLL"),
        ("given", "SNSN"),
        ("given", "SLWN"),
    ]
    assert points[2][1].window == 8 and points[5][1].window == 5
    with pytest.raises(PlanError, match="4 letters"):
        fixed_points(spec, 5)


class _Counting:
    """Evaluates plans, leaves a mark for each evaluation, and fails or dies on demand."""

    def __init__(self, folder, raises=None, dies_once=None, hangs_once=None):
        self.folder, self.raises, self.dies_once, self.hangs_once = folder, raises, dies_once, hangs_once

    def __call__(self, plan):
        with (self.folder / str(plan)).open("a") as mark:
            mark.write(f"{os.getpid()}\n")
        if str(plan) == self.raises:
            raise RuntimeError("a bad plan")
        died = self.folder / "died"
        if str(plan) == self.dies_once and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        hung = self.folder / "hung"
        if str(plan) == self.hangs_once and not hung.exists():
            hung.touch()
            time.sleep(600)
        return _values(plan) | {"scores": {"items": [0.5] * 10}}


def _search(folder, spec, known=None, on_plan=None, watch=UNWATCHED, **trouble):
    folder.mkdir(exist_ok=True)
    taken, failures = {}, []

    def take(done):
        assert done.unit.plan_id not in taken and done.seconds > 0 and done.worker.pid != os.getpid()
        taken[done.unit.plan_id] = done.result

    results = run_search(
        _state(spec, known),
        lambda: _Counting(folder, **trouble),
        WorkerResources(2, 1, 0),
        on_plan=on_plan or take,
        on_failure=failures.append,
        watch=watch,
    )
    return results, taken, failures


@pytest.mark.cluster
@pytest.mark.parametrize("method", ["thresholds", "evolution"])
def test_with_tune_the_way_is_the_same_through_deaths_and_failures_and_a_resume(ray_local, tmp_path, method):
    spec = SearchSpec(SPACE, method, trials=14, seed=5, lag=4)
    expected, _ = _drive(spec)
    dies = str(next(point.plan for point in expected if point.origin == "search" and not point.repeated))
    results, taken, failures = _search(tmp_path / "first", spec, dies_once=dies)
    assert not failures and (tmp_path / "first" / "died").exists()
    assert [way[:4] for way in _way(results)] == [way[:4] for way in _way(expected)]
    assert {point.plan.plan_id for point in results} == set(taken)
    marks = [mark for mark in (tmp_path / "first").iterdir() if mark.name != "died"]
    assert {mark.name: mark.read_text().count("\n") for mark in marks} == {
        str(point.plan): 2 if str(point.plan) == dies else 1 for point in results
    }
    assert results[0].values["scores"] == {"items": [0.5] * 10}

    again, taken_again, _ = _search(tmp_path / "second", spec, known=taken)
    assert not taken_again and not list((tmp_path / "second").iterdir())
    assert _way(again) == _way(results) and all(point.repeated for point in again)

    some = dict(list(taken.items())[:6])
    resumed, rest, failures = _search(tmp_path / "third", spec, known=some)
    assert _way(resumed) == _way(results) and set(rest) == set(taken) - set(some) and not failures


@pytest.mark.cluster
def test_with_tune_a_plan_that_raises_is_reported_and_the_processes_live_on(ray_local, tmp_path):
    results, _, failures = _search(tmp_path / "a", SearchSpec(SPACE, trials=4, seed=1), raises="WWWWWWWW")
    assert [str(failure.unit) for failure in failures] == ["WWWWWWWW"]
    assert "RuntimeError: a bad plan" in failures[0].error and failures[0].n_attempts == 3
    assert (tmp_path / "a" / "WWWWWWWW").read_text().count("\n") == 3
    assert [point.error is None for point in results if point.origin == "all_window"] == [False]
    assert sum(point.error is None for point in results) == len(results) - 1
    pids = {pid for mark in (tmp_path / "a").iterdir() for pid in mark.read_text().split()}
    assert len(pids) <= 2


@pytest.mark.cluster
def test_with_tune_a_hung_process_ends_itself_and_its_plan_is_tried_again(ray_local, tmp_path):
    events = []
    spec = SearchSpec(SPACE, trials=1, seed=1)
    results, taken, failures = _search(tmp_path / "a", spec, watch=Watch(3.0, events.append), hangs_once="NNNNNNNN")
    assert (tmp_path / "a" / "hung").exists() and not failures
    assert {point.plan.plan_id for point in results} == set(taken)
    assert (tmp_path / "a" / "NNNNNNNN").read_text().count("\n") == 2
    assert [event.what for event in events if str(event.unit) == "NNNNNNNN"] == ["started", "done"]


@pytest.mark.cluster
def test_with_tune_what_the_callback_raises_comes_through(ray_local, tmp_path):
    def full(*_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _search(tmp_path / "b", SearchSpec(SPACE, trials=4), on_plan=full)


@pytest.mark.cluster
def test_with_tune_the_first_interrupt_hands_over_what_is_under_way(ray_local, tmp_path):
    taken = []

    def interrupt(done):
        taken.append(done.unit)
        if len(taken) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _search(tmp_path / "c", SearchSpec(SPACE, trials=10), on_plan=interrupt)
    evaluated = {mark.name for mark in (tmp_path / "c").iterdir()}
    assert evaluated == {str(plan) for plan in taken} and 1 <= len(taken) <= 3
