"""Improves a plan by evaluating plans with the same number of layers for each treatment, which have the same speed.

A plan chosen by single-layer drops assumes that layers are independent. What they cost together is learned here from
the losses of whole plans. This module only keeps the books: `propose` names the plans of a round, which share layers
and are therefore cheap to evaluate together, and `observe` takes in their losses. The state depends only on the
observations: a restart repeats them in their order.

With noisy losses the best of many evaluated plans looks better than it is: measure it again on other data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from ..plan import Plan, Treatment

Costs = Mapping[Treatment, Sequence[float]]

PAIR_FRACTION = 0.125
"""Default share of the budget that `PairwiseModel` spends on plans with two treated layers."""

# Variances of an observed loss about the model and of a pair's interaction, relative to that of a layer's correction.
_RESIDUAL_GREEDY = 1.0  # includes the interactions, which a model without pairs cannot explain
_RESIDUAL_PAIRWISE = 0.1
_PAIR_VARIANCE = 0.3

_ROUNDING = 1e-9
_RANDOM_STARTS = 8
_EVALUATED_STARTS = 8


class RefinementError(ValueError):
    """Costs, a budget or an observation are invalid."""


def predicted_drop(plan: Plan, costs: Costs) -> float:
    """Returns what a plan would lose if layers were independent: the sum of its layers' single drops.

    Args:
        plan: The plan.
        costs: For each treatment except softmax the drop of each layer if it alone is treated so; softmax costs 0.

    Raises:
        RefinementError: A treatment of the plan has no costs, not one for each layer, or one that is not finite.
    """
    for treatment in sorted(set(plan.treatments) - {Treatment.SOFTMAX}):
        if treatment not in costs:
            raise RefinementError(
                f"costs: none for '{treatment}', which plan '{plan}' uses; give its drop of each layer"
            )
        if len(costs[treatment]) != len(plan):
            raise RefinementError(
                f"costs.{treatment}: {len(costs[treatment])} drops for {len(plan)} layers; give one for each layer"
            )
        for layer, cost in enumerate(costs[treatment]):
            if not math.isfinite(cost):
                raise RefinementError(
                    f"costs.{treatment}: layer {layer} has {cost}; give a finite drop, a large one where it must not be"
                )
    return float(
        sum(
            costs[treatment][layer] for layer, treatment in enumerate(plan.treatments) if treatment != Treatment.SOFTMAX
        )
    )


class Refiner(ABC):
    """Proposes plans in rounds and keeps the best one evaluated.

    Costs and losses are on one scale, positive is worse: NLL with drops as rises of the NLL, or negative quality with
    drops of the quality. A plan that failed (loss missing or not finite) is never chosen and never proposed again.

    Args:
        start: The plan to improve. It competes with the plans of its window and its number of layers per treatment.
        costs: Costs as in `predicted_drop`.
        max_plans: Maximum number of plans to evaluate, including the start.
        round_plans: Maximum number of plans in a round.
        known: Losses that need no evaluation, of any plans of the model.
        pinned: Layers that keep the start's treatment in every plan that competes with it.

    Raises:
        RefinementError: An argument is out of its range.
    """

    def __init__(
        self,
        start: Plan,
        costs: Costs,
        max_plans: int,
        round_plans: int = 16,
        known: Mapping[Plan, float] | None = None,
        *,
        pinned: Collection[int] = (),
    ):
        for name, value in (("max_plans", max_plans), ("round_plans", round_plans)):
            if value < 1:
                raise RefinementError(f"{name}: {value}; give at least 1")
        predicted_drop(start, costs)
        self.start = start
        self.max_plans = max_plans
        self.round_plans = round_plans
        self.n_evaluated = 0
        self._space = _Space(start, pinned)
        self._prior = self._space.prior(costs)
        self._losses: dict[Plan, float] = {}
        self._pending: tuple[Plan, ...] | None = None
        for plan, loss in (known or {}).items():
            if len(plan) != len(start):
                raise RefinementError(
                    f"known: plan '{plan}' has {len(plan)} layers, the start {len(start)}; leave it out"
                )
            self._losses[plan] = float(loss)

    def propose(self) -> list[Plan]:
        """Returns the plans of the next round, the same until they are observed; none when finished."""
        if self._pending is None:
            n_plans = min(self.round_plans, self.max_plans - self.n_evaluated)
            self._pending = tuple(self._choose(n_plans)) if n_plans else ()
        return list(self._pending)

    def observe(self, losses: Mapping[Plan, float]) -> None:
        """Takes in the losses of the proposed plans, lower is better; plans that are left out have failed.

        Raises:
            RefinementError: Nothing was proposed, or a plan was not; the state stays as it was.
        """
        proposed = self.propose()
        if not proposed:
            raise RefinementError(f"losses: {len(losses)} given but none asked for; stop when propose returns no plans")
        unasked = sorted(str(plan) for plan in losses if plan not in proposed)
        if unasked:
            raise RefinementError(f"losses: '{unasked[0]}' was not proposed; give it as known or leave it out")
        self._losses.update({plan: float(losses.get(plan, math.nan)) for plan in proposed})
        self.n_evaluated += len(proposed)
        self._pending = None

    @property
    def finished(self) -> bool:
        return not self.propose()

    @property
    def best(self) -> tuple[Plan, float]:
        """The best plan of the start's counts and its loss; the start and infinity before any has been evaluated."""
        ranked = self._ranked()
        return ranked[0] if ranked else (self.start, math.inf)

    @abstractmethod
    def _choose(self, n_plans: int) -> list[Plan]:
        """Returns up to `n_plans` plans without a loss, the most promising first."""

    def _ranked(self) -> list[tuple[Plan, float]]:
        """Returns the plans that compete with the start and have a loss, best first; the start wins ties."""
        found = [
            (plan, loss) for plan, loss in self._losses.items() if math.isfinite(loss) and self._space.competes(plan)
        ]
        return sorted(found, key=lambda item: (item[1], item[0] != self.start, str(item[0])))

    def _unknown(self, plans: Iterable[Plan]) -> list[Plan]:
        return [plan for plan in dict.fromkeys(plans) if plan not in self._losses]

    def _fitted(self, prior: _Quadratic, residual: float, pair: float) -> _Quadratic:
        """Corrects the model by the competing plans only, as layers may cost more if many are treated."""
        ranked = self._ranked()
        codes = np.array([self._space.encode(plan) for plan, _ in ranked]).reshape(-1, len(self.start))
        losses = np.array([loss for _, loss in ranked])
        return prior.fitted(self._space.features(codes), losses, residual, pair)


class GreedySwaps(Refiner):
    """Searches locally: evaluates swaps of two layers of the best plan and continues from the best plan evaluated.

    Swaps are ranked by the predicted change. The prediction uses the costs, corrected for each layer and treatment by
    ridge regression over the plans evaluated so far. The search ends if all swaps of the best plan are known, or with
    the budget.
    """

    def _choose(self, n_plans: int) -> list[Plan]:
        model = self._fitted(self._prior, _RESIDUAL_GREEDY, 0.0)
        neighbours = self._space.swaps(self._space.encode(self.best[0]))
        order = np.argsort(_rounded(model.predict(self._space.features(neighbours))), kind="stable")
        swapped = (self._space.decode(neighbours[index]) for index in order)
        return self._unknown([self.start, *swapped])[:n_plans]


class PairwiseModel(Refiner):
    """Learns what pairs of layers cost beyond their sum, and evaluates the best plans of this model.

    First it evaluates the all-softmax plan and plans that treat two layers near the boundaries between treatments:
    interaction = loss(pair) - loss(all softmax) - cost_i - cost_j. Each round then searches the quadratic model of
    costs and interactions by swaps from several plans, and ridge regression over the plans evaluated so far corrects
    the model's main effects and its interactions. Pairs that were not measured start from 0. The search ends if it
    finds no plan without a loss, or with the budget.

    Args:
        start, costs, max_plans, round_plans, known, pinned: As in `Refiner`.
        pair_fraction: Share of `max_plans` to spend on plans with two treated layers; the all-softmax plan adds one.
            Those in `known` are used as well and are not counted.

    Raises:
        RefinementError: An argument is out of its range.
    """

    def __init__(
        self,
        start: Plan,
        costs: Costs,
        max_plans: int,
        round_plans: int = 16,
        known: Mapping[Plan, float] | None = None,
        *,
        pinned: Collection[int] = (),
        pair_fraction: float = PAIR_FRACTION,
    ):
        super().__init__(start, costs, max_plans, round_plans, known, pinned=pinned)
        if not 0 <= pair_fraction <= 1:
            raise RefinementError(f"pair_fraction: {pair_fraction} is no part of the budget; give 0 to 1")
        self._base = Plan.uniform(Treatment.SOFTMAX, len(start))
        self._slots = {self._space.pair(*slots): slots for slots in self._space.boundary_pairs(self._prior)}
        self._pairs = self._unknown(self._slots)[: int(pair_fraction * max_plans)]

    def _choose(self, n_plans: int) -> list[Plan]:
        base = [self._base] if self._pairs else []
        # Without the base's loss a pair's loss gives no interaction.
        pairs = [] if self._failed(self._base) else self._pairs
        measure = self._unknown([self.start, *base, *pairs])[:n_plans]
        if measure:
            return measure
        return self._search(self._fitted(self._with_pairs(), _RESIDUAL_PAIRWISE, _PAIR_VARIANCE), n_plans)

    def _failed(self, plan: Plan) -> bool:
        return plan in self._losses and not math.isfinite(self._losses[plan])

    def _with_pairs(self) -> _Quadratic:
        pairs = self._prior.pairs.copy()
        base = self._losses.get(self._base, math.nan)
        for plan, (i, j) in self._slots.items():
            interaction = self._losses.get(plan, math.nan) - base - self._prior.main[i] - self._prior.main[j]
            if math.isfinite(interaction):
                pairs[i, j] = pairs[j, i] = interaction
        return _Quadratic(self._prior.intercept, self._prior.main, pairs)

    def _search(self, model: _Quadratic, n_plans: int) -> list[Plan]:
        """Returns the best plans without a loss among all plans that the descents from several plans visit."""
        rng = np.random.default_rng(self.n_evaluated)
        start = self._space.encode(self.start)
        starts = [start, *(self._space.encode(plan) for plan, _ in self._ranked()[:_EVALUATED_STARTS])]
        starts += [self._space.permuted(start, rng) for _ in range(_RANDOM_STARTS)]
        met: dict[tuple[int, ...], float] = {}
        for plan in starts:
            for codes, predicted in self._descent(model, plan):
                met |= {tuple(row): float(loss) for row, loss in zip(codes.tolist(), predicted, strict=True)}
        plans = sorted(met)
        order = np.argsort(_rounded(np.array([met[plan] for plan in plans])), kind="stable")
        return self._unknown(self._space.decode(plans[index]) for index in order)[:n_plans]

    def _descent(self, model: _Quadratic, plan: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields each plan on the way down and all its swaps, the plan itself first, with their predictions."""
        while True:
            codes = np.concatenate([plan[None], self._space.swaps(plan)])
            predicted = model.predict(self._space.features(codes))
            yield codes, predicted
            lowest = int(_rounded(predicted).argmin())
            # Steps smaller than rounding are not taken, because they could lead back.
            if predicted[0] - predicted[lowest] <= _ROUNDING * np.abs(predicted).max():
                return
            plan = codes[lowest]


def make_refiner(
    method: Literal["greedy", "pairwise"],
    start: Plan,
    costs: Costs,
    max_plans: int,
    round_plans: int = 16,
    known: Mapping[Plan, float] | None = None,
    *,
    pinned: Collection[int] = (),
    pair_fraction: float = PAIR_FRACTION,
) -> Refiner:
    """Returns the refiner with the given name; `pair_fraction` is used by `pairwise` only.

    Raises:
        RefinementError: The method is unknown, or an argument is out of its range.
    """
    if method == "greedy":
        return GreedySwaps(start, costs, max_plans, round_plans, known, pinned=pinned)
    if method == "pairwise":
        return PairwiseModel(start, costs, max_plans, round_plans, known, pinned=pinned, pair_fraction=pair_fraction)
    raise RefinementError(f"method: '{method}' is unknown; use greedy or pairwise")


class _Space:
    """Denotes the plans that compete with a start, as codes (n_layers,): 0 for softmax, 1 + index of other treatments.

    A slot is a layer with one treatment other than softmax; a plan's features (n_slots,) are 1 for the slots it fills.
    """

    def __init__(self, start: Plan, pinned: Collection[int] = ()):
        self._start = start
        self._pinned = sorted(pinned)
        self._free = [layer for layer in range(len(start)) if layer not in pinned]
        self._treatments = [Treatment.SOFTMAX, *sorted(set(start.treatments) - {Treatment.SOFTMAX})]

    def competes(self, plan: Plan) -> bool:
        return (
            (plan.window, plan.sinks) == (self._start.window, self._start.sinks)
            and sorted(plan.treatments) == sorted(self._start.treatments)
            and all(plan.treatments[layer] == self._start.treatments[layer] for layer in self._pinned)
        )

    def encode(self, plan: Plan) -> np.ndarray:
        return np.array([self._treatments.index(treatment) for treatment in plan.treatments])

    def decode(self, codes: Iterable[int]) -> Plan:
        return Plan(tuple(self._treatments[code] for code in codes), self._start.window, self._start.sinks)

    def features(self, codes: np.ndarray) -> np.ndarray:
        """Returns features (n, n_slots) of codes (n, n_layers); slots are ordered by treatment, then by layer."""
        return np.concatenate([codes == code for code in range(len(self._treatments))], axis=1)[
            :, len(self._start) :
        ].astype(np.float64)

    def swaps(self, codes: np.ndarray) -> np.ndarray:
        """Returns all codes (n, n_layers) with two free layers of different treatments swapped, in layer order."""
        pairs = [(i, j) for i, j in combinations(self._free, 2) if codes[i] != codes[j]]
        swapped = np.tile(codes, (len(pairs), 1))
        for row, (i, j) in zip(swapped, pairs, strict=True):
            row[[i, j]] = row[[j, i]]
        return swapped

    def permuted(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the codes (n_layers,) in random order, except for pinned layers."""
        permuted = codes.copy()
        permuted[self._free] = rng.permutation(codes[self._free])
        return permuted

    def prior(self, costs: Costs) -> _Quadratic:
        main = np.array([costs[treatment] for treatment in self._treatments[1:]], dtype=np.float64).ravel()
        return _Quadratic(0.0, main, np.zeros((len(main), len(main))))

    def pair(self, i: int, j: int) -> Plan:
        """Returns the plan that fills two slots and keeps softmax elsewhere."""
        codes = np.zeros(len(self._start), dtype=int)
        for slot in (i, j):
            treatment, layer = divmod(slot, len(self._start))
            codes[layer] = treatment + 1
        return self.decode(codes)

    def boundary_pairs(self, prior: _Quadratic) -> list[tuple[int, int]]:
        """Returns pairs of slots that one plan can fill, those nearest to the boundaries between treatments first.

        A slot's distance is the smallest change of the predicted loss by any swap that fills or empties it.
        """
        own, neighbours = self.encode(self._start), self.swaps(self.encode(self._start))
        if not len(neighbours):
            return []
        filled, others = self.features(own[None])[0], self.features(neighbours)
        changes = np.abs(prior.predict(others) - prior.predict(filled[None]))
        distance = np.where(others != filled, changes[:, None], np.inf).min(axis=0)
        reached = np.flatnonzero(np.isfinite(distance))  # no swap reaches the slots of pinned layers
        distance[reached] = _rounded(distance[reached])
        pairs = [
            (i, j)
            for i, j in combinations(reached.tolist(), 2)
            if (i - j) % len(own) and (i // len(own) != j // len(own) or (own == i // len(own) + 1).sum() > 1)
        ]
        return sorted(pairs, key=lambda pair: (distance[pair[0]] + distance[pair[1]], pair))


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """Models a loss as intercept + sum of the filled slots' effects + sum of their pairs' interactions.

    Attributes:
        intercept: Loss of the plan without treated layers; it matters only for fits, not for comparisons.
        main: (n_slots,), the effects.
        pairs: (n_slots, n_slots), the interactions, symmetric, zero on the diagonal.
    """

    intercept: float
    main: np.ndarray
    pairs: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        return self.intercept + features @ self.main + ((features @ self.pairs) * features).sum(axis=1) / 2

    def fitted(self, features: np.ndarray, losses: np.ndarray, residual: float, pair: float) -> _Quadratic:
        """Fits a correction of this model by ridge regression with a free intercept, solved in its dual form.

        Args:
            features: (n, n_slots), the evaluated plans.
            losses: (n,), their losses.
            residual: Variance of a loss about the model, relative to that of a correction to a main effect.
            pair: Variance of a correction to an interaction, relative to the same.
        """
        n = len(losses)
        if not n:
            return self
        common = features @ features.T  # number of filled slots that two plans share
        covariance = common + pair * common * (common - 1) / 2 + residual * np.eye(n)
        system = np.block([[covariance, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
        solution = np.linalg.solve(system, np.append(losses - self.predict(features), 0.0))
        weighted = features * solution[:n, None]
        pairs = features.T @ weighted
        np.fill_diagonal(pairs, 0.0)
        return _Quadratic(
            self.intercept + float(solution[n]), self.main + weighted.sum(axis=0), self.pairs + pair * pairs
        )


def _rounded(values: np.ndarray) -> np.ndarray:
    """Returns values in whole steps of rounding, because equal values may differ in their last digits."""
    scale = np.abs(values).max(initial=0.0)
    return values if scale == 0 else np.round(values / (_ROUNDING * scale))
