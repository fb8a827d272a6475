"""The search: thresholds that never cross, one way whatever was known before, each plan evaluated once."""

import os
import random
import signal
import sys

import numpy as np
import pytest
from ray import cloudpickle

from layerboost.plan import Plan, PlanError, Treatment, plan_from_thresholds
from tasks.cluster import WorkerResources
from tasks.search import SearchSpec, SearchState, Thresholds, distinct, fixed_points, run_search
from tasks.tuning import make_sampler

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DROPS = [0.03, 0.21, 0.05, 0.04, 0.06, 0.035, 0.08, 0.1]


def _value(plan: Plan) -> dict:
    removed, middle = plan.count(Treatment.NONE), plan.count(Treatment.LINEAR_WINDOW)
    return {"quality": 1 - 0.05 * removed - 0.02 * middle, "speedup": 1 + 0.2 * removed + 0.1 * middle}


def _drive(spec, known=None, n_workers=1, order=None, fails=()):
    """Runs a search without Ray, with results coming back in a random order; the results and the evaluated plans."""
    state = SearchState(DROPS, spec, make_sampler(spec), known or {})
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
            state.finish(plan, _value(plan))


def _way(results):
    return [(point.origin, str(point.plan), point.remove_below, point.keep_above, point.values) for point in results]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_the_way_does_not_depend_on_workers_order_or_what_is_known(sampler):
    spec = SearchSpec(trials=36, seed=random.randrange(1000), sampler=sampler, lag=4)
    undisturbed, evaluated = _drive(spec)
    assert len(undisturbed) == 4 + 36
    assert len(evaluated) == len({plan.plan_id for plan in evaluated}) == len(distinct(undisturbed))
    for n_workers in (2, 7):
        again, _ = _drive(spec, n_workers=n_workers, order=random.Random())
        assert _way(again) == _way(undisturbed)
    # A driver that died after any number of records goes the same way and evaluates only what is new.
    n_recorded = random.randrange(1, len(evaluated))
    known = {plan.plan_id: _value(plan) for plan in evaluated[:n_recorded]}
    resumed, rest = _drive(spec, known=known, n_workers=3, order=random.Random())
    assert _way(resumed) == _way(undisturbed)
    assert {plan.plan_id for plan in rest} == {plan.plan_id for plan in evaluated[n_recorded:]}
    assert _drive(spec, known={plan.plan_id: _value(plan) for plan in evaluated})[1] == []


def test_another_seed_or_lag_goes_another_way():
    ways = [_way(_drive(SearchSpec(trials=30, seed=seed, lag=lag))[0]) for seed, lag in ((0, 4), (1, 4), (0, 9))]
    assert ways[0] != ways[1] and ways[0] != ways[2]


def test_the_sampler_learns_from_the_values():
    spec = SearchSpec(trials=60, seed=3, lag=2)
    state = SearchState(DROPS, spec, make_sampler(spec), {})
    while (plan := state.next_plan()) is not None:
        # Only one thing counts: how many layers are removed, and four is best in both objectives.
        state.finish(plan, {"quality": -abs(plan.count(Treatment.NONE) - 4), "speedup": 0.0})
    removed = [point.plan.count(Treatment.NONE) for point in state.results() if point.origin == "search"]
    near = [sum(abs(n - 4) <= 1 for n in part) for part in (removed[:15], removed[-15:])]
    assert near[1] > near[0]


def test_a_failed_plan_is_a_point_and_not_tried_twice():
    spec = SearchSpec(trials=20, seed=0)
    good, _ = _drive(spec)
    bad = str(next(point.plan for point in good if point.origin == "search"))
    results, evaluated = _drive(spec, fails={bad, "NNNNNNNN"})
    assert [str(plan) for plan in evaluated].count(bad) == 1
    failed = [point for point in results if point.status == "failed"]
    assert {str(point.plan) for point in failed} == {bad, "NNNNNNNN"}
    assert all(point.values is None and point.error == "it failed" for point in failed)
    assert len(results) == 4 + 20


def test_thresholds_never_cross_and_reach_every_plan():
    thresholds, spec = Thresholds(DROPS, SearchSpec()), SearchSpec()
    plans = set()
    for removed in np.linspace(0, 1, 60):
        for middle in np.linspace(0, 1, 60):
            low, high = thresholds(removed, middle)
            assert low <= high
            plans.add(str(plan_from_thresholds(DROPS, low, high, spec.middle, spec.window)))
    n = len(DROPS)
    assert len(plans) == (n + 1) * (n + 2) // 2
    assert thresholds(0, 0)[0] < min(DROPS) and thresholds(1, 0)[0] > max(DROPS)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_the_recipe_hold(seed):
    draw = random.Random(seed)
    low, high = (tuple(sorted((draw.uniform(-0.05, 0.3), draw.uniform(-0.05, 0.3)))) for _ in range(2))
    if low[0] > high[1]:
        low, high = high, low
    thresholds = Thresholds(DROPS, SearchSpec(remove_below=low, keep_above=high))
    for _ in range(50):
        remove_below, keep_above = thresholds(draw.random(), draw.random())
        assert low[0] <= remove_below <= low[1] and remove_below <= keep_above
        assert high[0] <= keep_above <= max(high[1], remove_below)


@pytest.mark.parametrize("drops", [[0.1] * 5, [0.0, 0.0], [-0.02, 0.01, 0.01], [0.3]])
def test_equal_drops_are_treated_alike(drops):
    thresholds = Thresholds(drops, SearchSpec())
    for _ in range(50):
        low, high = thresholds(random.random(), random.random())
        plan = plan_from_thresholds(drops, low, high, Treatment.WINDOW, 4)
        assert len(set(zip(drops, plan.treatments, strict=True))) == len(set(drops))


def test_a_drop_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Thresholds([0.1, float("nan")], SearchSpec())


def test_the_fixed_points_are_there_once():
    given = (Plan.parse("SNSN"), Plan.parse("NNNN"), Plan.parse("SLWN", 5), Plan.parse("SNSN"))
    spec = SearchSpec(window=8, plans=given)
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
    """An evaluator that leaves a mark for each evaluation, and fails or dies on demand."""

    def __init__(self, folder, raises=None, dies_once=None):
        self.folder, self.raises, self.dies_once = folder, raises, dies_once

    def __call__(self, plan):
        with (self.folder / str(plan)).open("a") as mark:
            mark.write(f"{os.getpid()}\n")
        if str(plan) == self.raises:
            raise RuntimeError("a bad plan")
        died = self.folder / "died"
        if str(plan) == self.dies_once and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return _value(plan) | {"scores": {"items": [0.5] * 10}}


def _search(folder, spec, known=None, on_plan=None, **trouble):
    folder.mkdir(exist_ok=True)
    taken, failures = {}, []

    def take(plan, values, duration_s, info):
        assert plan.plan_id not in taken and duration_s > 0 and info["pid"] != os.getpid()
        taken[plan.plan_id] = values

    results = run_search(
        DROPS,
        spec,
        lambda: _Counting(folder, **trouble),
        WorkerResources(2, 1, 0),
        on_plan=on_plan or take,
        on_failure=failures.append,
        known=known,
    )
    return results, taken, failures


@pytest.mark.cluster
def test_with_tune_the_way_is_the_same_through_deaths_and_failures_and_a_resume(ray_local, tmp_path):
    spec = SearchSpec(trials=14, seed=5, lag=4)
    expected, _ = _drive(spec)
    dies = str(next(point.plan for point in expected if point.origin == "search" and not point.repeated))
    results, taken, failures = _search(tmp_path / "first", spec, dies_once=dies)
    assert not failures and (tmp_path / "first" / "died").exists()
    assert [way[:4] for way in _way(results)] == [way[:4] for way in _way(expected)]
    assert {point.plan.plan_id for point in results} == set(taken)
    marks = [mark for mark in (tmp_path / "first").iterdir() if mark.name != "died"]
    assert {mark.name: mark.read_text().count("\n") for mark in marks} == {
        str(point.plan): 2 if str(point.plan) == dies else 1 for point in distinct(results)
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
    results, _, failures = _search(tmp_path / "a", SearchSpec(trials=4, seed=1), raises="WWWWWWWW")
    assert [str(failure.unit) for failure in failures] == ["WWWWWWWW"]
    assert "RuntimeError: a bad plan" in failures[0].error
    assert [point.status for point in results if point.origin == "all_window"] == ["failed"]
    assert sum(point.status == "done" for point in results) == len(results) - 1
    pids = {pid for mark in (tmp_path / "a").iterdir() for pid in mark.read_text().split()}
    assert len(pids) <= 2


@pytest.mark.cluster
def test_with_tune_what_the_callback_raises_comes_through(ray_local, tmp_path):
    def full(*_):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _search(tmp_path / "b", SearchSpec(trials=4), on_plan=full)


@pytest.mark.cluster
def test_with_tune_the_first_interrupt_hands_over_what_is_under_way(ray_local, tmp_path):
    taken = []

    def interrupt(plan, *_):
        taken.append(plan)
        if len(taken) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _search(tmp_path / "c", SearchSpec(trials=10), on_plan=interrupt)
    evaluated = {mark.name for mark in (tmp_path / "c").iterdir()}
    assert evaluated == {str(plan) for plan in taken} and 1 <= len(taken) <= 3
