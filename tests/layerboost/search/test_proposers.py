"""Tests the proposers: thresholds that never cross, the exact front, evolution from it, swaps, all in the space."""

import random

import numpy as np
import pytest

from layerboost.plan import Plan, PlanError, Treatment, plan_from_thresholds
from layerboost.search.knapsack import knapsack_front
from layerboost.search.loop import SearchSpec, Suggestion
from layerboost.search.pareto import hypervolume
from layerboost.search.plan_space import Limit, PlanSpace
from layerboost.search.proposers import SampledPlans, Thresholds, make_proposer

DROPS = [0.03, 0.21, 0.05, 0.04, 0.06, 0.035, 0.08, 0.1]
TREATMENTS = (Treatment.SOFTMAX, Treatment.LINEAR_WINDOW, Treatment.NONE)


def _space(drops, **settings):
    return PlanSpace(len(drops), TREATMENTS, 64, **settings)


def _limit(treatment, at_most, n_layers=8):
    return Limit(f"n_{treatment}", {t: (float(t is treatment),) * n_layers for t in Treatment}, at_most)


def _layers(n_layers, seed):
    """Draws costs and times of layers, and what pairs of neighbours cost beyond their sum."""
    draw = np.random.default_rng(seed)
    none = draw.gamma(1.0, 0.05, n_layers)
    costs = {Treatment.NONE: none.tolist(), Treatment.LINEAR_WINDOW: (none * draw.uniform(0.1, 0.6, n_layers)).tolist()}
    times = {t: [value] * n_layers for t, value in zip(TREATMENTS, (5.0, 2.0, 1.0), strict=True)}
    return costs, times, draw.normal(0.0, 0.06, n_layers - 1)


def _outcome(plan, costs, times, pairs):
    loss = sum(costs[t][i] for i, t in enumerate(plan.treatments) if t in costs)
    both = (a != "S" and b != "S" for a, b in zip(str(plan), str(plan)[1:], strict=False))
    loss += sum(pair for pair, treated in zip(pairs, both, strict=True) if treated)
    return -loss, (10.0 + len(plan) * 5.0) / (10.0 + sum(times[t][i] for i, t in enumerate(plan.treatments)))


def _run(proposer, outcome, n_trials):
    """Asks and tells in turn, and returns the plans in order."""
    plans = []
    while len(plans) < n_trials and (suggestion := proposer.suggest(len(plans))) is not None:
        plans.append(suggestion.plan)
        proposer.tell(len(plans) - 1, outcome(suggestion.plan))
    return plans


def test_the_knapsack_plans_are_the_exact_front_spread():
    costs, times, _ = _layers(8, 0)
    spec = SearchSpec(_space(DROPS, pinned={0: Treatment.SOFTMAX}), "knapsack", trials=6)
    plans = _run(make_proposer(spec, costs, times, 10.0), lambda plan: None, 100)
    assert plans == knapsack_front(spec.space, costs, times, 6)
    assert set(plans) <= set(knapsack_front(spec.space, costs, times)) and len(plans) == 6
    assert len(_run(make_proposer(SearchSpec(spec.space, "knapsack", trials=1), costs, times, 10.0), print, 100)) == 2


def test_evolution_begins_with_the_knapsack_plans_and_betters_them():
    costs, times, pairs = _layers(12, 1)
    spec = SearchSpec(_space([0] * 12), "evolution", trials=60, seed=2, lag=4)
    plans = _run(make_proposer(spec, costs, times, 10.0), lambda plan: _outcome(plan, costs, times, pairs), 60)
    assert len(plans) == len(set(plans)) == 60
    seeds = knapsack_front(spec.space, costs, times, 30)
    assert plans[: len(seeds)] == seeds
    covered = [
        hypervolume([_outcome(plan, costs, times, pairs) for plan in some], (-2.0, 1.0)) for some in (seeds, plans)
    ]
    assert covered[1] > covered[0]


@pytest.mark.parametrize("method", ["thresholds", "evolution", "knapsack", "swaps"])
def test_a_space_of_one_plan_is_proposed_once(method):
    costs, times, _ = _layers(3, 0)
    pinned = dict(enumerate((Treatment.SOFTMAX, Treatment.NONE, Treatment.LINEAR_WINDOW)))
    spec = SearchSpec(PlanSpace(3, TREATMENTS, 64, pinned), method)
    plans = _run(make_proposer(spec, costs, times, 10.0), lambda plan: (0.0, 1.0), 5)
    assert {str(plan) for plan in plans} == {"SNL"}
    assert len(plans) == (5 if method == "thresholds" else 1)


def test_thresholds_leave_pinned_layers_as_they_are_and_hold_limits():
    space = _space(DROPS, pinned={0: Treatment.SOFTMAX, 7: Treatment.WINDOW}, limits=(_limit(Treatment.SOFTMAX, 3),))
    proposer = make_proposer(SearchSpec(space, seed=4), {Treatment.NONE: DROPS}, {}, 10.0)
    for trial in range(30):
        suggestion = proposer.suggest(trial)
        free = plan_from_thresholds(DROPS, suggestion.remove_below, suggestion.keep_above, TREATMENTS[1], 64)
        assert str(suggestion.plan) == f"S{str(free)[1:7]}W" and space.holds(suggestion.plan)
        proposer.tell(trial, (0.0, 1.0) if trial % 2 else None)


class _Sampler:
    """Proposes plans in a cycle and records what it is told."""

    def __init__(self, plans):
        self.plans, self.n, self.told = plans, 0, []

    def suggest(self, trial_id):
        self.n += 1
        return self.plans[(self.n - 1) % len(self.plans)]

    def on_trial_complete(self, trial_id, result=None, error=False):
        self.told.append((trial_id, result, error))


def test_what_is_of_no_use_is_told_as_failed_and_is_no_trial():
    space = _space([0, 0], limits=(_limit(Treatment.NONE, 1, 2),))
    sampler = _Sampler(["NN", "SN", "SN", "NS"])
    proposer = SampledPlans(sampler, lambda text: Suggestion(Plan.parse(text)), space, distinct=True)
    assert [str(proposer.suggest(trial).plan) for trial in range(2)] == ["SN", "NS"]
    assert sampler.told == [("0", None, True), ("2", None, True)]
    proposer.tell(0, (0.5, 2.0))
    proposer.tell(1, None)
    assert sampler.told[2:] == [("1", {"objective": 0.5, "speedup": 2.0}, False), ("3", None, True)]
    assert proposer.suggest(2) is None and sampler.n < 1000


def test_an_empty_space_is_refused():
    costs, times, _ = _layers(8, 0)
    space = _space(DROPS, pinned={0: Treatment.SOFTMAX}, limits=(_limit(Treatment.SOFTMAX, 0),))
    for method in ("knapsack", "evolution"):
        with pytest.raises(PlanError, match="n_softmax"):
            make_proposer(SearchSpec(space, method), costs, times, 10.0)


def test_thresholds_never_cross_and_reach_every_plan():
    thresholds, spec = Thresholds(DROPS, SearchSpec(_space(DROPS))), SearchSpec(_space(DROPS))
    plans = set()
    for removed in np.linspace(0, 1, 60):
        for middle in np.linspace(0, 1, 60):
            low, high = thresholds(removed, middle)
            assert low <= high
            plans.add(str(plan_from_thresholds(DROPS, low, high, spec.middle, spec.space.window)))
    n = len(DROPS)
    assert len(plans) == (n + 1) * (n + 2) // 2
    assert thresholds(0, 0)[0] < min(DROPS) and thresholds(1, 0)[0] > max(DROPS)


@pytest.mark.parametrize("seed", range(20))
def test_ranges_of_the_recipe_hold(seed):
    draw = random.Random(seed)
    low, high = (tuple(sorted((draw.uniform(-0.05, 0.3), draw.uniform(-0.05, 0.3)))) for _ in range(2))
    if low[0] > high[1]:
        low, high = high, low
    thresholds = Thresholds(DROPS, SearchSpec(_space(DROPS), remove_below=low, keep_above=high))
    for _ in range(50):
        remove_below, keep_above = thresholds(draw.random(), draw.random())
        assert low[0] <= remove_below <= low[1] and remove_below <= keep_above
        assert high[0] <= keep_above <= max(high[1], remove_below)


@pytest.mark.parametrize("drops", [[0.1] * 5, [0.0, 0.0], [-0.02, 0.01, 0.01], [0.3]])
def test_equal_drops_are_treated_alike(drops):
    thresholds = Thresholds(drops, SearchSpec(_space(DROPS)))
    for _ in range(50):
        low, high = thresholds(random.random(), random.random())
        plan = plan_from_thresholds(drops, low, high, Treatment.WINDOW, 4)
        assert len(set(zip(drops, plan.treatments, strict=True))) == len(set(drops))


def test_a_drop_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Thresholds([0.1, float("nan")], SearchSpec(_space(DROPS)))
