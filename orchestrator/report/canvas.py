"""Holds what all pictures share: colours, style, how a figure is made without a window and how it is saved.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. No picture relies on colour alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from layerboost.plan import TREATMENTS

INK, PAPER, GRID, FAINT = "#1f2933", "#ffffff", "#d9dde1", "#8a9099"
BLUE, ORANGE, SKY, GREEN, VERMILION, PURPLE = "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "layerboost",
    "text.parse_math": False,  # names may hold a dollar sign, which is no formula
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
"""The matplotlib settings under which every picture is drawn."""


@dataclass(frozen=True)
class Picture:
    """Holds one picture in two formats, and its alternative text: what it shows, in words."""

    png: bytes
    svg: bytes
    alt: str


def treatment_colour(treatment: str) -> str:
    """Returns the fill colour of a treatment by its name, and grey for an unknown name."""
    return TREATMENTS[treatment].fill if treatment in TREATMENTS else FAINT


def letter_colours() -> dict[str, tuple[str, str]]:
    """Returns the fill of a layer and the colour of the letter on it, by the treatment's letter."""
    return {entry.letter: (entry.fill, entry.ink) for entry in TREATMENTS}


def new_figure(width_in: float, height_in: float) -> Figure:
    """Makes a figure with the Agg canvas, which needs no display, and a constrained layout."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def saved(figure: Figure, alt: str) -> Picture:
    """Renders the figure in both formats, without dates or versions, so that equal figures give equal bytes."""
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(png.getvalue(), svg.getvalue(), alt)
