"""Improves a whole front of quality against speed by small changes of its plans, with few evaluations of the model.

The search starts with plans that would be optimal if layers were independent, spread over the speeds. Then it proposes
neighbours of the plans on the evaluated front (one layer treated differently, or two layers exchanged), first the one
with the largest expected improvement. The expectation comes from a model that starts with the single layers' costs and
learns from all evaluated plans what layers cost together.

The objective is the hypervolume of (quality, speed-up) over the corner (0, 1). The speed-up is relative to softmax in
every layer. The quality is exp(-loss), the likelihood that is kept if losses are drops of the NLL, relative to the
best one seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtr

from ..plan import Plan, PlanError, Treatment
from .knapsack import knapsack_front, spread_order
from .pareto import front
from .plan_space import PlanSpace

_STARTS = 16
"""Plans that start the search: enough for the model to learn from, few compared with the smallest sensible budget."""

_NOISE = 0.01  # variance of a loss about the model, relative to that of a correction to an average cost
_LEAST_SCALE = 0.05  # least scale of a layer's correction, relative to the average: a cost of 0 may be wrong, too
_DEVIATIONS = 0.5  # factor on the model's deviation in expected gains: below 1, as evaluations are few
_ROUNDING_DIGITS = 12  # gains are compared to this many digits, because rounding differs between equal gains


class FrontSwaps:
    """Proposes plans one by one and takes in their losses; several plans may be pending at once.

    The proposals depend only on the arguments and on what was observed and proposed before, in order. A plan whose loss
    is pending counts with the loss that the model expects. No plan is proposed twice.

    Args:
        space: The plans that may be proposed.
        costs: Drop of each layer if it alone is treated so, as for `knapsack_front`, in the unit of the losses.
        times: Time that each layer adds to a decode step by treatment, as for `knapsack_front`, including softmax.
        rest_time: Time of a decode step apart from the layers' times, in the same unit.
        known: Losses that need no evaluation; plans outside the space are left out.

    Raises:
        PlanError: The space is empty, costs or times are missing or not finite, or a step would take no time.
    """

    def __init__(
        self,
        space: PlanSpace,
        costs: Mapping[Treatment, Sequence[float]],
        times: Mapping[Treatment, Sequence[float]],
        *,
        rest_time: float = 0.0,
        known: Mapping[Plan, float] | None = None,
    ):
        starts = knapsack_front(space, costs, times, _STARTS)
        self._starts = [starts[index] for index in spread_order(len(starts))]
        self._space = space
        pinned = {treatment for treatment in space.pinned.values() if treatment not in space.treatments}
        self._treatments = [*space.treatments, *sorted(pinned)]
        missing = [0.0] * space.n_layers  # only for treatments of pinned layers: a constant changes no order
        self._costs = np.array([costs.get(treatment, missing) for treatment in self._treatments]).T
        self._times = np.array([times.get(treatment, missing) for treatment in self._treatments]).T
        self._rest_time = rest_time
        self._base_time = rest_time + float(np.sum(times.get(Treatment.SOFTMAX, missing)))
        least = rest_time + float(self._sums(self._times, self._encode(starts[-1:]))[0])
        if min(least, self._base_time) <= 0:
            raise PlanError(f"times: a decode step of plan '{starts[-1]}' would take {least:g}; add what is missing")
        scales = np.abs(self._costs)
        average = scales.sum() / max(1, scales[:, 1:].size) or 1.0  # column 0 is softmax, which costs nothing
        self._scales = _LEAST_SCALE + scales / average
        self._losses = {plan: float(loss) for plan, loss in (known or {}).items() if space.contains(plan)}
        self._out: list[Plan] = []

    def next_plan(self) -> Plan | None:
        """Returns the next plan to evaluate, or None if there is none: finally, if no plan is pending either."""
        while self._starts:
            plan = self._starts.pop(0)
            if plan not in self._losses:
                break
        else:
            found = self._best_neighbour()
            if found is None:
                return None
            plan = found
        self._out.append(plan)
        return plan

    def observe(self, plan: Plan, loss: float | None) -> None:
        """Takes in the loss of a proposed plan, lower is better; None if the evaluation failed.

        Raises:
            PlanError: The plan is not pending.
        """
        if plan not in self._out:
            raise PlanError(f"plan: '{plan}' was not proposed or is observed already; give it as known")
        self._out.remove(plan)
        self._losses[plan] = math.nan if loss is None else float(loss)

    def _best_neighbour(self) -> Plan | None:
        """Returns the neighbour of the front that gains most hypervolume; pending plans count with expected losses."""
        done = [plan for plan, loss in self._losses.items() if math.isfinite(loss)]
        plans = [*done, *self._out]
        if not plans:
            return None
        codes = self._encode(plans)
        expect = _Model(self._scales, self._costs, codes[: len(done)], np.array([self._losses[plan] for plan in done]))
        losses = np.append([self._losses[plan] for plan in done], expect(codes[len(done) :])[0])
        quality, speed = np.exp(losses.min() - losses), self._speed(codes)
        on_front = np.array(front(list(zip(quality.tolist(), speed.tolist(), strict=True))))
        for of_plans in (codes[on_front], codes):  # neighbours of other plans only if all those of the front are known
            neighbours = np.unique(np.concatenate([self._neighbours(row) for row in of_plans]), axis=0)
            mean, deviation = expect(neighbours)
            expected = np.exp(losses.min() - mean)
            gains = _expected_gains(
                expected, expected * deviation, self._speed(neighbours), quality[on_front], speed[on_front]
            )
            for index in np.argsort(-np.round(gains, _ROUNDING_DIGITS), kind="stable"):
                treatments = tuple(self._treatments[code] for code in neighbours[index])
                plan = Plan(treatments, self._space.window, self._space.sinks)
                if plan not in self._losses and plan not in self._out and self._space.contains(plan):
                    return plan
        return None

    def _encode(self, plans: Sequence[Plan]) -> np.ndarray:
        """Returns the treatments of plans as indices, (n, n_layers)."""
        codes = [[self._treatments.index(treatment) for treatment in plan.treatments] for plan in plans]
        return np.array(codes, dtype=np.int64).reshape(-1, self._space.n_layers)

    def _neighbours(self, codes: np.ndarray) -> np.ndarray:
        """Returns the neighbours (n, n_layers) of a plan (n_layers,): one layer changed, or two layers exchanged."""
        n_layers, n_treatments = len(codes), len(self._space.treatments)
        layers, changes = np.divmod(np.arange(n_layers * n_treatments), n_treatments)
        changed = np.tile(codes, (len(layers), 1))
        changed[np.arange(len(layers)), layers] = changes
        first, second = np.triu_indices(n_layers, 1)
        rows = np.arange(len(first))
        exchanged = np.tile(codes, (len(first), 1))
        exchanged[rows, first], exchanged[rows, second] = codes[second], codes[first]
        return np.concatenate([changed, exchanged])

    def _speed(self, codes: np.ndarray) -> np.ndarray:
        return self._base_time / (self._rest_time + self._sums(self._times, codes))

    @staticmethod
    def _sums(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Returns the sums (n,) over the layers of values (n_layers, n_treatments) at codes (n, n_layers)."""
        return values[np.arange(len(values)), codes].sum(axis=1)


class _Model:
    """Predicts losses from single costs, corrected by ridge regression with interactions of pairs of layers.

    It is a Gaussian process in which the variance of a layer's correction grows with its cost, and that of a pair's
    interaction with the product of both: layers that matter little alone are assumed to matter little together.

    Args:
        scales: (n_layers, n_treatments), variance of each correction, 1 on average.
        costs: (n_layers, n_treatments), costs of layers treated alone, the mean of the process.
        codes: (n, n_layers), the evaluated plans.
        losses: (n,), their losses.
    """

    def __init__(self, scales: np.ndarray, costs: np.ndarray, codes: np.ndarray, losses: np.ndarray):
        self._costs, self._scales, self._codes = costs, scales, codes
        self._layers = np.arange(len(costs))
        n = len(losses)
        covariance = self._covariance(codes) + _NOISE * np.eye(n)
        # The level of the mean is free: the border of the system constrains the weights to a sum of 0.
        system = np.block([[covariance, np.ones((n, 1))], [np.ones((1, n)), np.full((1, 1), 0.0 if n else 1.0)]])
        self._inverse = np.linalg.inv(system)
        residuals = losses - self._single(codes)
        self._weights = self._inverse @ np.append(residuals, 0.0)
        self._variance = max(float(residuals @ self._weights[:n]), 0.0) / max(n, 1)

    def __call__(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns means and standard deviations of the losses of plans (n, n_layers), both (n,)."""
        shared = np.concatenate([self._covariance(codes), np.ones((len(codes), 1))], axis=1)
        own = np.where(codes > 0, self._scales[self._layers, codes], 0.0).sum(axis=1)
        left = own + own**2 / 2 - ((shared @ self._inverse) * shared).sum(axis=1)
        deviation = np.sqrt(self._variance * np.maximum(left, 0.0))
        return self._single(codes) + shared @ self._weights, _DEVIATIONS * deviation

    def _single(self, codes: np.ndarray) -> np.ndarray:
        return self._costs[self._layers, codes].sum(axis=1)

    def _covariance(self, codes: np.ndarray) -> np.ndarray:
        """Returns covariances (m, n) of plans (m, n_layers) with the evaluated ones; softmax (code 0) adds nothing."""
        shared = np.zeros((len(codes), len(self._codes)))
        for treatment in range(1, self._costs.shape[1]):
            shared += ((codes == treatment) * self._scales[:, treatment]) @ (self._codes == treatment).T
        return shared + shared**2 / 2


def _expected_gains(
    mean: np.ndarray, deviation: np.ndarray, speed: np.ndarray, front_quality: np.ndarray, front_speed: np.ndarray
) -> np.ndarray:
    """Returns the expected gain in a front's hypervolume, (n,), of plans with known speed and normal quality.

    `mean` and `deviation` (n,) are those of the qualities.
    """
    order = np.argsort(front_speed, kind="stable")
    stairs, ends = np.append(front_quality[order], 0.0), np.append(np.maximum(front_speed[order], 1.0), np.inf)
    begins = np.append(1.0, ends[:-1])
    widths = np.clip(speed[:, None] - begins, 0.0, ends - begins)
    deviation = np.maximum(deviation, 1e-12)
    above = (mean[:, None] - stairs) / deviation[:, None]
    density = np.exp(-(above**2) / 2) / math.sqrt(2 * math.pi)
    return (deviation[:, None] * (above * ndtr(above) + density) * widths).sum(axis=1)
