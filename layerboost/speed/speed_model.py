"""Predicts the decode speed of every plan from the measured speed of a few.

The time of a decode step is that of everything except attention plus what each layer's attention adds, which depends on
the layer's treatment and not on its place. If the parent itself gives some layers a window, its softmax layers are of
two kinds, and each kind has its own time. A treated layer has the plan's window, whichever kind it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.optimize import nnls

from ..plan import Plan, Treatment

Kind = tuple[Treatment, int | None]
"""A treatment and, for softmax, the window that the parent itself gives the layer."""

Point = tuple[Plan, float, float]
"""A measured plan, the seconds of a decode step, and their standard error."""

_LEAST_ERROR = 0.01
"""Minimum relative error of a measurement, because the scatter of a few repeats may be small by chance."""

_MOST_PARTS = 12
"""Number of parts that the layers are cut into for mixtures: enough for any mixture that a fit needs."""


class SpeedFitError(ValueError):
    """The measured plans do not determine the treatments' times; the message says how many there are and are needed."""


@dataclass(frozen=True)
class SpeedModel:
    """Predicts the seconds of a decode step under one serving condition.

    Attributes:
        concurrency: Sequences decoded together.
        native_windows: The window that the parent itself gives each layer.
        window: Window of the windowed treatments, in tokens; None if no measured plan had one.
        kinds: Kinds of layers that were measured, except `none`.
        rest_s: Seconds of everything except attention.
        attention_s: Seconds that one layer of each kind adds.
        covariance: Covariance of (rest_s, *attention_s), in s².
        scatter: Relative standard deviation of a plan's time around the model.
        n_points: Number of plans that it was fitted to.
    """

    concurrency: int
    native_windows: tuple[int | None, ...]
    window: int | None
    kinds: tuple[Kind, ...]
    rest_s: float
    attention_s: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    scatter: float
    n_points: int

    @classmethod
    def fit(
        cls, points: Sequence[Point], *, concurrency: int, native_windows: Sequence[int | None] | None = None
    ) -> SpeedModel:
        """Fits non-negative times, with each plan weighted by its relative error.

        The scatter is the largest of three estimates: from the measurements' own errors, from the residuals, and from
        plans that are left out of the fit.

        Args:
            points: Plans of one model, each with seconds of a step and their standard error.
            concurrency: Sequences that were decoded together.
            native_windows: The window that the parent itself gives each layer; None if it gives none.

        Raises:
            SpeedFitError: There are no more plans than times to fit, the plans do not determine all times, or their
                windows differ.
        """
        native = tuple(native_windows) if native_windows is not None else (None,) * len(points[0][0]) if points else ()
        plans = [plan for plan, _, _ in points]
        windows = {plan.window for plan in plans if plan.window is not None}
        if len(windows) > 1:
            raise SpeedFitError(f"window: plans of windows {sorted(windows)} were measured; give those of one window")
        kinds = tuple(sorted({kind for plan in plans for kind in _kinds(plan, native)}, key=_order))
        design = np.array([_row(plan, kinds, native) for plan in plans]).reshape(len(plans), 1 + len(kinds))
        if len(plans) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
            raise SpeedFitError(
                f"{len(plans)} measured plans do not tell {design.shape[1]} times (attention of "
                f"{len(kinds)} kinds and the rest); measure more plans, `none` in every layer among them"
            )
        seconds = np.array([point[1] for point in points])
        errors = np.hypot([point[2] for point in points], _LEAST_ERROR * seconds)
        rows, times = design / errors[:, None], seconds / errors
        fitted, residual = nnls(rows, times)
        factor = max(1.0, residual**2 / (len(plans) - design.shape[1]), _left_out_factor(rows, times))
        covariance = factor * np.linalg.inv(rows.T @ rows)
        return cls(
            concurrency=concurrency,
            native_windows=native,
            window=windows.pop() if windows else None,
            kinds=kinds,
            rest_s=float(fitted[0]),
            attention_s=tuple(fitted[1:].tolist()),
            covariance=tuple(map(tuple, covariance.tolist())),
            scatter=float(np.sqrt(factor) * np.median(errors / seconds)),
            n_points=len(plans),
        )

    def predict(self, plan: Plan) -> tuple[float, float] | None:
        """Returns the output throughput in tokens per second and its standard error.

        It is None for a plan with a treatment or window that no measured plan had.
        """
        plan.check_length(len(self.native_windows))
        if not set(_kinds(plan, self.native_windows)) <= set(self.kinds) or plan.window not in (None, self.window):
            return None
        row = np.array(_row(plan, self.kinds, self.native_windows))
        step_s = float(row @ np.array([self.rest_s, *self.attention_s]))
        stderr_s = np.sqrt(row @ np.array(self.covariance) @ row + (self.scatter * step_s) ** 2)
        throughput = self.concurrency / step_s
        return throughput, float(throughput * stderr_s / step_s)

    def layer_times(self) -> dict[Treatment, list[float]]:
        """Returns the seconds that each layer's attention adds to a step, first layer first, by measured treatment."""
        of_kind = dict(zip(self.kinds, self.attention_s, strict=True))
        times = {Treatment.NONE: [0.0] * len(self.native_windows)}
        for treatment in dict.fromkeys(treatment for treatment, _ in self.kinds):
            times[treatment] = [of_kind[_kind(treatment, native)] for native in self.native_windows]
        return times

    def to_dict(self) -> dict[str, Any]:
        return {
            "concurrency": self.concurrency,
            "native_windows": list(self.native_windows),
            "window": self.window,
            "kinds": [[treatment.value, native] for treatment, native in self.kinds],
            "rest_s": self.rest_s,
            "attention_s": list(self.attention_s),
            "covariance": [list(row) for row in self.covariance],
            "scatter": self.scatter,
            "n_points": self.n_points,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpeedModel:
        return cls(
            **{
                **data,
                "native_windows": tuple(data["native_windows"]),
                "kinds": tuple((Treatment(treatment), native) for treatment, native in data["kinds"]),
                "attention_s": tuple(data["attention_s"]),
                "covariance": tuple(map(tuple, data["covariance"])),
            }
        )


def counts(plan: Plan, native_windows: Sequence[int | None]) -> tuple[tuple[Treatment, int | None, int], ...]:
    """Returns how many layers of each kind a plan has, which together with its window determines its speed."""
    kinds = _kinds(plan, native_windows)
    return tuple((*kind, kinds.count(kind)) for kind in sorted(set(kinds), key=_order))


def design_plans(
    n_layers: int,
    treatments: Sequence[Treatment],
    window: int,
    n: int,
    *,
    native_windows: Sequence[int | None] | None = None,
    given: Sequence[Plan] = (),
    sinks: int = 0,
) -> list[Plan]:
    """Returns the plans to measure so that the speed of all others can be predicted.

    The order is: every layer treated alike, for each treatment; if the parent has layers of two kinds, softmax in only
    one of them; the given plans; then mixtures, each time the one that reduces the uncertainty most (D-optimal). A
    mixture gives no treatment more than half of the layers, so that it also tests whether times add up, and spreads
    each treatment over the depth.

    Args:
        n_layers: Layers of the model.
        treatments: Treatments that layers may get; softmax and none are always included.
        window: Window of the windowed treatments, in tokens.
        n: Total number of plans; at least as many as a fit needs are returned, and at most as many as there are.
        native_windows: The window that the parent itself gives each layer; None if it gives none.
        given: Plans that are measured in any case, except those of another window.
        sinks: Sinks of the windowed treatments, in tokens.
    """
    native = tuple(native_windows) if native_windows is not None else (None,) * n_layers
    given = [plan for plan in given if plan.window is None or (plan.window, plan.sinks) == (window, sinks)]
    named = {Treatment.SOFTMAX, Treatment.NONE, *treatments, *(t for plan in given for t in plan.treatments)}
    wanted = [treatment for treatment in Treatment if treatment in named]
    chosen = [Plan.uniform(treatment, n_layers, window, sinks) for treatment in wanted]
    chosen += [
        Plan(tuple(Treatment.SOFTMAX if kind == one else Treatment.NONE for kind in native))
        for one in list(dict.fromkeys(native))[1:]
    ]
    chosen = list(dict.fromkeys([*chosen, *given]))
    kinds = tuple(sorted({kind for plan in chosen for kind in _kinds(plan, native)}, key=_order))
    met = {counts(plan, native) for plan in chosen}
    pool = [plan for plan in _mixtures(n_layers, wanted, window, sinks) if counts(plan, native) not in met]
    rows = np.array([_row(plan, kinds, native) for plan in pool]).reshape(len(pool), 1 + len(kinds))
    n = max(n, 2 + len(kinds))
    while len(chosen) < n and (fresh := [index for index, plan in enumerate(pool) if plan not in chosen]):
        measured = np.array([_row(plan, kinds, native) for plan in chosen])
        gain = np.einsum("ij,jk,ik->i", rows, np.linalg.inv(measured.T @ measured), rows)
        chosen.append(pool[max(fresh, key=lambda index: (round(gain[index], 9), -index))])
    return chosen


def _mixtures(n_layers: int, treatments: Sequence[Treatment], window: int, sinks: int) -> list[Plan]:
    """Returns plans of at least two treatments, none of them in more than half of the layers (rounded up)."""
    n_parts, n_bars = min(n_layers, _MOST_PARTS), len(treatments) - 1
    found = []
    for bars in combinations(range(n_parts + n_bars), n_bars):
        # This is stars and bars: the parts before the first bar go to the first treatment, and so on.
        ends = [bar - i for i, bar in enumerate(bars)] + [n_parts]
        layers = np.diff([0, *(round(end * n_layers / n_parts) for end in ends)])
        if layers.max() <= (n_layers + 1) // 2 and np.count_nonzero(layers) > 1:
            found.append(Plan(_interleaved(dict(zip(treatments, layers.tolist(), strict=True))), window, sinks))
    return list(dict.fromkeys(found))


def _interleaved(n_of: dict[Treatment, int]) -> tuple[Treatment, ...]:
    """Spreads the given numbers of layers of each treatment evenly over the depth."""
    places = [((i + 0.5) / n, treatment) for treatment, n in n_of.items() for i in range(n)]
    return tuple(treatment for _, treatment in sorted(places, key=lambda place: place[0]))


def _kind(treatment: Treatment, native: int | None) -> Kind:
    return treatment, native if treatment is Treatment.SOFTMAX else None


def _kinds(plan: Plan, native_windows: Sequence[int | None]) -> list[Kind]:
    """Returns the kinds of the layers that add time to a step; layers without attention add none."""
    layers = zip(plan.treatments, native_windows, strict=True)
    return [_kind(treatment, native) for treatment, native in layers if treatment is not Treatment.NONE]


def _order(kind: Kind) -> tuple[int, int]:
    return list(Treatment).index(kind[0]), kind[1] or 0


def _row(plan: Plan, kinds: Sequence[Kind], native_windows: Sequence[int | None]) -> list[float]:
    """Returns the coefficients of a step's seconds: 1 for the rest, and the number of layers of each kind."""
    of_plan = _kinds(plan, native_windows)
    return [1.0, *(float(of_plan.count(kind)) for kind in kinds)]


def _left_out_factor(rows: np.ndarray, times: np.ndarray) -> float:
    """Returns the mean squared error of left-out points, relative to the error that their weights predict."""
    found = []
    for index in range(len(rows)):
        kept, kept_times = np.delete(rows, index, axis=0), np.delete(times, index)
        if np.linalg.matrix_rank(kept) < rows.shape[1]:
            continue  # without this point one of the times would be undetermined
        fitted, _ = nnls(kept, kept_times)
        row = rows[index]
        expected = 1 + row @ np.linalg.inv(kept.T @ kept) @ row
        found.append((times[index] - row @ fitted) ** 2 / expected)
    return float(np.mean(found)) if found else 0.0
