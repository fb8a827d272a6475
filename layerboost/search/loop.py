"""Represents the search as data: its specification, the results of trials, and the state that drives a proposer.

The state tells the proposer the outcomes of trials strictly in their order. Before it asks for a trial it tells all but
the last `lag` - 1 outcomes, and more of them if the proposer has no plan without them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ..plan import Plan, Treatment
from .methods import METHODS
from .plan_space import PlanSpace

OBJECTIVES = ("objective", "speedup")
"""Names of the two values that the search maximises."""


Values = Mapping[str, Any]
"""The result of an evaluation: `quality`, and other JSON values to record with it."""


Outcome = tuple[float, float]
"""The values of a plan's OBJECTIVES."""


Evaluator = Callable[[Plan], Values]


Judge = Callable[[Plan, Values, Values], Outcome]
"""Computes the outcome from a plan, its values and those of the untouched model, which every outcome needs."""


@dataclass(frozen=True)
class SearchSpec:
    """Specifies a search. Every field changes the plans that are tried.

    Attributes:
        space: The plans that may be proposed; the uniform baselines use its window too.
        method: The method that proposes them, one of `layerboost.search.methods.METHODS`.
        trials: Number of plans that may be proposed. With `thresholds` each pair of thresholds counts, whatever plan it
            gives. The other methods propose no plan twice, and a fixed point does not count.
        middle: Treatment of the layers between the thresholds; only `thresholds` uses it.
        seed: Seed of the method.
        sampler: The sampler that moves the thresholds; only `thresholds` uses it.
        remove_below, keep_above: Ranges of the thresholds; None spans all drops and a margin around them.
        plans: Plans that are always evaluated, besides the untouched model and the uniform plans.
        removed: Treatment of the layers below the lower threshold; only `thresholds` uses it.
        lag: Number of trials that may run at the same time. It belongs to the search and not to the placement, because
            each trial is chosen without knowing the last lag - 1 outcomes.
    """

    space: PlanSpace
    method: str = "thresholds"
    trials: int = 40
    middle: Treatment = Treatment.LINEAR_WINDOW
    seed: int = 0
    sampler: Literal["tpe", "nsga2"] = "tpe"
    remove_below: tuple[float, float] | None = None
    keep_above: tuple[float, float] | None = None
    plans: tuple[Plan, ...] = ()
    lag: int = 8
    removed: Treatment = Treatment.NONE


@dataclass
class TrialResult:
    """Holds one point of the search.

    Attributes:
        plan: The plan.
        origin: `base`, `all_none`, `all_window`, `all_linear_window`, `given` or `search`.
        remove_below, keep_above: The thresholds; None for points without thresholds.
        values: The evaluator's values and both OBJECTIVES; None if the point failed.
        error: The reason for a failure.
        repeated: True if the plan occurred before, in this search or in `known`, and was not evaluated again.
    """

    plan: Plan
    origin: str
    remove_below: float | None = None
    keep_above: float | None = None
    values: dict[str, Any] | None = None
    error: str | None = None
    repeated: bool = False


@dataclass(frozen=True)
class Suggestion:
    """Holds a plan to try, and the thresholds that gave it, if any."""

    plan: Plan
    remove_below: float | None = None
    keep_above: float | None = None


class Proposer(Protocol):
    """Defines a method of search, which is asked and told in the order that the module describes."""

    def suggest(self, trial: int) -> Suggestion | None:
        """Returns the plan of a trial.

        None means that it needs more outcomes first, or that no plan is left if all outcomes are told.
        """

    def tell(self, trial: int, outcome: Outcome | None) -> None:
        """Takes in the outcome of a trial's plan; None if it failed."""


def fixed_points(spec: SearchSpec, n_layers: int) -> list[tuple[str, Plan]]:
    """Returns origin and plan of the points that every search has: untouched, uniform and given plans, each once."""
    points = [
        ("base", Plan.uniform(Treatment.SOFTMAX, n_layers)),
        ("all_none", Plan.uniform(Treatment.NONE, n_layers)),
        ("all_window", spec.space.uniform(Treatment.WINDOW)),
        ("all_linear_window", spec.space.uniform(Treatment.LINEAR_WINDOW)),
        *(("given", plan) for plan in spec.plans),
    ]
    for _, plan in points:
        plan.check_length(n_layers)
    by_id: dict[str, tuple[str, Plan]] = {}
    for origin, plan in points:
        by_id.setdefault(plan.plan_id, (origin, plan))
    return list(by_id.values())


class SearchState:
    """Decides which plan comes next, collects values, and tells the proposer outcomes in the order of the module.

    It does not depend on Ray: any code that evaluates plans may call `next_plan` and `finish`. A trial has an outcome
    once its plan and the untouched model are evaluated. If the untouched model fails, the search ends.

    Args:
        spec: Specification of the search.
        proposer: Chooses the plans.
        judge: Computes a plan's outcome; an outcome that is not finite counts as failed.
        known: Values of plans by `plan_id`, from records; these plans are not evaluated again.
    """

    def __init__(self, spec: SearchSpec, proposer: Proposer, judge: Judge, known: Mapping[str, Values]):
        self.spec, self._proposer, self._judge = spec, proposer, judge
        self._values = dict(known)
        self._errors: dict[str, str] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._met: set[str] = set()
        self._queue: deque[Plan] = deque()
        self.points: list[TrialResult] = []
        self._trials: list[TrialResult] = []
        self._n_counted = self._n_told = self._n_to_tell = 0
        self._ended = False
        for origin, plan in fixed_points(spec, spec.space.n_layers):
            self._add(TrialResult(plan, origin))
        self._base = self.points[0].plan.plan_id

    def next_plan(self) -> Plan | None:
        """Returns a plan to evaluate; None while there is none, and always once `exhausted`."""
        self._ask()
        return self._queue.popleft() if self._queue else None

    @property
    def exhausted(self) -> bool:
        """Whether no further plan will come, whatever the results that are still missing."""
        return not self._queue and (self._ended or self._n_counted >= self.spec.trials)

    @property
    def n_left(self) -> int:
        """The number of trials that may still be proposed."""
        return 0 if self._ended else self.spec.trials - self._n_counted

    def finish(self, plan: Plan, values: Values | None, error: str | None = None) -> None:
        """Takes in the result of a plan's evaluation: its values or an error."""
        if values is not None:
            self._values[plan.plan_id] = values
        else:
            self._errors[plan.plan_id] = error or "no values"
            self._ended = self._ended or plan.plan_id == self._base

    def results(self) -> list[TrialResult]:
        """Returns all points with an outcome or an error, the fixed ones first, then the trials in their order."""
        for point in self.points:
            outcome = self._outcome(point.plan)
            point.error = self._errors.get(point.plan.plan_id)
            if outcome is not None:
                point.values = {**self._values[point.plan.plan_id], **dict(zip(OBJECTIVES, outcome, strict=True))}
        return [point for point in self.points if point.values is not None or point.error is not None]

    def _ask(self) -> None:
        while not self._ended and self._n_counted < self.spec.trials:
            while self._n_told < self._n_to_tell:
                if not self._tell():
                    return
            suggestion = self._proposer.suggest(len(self._trials))
            if suggestion is not None:
                trial = TrialResult(suggestion.plan, "search", suggestion.remove_below, suggestion.keep_above)
                self._n_counted += METHODS[self.spec.method].counts_repeats or trial.plan.plan_id not in self._met
                self._trials.append(trial)
                self._add(trial)
                self._n_to_tell = len(self._trials) - self.spec.lag + 1
            elif self._n_told < len(self._trials):
                self._n_to_tell = self._n_told + 1
            else:
                self._ended = True

    def _tell(self) -> bool:
        """Tells the proposer the oldest trial it does not know; returns False while that trial has no outcome."""
        plan = self._trials[self._n_told].plan
        outcome = self._outcome(plan)
        if outcome is None and plan.plan_id not in self._errors:
            return False
        self._proposer.tell(self._n_told, outcome)
        self._n_told += 1
        return True

    def _outcome(self, plan: Plan) -> Outcome | None:
        """Returns a plan's outcome; None if it is not known yet, or if the plan has failed and has an error."""
        plan_id = plan.plan_id
        if self._base in self._errors:
            self._errors.setdefault(plan_id, "the untouched model, which plans are compared with, has failed")
        if plan_id in self._outcomes or plan_id in self._errors:
            return self._outcomes.get(plan_id)
        if plan_id not in self._values or self._base not in self._values:
            return None
        outcome = self._judge(plan, self._values[plan_id], self._values[self._base])
        for name, value in zip(OBJECTIVES, outcome, strict=True):
            if not math.isfinite(value):
                self._errors[plan_id] = f"{name}: {value} is not a finite number"
                return None
        self._outcomes[plan_id] = outcome
        return outcome

    def _add(self, point: TrialResult) -> None:
        self.points.append(point)
        plan_id = point.plan.plan_id
        point.repeated = plan_id in self._met or plan_id in self._values
        if not point.repeated:
            self._queue.append(point.plan)
        self._met.add(plan_id)


def check_values(values: Values) -> str | None:
    """Returns why an evaluator's values cannot be used; None if they can."""
    value = values.get("quality")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return f"quality: {value} is not a finite number"
    return None
