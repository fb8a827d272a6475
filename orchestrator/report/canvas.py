"""What all pictures share: colours, style, a figure without a window, and its bytes.

Colours are those of Okabe and Ito, told apart by colour-blind readers; nothing is said by colour alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from layerboost.plan import Treatment

INK, PAPER, GRID, FAINT = "#1f2933", "#ffffff", "#d9dde1", "#8a9099"
BLUE, ORANGE, SKY, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7"
TREATMENT_COLOURS = {
    "S": (BLUE, "#fefefe"),
    "L": (ORANGE, "#000001"),
    "W": (SKY, "#000001"),
    "N": ("#c3c8ce", "#000001"),
}
"""Fill and letter colour of each treatment."""

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "layerboost",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}
"""Settings of matplotlib that every picture is drawn under."""


@dataclass(frozen=True)
class Picture:
    """One picture in two formats, and what it shows in words (its alternative text)."""

    png: bytes
    svg: bytes
    alt: str


def treatment_colour(treatment: str) -> str:
    """The fill of a treatment by its name; grey for an unknown name."""
    known: dict[str, str] = {t.value: TREATMENT_COLOURS[t.letter][0] for t in Treatment}
    return known.get(treatment, FAINT)


def new_figure(width_in: float, height_in: float) -> Figure:
    """A figure with Agg behind it and a constrained layout."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def saved(figure: Figure, alt: str) -> Picture:
    """The figure in both formats, without dates or versions, so that equal figures give equal bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(png.getvalue(), svg.getvalue(), alt)
