"""Draws how sure a ranking of layers is: agreement between rankings, and predicted against measured drops."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.patches import Rectangle

from orchestrator.report.canvas import BLUE, FAINT, GRID, ORANGE, STYLE, VERMILION, Picture, new_figure, saved
from orchestrator.report.certainty import by_score, view_order
from orchestrator.report.label_placement import place_labels

HEAT_METHOD = "spearman"
"""The heat map shows this correlation; the table holds the others too."""

MAX_NAME_CHARS = 36
"""Names of views longer than this lose their middle in the heat map; the table holds them whole."""

_NEUTRAL = "#f4f4f2"
_DEEP_BLUE = "#003a5d"
_HEAT = LinearSegmentedColormap.from_list("agreement", [(0, ORANGE), (0.5, _NEUTRAL), (0.85, BLUE), (1, _DEEP_BLUE)])
"""The colours run from opposite over unrelated to equal order.

Printed in grey they run from light grey over white to nearly black, so that the order stays readable.
"""
_DARK_INK, _LIGHT_INK = "#000001", "#fefefe"  # fixed: unlike INK and PAPER, cells do not follow dark mode
_CELL_IN = (0.62, 0.4)
_MIN_WIDTH_IN = 7.6


def correlation_picture(table: pd.DataFrame) -> Picture | None:
    """Draws how well rankings agree: one symmetric heat map for each treatment, numbered views on both sides.

    Args:
        table: rows of rank_correlations.csv.

    Returns:
        The picture; None without a finite Spearman correlation.
    """
    rows = table[table["method"].eq(HEAT_METHOD) & np.isfinite(table["correlation"])]
    if rows.empty:
        return None
    panels = [(str(treatment), _views(of_one), of_one) for treatment, of_one in rows.groupby("treatment", sort=False)]
    names_in = 0.25 + 0.078 * max(len(_label(view, 99)) for _, views, _ in panels for view in views)
    n_columns = max(len(views) for _, views, _ in panels)
    n_columns = max(n_columns, math.floor((_MIN_WIDTH_IN - names_in) / _CELL_IN[0]))
    heights = [len(views) + 1.4 for _, views, _ in panels]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(names_in + n_columns * _CELL_IN[0], 0.5 + sum(heights) * _CELL_IN[1])
        grid = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
        for axes, (treatment, views, of_one) in zip(grid, panels, strict=True):
            _draw_heat(axes, views, of_one)
            axes.set_xlim(-0.5, n_columns - 0.5)
            axes.set_title(treatment, loc="left")
        swatches = {"-1 opposite order": -1.0, "-.5": -0.5, "0 unrelated": 0.0, ".5": 0.5, "1 same order": 1.0}
        keys = [Rectangle((0, 0), 1, 1, facecolor=to_hex(_colour(value)), linewidth=0) for value in swatches.values()]
        figure.legend(keys, list(swatches), loc="outside upper left", ncols=5)
        parts = [_agreement_in_words(treatment, views, of_one) for treatment, views, of_one in panels]
        return saved(figure, f"Spearman correlation between rankings of layers. {'; '.join(parts)}.")


def interaction_picture(table: pd.DataFrame) -> Picture | None:
    """Draws the measured over the predicted drop of each plan, one panel for each score.

    Args:
        table: rows of interactions.csv.

    Returns:
        The picture; None where no row has both drops.
    """
    rows = table[np.isfinite(table["predicted_drop"]) & np.isfinite(table["measured_drop"])]
    if rows.empty:
        return None
    panels = by_score(rows)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(_MIN_WIDTH_IN, 0.6 + 4.0 * len(panels))
        grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (score, of_one) in zip(grid, panels, strict=True):
            _draw_drops(axes, of_one)
            axes.set(xlabel="predicted drop: sum over the single layers", ylabel=f"measured drop ({score})")
        by_name: dict[str, Any] = {}
        for axes in grid:
            by_name |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(by_name.values()), list(by_name), loc="outside upper left", ncols=4)
        for axes, (_, of_one) in zip(grid, panels, strict=True):
            points = list(zip(of_one["predicted_drop"], of_one["measured_drop"], strict=True))
            place_labels(figure, axes, _drop_labels(of_one), points, FAINT)
        parts = [_drops_in_words(score, of_one) for score, of_one in panels]
        return saved(figure, f"Measured over predicted drop of the score. {'; '.join(parts)}.")


def _views(rows: pd.DataFrame) -> list[str]:
    return sorted({*rows["view_a"], *rows["view_b"]}, key=view_order)


def _label(view: str, number: int) -> str:
    if len(view) > MAX_NAME_CHARS:
        half = (MAX_NAME_CHARS - 3) // 2
        view = f"{view[:half]}...{view[-half:]}"
    return f"{view}  {number}"


def _draw_heat(axes: Axes, views: list[str], rows: pd.DataFrame) -> None:
    places = {view: index for index, view in enumerate(views)}
    for place in places.values():
        axes.add_patch(Rectangle((place - 0.48, place - 0.46), 0.96, 0.92, facecolor=GRID, linewidth=0))
    for _, row in rows.iterrows():
        value = float(row["correlation"])
        colour = _colour(value)
        ink = _ink(colour)
        interval = _interval(row["ci_low"], row["ci_high"])
        pair = places[row["view_a"]], places[row["view_b"]]
        for x, y in (pair, pair[::-1]):
            axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=to_hex(colour), linewidth=0))
            lift = 0.14 if interval else 0.0
            axes.text(x, y - lift, _short(value), ha="center", va="center_baseline", fontsize=8.5, color=ink)
            axes.text(x, y + 0.24, interval, ha="center", va="center_baseline", fontsize=6.3, color=ink)
    axes.set_ylim(len(views) - 0.5, -0.5)
    axes.set_yticks(range(len(views)), [_label(view, n) for n, view in enumerate(views, 1)], fontsize=8.5)
    axes.set_xticks(range(len(views)), [str(n) for n in range(1, len(views) + 1)], fontsize=8.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _colour(correlation: float) -> tuple[float, float, float]:
    return to_rgb(_HEAT((max(-1.0, min(1.0, correlation)) + 1) / 2))


def _ink(colour: tuple[float, float, float]) -> str:
    """Returns the dark or the light ink, whichever contrasts more with a colour (WCAG 2.2, relative luminance)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return _DARK_INK if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else _LIGHT_INK


def _short(value: float) -> str:
    """Formats two decimals without the zero before the point: .83, -.12, 1.00."""
    text = f"{value:.2f}"
    text = "0.00" if text == "-0.00" else text
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def _interval(low: float, high: float) -> str:
    if pd.isna(low) or pd.isna(high):
        return ""
    ends = [_short(end).removesuffix(".00") or "0" for end in (low, high)]
    return ("-" if low >= 0 else " to ").join(ends)


def _agreement_in_words(treatment: str, views: list[str], rows: pd.DataFrame) -> str:
    worst, best = rows.iloc[int(rows["correlation"].argmin())], rows.iloc[int(rows["correlation"].argmax())]
    return (
        f"{treatment}, {len(views)} rankings: from {worst['correlation']:.2f} between {worst['view_a']} and "
        f"{worst['view_b']} to {best['correlation']:.2f} between {best['view_a']} and {best['view_b']}"
    )


def _draw_drops(axes: Axes, rows: pd.DataFrame) -> None:
    x, y = "predicted_drop", "measured_drop"
    low, high = float(rows[x].min()), float(rows[x].max())
    axes.axline((low, low), slope=1, color=FAINT, linestyle="--", linewidth=1.0, zorder=1, label="layers independent")
    axes.update_datalim([(high, high)])
    axes.errorbar(
        rows[x],
        rows[y],
        yerr=rows["measured_drop_stderr"].fillna(0.0),
        fmt="none",
        ecolor=FAINT,
        elinewidth=0.8,
        alpha=0.6,
        zorder=2,
    )
    searched, base = rows["origin"].eq("search"), rows["origin"].eq("base")
    for mask, name, marker, size, colour, alpha in (
        (searched, "searched", "o", 36, FAINT, 0.55),
        (~searched & ~base, "named", "D", 36, VERMILION, 1.0),
        (base, "base", "*", 140, VERMILION, 1.0),
    ):
        if mask.any():
            look: dict[str, Any] = {"s": size, "marker": marker, "color": colour, "alpha": alpha, "linewidths": 0}
            axes.scatter(rows.loc[mask, x], rows.loc[mask, y], zorder=3, label=name, **look)
    axes.grid(linewidth=0.6)
    axes.margins(0.09, 0.12)


def _drop_labels(rows: pd.DataFrame) -> list[tuple[float, float, str]]:
    """Returns (predicted drop, measured drop, label) of each plan that has a name of its own.

    The label is the plan's origin, followed by its window where several windows share the origin.
    """
    named = rows[~rows["origin"].eq("search")]
    named = named.assign(windows=named.groupby("origin")["window"].transform("nunique"))
    return [
        (
            row["predicted_drop"],
            row["measured_drop"],
            f"{row['origin']} {row['window']}" if row["windows"] > 1 and pd.notna(row["window"]) else row["origin"],
        )
        for _, row in named.iterrows()
    ]


def _drops_in_words(score: str, rows: pd.DataFrame) -> str:
    extreme = rows.iloc[int(rows["interaction"].abs().fillna(0.0).argmax())]
    name = extreme["plan"] if extreme["origin"] == "search" else extreme["origin"]
    return (
        f"{score}, {len(rows)} plans: {int((rows['interaction'] > 0).sum())} lie above the diagonal of independent "
        f"layers; furthest from it is {name}, predicted {extreme['predicted_drop']:.3g}, "
        f"measured {extreme['measured_drop']:.3g}"
    )
