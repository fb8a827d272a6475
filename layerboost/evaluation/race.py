"""Finds plans that lose for certain by the items that have been judged so far, so that no more of them need be asked.

A plan loses if another one is at least as fast and loses less quality, with stated confidence. Plans are compared item
by item (Maron and Moore, "Hoeffding Races", 1993, race models in this way; the bounds here are Student's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .statistics import mean_of_differences, paired_difference


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
    plans beat one, it is the one by which the lower bound of the difference is largest.

    Args:
        speeds: Speed of each plan; higher is better.
        losses: Loss of each plan on each item of each task, (n_items,) by task; lower is better. All plans have the
            same items. Tasks have equal weights.
        rivals: Whether each plan may beat others.
        confidence: Confidence with which a plan is beaten, between 0 and 1.

    Raises:
        PairingError: Two plans have different numbers of items of a task.
    """
    return [_winner(plan, speeds, losses, rivals, confidence) for plan in range(len(speeds))]


def _winner(
    plan: int,
    speeds: Sequence[float],
    losses: Sequence[Mapping[str, np.ndarray]],
    rivals: Sequence[bool],
    confidence: float,
) -> int | None:
    faster = [n for n in range(len(speeds)) if rivals[n] and n != plan and speeds[n] >= speeds[plan]]
    best, margin = None, 0.0
    for rival in faster:
        differences = [
            paired_difference(items.tolist(), losses[rival][task].tolist(), confidence=None)
            for task, items in losses[plan].items()
        ]
        # One side of the interval holds half of the risk.
        interval = 1 - 2 * (1 - confidence) / len(faster)
        low = mean_of_differences(differences, confidence=interval).ci_low
        if low is not None and low > margin:
            best, margin = rival, low
    return best
