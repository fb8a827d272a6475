"""Differences and ratios of scores over the same items, with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_RESAMPLED_VALUES_AT_ONCE = 4_000_000


class PairingError(ValueError):
    """Scores that cannot be compared item by item."""


@dataclass(frozen=True)
class Difference:
    """A mean difference and its uncertainty.

    Attributes:
        mean: Mean of base minus other; positive where other scores lower.
        stderr: Standard error by normal theory; None where one item says nothing about it.
        ci_low: Lower end of the confidence interval; None where `stderr` is.
        ci_high: Upper end of the confidence interval; None where `stderr` is.
        n_items: Items compared, over all tasks.
    """

    mean: float
    stderr: float | None
    ci_low: float | None
    ci_high: float | None
    n_items: int


def mean_stderr(items: Sequence[float] | np.ndarray) -> float | None:
    """Returns the standard error of the mean of independent items (ddof 1), None for fewer than two items."""
    if len(items) < 2:
        return None
    values = np.asarray(items, dtype=np.float64)
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def paired_difference(
    base_items: Sequence[float],
    other_items: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compares two models over the same items.

    The interval is the percentile bootstrap of the mean difference: items are drawn with replacement, each with both of
    its scores. The standard error is the sample one of the differences.

    Args:
        base_items: The base's score of each item.
        other_items: The other model's score of each item, in the same order.
        confidence: Probability that the interval is to cover.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        PairingError: If there are no items or their numbers differ.
    """
    differences = _paired(base_items, other_items)
    n = len(differences)
    mean = float(differences.mean())
    stderr = mean_stderr(differences)
    if stderr is None:
        return Difference(mean, None, None, None, n)
    if stderr == 0.0:
        return Difference(mean, stderr, mean, mean, n)
    rng = np.random.default_rng(seed)
    at_once = max(1, _RESAMPLED_VALUES_AT_ONCE // n)
    means = np.concatenate(
        [
            differences[rng.integers(n, size=(min(at_once, resamples - done), n))].mean(axis=1)
            for done in range(0, resamples, at_once)
        ]
    )
    tail = (1 - confidence) / 2
    ci_low, ci_high = np.quantile(means, [tail, 1 - tail])
    return Difference(mean, stderr, float(ci_low), float(ci_high), n)


def mean_of_differences(differences: Sequence[Difference], *, confidence: float = 0.95) -> Difference:
    """Averages the differences of independent tasks, each task weighing the same.

    Tasks are fixed and their items sampled: the error is that of the same tasks with other items. The interval is the
    normal one. A task without a standard error leaves the mean without one.

    Raises:
        PairingError: If there are no differences.
    """
    if not differences:
        raise PairingError("differences: none given; at least one task must be scored")
    mean = math.fsum(d.mean for d in differences) / len(differences)
    n_items = sum(d.n_items for d in differences)
    stderr = mean_of_independent([d.stderr for d in differences])
    if stderr is None:
        return Difference(mean, None, None, None, n_items)
    reach = stderr * NormalDist().inv_cdf((1 + confidence) / 2)
    return Difference(mean, stderr, mean - reach, mean + reach, n_items)


def mean_of_independent(stderrs: Sequence[float | None]) -> float | None:
    """Returns the standard error of the mean of independent quantities, None if one of theirs is unknown."""
    known = [stderr for stderr in stderrs if stderr is not None]
    if len(known) < len(stderrs) or not known:
        return None
    return math.sqrt(math.fsum(stderr**2 for stderr in known)) / len(known)


def ratio_of_means(base_items: Sequence[float], other_items: Sequence[float]) -> tuple[float, float | None]:
    """Returns mean(other) / mean(base) over the same items and its standard error by the delta method.

    The error is that of `other - ratio * base` per item, divided by the base's mean, so that what both models find hard
    cancels. The ratio is NaN, without error, where the base's mean is zero.

    Raises:
        PairingError: If there are no items or their numbers differ.
    """
    differences = _paired(base_items, other_items)
    base_mean = float(np.mean(base_items))
    if base_mean == 0.0:
        return math.nan, None
    ratio = 1.0 - float(differences.mean()) / base_mean
    stderr = ratio_residual_stderr(base_items, other_items, ratio)
    return ratio, None if stderr is None else stderr / abs(base_mean)


def ratio_residual_stderr(base_items: Sequence[float], other_items: Sequence[float], ratio: float) -> float | None:
    """Returns the standard error of mean(other) - ratio * mean(base) over the same items, None for a single item."""
    _paired(base_items, other_items)
    return mean_stderr(np.asarray(other_items, dtype=np.float64) - ratio * np.asarray(base_items, dtype=np.float64))


def _paired(base_items: Sequence[float], other_items: Sequence[float]) -> np.ndarray:
    if len(base_items) != len(other_items) or len(base_items) == 0:
        raise PairingError(
            f"items: {len(base_items)} of the base against {len(other_items)} of the other; "
            "score both models over the same items"
        )
    return np.asarray(base_items, dtype=np.float64) - np.asarray(other_items, dtype=np.float64)
