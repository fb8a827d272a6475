"""The methods of search: what proposes the plans that a search tries, from what single layers cost and take.

`thresholds` moves the paper's two thresholds; `knapsack` gives plans that are the best for their speed if layers are
independent; `evolution` goes on from these by NSGA-II over whole plans; `swaps` improves their front by exchanging
layers. What an Optuna sampler draws comes through Tune's OptunaSearch.
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
"""Of each treatment in each layer, first layer first."""

_REMOVED_FRACTION, _MIDDLE_FRACTION = "removed_fraction", "middle_fraction"
"""The sampler's own two numbers, each between 0 and 1: see Thresholds."""

_MAX_DRAWS = 200
"""Draws in a row of no use after which a sampler has nothing to propose."""


def make_proposer(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> Proposer:
    """The proposer of a search's method, which `METHODS` describes.

    Args:
        spec: what is searched.
        costs: drop of each layer when it alone is treated so, of the treatments that the method needs them of.
        times: what each layer adds to a decode step, in any unit; not used by `thresholds`.
        rest_time: what a decode step takes beside that, in the same unit; used by `swaps` alone.

    Raises:
        PlanError: the space is empty, or costs or times are missing or not finite.
    """
    return resolved(METHODS[spec.method].maker, __package__)(spec, costs, times, rest_time)


class ListedPlans:
    """Plans that are known before the search; a Proposer."""

    def __init__(self, plans: Sequence[Plan]):
        self._plans = iter(plans)

    def suggest(self, trial: int) -> Suggestion | None:
        plan = next(self._plans, None)
        return None if plan is None else Suggestion(plan)

    def tell(self, trial: int, outcome: Outcome | None) -> None:
        """Changes nothing."""


class SwappedPlans:
    """Plans of FrontSwaps, whose loss is the negative objective; a Proposer."""

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
    """The part of Tune's OptunaSearch that is used here."""

    def suggest(self, trial_id: str) -> Any: ...

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None: ...


class SampledPlans:
    """What a sampler draws, without plans that are outside the space's limits; a Proposer.

    What it leaves out is told as failed, evaluated never, and no trial. It has nothing to propose after many such
    draws in a row.

    Args:
        sampler: draws parameters.
        read: gives the plan of some parameters, with pinned layers as they are pinned.
        space: whose limits the plans must hold.
        distinct: leave out plans that were proposed before, too.
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
    """The best plans for their speed if layers are independent of each other."""
    return ListedPlans(knapsack_front(spec.space, costs, times, max(2, spec.trials)))


def by_swaps(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> SwappedPlans:
    """The knapsack's front, improved by exchanging layers."""
    return SwappedPlans(FrontSwaps(spec.space, costs, times, rest_time=rest_time))


def by_thresholds(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> SampledPlans:
    """The paper's two thresholds over what the removal of each layer costs, moved by a sampler."""
    import optuna

    drops = costs[Treatment.NONE]
    thresholds, space = Thresholds(drops, spec), spec.space

    def read(drawn: Mapping[str, float]) -> Suggestion:
        low, high = thresholds(drawn[_REMOVED_FRACTION], drawn[_MIDDLE_FRACTION])
        plan = plan_from_thresholds(drops, low, high, spec.middle, space.window)
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
    """NSGA-II over whole plans, from the knapsack's; the knapsack alone where every layer is pinned."""
    import optuna

    free = [layer for layer in range(spec.space.n_layers) if len(spec.space.choices(layer)) > 1]
    if not free:
        return by_knapsack(spec, costs, times, rest_time)
    space, population = spec.space, max(4, spec.trials // 4)
    # Random plans are poor: seeds fill the first generation, and what is asked for before all of that is told.
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
    """Tune's Optuna search, both objectives maximised."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    modes = ["max"] * len(OBJECTIVES)
    return OptunaSearch(space=space, metric=list(OBJECTIVES), mode=modes, sampler=sampler, points_to_evaluate=points)


class Thresholds:
    """From two numbers in [0, 1] to a pair of thresholds that cannot cross.

    The sampler moves along the sorted drops, not along their values: drops are skewed, and evenly drawn values would
    mostly fall where no layer is. `removed_fraction` is how far along the first threshold lies, `middle_fraction` how
    far along what is left the second one lies. Ranges are given in drops and keep their meaning.
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
        """(remove_below, keep_above), the first at most the second."""
        remove_below = self._threshold(removed_fraction, self._low, at_least=-math.inf)
        return remove_below, self._threshold(middle_fraction, self._high, at_least=remove_below)

    def _threshold(self, fraction: float, span: tuple[float, float] | None, at_least: float) -> float:
        first, last = (max(end, at_least) for end in span or (self._cuts[0], self._cuts[-1]))
        start, end = np.interp([first, last], self._cuts, self._positions)
        value = np.interp(start + fraction * (end - start), self._positions, self._cuts)
        return float(np.clip(value, first, last))
