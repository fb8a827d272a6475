"""Implements the methods of search, which propose plans from the costs and times of single layers.

`thresholds` moves the paper's two thresholds. `knapsack` gives the plans that are best for their speed if layers are
independent. `evolution` continues from these plans by NSGA-II over whole plans. `swaps` improves their front by
exchanging layers. Optuna samplers are used through Tune's OptunaSearch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ..plan import Plan, Treatment, plan_from_thresholds
from ..registry import resolved
from .front_swaps import FrontSwaps
from .knapsack import knapsack_front
from .loop import OBJECTIVES, Outcome, Proposer, SearchSpec, Suggestion
from .methods import METHODS
from .plan_space import PlanSpace

Costs = Mapping[Treatment, Sequence[float]]
"""Costs or times of each treatment in each layer, first layer first."""

_REMOVED_FRACTION, _MIDDLE_FRACTION = "removed_fraction", "middle_fraction"
"""Names of the two numbers that the sampler draws, each between 0 and 1; see `Thresholds`."""

_MAX_DRAWS = 200
"""Number of successive useless draws after which a sampler gives up."""


def make_proposer(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> Proposer:
    """Makes the proposer of a search's method, which `METHODS` describes.

    Args:
        spec: Specification of the search.
        costs: Drop of each layer if only this layer is treated, for the treatments that the method needs.
        times: Time that each layer adds to a decode step, in any unit; `thresholds` does not use it.
        rest_time: Remaining time of a decode step, in the same unit; only `swaps` uses it.

    Raises:
        PlanError: The space is empty, or costs or times are missing or not finite.
    """
    return resolved(METHODS[spec.method].maker, __package__)(spec, costs, times, rest_time)


class ListedPlans:
    """Proposes plans that are known before the search; a Proposer."""

    def __init__(self, plans: Sequence[Plan]):
        self._plans = iter(plans)

    def suggest(self, trial: int) -> Suggestion | None:
        plan = next(self._plans, None)
        return None if plan is None else Suggestion(plan)

    def tell(self, trial: int, outcome: Outcome | None) -> None:
        """Ignores the outcome, because the plans do not depend on it."""


class SwappedPlans:
    """Proposes the plans of FrontSwaps, whose loss is the negative objective; a Proposer."""

    def __init__(self, swaps: FrontSwaps):
        self._swaps = swaps
        self._plans: dict[int, Plan] = {}

    def suggest(self, trial: int) -> Suggestion | None:
        plan = self._swaps.next_plan()
        if plan is None:
            return None
        self._plans[trial] = plan
        return Suggestion(plan)

    def tell(self, trial: int, outcome: Outcome | None) -> None:
        self._swaps.observe(self._plans.pop(trial), None if outcome is None else -outcome[0])


class Sampler(Protocol):
    """Declares the part of Tune's OptunaSearch that is used here."""

    def suggest(self, trial_id: str) -> Any: ...

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None: ...


class SampledPlans:
    """Proposes the plans that a sampler draws and that hold the space's limits; a Proposer.

    Other plans are reported to the sampler as failed; they are not evaluated and count as no trial. After many such
    draws in a row there is nothing to propose.

    Args:
        sampler: Draws parameters.
        read: Returns the plan for some parameters, with pinned layers as they are pinned.
        space: The space whose limits the plans must hold.
        distinct: Whether plans that were proposed before are left out too.
    """

    def __init__(self, sampler: Sampler, read: Callable[[Any], Suggestion], space: PlanSpace, distinct: bool):
        self._sampler, self._read, self._space, self._distinct = sampler, read, space, distinct
        self._n_draws = 0
        self._drawn: dict[int, str] = {}
        self._proposed: set[Plan] = set()

    def suggest(self, trial: int) -> Suggestion | None:
        for _ in range(_MAX_DRAWS):
            draw, self._n_draws = str(self._n_draws), self._n_draws + 1
            suggestion = self._read(self._sampler.suggest(draw))
            is_new = not self._distinct or suggestion.plan not in self._proposed
            if is_new and self._space.holds(suggestion.plan):
                self._drawn[trial] = draw
                self._proposed.add(suggestion.plan)
                return suggestion
            self._sampler.on_trial_complete(draw, error=True)
        return None

    def tell(self, trial: int, outcome: Outcome | None) -> None:
        result = None if outcome is None else dict(zip(OBJECTIVES, outcome, strict=True))
        self._sampler.on_trial_complete(self._drawn.pop(trial), result, error=outcome is None)


def by_knapsack(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> ListedPlans:
    """Proposes the plans that are best for their speed if layers are independent of each other."""
    return ListedPlans(knapsack_front(spec.space, costs, times, max(2, spec.trials)))


def by_swaps(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> SwappedPlans:
    """Proposes improvements of the knapsack's front, made by exchanging layers."""
    return SwappedPlans(FrontSwaps(spec.space, costs, times, rest_time=rest_time))


def by_thresholds(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> SampledPlans:
    """Proposes plans by the paper's two thresholds on the cost of removing each layer; a sampler moves them."""
    import optuna

    drops = costs[spec.removed]
    thresholds, space = Thresholds(drops, spec), spec.space

    def read(drawn: Mapping[str, float]) -> Suggestion:
        low, high = thresholds(drawn[_REMOVED_FRACTION], drawn[_MIDDLE_FRACTION])
        plan = plan_from_thresholds(drops, low, high, spec.middle, space.window, space.sinks, spec.removed)
        return Suggestion(space.plan(plan.treatments), low, high)

    sampler: optuna.samplers.BaseSampler
    if spec.sampler == "nsga2":
        # The default population of 50 would leave no room for a second generation.
        sampler = optuna.samplers.NSGAIISampler(seed=spec.seed, population_size=max(4, spec.trials // 5))
    else:
        sampler = optuna.samplers.TPESampler(seed=spec.seed)
    unit_interval = optuna.distributions.FloatDistribution(0.0, 1.0)
    search = _optuna_search({_REMOVED_FRACTION: unit_interval, _MIDDLE_FRACTION: unit_interval}, sampler)
    return SampledPlans(search, read, space, distinct=False)


def by_evolution(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> Proposer:
    """Proposes plans by NSGA-II over whole plans, from the knapsack's; only the knapsack's if every layer is pinned."""
    import optuna

    free = [layer for layer in range(spec.space.n_layers) if len(spec.space.choices(layer)) > 1]
    if not free:
        return by_knapsack(spec, costs, times, rest_time)
    space, population = spec.space, max(4, spec.trials // 4)
    # Random plans are poor, so seeds fill the first generation and the trials asked for before all of it is told.
    seeds = knapsack_front(space, costs, times, max(population + spec.lag, spec.trials // 2))
    names = {layer: f"layer_{layer}" for layer in free}

    def read(drawn: Mapping[str, str]) -> Suggestion:
        treatments = [Treatment(drawn[names[layer]]) if layer in names else space.choices(layer)[0] for layer in layers]
        return Suggestion(space.plan(treatments))

    layers = range(space.n_layers)
    choices = {
        name: optuna.distributions.CategoricalDistribution([choice.value for choice in space.choices(layer)])
        for layer, name in names.items()
    }
    points = [{name: plan.treatments[layer].value for layer, name in names.items()} for plan in seeds]
    sampler = optuna.samplers.NSGAIISampler(seed=spec.seed, population_size=population)
    return SampledPlans(_optuna_search(choices, sampler, points), read, space, distinct=True)


def _optuna_search(space: dict[str, Any], sampler: Any, points: list[dict] | None = None) -> Sampler:
    """Makes Tune's Optuna search, which maximises both objectives."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    modes = ["max"] * len(OBJECTIVES)
    return OptunaSearch(space=space, metric=list(OBJECTIVES), mode=modes, sampler=sampler, points_to_evaluate=points)


class Thresholds:
    """Converts two numbers in [0, 1] into a pair of thresholds that cannot cross.

    The sampler moves along the sorted drops, not along their values, because drops are skewed and evenly drawn values
    would mostly fall where no layer is. `removed_fraction` is the position of the first threshold along all drops, and
    `middle_fraction` the position of the second one along the rest. Ranges are given in drops and keep their meaning.
    """

    def __init__(self, drops: Sequence[float], spec: SearchSpec):
        ordered = np.sort(np.asarray(drops, dtype=np.float64))
        if len(ordered) == 0 or not np.isfinite(ordered).all():
            raise ValueError("drops: every layer needs a finite drop; look at sensitivity.csv")
        margin = 0.05 * max(ordered[-1] - ordered[0], abs(ordered[0]), abs(ordered[-1]), 1e-9)
        middles = (ordered[1:] + ordered[:-1]) / 2
        # The i-th cut lies above i layers.
        self._cuts = np.concatenate([[ordered[0] - margin], middles, [ordered[-1] + margin]])
        self._positions = np.arange(len(self._cuts), dtype=np.float64)
        self._low, self._high = spec.remove_below, spec.keep_above

    def __call__(self, removed_fraction: float, middle_fraction: float) -> tuple[float, float]:
        """Returns (remove_below, keep_above); the first is at most the second."""
        remove_below = self._threshold(removed_fraction, self._low, at_least=-math.inf)
        return remove_below, self._threshold(middle_fraction, self._high, at_least=remove_below)

    def _threshold(self, fraction: float, span: tuple[float, float] | None, at_least: float) -> float:
        first, last = (max(end, at_least) for end in span or (self._cuts[0], self._cuts[-1]))
        start, end = np.interp([first, last], self._cuts, self._positions)
        value = np.interp(start + fraction * (end - start), self._positions, self._cuts)
        return float(np.clip(value, first, last))
