"""Places labels of points in a figure where they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

_DISTANCES_PT = (8, 15, 24, 36, 50)
_DIRECTIONS = ((1, 1), (-1, -1), (1, -1), (-1, 1), (1, 0), (-1, 0), (0, 1), (0, -1))


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[float, float, str]],
    points: Iterable[tuple[float, float]],
    line_colour: str,
) -> None:
    """Writes each label at the nearest offset where it covers no earlier label, no point and no edge.

    Labels are placed greedily in the order given. Where every offset has a fault, the one with the fewest is taken.
    A label without a line also counts as a fault where it is nearer to another point than to its own, because a reader
    would assign it to that point.

    Args:
        figure: an Agg figure whose axes already hold everything else, so that its limits are final.
        axes: the axes that hold the points.
        labels: (x, y, text) in data coordinates.
        points: (x, y) of every point drawn, including the labelled ones.
        line_colour: colour of the thin line that joins a label to a point that it does not touch.
    """
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    marks = [_pixel(axes, point) for point in points]
    taken: list[Bbox] = []
    for x, y, text in labels:
        best: tuple[int, Annotation, Bbox] | None = None
        for distance, direction in ((d, v) for d in _DISTANCES_PT for v in _DIRECTIONS):
            note = _annotate(axes, (x, y), text, distance, direction, line_colour)
            note.update_positions(renderer)
            box = Text.get_window_extent(note, renderer).padded(2)
            faults = sum(box.overlaps(other) for other in taken) + sum(box.contains(*mark) for mark in marks)
            if distance == _DISTANCES_PT[0]:
                own = _pixel(axes, (x, y))
                faults += min(_distance(box, mark) for mark in [*marks, own]) < _distance(box, own)
            faults += not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
            if best is not None and faults >= best[0]:
                note.remove()
                continue
            if best is not None:
                best[1].remove()
            best = (faults, note, box)
            if not faults:
                break
        if best is not None:
            taken.append(best[2])


def _pixel(axes: Axes, point: tuple[float, float]) -> tuple[float, float]:
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def _distance(box: Bbox, mark: tuple[float, float]) -> float:
    """Returns the distance of the mark from the nearest edge of the box, in pixels."""
    return math.hypot(
        max(box.x0 - mark[0], 0.0, mark[0] - box.x1),
        max(box.y0 - mark[1], 0.0, mark[1] - box.y1),
    )


def _annotate(
    axes: Axes, point: tuple[float, float], text: str, distance_pt: int, direction: tuple[int, int], line_colour: str
) -> Annotation:
    dx, dy = direction
    touches = distance_pt == _DISTANCES_PT[0]
    note = axes.annotate(
        text,
        point,
        (dx * distance_pt, dy * distance_pt),
        textcoords="offset points",
        ha=("center", "left", "right")[dx],
        va=("center", "bottom", "top")[dy],
        fontsize=9,
        zorder=4,
        arrowprops=None if touches else {"arrowstyle": "-", "color": line_colour, "lw": 0.7},
    )
    note.set_in_layout(False)
    return note
