"""Draws healing: the losses, and the quality retained over the tokens of healing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter, NullFormatter

from orchestrator.report.canvas import (
    BLUE,
    FAINT,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    Picture,
    new_figure,
    saved,
)

LineLook = tuple[str, str, str]
"""Colour, dashes and marker of a line."""

_SHOWN_SHARE = 0.02
"""Share of the highest loss that a line must reach to count in the choice of the axis."""

HELD_OUT = "held-out divergence"


def healing_picture(
    curves: pd.DataFrame, names: Mapping[str, str] | None = None, looks: Mapping[str, LineLook] | None = None
) -> Picture | None:
    """Draws the loss over the tokens seen, one line for each healed plan, one panel for each phase.

    Where the divergence on held-out text was measured, it has its own panel.

    Args:
        curves: rows of healing_curves.csv.
        names: what to call a plan_id in the legend.
        looks: how the line of a plan_id looks in all pictures.

    Returns:
        The picture; None without a finite loss.
    """
    measured = curves.assign(phase=HELD_OUT, loss=curves["held_out_divergence"])
    curves = pd.concat([part[np.isfinite(part["loss"]) & part["tokens"].notna()] for part in (curves, measured)])
    if curves.empty:
        return None
    phases: list[Any] = list(curves.groupby("phase", dropna=False, sort=False))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 0.9 + 2.9 * len(phases))
        grid = figure.subplots(len(phases), 1, squeeze=False)[:, 0]
        ids = sorted(curves["plan_id"].unique())
        looks = looks or line_looks(ids)
        for axes, (phase, rows) in zip(grid, phases, strict=True):
            lines: list[Any] = list(rows.groupby("plan_id"))
            for plan_id, line in lines:
                colour, dashes, marker = looks[plan_id]
                axes.plot(
                    line["tokens"].astype(float),
                    line["loss"],
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markevery=max(1, len(line) // 6),
                    markersize=4.5,
                    linewidth=1.4,
                    label=(names or {}).get(plan_id, plan_id),
                )
            axes.set_title("loss" if pd.isna(phase) else phase, loc="left")
            axes.set_ylabel("loss")
            axes.grid(linewidth=0.6)
            # The control loses next to nothing, and would press all other lines together.
            highest = rows.groupby("plan_id")["loss"].transform("max")
            lowest = rows.loc[highest >= _SHOWN_SHARE * highest.max(), "loss"].min()
            if lowest > 0 and rows["loss"].max() / lowest > 20:
                axes.set_yscale("log")
                axes.set_ylim(bottom=lowest / 2)
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[-1].set_xlabel("tokens")
        by_name: dict[str, Any] = {}
        for axes in grid:
            by_name |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(list(by_name.values()), list(by_name), loc="outside upper left", ncols=2)
        ends = curves.groupby(["phase", "plan_id"], sort=False, dropna=False)["loss"].agg(["first", "last"])
        spans: list[Any] = list(ends.iterrows())
        parts = [
            f"{(names or {}).get(plan, plan)} {phase}: {row['first']:.3g} to {row['last']:.3g}"
            for (phase, plan), row in spans
        ]
        return saved(figure, f"Healing loss over tokens, first to last value. {'; '.join(parts)}.")


def quality_curve_picture(
    table: pd.DataFrame, names: Mapping[str, str] | None = None, looks: Mapping[str, LineLook] | None = None
) -> Picture | None:
    """Draws the quality retained over the tokens of healing (log axis, 0 at its left end), one line for each plan.

    Args:
        table: rows of healing_quality.csv.
        names: what to call a plan_id in the legend.
        looks: how the line of a plan_id looks in all pictures.

    Returns:
        The picture; None where no plan has two points.
    """
    table = table[np.isfinite(table["quality_retained"])]
    lines: list[Any] = [(plan_id, line) for plan_id, line in table.groupby("plan_id", sort=False) if len(line) > 1]
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 4.2)
        axes = figure.subplots()
        looks = looks or line_looks([plan_id for plan_id, _ in lines])
        parts = []
        for plan_id, line in lines:
            colour, dashes, marker = looks[plan_id]
            name = (names or {}).get(plan_id, plan_id)
            axes.errorbar(
                line["tokens"].astype(float),
                100 * line["quality_retained"],
                yerr=100 * line["quality_retained_stderr"].fillna(0.0),
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=4.5,
                linewidth=1.4,
                elinewidth=0.9,
                capsize=2.0,
                label=name,
            )
            first, last = (100 * line["quality_retained"].iloc[index] for index in (0, -1))
            parts.append(f"{name}: {first:.1f} % to {last:.1f} %")
        axes.axhline(100.0, color=FAINT, linewidth=0.9)
        positive = table["tokens"][table["tokens"] > 0].astype(float)
        axes.set_xscale("symlog", linthresh=float(positive.min()), linscale=0.5)
        axes.set_xticks([0.0, *sorted(positive.unique())])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel("tokens of healing")
        axes.set_ylabel("quality retained (%)")
        axes.grid(linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=2)
        return saved(figure, f"Quality retained over tokens of healing, first to last point. {'; '.join(parts)}.")


def line_looks(plan_ids: Sequence[str]) -> dict[str, LineLook]:
    """Assigns a colour, dashes and a marker to each plan."""
    return dict(zip(plan_ids, cycle(_LINES), strict=False))


_LINES = [
    (colour, dashes, marker)
    for dashes in ("-", "--", ":")
    for colour, marker in zip((BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY), "os^Dv*", strict=True)
]
