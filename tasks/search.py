"""The search for plans over the two thresholds: quality against speed, each plan evaluated once.

The order of everything that the sampler is asked and told is fixed by the seed, the drops and the values that plans
get: not by the number of workers, by who finishes first, or by what was evaluated before. The sampler is asked for
trial k when it was told the trials 0 .. k - lag, no fewer and no more, in their order. So a search whose driver died
resumes by being run again with the finished plans as `known`: it takes the same way, and evaluates only what is new.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from layerboost.plan import Plan, Treatment, plan_from_thresholds

from .cluster import WorkerResources
from .units import UnitFailure, finish_on_interrupt

OBJECTIVES = ("quality", "speedup")
"""Both are maximised."""

REMOVED_FRACTION, MIDDLE_FRACTION = "removed_fraction", "middle_fraction"
"""The sampler's own two numbers, each between 0 and 1: see Thresholds."""

Evaluator = Callable[[Plan], Mapping[str, Any]]
"""Gives a plan's `quality` and `speedup`, and whatever else is to be recorded with them (JSON-able)."""


@dataclass(frozen=True)
class SearchSpec:
    """What is searched. Everything in it changes the plans that are tried.

    Attributes:
        trials: pairs of thresholds that the sampler may try. Pairs that give a plan which is known cost nothing.
        middle: treatment of the layers between the thresholds.
        window: of the middle treatment and of the uniform baselines, in tokens.
        remove_below, keep_above: ranges of the thresholds; None spans all drops and a margin around them.
        plans: plans to evaluate in any case, beside the untouched model and the uniform ones.
        lag: trials that may be under way together. Part of the search, not of the placement: the sampler chooses
            each trial without knowing the last lag - 1 ones.
    """

    trials: int = 40
    middle: Treatment = Treatment.LINEAR_WINDOW
    window: int = 64
    seed: int = 0
    sampler: Literal["tpe", "nsga2"] = "tpe"
    remove_below: tuple[float, float] | None = None
    keep_above: tuple[float, float] | None = None
    plans: tuple[Plan, ...] = ()
    lag: int = 8


@dataclass
class TrialResult:
    """One point of the search.

    Attributes:
        origin: `base`, `all_none`, `all_window`, `all_linear_window`, `given` or `search`.
        remove_below, keep_above: the thresholds, None for points that have none.
        values: what the evaluator gave; None where it failed.
        error: why it failed.
        repeated: True where the plan had been met before, in this search or in `known`, and was not evaluated again.
    """

    plan: Plan
    origin: str
    remove_below: float | None = None
    keep_above: float | None = None
    values: dict[str, Any] | None = None
    error: str | None = None
    repeated: bool = False

    @property
    def status(self) -> str:
        return "done" if self.error is None else "failed"


class Sampler(Protocol):
    """The part of Tune's OptunaSearch that is used here."""

    def suggest(self, trial_id: str) -> Any: ...

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None: ...


def fixed_points(spec: SearchSpec, n_layers: int) -> list[tuple[str, Plan]]:
    """The points that every search has, origin and plan: untouched, the uniform ones, the given ones; none twice."""
    points = [
        ("base", Plan.uniform(Treatment.SOFTMAX, n_layers)),
        ("all_none", Plan.uniform(Treatment.NONE, n_layers)),
        ("all_window", Plan.uniform(Treatment.WINDOW, n_layers, spec.window)),
        ("all_linear_window", Plan.uniform(Treatment.LINEAR_WINDOW, n_layers, spec.window)),
        *(("given", plan) for plan in spec.plans),
    ]
    for _, plan in points:
        plan.check_length(n_layers)
    by_id: dict[str, tuple[str, Plan]] = {}
    for origin, plan in points:
        by_id.setdefault(plan.plan_id, (origin, plan))
    return list(by_id.values())


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


class SearchState:
    """Which plan comes next, what is known, and what the sampler is told; see the module for the order.

    Knows nothing of Ray: `next_plan` and `finish` may be called by anything that evaluates plans.
    """

    def __init__(self, drops: Sequence[float], spec: SearchSpec, sampler: Sampler, known: Mapping[str, Mapping]):
        self.spec, self.sampler = spec, sampler
        self._drops = list(drops)
        self._thresholds = Thresholds(drops, spec)
        self._values = {plan_id: dict(values) for plan_id, values in known.items()}
        self._errors: dict[str, str] = {}
        self._met: set[str] = set(self._values)
        self._queue: deque[Plan] = deque()
        self.points: list[TrialResult] = []
        self._trials: list[TrialResult] = []
        self._n_told = 0
        for origin, plan in fixed_points(spec, len(self._drops)):
            self._add(TrialResult(plan, origin))

    def next_plan(self) -> Plan | None:
        """A plan to evaluate, None while there is none (and for ever when `exhausted`)."""
        self._ask()
        return self._queue.popleft() if self._queue else None

    @property
    def exhausted(self) -> bool:
        """Whether no further plan will come, whatever the results still out."""
        return not self._queue and len(self._trials) >= self.spec.trials

    def finish(self, plan: Plan, values: Mapping[str, Any] | None, error: str | None = None) -> None:
        """Takes in what a plan's evaluation gave: its values or an error."""
        if values is not None:
            self._values[plan.plan_id] = dict(values)
        else:
            self._errors[plan.plan_id] = error or "no values"

    def results(self) -> list[TrialResult]:
        """All points so far that have an outcome, the fixed ones first, then the trials in their order."""
        for point in self.points:
            point.values = self._values.get(point.plan.plan_id)
            point.error = self._errors.get(point.plan.plan_id)
        return [point for point in self.points if point.values is not None or point.error is not None]

    def _ask(self) -> None:
        while len(self._trials) < self.spec.trials:
            while self._n_told < len(self._trials) - self.spec.lag + 1:
                if not self._tell():
                    return
            suggestion = self.sampler.suggest(str(len(self._trials)))
            low, high = self._thresholds(suggestion[REMOVED_FRACTION], suggestion[MIDDLE_FRACTION])
            plan = plan_from_thresholds(self._drops, low, high, self.spec.middle, self.spec.window)
            trial = TrialResult(plan, "search", low, high)
            self._trials.append(trial)
            self._add(trial)

    def _tell(self) -> bool:
        """Tells the sampler the oldest trial it does not know; False while that one has no outcome."""
        plan_id = self._trials[self._n_told].plan.plan_id
        if plan_id in self._values:
            objectives = {name: self._values[plan_id][name] for name in OBJECTIVES}
            self.sampler.on_trial_complete(str(self._n_told), objectives)
        elif plan_id in self._errors:
            self.sampler.on_trial_complete(str(self._n_told), error=True)
        else:
            return False
        self._n_told += 1
        return True

    def _add(self, point: TrialResult) -> None:
        self.points.append(point)
        point.repeated = point.plan.plan_id in self._met
        if not point.repeated:
            self._met.add(point.plan.plan_id)
            self._queue.append(point.plan)


def run_search(
    drops: Sequence[float],
    spec: SearchSpec,
    make_evaluator: Callable[[], Evaluator],
    resources: WorkerResources,
    *,
    on_plan: Callable[[Plan, dict[str, Any], float, dict], None],
    on_failure: Callable[[UnitFailure], None] | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    max_attempts: int = 3,
    storage_path: str | None = None,
) -> list[TrialResult]:
    """Searches with Ray Tune and Optuna; the trial processes keep their evaluator, and with it the model, loaded.

    A first Ctrl-C lets the trials under way finish, hands their plans over and raises KeyboardInterrupt.

    Args:
        drops: sensitivity of each layer to the removal of its attention, first layer first.
        spec: what is searched.
        make_evaluator: picklable; called once in each trial process.
        resources: of the trials; at most `n_workers` run together.
        on_plan: called in this process with plan, values, seconds and where it ran, as soon as a plan is evaluated: to
            be recorded at once. What it raises ends the search when the trials under way are done.
        on_failure: called in this process with each plan that failed for good.
        known: values of plans by `plan_id`, from records; they are not evaluated again.
        max_attempts: how often a plan is tried whose process dies. An evaluator that raises is not asked again.
        storage_path: folder for Tune's own files; None takes a temporary one and removes it.

    Returns:
        All points, fixed ones first, then the trials in the sampler's order.
    """
    from .tuning import make_sampler, run_trials

    state = SearchState(drops, spec, make_sampler(spec), known or {})
    with finish_on_interrupt() as interrupt:
        run_trials(state, make_evaluator, resources, interrupt, on_plan, on_failure, max_attempts, storage_path)
        if interrupt.requested:
            raise KeyboardInterrupt
    return state.results()


def distinct(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The first point of each plan, in order: the rows of `candidates.csv`."""
    by_id: dict[str, TrialResult] = {}
    for point in results:
        by_id.setdefault(point.plan.plan_id, point)
    return list(by_id.values())


def check_values(values: Mapping[str, Any]) -> str | None:
    """Why an evaluator's values cannot be used, None where they can."""
    for name in OBJECTIVES:
        value = values.get(name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{name}: {value} is not a finite number"
    return None
