"""Improves a whole front of quality against speed by small changes of its plans, for few evaluations of the model.

It begins with plans that would be the best if layers were independent, spread over the speeds. From then on it proposes
neighbours of the plans on the evaluated front (one layer treated otherwise, or two layers exchanged), first the one
with the largest expected improvement under a model that starts from the single layers' costs and learns from
everything evaluated what layers cost together.

What counts is the hypervolume of (quality, speed-up) over the corner (0, 1): the speed-up over softmax in every layer,
and as quality exp(-loss), the likelihood that is kept where losses are drops of the NLL, as part of the best seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm

from ..plan import Plan, PlanError, Treatment
from .knapsack import knapsack_front, spread_order
from .pareto import front
from .plan_space import PlanSpace

_STARTS = 16
"""Plans that begin the search: enough for the model to learn from, few beside the smallest sensible budget."""

_NOISE = 0.01  # variance of a loss about the model, as part of that of a correction to an average cost
_LEAST_SCALE = 0.05  # of a layer's correction, as part of the average one: a cost of 0 may be wrong too
_DEVIATIONS = 0.5  # of the model that the improvement is expected with: less than 1 as evaluations are few
_ROUNDING_DIGITS = 12  # the last digits of equal gains may differ


class FrontSwaps:
    """Proposes plans one by one and takes in their losses; several may be out at once.

    What is proposed follows from the arguments and from what was observed and proposed before, in their order. A plan
    whose loss is out counts as if it had the loss that the model expects. No plan is proposed twice.

    Args:
        space: the plans that may be proposed.
        costs: drop of each layer when it alone is treated so, as for `knapsack_front`, in the unit of the losses.
        times: what each layer adds to a decode step by treatment, as for `knapsack_front`; softmax too.
        rest_time: what a decode step takes beside the layers' times, in their unit.
        known: losses that cost nothing; plans outside the space are left out.

    Raises:
        PlanError: the space is empty, costs or times are missing or not finite, or a step would take no time.
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
        missing = [0.0] * space.n_layers  # of pinned layers alone: changes no order
        self._costs = np.array([costs.get(treatment, missing) for treatment in self._treatments]).T
        self._times = np.array([times.get(treatment, missing) for treatment in self._treatments]).T
        self._rest_time = rest_time
        self._base_time = rest_time + float(np.sum(times.get(Treatment.SOFTMAX, missing)))
        least = rest_time + float(self._sums(self._times, self._encode(starts[-1:]))[0])
        if min(least, self._base_time) <= 0:
            raise PlanError(f"times: a decode step of plan '{starts[-1]}' would take {least:g}; add what is missing")
        scales = np.abs(self._costs)
        average = scales.sum() / max(1, scales[:, 1:].size) or 1.0  # softmax costs nothing
        self._scales = _LEAST_SCALE + scales / average
        self._losses = {plan: float(loss) for plan, loss in (known or {}).items() if space.contains(plan)}
        self._out: list[Plan] = []

    def next_plan(self) -> Plan | None:
        """The next plan to evaluate; None where there is none before more is observed, and for ever if none is out."""
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
        """Takes in what a proposed plan lost, lower is better; None where it failed.

        Raises:
            PlanError: the plan is not out.
        """
        if plan not in self._out:
            raise PlanError(f"plan: '{plan}' was not proposed or is observed already; give it as known")
        self._out.remove(plan)
        self._losses[plan] = math.nan if loss is None else float(loss)

    def _best_neighbour(self) -> Plan | None:
        """Of the front, counting what is out at its expected loss, the neighbour that gains most hypervolume."""
        done = [plan for plan, loss in self._losses.items() if math.isfinite(loss)]
        plans = [*done, *self._out]
        if not plans:
            return None
        codes = self._encode(plans)
        expect = _Model(self._scales, self._costs, codes[: len(done)], np.array([self._losses[plan] for plan in done]))
        losses = np.append([self._losses[plan] for plan in done], expect(codes[len(done) :])[0])
        quality, speed = np.exp(losses.min() - losses), self._speed(codes)
        on_front = np.array(front(list(zip(quality.tolist(), speed.tolist(), strict=True))))
        for of_plans in (codes[on_front], codes):  # farther away only where all near the front is known
            neighbours = np.unique(np.concatenate([self._neighbours(row) for row in of_plans]), axis=0)
            mean, deviation = expect(neighbours)
            expected = np.exp(losses.min() - mean)
            gains = _expected_gains(
                expected, expected * deviation, self._speed(neighbours), quality[on_front], speed[on_front]
            )
            for index in np.argsort(-np.round(gains, _ROUNDING_DIGITS), kind="stable"):
                plan = Plan(tuple(self._treatments[code] for code in neighbours[index]), self._space.window)
                if plan not in self._losses and plan not in self._out and self._space.contains(plan):
                    return plan
        return None

    def _encode(self, plans: Sequence[Plan]) -> np.ndarray:
        """(n, n_layers) indices of treatments."""
        codes = [[self._treatments.index(treatment) for treatment in plan.treatments] for plan in plans]
        return np.array(codes, dtype=np.int64).reshape(-1, self._space.n_layers)

    def _neighbours(self, codes: np.ndarray) -> np.ndarray:
        """(n, n_layers) of a plan (n_layers,): each layer treated otherwise, and two different layers exchanged."""
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
        """(n,) sums over the layers of values (n_layers, n_treatments) at codes (n, n_layers)."""
        return values[np.arange(len(values)), codes].sum(axis=1)


class _Model:
    """Expected losses: single costs, corrected by ridge regression with interactions of pairs of layers.

    A Gaussian process in which a layer's correction varies as its cost does, and a pair's interaction as the product
    of both: layers that matter little alone are taken to matter little together.

    Args:
        scales: (n_layers, n_treatments) variance of each correction, 1 on average.
        costs: (n_layers, n_treatments) of layers treated alone, the mean of the process.
        codes: (n, n_layers) of the evaluated plans.
        losses: (n,)
    """

    def __init__(self, scales: np.ndarray, costs: np.ndarray, codes: np.ndarray, losses: np.ndarray):
        self._costs, self._scales, self._codes = costs, scales, codes
        self._layers = np.arange(len(costs))
        n = len(losses)
        covariance = self._covariance(codes) + _NOISE * np.eye(n)
        # The mean's level is free: the border holds the weights' sum at 0.
        system = np.block([[covariance, np.ones((n, 1))], [np.ones((1, n)), np.full((1, 1), 0.0 if n else 1.0)]])
        self._inverse = np.linalg.inv(system)
        residuals = losses - self._single(codes)
        self._weights = self._inverse @ np.append(residuals, 0.0)
        self._variance = max(float(residuals @ self._weights[:n]), 0.0) / max(n, 1)

    def __call__(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of the losses of plans (n, n_layers), (n,) both."""
        shared = np.concatenate([self._covariance(codes), np.ones((len(codes), 1))], axis=1)
        own = np.where(codes > 0, self._scales[self._layers, codes], 0.0).sum(axis=1)
        left = own + own**2 / 2 - ((shared @ self._inverse) * shared).sum(axis=1)
        deviation = np.sqrt(self._variance * np.maximum(left, 0.0))
        return self._single(codes) + shared @ self._weights, _DEVIATIONS * deviation

    def _single(self, codes: np.ndarray) -> np.ndarray:
        return self._costs[self._layers, codes].sum(axis=1)

    def _covariance(self, codes: np.ndarray) -> np.ndarray:
        """(m, n) between plans (m, n_layers) and the evaluated ones; softmax, code 0, has no effect to correct."""
        shared = np.zeros((len(codes), len(self._codes)))
        for treatment in range(1, self._costs.shape[1]):
            shared += ((codes == treatment) * self._scales[:, treatment]) @ (self._codes == treatment).T
        return shared + shared**2 / 2


def _expected_gains(
    mean: np.ndarray, deviation: np.ndarray, speed: np.ndarray, front_quality: np.ndarray, front_speed: np.ndarray
) -> np.ndarray:
    """(n,) what plans of known speed and normally distributed quality are expected to add to a front's hypervolume."""
    order = np.argsort(front_speed, kind="stable")
    stairs, ends = np.append(front_quality[order], 0.0), np.append(np.maximum(front_speed[order], 1.0), np.inf)
    begins = np.append(1.0, ends[:-1])
    widths = np.clip(speed[:, None] - begins, 0.0, ends - begins)
    deviation = np.maximum(deviation, 1e-12)
    above = (mean[:, None] - stairs) / deviation[:, None]
    return (deviation[:, None] * (above * norm.cdf(above) + norm.pdf(above)) * widths).sum(axis=1)
