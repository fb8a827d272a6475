"""Computes the Pareto front of two objectives that are both maximised, and the area that it dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

Point = tuple[float, float]


def front(points: Sequence[Point]) -> list[bool]:
    """Tells for each point whether no other point dominates it.

    A point dominates another if it is at least as good in both objectives and better in one. Duplicates do not
    dominate each other: they are on the front together or off it together. A point with a NaN (a failed measurement)
    is never on the front and dominates nothing. Comparisons are exact, without a tolerance. The cost is O(n log n).

    Args:
        points: (first, second) objective of each point, larger is better.

    Returns:
        One bool for each point, in the order given.
    """
    on_front = [False] * len(points)
    usable = [index for index, point in enumerate(points) if not _has_nan(point)]
    usable.sort(key=lambda index: points[index], reverse=True)
    best_second: float | None = None
    for _, group in groupby(usable, key=lambda index: points[index][0]):
        tied = list(group)
        second = points[tied[0]][1]
        if best_second is not None and second <= best_second:
            continue
        best_second = second
        for index in tied:
            on_front[index] = points[index][1] == second
    return on_front


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Returns the area between a reference point and the front of `points`, both objectives maximised.

    Args:
        points: (first, second) objective of each point. Points with a NaN, and points that are not above the
            reference in both objectives, add nothing.
        reference: The corner that the area is measured from.

    Returns:
        The area in the product of the two objectives' units; 0.0 without a point above the reference.

    Raises:
        ValueError: The reference holds a NaN.
    """
    if _has_nan(reference):
        raise ValueError(f"reference: {reference} holds a NaN; give the worst acceptable value of each objective")
    above = [point for point in points if not _has_nan(point) and point[0] > reference[0] and point[1] > reference[1]]
    area, floor = 0.0, reference[1]
    for first, second in sorted(above, reverse=True):
        if second > floor:
            area += (first - reference[0]) * (second - floor)
            floor = second
    return area


def _has_nan(point: Point) -> bool:
    return math.isnan(point[0]) or math.isnan(point[1])


def choose_spread(points: Sequence[Point], n: int, reference: Point) -> list[int]:
    """Chooses `n` points that together dominate the most, front after front: the candidates worth a closer look.

    The choice is greedy by gain in hypervolume over `reference`, which is within 1 - 1/e of the best choice; among
    equal gains the earlier point wins. If the front has fewer points, those dominated only by chosen ones follow.

    Args:
        points: (first, second) objective of each point, larger is better; points with a NaN are never chosen.
        n: Maximum number of points to choose.
        reference: The corner that hypervolumes are measured from.

    Returns:
        Indices in the order in which they were chosen.
    """
    left = [index for index, point in enumerate(points) if not _has_nan(point)]
    chosen: list[int] = []
    while left and len(chosen) < n:
        mask = front([points[index] for index in left])
        layer = [index for index, on_front in zip(left, mask, strict=True) if on_front]
        picked: list[int] = []
        while layer and len(chosen) < n:
            best = max(
                layer,
                key=lambda index: (hypervolume([points[i] for i in (*picked, index)], reference), -index),
            )
            layer.remove(best)
            picked.append(best)
            chosen.append(best)
        left = [index for index in left if index not in picked and index not in layer]
    return chosen
