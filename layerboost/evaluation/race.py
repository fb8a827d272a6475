"""Finds plans that lose for certain by the items that have been judged so far, so that no more of them need be asked.

A plan loses if another one is at least as fast and loses less quality, with stated confidence. Plans are compared item
by item (Maron and Moore, "Hoeffding Races", 1993, race models in this way; the bounds here are Student's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from .statistics import PairingError


def winners(
    speeds: Sequence[float],
    losses: Sequence[Mapping[str, np.ndarray]],
    rivals: Sequence[bool],
    *,
    confidence: float,
) -> list[int | None]:
    """Returns for each plan the one that beats it, or None if it may be on the front.

    The probability that a plan which is on the front is beaten is at most 1 - `confidence`, however many rivals it has:
    each comparison is made with the share of this risk that falls to it (Bonferroni). Speeds count as exact. If several
    plans beat one, it is the one by which the lower bound of the difference is largest. The bound is that of
    `statistics.mean_of_differences`.

    Args:
        speeds: Speed of each plan; higher is better.
        losses: Loss of each plan on each item of each task, (n_items,) by task; lower is better. All plans have the
            same items. Tasks have equal weights.
        rivals: Whether each plan may beat others.
        confidence: Confidence with which a plan is beaten, between 0 and 1.

    Raises:
        PairingError: Two plans have different numbers of items of a task.
    """
    if not losses:
        return []
    by_task = []
    for task in losses[0]:
        counts = {len(of_plan[task]) for of_plan in losses}
        if len(counts) > 1:
            raise PairingError(f"items: {task} has {sorted(counts)} of them; score all plans over the same items")
        by_task.append(np.stack([of_plan[task] for of_plan in losses]))
    fast, may_win = np.asarray(speeds, dtype=np.float64), np.asarray(rivals, dtype=bool)
    if min(values.shape[1] for values in by_task) < 2:
        return [None] * len(losses)  # a single item does not say how much items differ
    found: list[int | None] = []
    for plan in range(len(losses)):
        faster = np.flatnonzero(may_win & (fast >= fast[plan]) & (np.arange(len(fast)) != plan))
        if not len(faster):
            found.append(None)
            continue
        low = _lower_bounds(by_task, plan, faster, (1 - confidence) / len(faster))
        best = int(np.argmax(low))
        found.append(int(faster[best]) if low[best] > 0 else None)
    return found


def _lower_bounds(by_task: list[np.ndarray], plan: int, others: np.ndarray, risk: float) -> np.ndarray:
    """Returns lower bounds of how much more a plan loses than each other one, which hold with probability 1 - `risk`.

    Args:
        by_task: (n_plans, n_items) for each task.
        plan, others: Index of the plan, and those of the other ones (n,).
        risk: Probability of a difference below its bound.
    """
    mean, variance, spread = (np.zeros(len(others)) for _ in range(3))
    for losses in by_task:
        differences = losses[plan] - losses[others]
        n_items = differences.shape[1]
        of_mean = differences.var(axis=1, ddof=1) / n_items
        mean += differences.mean(axis=1) / len(by_task)
        variance += of_mean
        spread += of_mean**2 / (n_items - 1)
    # Welch and Satterthwaite's degrees of freedom; without any variance the mean is exact.
    degrees = np.divide(variance**2, spread, out=np.full(len(others), np.inf), where=spread > 0)
    return mean - stdtrit(degrees, 1 - risk) * np.sqrt(variance) / len(by_task)
