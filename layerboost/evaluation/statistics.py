"""Computes differences and ratios of scores over the same items, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

# This many resampled values at once stay in the processor's cache.
_RESAMPLED_VALUES_AT_ONCE = 100_000
# With fewer items, resamples of a few almost equal values make the studentised bootstrap arbitrarily wide.
_BOOTSTRAP_FROM_N_ITEMS = 10
# If a resample's standard error is below this part of the sample's, it is only rounding.
_NO_SPREAD = 1e-6


class PairingError(ValueError):
    """The scores cannot be compared item by item."""


@dataclass(frozen=True)
class Difference:
    """Holds a mean difference and its uncertainty.

    Attributes:
        mean: Mean of base minus other; positive if the other scores lower.
        stderr: Standard error by normal theory; None if a single item says nothing about it.
        ci_low: Lower end of the confidence interval; None if `stderr` is None or no interval was asked for.
        ci_high: Upper end of the confidence interval; None if `ci_low` is None.
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
    confidence: float | None = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Compares two models over the same items.

    The interval is the symmetric studentised bootstrap one (Hall 1988), mean ± q * stderr. Items are drawn with
    replacement, each with both of its scores, and the distance of a resample's mean from the mean is divided by the
    resample's own standard error; q is the quantile of this number over the resamples. The interval is never narrower
    than Student's t interval, and equals it below ten items. The standard error is the sample one of the differences.

    By simulation, at 95 % it covers the truth in 94 to 96.5 % of samples if differences are normal, moderately skewed
    (exponential) or heavy-tailed (t with 3 degrees of freedom) and n is 50 or more, and in 94 to 97 % if they are 1, 0
    or -1 and about eight or more of them are not 0. It covers less if a few extreme or rare items determine the mean:
    88 to 94 % for lognormal differences (sigma 1) with 20 to 100 items, and far less if only a handful of items change
    at all. If all items change by the same amount the interval is a single point, which is too narrow. On skewed
    differences the misses are mostly on the side of the long tail.

    Args:
        base_items: The base's score of each item.
        other_items: The other model's score of each item, in the same order.
        confidence: Probability that the interval is to cover; None for no interval, which takes nearly all of the time.
        resamples: Bootstrap samples.
        seed: Seed of the bootstrap.

    Raises:
        PairingError: If there are no items or their numbers differ.
    """
    differences = _paired(base_items, other_items)
    n = len(differences)
    mean = float(differences.mean())
    stderr = mean_stderr(differences)
    if stderr is None or confidence is None:
        return Difference(mean, stderr, None, None, n)
    if stderr == 0.0:
        return Difference(mean, stderr, mean, mean, n)
    reach = stderr * _studentised_quantile(differences, stderr, confidence, resamples, seed)
    return Difference(mean, stderr, mean - reach, mean + reach, n)


def mean_of_differences(differences: Sequence[Difference], *, confidence: float | None = 0.95) -> Difference:
    """Averages the differences of independent tasks, with the same weight for each task.

    Tasks are fixed and their items sampled: the error is that of the same tasks with other items. The interval is
    Student's with Welch and Satterthwaite's degrees of freedom, because the error itself is uncertain if most of it
    comes from a small task. The standard error of a task that has no number of items counts as exact. If a task has no
    standard error, the mean has none either. With a confidence of None there is no interval.

    Raises:
        PairingError: If there are no differences.
    """
    if not differences:
        raise PairingError("differences: none given; at least one task must be scored")
    mean = math.fsum(d.mean for d in differences) / len(differences)
    n_items = sum(d.n_items for d in differences)
    stderr = mean_of_independent([d.stderr for d in differences])
    if stderr is None or confidence is None:
        return Difference(mean, stderr, None, None, n_items)
    reach = stderr * _t_quantile(confidence, _welch_satterthwaite(differences))
    return Difference(mean, stderr, mean - reach, mean + reach, n_items)


def mean_of_independent(stderrs: Sequence[float | None]) -> float | None:
    """Returns the standard error of the mean of independent quantities, None if one of their errors is unknown."""
    known = [stderr for stderr in stderrs if stderr is not None]
    if len(known) < len(stderrs) or not known:
        return None
    return math.sqrt(math.fsum(stderr**2 for stderr in known)) / len(known)


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


def _studentised_quantile(values: np.ndarray, stderr: float, confidence: float, resamples: int, seed: int) -> float:
    """Returns how many standard errors the symmetric interval reaches to each side of the mean of `values` (n,)."""
    n = len(values)
    least = _t_quantile(confidence, n - 1)
    if n < _BOOTSTRAP_FROM_N_ITEMS:
        return least
    rng = np.random.default_rng(seed)
    centred = values - values.mean()
    at_once = max(1, _RESAMPLED_VALUES_AT_ONCE // n)
    deviations = []
    for done in range(0, resamples, at_once):
        drawn = centred[rng.integers(n, size=(min(at_once, resamples - done), n))]
        means = drawn.mean(axis=1)
        drawn -= means[:, None]
        drawn *= drawn
        stderrs = np.sqrt(drawn.sum(axis=1) / (n * (n - 1)))
        # Resamples without spread have no such ratio; if few items differ, they would make the interval infinite.
        spread = stderrs > _NO_SPREAD * stderr
        deviations.append(np.abs(means[spread]) / stderrs[spread])
    measured = np.concatenate(deviations) if deviations else np.empty(0)
    return max(least, float(np.quantile(measured, confidence))) if len(measured) else least


def _welch_satterthwaite(differences: Sequence[Difference]) -> float:
    """Returns the degrees of freedom of the mean's standard error, infinite if the errors of all tasks are exact."""
    variances = [(d.stderr or 0.0) ** 2 for d in differences]
    # Variances are divided by their sum, or their squares could underflow.
    total = math.fsum(variances)
    if total == 0.0:
        return math.inf
    shares = math.fsum(
        (variance / total) ** 2 / (d.n_items - 1)
        for variance, d in zip(variances, differences, strict=True)
        if d.n_items > 1
    )
    return 1.0 / shares if shares else math.inf


def _t_quantile(confidence: float, degrees_of_freedom: float) -> float:
    return float(stdtrit(degrees_of_freedom, (1 + confidence) / 2))
