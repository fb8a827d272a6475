"""Lays out a scatter plot of plans as inline SVG, so that the page needs neither an image nor a script.

This file computes where everything goes; the template writes the SVG. Coordinates are those of the SVG's view box, in
pixels at its natural size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

CHARACTER_PX, LINE_PX = 6.7, 14.0
"""Width of a letter and height of a line at the figures' font size of 12 px."""

SHAPES = {
    "circle": "M5.5 0A5.5 5.5 0 1 1-5.5 0A5.5 5.5 0 1 1 5.5 0Z",
    "triangle": "M0-6.5L6.2 4.8H-6.2Z",
    "star": "M0-9L2.3-3.1 8.6-2.8 3.7 1.2 5.3 7.3 0 3.8-5.3 7.3-3.7 1.2-8.6-2.8-2.3-3.1Z",
}
"""SVG paths of the shapes of points, each centred on (0, 0)."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 28.0, 42.0
_DISTANCES = (9, 16, 26, 40)
_DIRECTIONS = ((1, -1), (-1, 1), (1, 1), (-1, -1), (1, 0), (-1, 0), (0, -1), (0, 1))
_MARK = 6.0

Box = tuple[float, float, float, float]
"""A rectangle as (left, top, right, bottom)."""


@dataclass(frozen=True)
class Axis:
    """Describes an axis: what it measures and how its ticks are written."""

    label: str
    tick: Callable[[float], str]


@dataclass(frozen=True)
class Point:
    """Describes one plan in a figure.

    Attributes:
        x, y: the plan's values. `x_error` and `y_error` are one standard error, 0 where it is unknown.
        shape: a key of `SHAPES`.
        look: the CSS class that colours the point.
        label: the text beside the point; empty for no text.
        short_label: the text on a narrow screen, where it differs.
        must_label: whether the label stays even where it covers something.
        name: everything about the plan in words, for a screen reader.
        plan: the plan string.
        details: (term, value) pairs that are shown while the point is hovered or focused.
        hollow: whether the point is drawn as an outline, because the plan violates the constraints.
        flagged: whether the point is marked, because the plan lost something that accuracy does not show.
        in_front: whether the step line of its `look` runs through the point.
    """

    x: float
    y: float
    x_error: float
    y_error: float
    shape: str
    look: str
    label: str
    must_label: bool
    name: str
    plan: str
    details: tuple[tuple[str, str], ...]
    hollow: bool = False
    flagged: bool = False
    in_front: bool = False
    short_label: str | None = None


@dataclass(frozen=True)
class Mark:
    """Places a point in the view box, with the ends of its error bars."""

    point: Point
    x: float
    y: float
    x_bar: tuple[float, float]
    y_bar: tuple[float, float]

    @property
    def outline(self) -> str:
        return SHAPES[self.point.shape]


@dataclass(frozen=True)
class Label:
    """Places a text beside a mark; `leader` is the end of a thin line from the mark, None where both touch."""

    text: str
    x: float
    y: float
    anchor: str
    mark: Mark
    leader: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """Holds a figure whose parts are all placed, for the template to write."""

    size: str
    width: int
    height: int
    plot: Box
    x_axis: Axis
    y_axis: Axis
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]]
    """The (look, SVG path) of the step line of each front."""
    marks: list[Mark]
    labels: list[Label]


def charts(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> list[Chart]:
    """Draws the same points for a wide and for a narrow screen; without points there is no chart."""
    if not points:
        return []
    short = [p if p.short_label is None else replace(p, label=p.short_label) for p in points]
    return [
        draw(points, x_axis, y_axis, "wide", 760, 430),
        draw(short, x_axis, y_axis, "narrow", 328, 340),
    ]


def draw(points: Sequence[Point], x_axis: Axis, y_axis: Axis, size: str, width: int, height: int) -> Chart:
    """Places points, error bars, ticks, fronts and labels; labels that must be there choose their place first.

    Args:
        points: at least one point, with finite values.
        x_axis, y_axis: the quantities drawn; larger values lie further right and further up.
        size: the CSS class that the template gives the chart.
        width, height: size of the view box, in pixels.
    """
    plot = (_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)
    n_ticks = max(2, width // 90)
    x_low, x_high, x_values = _limits([(p.x, p.x_error) for p in points], n_ticks)
    y_low, y_high, y_values = _limits([(p.y, p.y_error) for p in points], 6)

    def across(value: float) -> float:
        share = (value - x_low) / (x_high - x_low)
        return round(plot[0] + min(1.0, max(0.0, share)) * (plot[2] - plot[0]), 1)

    def up(value: float) -> float:
        share = (value - y_low) / (y_high - y_low)
        return round(plot[3] - min(1.0, max(0.0, share)) * (plot[3] - plot[1]), 1)

    marks = [
        Mark(
            p,
            across(p.x),
            up(p.y),
            (across(p.x - p.x_error), across(p.x + p.x_error)),
            (up(p.y - p.y_error), up(p.y + p.y_error)),
        )
        for p in points
    ]
    fronts = {look: _corners([m for m in marks if m.point.in_front and m.point.look == look]) for look in _looks(marks)}
    fronts = {look: corners for look, corners in fronts.items() if corners}
    return Chart(
        size,
        width,
        height,
        plot,
        x_axis,
        y_axis,
        [(across(value), x_axis.tick(value)) for value in x_values],
        [(up(value), y_axis.tick(value)) for value in y_values],
        [(look, "M" + "L".join(f"{x} {y}" for x, y in corners)) for look, corners in fronts.items()],
        marks,
        list(_labels(marks, [corner for corners in fronts.values() for corner in _steps(corners)], plot)),
    )


def _limits(values: Sequence[tuple[float, float]], n_ticks: int) -> tuple[float, float, list[float]]:
    """Returns the lowest and highest value, with room around the error bars, and the ticks between them."""
    low, high = min(value - error for value, error in values), max(value + error for value, error in values)
    room = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    ticks = MaxNLocator(n_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return low, high, [float(tick) for tick in ticks if low <= tick <= high]


def _looks(marks: Sequence[Mark]) -> list[str]:
    return list(dict.fromkeys(mark.point.look for mark in marks))


def _corners(marks: Sequence[Mark]) -> list[tuple[float, float]]:
    """Returns the corners of the step line; everything that the front dominates lies below that line."""
    corners: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: (mark.x, mark.y)):
        if corners:
            corners.append((corners[-1][0], mark.y))
        corners.append((mark.x, mark.y))
    return corners


def _steps(corners: Sequence[tuple[float, float]]) -> Iterator[Box]:
    for (x0, y0), (x1, y1) in pairwise(corners):
        yield min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def _labels(marks: Sequence[Mark], steps: Sequence[Box], plot: Box) -> Iterator[Label]:
    """Yields each label at the nearest place where it covers no mark, no label and no line.

    Where every place has a fault, a label that must be there takes the least bad one. Any other label is left out: the
    reader still sees the point's name by pointing at it.
    """
    taken: list[Box] = []
    for mark in sorted(marks, key=lambda mark: not mark.point.must_label):
        text = mark.point.label
        if not text:
            continue
        best: tuple[float, int, tuple[int, int], Box] | None = None
        for distance in _DISTANCES:
            for direction in _DIRECTIONS:
                box = _box(mark, len(text) * CHARACTER_PX, distance, direction)
                faults = _faults(box, mark, marks, taken, steps, plot, joined=distance > _DISTANCES[0])
                if best is None or faults < best[0]:
                    best = (faults, distance, direction, box)
            if best is not None and best[0] == 0:
                break
        assert best is not None
        faults, distance, (dx, _), box = best
        if faults >= 1 and not mark.point.must_label:
            continue
        taken.append(box)
        x = {1: box[0], -1: box[2], 0: (box[0] + box[2]) / 2}[dx]
        nearest = (min(max(mark.x, box[0]), box[2]), min(max(mark.y, box[1]), box[3]))
        leader = nearest if distance > _DISTANCES[0] else None
        yield Label(text, round(x, 1), round(box[3] - 3, 1), {1: "start", -1: "end", 0: "middle"}[dx], mark, leader)


def _box(mark: Mark, width: float, distance: int, direction: tuple[int, int]) -> Box:
    dx, dy = direction
    x = mark.x + dx * distance - {1: 0.0, -1: width, 0: width / 2}[dx]
    y = mark.y + dy * distance - {1: 0.0, -1: LINE_PX, 0: LINE_PX / 2}[dy]
    return x, y, x + width, y + LINE_PX


def _faults(
    box: Box,
    own: Mark,
    marks: Sequence[Mark],
    taken: Sequence[Box],
    steps: Sequence[Box],
    plot: Box,
    *,
    joined: bool,
) -> float:
    covered = sum(
        _overlap(box, (mark.x - _MARK, mark.y - _MARK, mark.x + _MARK, mark.y + _MARK))
        for mark in marks
        if mark is not own
    )
    outside = box[0] < plot[0] or box[1] < plot[1] or box[2] > plot[2] or box[3] > plot[3]
    # A label that is nearer to another point, and has no line to its own, would be taken for that point's label.
    distance = _distance(box, own)
    astray = not joined and any(_distance(box, mark) < distance for mark in marks if mark is not own)
    crossed = any(_overlap(box, step) for step in steps)
    return 2.0 * covered + 3.0 * sum(_overlap(box, other) for other in taken) + 4.0 * outside + astray + 0.4 * crossed


def _overlap(a: Box, b: Box) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _distance(box: Box, mark: Mark) -> float:
    return math.hypot(max(box[0] - mark.x, 0.0, mark.x - box[2]), max(box[1] - mark.y, 0.0, mark.y - box[3]))
