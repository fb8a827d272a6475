"""Finds the best plans if layers were independent: the exact front of summed costs against summed times.

Choosing a treatment for each layer under a bound on the sum of their times is a multiple-choice knapsack. Integer
programming solves one such problem for each point of the front, under the limits that plans must satisfy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.optimize import LinearConstraint, milp

from ..plan import Plan, PlanError, Treatment
from .pareto import front
from .plan_space import PlanSpace

Values = Mapping[Treatment, Sequence[float]]

_STEPS = 1 << 20
"""Whole steps in the range of a sum: far coarser than the solver's tolerance, so that solutions are exact."""

_ROW_SCALE = 1e4
"""Scale of a limit's row: it makes the solver's tolerance of 1e-6 no wider than that of `Limit.holds`."""

_ROUNDING = 1e-9


def knapsack_front(
    space: PlanSpace,
    costs: Values,
    times: Values,
    max_plans: int | None = None,
) -> list[Plan]:
    """Returns the plans of a space that no other plan beats in both the sum of costs and the sum of times.

    Sums are distinguished to a millionth of their range over the space. Of plans with equal sums only one is returned.

    Args:
        space: The plans to choose from.
        costs: Drop of each layer if it alone is treated so, first layer first; softmax costs 0 unless given. Costs of
            pinned layers may be missing, because they change no choice.
        times: Time that each layer adds to a decode step, in any unit (bytes are possible). Every treatment is needed,
            except those that only pinned layers have.
        max_plans: Maximum number of plans, at least 2. They are spread evenly over the times, and only they are solved
            for. None gives the whole front.

    Returns:
        The plans from the slowest, which has the least cost, to the fastest.

    Raises:
        PlanError: The space is empty, costs or times are missing or not finite, or `max_plans` is too small.
    """
    if max_plans is not None and max_plans < 2:
        raise PlanError(f"max_plans: {max_plans} is too small for a front; give at least 2")
    program = _Program(space, costs, times)
    slowest, fastest = program.best("cost"), program.best("time")
    found = {slowest, fastest}
    gaps = [(slowest, fastest)] if slowest != fastest else []
    while gaps and (max_plans is None or len(found) < max_plans):
        gaps.sort(key=lambda gap: (gap[0].time - gap[1].time, gap[0].time))
        slow, fast = gaps.pop()
        between = fast
        if max_plans is not None:
            between = program.best("cost", time_at_most=(slow.time + fast.time) // 2)
        if between == fast:  # the faster half is empty: take the next slower plan, in the end the slow one itself
            between = program.best("time", cost_at_most=fast.cost - 1)
            gaps += [(slow, between)] if between != slow else []
        else:
            gaps += [(slow, between), (between, fast)]
        found.add(between)
    return program.undominated(found)


def spread_order(n: int) -> list[int]:
    """Orders the indices below `n` so that any beginning covers the range: both ends, then middles of the gaps."""
    order, gaps = sorted({0, n - 1}), [(0, n - 1)]
    while gaps:
        first, last = gaps.pop(0)
        if last - first > 1:
            middle = (first + last) // 2
            order.append(middle)
            gaps += [(first, middle), (middle, last)]
    return order


@dataclass(frozen=True)
class _Point:
    """Denotes a plan by its sums in whole steps; plans with equal sums are equal."""

    cost: int
    time: int
    choices: tuple[Treatment, ...] = field(compare=False)


class _Program:
    """Holds the integer program, which has a binary variable for each layer and each treatment that it may get."""

    def __init__(self, space: PlanSpace, costs: Values, times: Values):
        self._space = space
        self._variables = [(layer, choice) for layer in range(space.n_layers) for choice in space.choices(layer)]
        self._layers = np.array([layer for layer, _ in self._variables])
        costs = {Treatment.SOFTMAX: [0.0] * space.n_layers, **costs}
        self._values = {"cost": self._row("costs", costs), "time": self._row("times", times)}
        self._steps = {name: _whole_steps(row, self._layers) for name, row in self._values.items()}
        one_each = (self._layers == np.arange(space.n_layers)[:, None]).astype(np.float64)
        self._constraints = [LinearConstraint(one_each, 1, 1)]
        for limit in space.limits:
            row = np.array([limit.costs[choice][layer] for layer, choice in self._variables], dtype=np.float64)
            scale = _ROW_SCALE / max(np.abs(row).max(), abs(limit.at_most), 1e-300)
            self._constraints.append(LinearConstraint(row * scale, -np.inf, limit.at_most * scale))

    def best(
        self, first: Literal["cost", "time"], *, cost_at_most: int | None = None, time_at_most: int | None = None
    ) -> _Point:
        """Returns the plan with the least of one sum and, among equal ones, the least of the other.

        Raises:
            PlanError: No plan satisfies the limits. The caller must give bounds on the sums that can be satisfied.
        """
        bounds = {"cost": cost_at_most, "time": time_at_most}
        point = self._solve(first, bounds)
        bounds[first] = getattr(point, first)
        return self._solve("time" if first == "cost" else "cost", bounds)

    def undominated(self, points: set[_Point]) -> list[Plan]:
        """Returns the plans of the points, slowest first, except those worse by no more than rounding to steps."""
        ordered = sorted(points, key=lambda point: -point.time)
        sums = [self._sums(point) for point in ordered]
        kept = front(sums)
        return [
            self._space.plan(point.choices)
            for index, point in enumerate(ordered)
            if kept[index] and sums[index] not in sums[:index]
        ]

    def _row(self, name: str, values: Values) -> np.ndarray:
        """Returns the value of each variable; missing values of pinned layers are 0, as they change no choice."""
        row = np.zeros(len(self._variables))
        for index, (layer, choice) in enumerate(self._variables):
            if layer in self._space.pinned and choice not in values:
                continue
            if len(values.get(choice, ())) != self._space.n_layers:
                raise PlanError(f"{name}: gives no value of {choice} for each of {self._space.n_layers} layers")
            row[index] = values[choice][layer]
            if not math.isfinite(row[index]):
                raise PlanError(f"{name}.{choice}: layer {layer} has {row[index]}; give a finite number")
        return row

    def _sums(self, point: _Point) -> tuple[int, int]:
        """Returns minus cost and minus time, rounded far below a step, because equal sums may differ by rounding."""
        picked = [self._variables.index((layer, choice)) for layer, choice in enumerate(point.choices)]
        cost, time = (-_rounded_sum(self._values[name], picked) for name in ("cost", "time"))
        return cost, time

    def _solve(self, objective: str, at_most: Mapping[str, int | None]) -> _Point:
        bounds = [
            LinearConstraint(self._steps[name], -np.inf, bound + 0.5)
            for name, bound in at_most.items()
            if bound is not None
        ]
        solution = milp(
            self._steps[objective],
            integrality=np.ones(len(self._variables)),
            bounds=(0, 1),
            constraints=[*self._constraints, *bounds],
            options={"mip_rel_gap": 0.0},
        )
        if solution.x is None:
            raise PlanError(self._why_empty() if not bounds else f"search for plans: {solution.message}")
        chosen = np.flatnonzero(solution.x > 0.5)
        sums = {name: int(steps[chosen].sum()) for name, steps in self._steps.items()}
        return _Point(**sums, choices=tuple(self._variables[index][1] for index in chosen))

    def _why_empty(self) -> str:
        space = self._space
        for limit in space.limits:
            least = sum(min(limit.costs[c][layer] for c in space.choices(layer)) for layer in range(space.n_layers))
            if least > limit.at_most:
                return f"{limit.name}: no plan has at most {limit.at_most:g}, the least is {least:g}; raise it or unpin"
        names = ", ".join(limit.name for limit in space.limits)
        return f"{names}: no plan holds them together; raise one of them or unpin layers"


def _rounded_sum(values: np.ndarray, picked: Sequence[int]) -> int:
    unit = _ROUNDING * max(float(np.abs(values).max(initial=0.0)), 1e-300)
    return round(math.fsum(values[picked]) / unit)


def _whole_steps(values: np.ndarray, layers: np.ndarray) -> np.ndarray:
    """Returns values relative to the least of their layer, in whole steps; exact if a common step is large enough."""
    least = np.full(layers[-1] + 1, np.inf)
    np.minimum.at(least, layers, values)
    above = values - least[layers]
    most = np.zeros(len(least))
    np.maximum.at(most, layers, above)
    whole_range = most.sum()
    if whole_range == 0:
        return above
    if (above == np.round(above)).all() and above.max() < 2**53:
        step = float(np.gcd.reduce(above.astype(np.int64)))
        if whole_range / step <= _STEPS:
            return above / step
    return np.round(above * (_STEPS / whole_range))
