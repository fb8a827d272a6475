from __future__ import annotations

import math
from collections import deque
from itertools import product

import numpy as np
import pytest

from layerboost.plan import Plan, PlanError, Treatment
from layerboost.search.front_swaps import FrontSwaps, _expected_gains
from layerboost.search.knapsack import knapsack_front
from layerboost.search.pareto import hypervolume
from layerboost.search.plan_space import Limit, PlanSpace
from layerboost.search.refinement import predicted_drop

S, L, N = Treatment.SOFTMAX, Treatment.LINEAR_WINDOW, Treatment.NONE
REST = 2.0


class World:
    """Draws random single costs, and interactions of pairs that grow with the layers' costs."""

    def __init__(self, seed: int, n_layers: int = 7):
        rng = np.random.default_rng(seed)
        self.space = PlanSpace(n_layers, (S, L, N), 16)
        self.costs = {L: rng.uniform(0.01, 0.1, n_layers).tolist(), N: rng.uniform(0.03, 0.3, n_layers).tolist()}
        self.times = {S: [1.0] * n_layers, L: [0.3] * n_layers, N: [0.0] * n_layers}
        self._pairs = np.triu(rng.normal(3.0, 6.0, (n_layers, n_layers)), 1)

    def loss(self, plan: Plan) -> float:
        single = np.array([self.costs[t][i] if t != S else 0.0 for i, t in enumerate(plan.treatments)])
        return predicted_drop(plan, self.costs) + float(single @ self._pairs @ single)

    def point(self, plan: Plan) -> tuple[float, float]:
        time = REST + sum(self.times[t][layer] for layer, t in enumerate(plan.treatments))
        return math.exp(-self.loss(plan)), (REST + len(plan)) / time

    def hypervolume(self, plans) -> float:
        return hypervolume([self.point(plan) for plan in plans], (0.0, 1.0))

    def search(self, **options) -> FrontSwaps:
        return FrontSwaps(options.pop("space", self.space), self.costs, self.times, rest_time=REST, **options)


def run(search: FrontSwaps, loss, n: int, lag: int = 8) -> list[Plan]:
    """Returns up to `n` plans in the order proposed and observed, with up to `lag` of them pending at a time."""
    plans: list[Plan] = []
    out: deque[Plan] = deque()
    while True:
        plan = search.next_plan() if len(plans) < n else None
        if plan is not None:
            plans.append(plan)
            out.append(plan)
        elif not out:
            return plans
        if plan is None or len(out) == lag:
            told = out.popleft()
            search.observe(told, loss(told))


@pytest.fixture
def world() -> World:
    return World(int(np.random.default_rng().integers(1 << 30)))


def test_it_comes_near_the_best_front_and_nearer_than_single_costs_do():
    swaps, alone = [], []
    for seed in range(3):
        world = World(seed)
        best = world.hypervolume(map(world.space.plan, product((S, L, N), repeat=7)))
        swaps.append(world.hypervolume(run(world.search(), world.loss, 60)) / best)
        alone.append(world.hypervolume(knapsack_front(world.space, world.costs, world.times)) / best)
    assert np.mean(swaps) > 0.98
    assert 1 - np.mean(swaps) < (1 - np.mean(alone)) / 2


def test_it_begins_with_plans_over_the_whole_range_of_speeds(world):
    search = world.search()
    first, second, third = (search.next_plan() for _ in range(3))
    assert str(first) == "S" * 7 and str(second) == "N" * 7
    assert 1.2 < world.point(third)[1] < world.point(second)[1] * 0.8


def test_no_plan_comes_twice_and_the_same_observations_give_the_same_plans(world):
    plans = run(world.search(), world.loss, 30)
    assert len(set(plans)) == 30
    assert plans == run(world.search(), world.loss, 30)
    known = {plan: world.loss(plan) for plan in plans[:10]}
    assert not set(known) & set(run(world.search(known=known), world.loss, 20))


def test_proposals_hold_pins_and_limits(world):
    limit = Limit("n_softmax", {t: (float(t is S),) * 7 for t in Treatment}, 3)
    space = PlanSpace(7, (S, L, N), 16, {2: Treatment.WINDOW, 5: S}, (limit,))
    plans = run(FrontSwaps(space, world.costs, world.times, rest_time=REST), lambda plan: len(set(str(plan))), 30)
    assert len(plans) == 30 and all(space.contains(plan) for plan in plans)


def test_it_ends_when_all_plans_are_known():
    space = PlanSpace(2, (S, N))
    plans = run(FrontSwaps(space, {N: [0.1, 0.2]}, {S: [1.0, 1.0], N: [0.5, 0.5]}), lambda plan: 0.1, 10)
    assert sorted(map(str, plans)) == ["NN", "NS", "SN", "SS"]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_failed_plans_are_passed_over(world, bad):
    def loss(plan: Plan) -> float | None:
        return bad if plan.treatments[0] is N else world.loss(plan)

    plans = run(world.search(), loss, 30)
    assert len(set(plans)) == 30
    assert len(run(world.search(), lambda plan: bad, 30, lag=1)) <= 16  # without a front only the starts are proposed


def test_without_a_choice_there_is_one_plan(world):
    for space in (PlanSpace(7, (S,)), PlanSpace(7, (S, N), pinned=dict.fromkeys(range(7), S))):
        assert list(map(str, run(world.search(space=space), world.loss, 30))) == ["S" * 7]


def test_losses_count_from_any_level(world):
    plans = run(world.search(), world.loss, 30)
    assert plans == run(world.search(), lambda plan: world.loss(plan) - 0.5, 30)


def test_only_what_is_out_is_observed(world):
    search = world.search()
    plan = search.next_plan()
    search.observe(plan, 0.0)
    with pytest.raises(PlanError, match="not proposed or is observed"):
        search.observe(plan, 0.0)


def test_a_step_must_take_time():
    with pytest.raises(PlanError, match="'NN' would take 0"):
        FrontSwaps(PlanSpace(2, (S, N)), {N: [0.1, 0.1]}, {S: [1.0, 1.0], N: [0.0, 0.0]})


def test_expected_gain_is_the_mean_gain_in_hypervolume():
    rng = np.random.default_rng(0)
    on_front = [(0.9, 1.2), (0.6, 2.0), (0.3, 3.0)]
    quality, speed = (np.array(values) for values in zip(*on_front, strict=True))
    before = hypervolume(on_front, (0.0, 1.0))
    for mean, at in ((0.7, 1.8), (0.5, 1.1), (0.4, 4.0)):
        gains = [hypervolume([*on_front, (q, at)], (0.0, 1.0)) - before for q in rng.normal(mean, 0.1, 20_000)]
        found = _expected_gains(np.array([mean]), np.array([0.1]), np.array([at]), quality, speed)
        assert found[0] == pytest.approx(np.mean(gains), abs=0.003)
