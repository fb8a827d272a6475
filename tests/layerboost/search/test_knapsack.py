from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from layerboost.plan import Plan, PlanError, Treatment
from layerboost.search.knapsack import knapsack_front, spread_order
from layerboost.search.pareto import front
from layerboost.search.plan_space import Limit, PlanSpace

ALL = tuple(Treatment)
S, N = Treatment.SOFTMAX, Treatment.NONE


def sums(plan: Plan, *values) -> tuple[float, ...]:
    """Returns rounded sums, because sums in another order may differ in their last digits."""
    return tuple(round(sum(v[t][layer] for layer, t in enumerate(plan.treatments)), 7) for v in values)


def by_enumeration(space: PlanSpace, costs, times) -> list[tuple[float, ...]]:
    """Returns costs and times of the front by enumeration, slowest first, without duplicates."""
    plans = (space.plan(t) for t in product(*(space.choices(layer) for layer in range(space.n_layers))))
    points = [sums(plan, costs, times) for plan in plans if space.holds(plan)]
    mask = front([(-cost, -time) for cost, time in points])
    return sorted({point for point, keep in zip(points, mask, strict=True) if keep})


def random_instance(rng: np.random.Generator, kind: str):
    n_layers = int(rng.integers(1, 6))
    draw = {
        "ties": lambda: {t: rng.integers(0, 4, n_layers).astype(float).tolist() for t in ALL},
        "bytes": lambda: {t: [float(rng.integers(1 << 40))] * n_layers for t in ALL},
        "floats": lambda: {t: rng.uniform(-0.1, 1, n_layers).tolist() for t in ALL},
        "tied_floats": lambda: {t: [float(rng.choice([0.1, 0.2, 0.3]))] * n_layers for t in ALL},
    }
    costs, times = draw["floats" if kind == "bytes" else kind](), draw[kind]()
    limits = ()
    if rng.random() < 0.5:
        limits = tuple(
            Limit(name, {t: tuple(rng.uniform(0, 1e6, n_layers)) for t in ALL}, 6e5 * n_layers) for name in "ab"
        )
    pinned = {int(rng.integers(n_layers)): ALL[int(rng.integers(4))]} if rng.random() < 0.5 else {}
    return PlanSpace(n_layers, ALL if rng.random() < 0.5 else (S, N), 16, pinned, limits), costs, times


@pytest.mark.parametrize("kind", ["ties", "bytes", "floats", "tied_floats"])
def test_the_front_is_that_of_all_plans(kind):
    rng = np.random.default_rng()
    for _ in range(12):
        space, costs, times = random_instance(rng, kind)
        expected = by_enumeration(space, costs, times)
        if not expected:
            with pytest.raises(PlanError):
                knapsack_front(space, costs, times)
            continue
        plans = knapsack_front(space, costs, times)
        assert [sums(plan, costs, times) for plan in plans] == expected
        assert all(space.contains(plan) for plan in plans)
        assert plans == knapsack_front(space, costs, times)
        some = knapsack_front(space, costs, times, max_plans=3)
        points = [sums(plan, costs, times) for plan in some]
        assert len(some) == min(3, len(expected)) and set(points) <= set(expected)
        assert points[0] == expected[0] and points[-1] == expected[-1]


def test_few_plans_of_a_deep_model_spread_over_the_times():
    rng = np.random.default_rng(0)
    costs = {N: rng.exponential(0.1, 80).tolist()}
    times = {S: [1.0] * 80, N: [0.0] * 80}
    plans = knapsack_front(PlanSpace(80, (S, N)), costs, times, max_plans=9)
    assert [plan.count(S) for plan in plans] == list(range(80, -1, -10))
    order = np.argsort(costs[N])
    assert [plans[4].treatments[layer] for layer in order] == [N] * 40 + [S] * 40


def test_pinned_layers_need_no_costs():
    space = PlanSpace(3, (S, N), 16, pinned={1: Treatment.WINDOW})
    plans = knapsack_front(space, {N: [1.0, 9.0, 2.0]}, {S: [1.0] * 3, N: [0.0] * 3})
    assert [str(plan) for plan in plans] == ["SWS", "NWS", "NWN"]


def test_an_empty_space_names_its_limit():
    count = {S: (1.0, 1.0), N: (0.0, 0.0)}
    kv = {S: (0.0, 0.0), N: (1.0, 1.0)}
    costs, times = {N: [1.0, 1.0]}, {S: [1.0, 1.0], N: [0.0, 0.0]}
    space = PlanSpace(2, (S, N), pinned={0: S, 1: S}, limits=(Limit("n_softmax", count, 1),))
    with pytest.raises(PlanError, match="n_softmax: no plan has at most 1, the least is 2"):
        knapsack_front(space, costs, times)
    space = PlanSpace(2, (S, N), limits=(Limit("n_softmax", count, 0), Limit("n_none", kv, 1)))
    with pytest.raises(PlanError, match="n_softmax, n_none: no plan holds them together"):
        knapsack_front(space, costs, times)


@pytest.mark.parametrize(
    ("costs", "max_plans", "message"),
    [
        ({}, None, "costs: gives no value of none"),
        ({N: [1.0]}, None, "costs: gives no value of none for each of 2"),
        ({N: [1.0, float("nan")]}, None, "costs.none: layer 1 has nan"),
        ({N: [1.0, 2.0]}, 1, "max_plans: 1"),
    ],
)
def test_arguments_are_checked(costs, max_plans, message):
    with pytest.raises(PlanError, match=message):
        knapsack_front(PlanSpace(2, (S, N)), costs, {S: [1.0, 1.0], N: [0.0, 0.0]}, max_plans)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17])
def test_beginnings_of_the_order_cover_the_range(n):
    order = spread_order(n)
    assert sorted(order) == list(range(n))
    if n == 17:
        assert sorted(order[:5]) == [0, 4, 8, 12, 16]
