from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from layerboost.plan import Plan, Treatment
from layerboost.search.refinement import (
    GreedySwaps,
    PairwiseModel,
    RefinementError,
    Refiner,
    make_refiner,
    predicted_drop,
)

WINDOW = 16
METHODS = ("greedy", "pairwise")
LETTERS = ("SSSSLLLLNNNN", "SSSSSSSSNNNN")
SCALE = {Treatment.NONE: 1.0, Treatment.LINEAR_WINDOW: 0.4}


class World:
    """Draws random single costs and pair interactions, and holds the plan that single costs would choose."""

    def __init__(self, seed: int, letters: str, interaction: float = 0.03):
        rng = np.random.default_rng(seed)
        self.n_layers = len(letters)
        self.kinds = [kind for kind in SCALE if kind.letter in letters]
        self.costs = {kind: list(SCALE[kind] * rng.uniform(0.03, 0.2, self.n_layers)) for kind in self.kinds}
        n_slots = len(self.kinds) * self.n_layers
        self.pairs = np.triu(rng.normal(0, interaction, (n_slots, n_slots)), 1)
        self.plans = _arrangements(letters)
        self._features = _features(letters)
        self._sums = self._features @ np.concatenate([self.costs[kind] for kind in self.kinds])
        self.start = self.plans[int(self._sums.argmin())]

    def loss(self, plan: Plan) -> float:
        slots = [
            self.kinds.index(treatment) * self.n_layers + layer
            for layer, treatment in enumerate(plan.treatments)
            if treatment != Treatment.SOFTMAX
        ]
        slots.sort()
        return 2.0 + predicted_drop(plan, self.costs) + float(self.pairs[np.ix_(slots, slots)].sum())

    def losses_of_all(self) -> np.ndarray:
        return 2.0 + self._sums + ((self._features @ self.pairs) * self._features).sum(axis=1)


@cache
def _arrangements(letters: str) -> list[Plan]:
    layers = set(range(len(letters)))
    found = []
    for removed in combinations(sorted(layers), letters.count("N")):
        for linear in combinations(sorted(layers - set(removed)), letters.count("L")):
            plan = [Treatment.SOFTMAX] * len(letters)
            for layer in removed:
                plan[layer] = Treatment.NONE
            for layer in linear:
                plan[layer] = Treatment.LINEAR_WINDOW
            found.append(Plan(tuple(plan), WINDOW))
    return found


@cache
def _features(letters: str) -> np.ndarray:
    texts = np.array([list(str(plan)) for plan in _arrangements(letters)])
    return np.concatenate([texts == kind.letter for kind in SCALE if kind.letter in letters], axis=1).astype(float)


@pytest.fixture
def small() -> World:
    return World(int(np.random.default_rng().integers(1 << 30)), "SSLLNN")


def refine(refiner: Refiner, loss: Callable[[Plan], float]) -> list[list[Plan]]:
    rounds = []
    while plans := refiner.propose():
        rounds.append(plans)
        refiner.observe({plan: loss(plan) for plan in plans})
    assert refiner.finished
    return rounds


def make(method: str, world: World, max_plans: int = 48, **options) -> Refiner:
    return make_refiner(method, world.start, world.costs, max_plans, **options)  # type: ignore[arg-type]


def test_predicted_drop_is_the_sum_of_single_drops():
    costs = {Treatment.NONE: [1.0, 2.0, 4.0], Treatment.WINDOW: [0.1, 0.2, 0.4]}
    assert predicted_drop(Plan.parse("NSW", WINDOW), costs) == pytest.approx(1.4)
    assert predicted_drop(Plan.parse("SSS"), {}) == 0


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({}, "costs: none for 'none'"),
        ({Treatment.NONE: [1.0]}, "costs.none: 1 drops for 2 layers"),
        ({Treatment.NONE: [1.0, math.nan]}, "costs.none: layer 1 has nan"),
    ],
)
def test_costs_are_checked(costs, message):
    with pytest.raises(RefinementError, match=message):
        predicted_drop(Plan.parse("NS"), costs)
    with pytest.raises(RefinementError, match=message):
        GreedySwaps(Plan.parse("NS"), costs, 4)


@pytest.mark.parametrize("letters", LETTERS)
def test_refinement_closes_most_of_the_gap_to_the_best_plan(letters, record_property):
    first = int(np.random.default_rng().integers(1 << 30))
    closed: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in range(first, first + 20):
        world = World(seed, letters)
        before, lowest = world.loss(world.start), world.losses_of_all().min()
        for method in METHODS:
            refiner = make(method, world)
            rounds = refine(refiner, world.loss)
            proposed = [plan for plans in rounds for plan in plans]
            best, loss = refiner.best
            assert loss == world.loss(best) <= before, seed
            assert sorted(best.treatments) == sorted(world.start.treatments)
            assert best.window == world.start.window
            assert len(proposed) == len(set(proposed)) == refiner.n_evaluated <= 48
            assert max(map(len, rounds)) <= 16
            closed[method].append((before - loss) / (before - lowest) if before > lowest else 1.0)
    for method, parts in closed.items():
        record_property(method, float(np.mean(parts)))
        assert np.mean(parts) > 0.6, (method, first, parts)


@pytest.mark.parametrize("method", METHODS)
def test_additive_losses_leave_the_start(method):
    world = World(int(np.random.default_rng().integers(1 << 30)), "SSSLLNNN", interaction=0.0)
    refiner = make(method, world)
    refine(refiner, world.loss)
    assert refiner.best == (world.start, world.loss(world.start))


@pytest.mark.parametrize("method", METHODS)
def test_replay_gives_the_same_proposals(method, small):
    rounds = refine(make(method, small, 30, round_plans=7), small.loss)
    again = make(method, small, 30, round_plans=7)
    for plans in rounds:
        assert again.propose() == again.propose() == plans
        again.observe({plan: small.loss(plan) for plan in reversed(plans)})
    assert again.finished


@pytest.mark.parametrize("method", METHODS)
def test_what_is_known_costs_nothing(method, small):
    base = Plan.uniform(Treatment.SOFTMAX, small.n_layers)
    lowest = small.plans[int(small.losses_of_all().argmin())]
    known = {plan: small.loss(plan) for plan in (base, small.start, lowest)}
    refiner = make(method, small, 20, known=known)
    assert refiner.n_evaluated == 0
    assert refiner.best == (lowest, small.loss(lowest))  # the base is better, but slower, so it does not compete
    assert not set(refiner.propose()) & set(known)
    refine(refiner, small.loss)
    assert refiner.best[0] == lowest


@pytest.mark.parametrize("method", METHODS)
def test_failed_plans_are_neither_chosen_nor_tried_again(method, small):
    refiner = make(method, small, 60)
    seen: set[Plan] = set()
    failed: set[Plan] = set()
    while plans := refiner.propose():
        assert not seen & set(plans)
        seen |= set(plans)
        failed |= set(plans[::3])
        losses = {plan: small.loss(plan) for plan in plans if plan not in failed}
        refiner.observe(losses | dict.fromkeys(plans[::6], math.nan))
    assert refiner.best[0] in seen - failed
    assert refiner.n_evaluated == len(seen)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_evaluated_first_and_alone_if_need_be(method, small):
    refiner = make(method, small, 1)
    assert refiner.best == (small.start, math.inf)
    assert refine(refiner, small.loss) == [[small.start]]


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_of_one_treatment_has_no_swaps(method):
    start = Plan.parse("NNN")
    refiner = make_refiner(method, start, {Treatment.NONE: [1.0, 2.0, 3.0]}, 9, pair_fraction=0.0)
    assert refine(refiner, lambda plan: 1.0) == [[start]]


@pytest.mark.parametrize("method", METHODS)
def test_pinned_layers_keep_the_treatment_of_the_start(method, small):
    pinned = [0, 3]
    refiner = make(method, small, 40, pinned=pinned, pair_fraction=0.0)
    proposed = [plan for plans in refine(refiner, small.loss) for plan in plans]
    # The start is never left by some draws; the four free layers then have at least four swaps of unlike layers.
    assert len(proposed) >= 5 and small.start in proposed
    assert {tuple(plan.treatments[layer] for layer in pinned) for plan in proposed} == {
        tuple(small.start.treatments[layer] for layer in pinned)
    }
    assert all(refiner.best[0].treatments[layer] == small.start.treatments[layer] for layer in pinned)


def test_greedy_ends_in_a_plan_that_no_swap_improves(small):
    refiner = make("greedy", small, 1000, round_plans=5)
    refine(refiner, small.loss)
    best, loss = refiner.best
    for i, j in combinations(range(small.n_layers), 2):
        treatments = list(best.treatments)
        treatments[i], treatments[j] = treatments[j], treatments[i]
        assert small.loss(Plan(tuple(treatments), best.window)) >= loss


def test_pairwise_measures_pairs_at_the_boundary_first():
    # By their costs layers 0 and 1 are removed, and 4 and 5 stay; layers 2 and 3 are nearly equal, one is removed.
    costs = {Treatment.NONE: [0.1, 0.2, 1.0, 1.01, 5.0, 6.0]}
    refiner = PairwiseModel(Plan.parse("NNNSSS"), costs, 8, pair_fraction=0.125)
    assert [str(plan) for plan in refiner.propose()] == ["NNNSSS", "SSSSSS", "SSNNSS"]


def test_pairwise_uses_measured_interactions():
    costs = {Treatment.NONE: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    start = Plan.parse("NNNSSS")
    known = {start: 0.6, Plan.parse("SSSSSS"): 0.0}
    # Layers 3 and 4 together cost 0.7 less than the sum of both alone.
    for pair, first in (({}, "NNSNSS"), ({Plan.parse("SSSNNS"): 0.2}, "NSSNNS")):
        refiner = PairwiseModel(start, costs, 1, known=known | pair, pair_fraction=0.0)
        assert [str(plan) for plan in refiner.propose()] == [first]


def test_without_the_base_pairs_are_not_measured(small):
    base = Plan.uniform(Treatment.SOFTMAX, small.n_layers)
    rounds = refine(make("pairwise", small, 20, known={base: math.nan}), small.loss)
    assert all(sorted(plan.treatments) == sorted(small.start.treatments) for plans in rounds for plan in plans)


def test_wrong_arguments_and_observations(small):
    with pytest.raises(RefinementError, match="max_plans: 0; give at least 1"):
        make("greedy", small, 0)
    with pytest.raises(RefinementError, match="round_plans: 0; give at least 1"):
        make("greedy", small, round_plans=0)
    with pytest.raises(RefinementError, match=r"pair_fraction: 1\.5 is no part"):
        make("pairwise", small, pair_fraction=1.5)
    with pytest.raises(RefinementError, match="method: 'annealing' is unknown; use greedy or pairwise"):
        make("annealing", small)
    with pytest.raises(RefinementError, match="known: plan 'SN' has 2 layers"):
        make("greedy", small, known={Plan.parse("SN"): 1.0})
    refiner = make("greedy", small, 1)
    with pytest.raises(RefinementError, match="losses: 'NNNNNN' was not proposed"):
        refiner.observe({Plan.parse("NNNNNN"): 1.0})
    assert refiner.n_evaluated == 0
    refine(refiner, small.loss)
    with pytest.raises(RefinementError, match="none asked for"):
        refiner.observe({small.start: 1.0})
