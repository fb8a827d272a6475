"""Draws the pictures of a run as PNG and SVG bytes: the front, the sensitivity and the plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from layerboost.plan import Treatment
from orchestrator.report.canvas import (
    BLUE,
    FAINT,
    INK,
    STYLE,
    VERMILION,
    Picture,
    letter_colours,
    new_figure,
    saved,
    treatment_colour,
)
from orchestrator.report.front import letter_counts
from orchestrator.report.label_placement import place_labels


def pareto_picture(rows: pd.DataFrame) -> Picture | None:
    """Draws quality over output throughput for the rows of one serving condition.

    Args:
        rows: rows of pareto.csv under one condition; a column `point` numbers those on the front.

    Returns:
        The picture; None where no row has both values.
    """
    rows = rows[(rows["status"] == "ok") & rows["quality"].notna() & rows["output_throughput_tok_per_s"].notna()]
    if rows.empty:
        return None
    x, y = "output_throughput_tok_per_s", "quality"
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 4.6)
        axes = figure.subplots()
        is_front = rows["point"].notna()
        is_named = ~rows["origin"].eq("search")
        line = rows[is_front].sort_values(x)
        axes.errorbar(
            rows[x],
            rows[y],
            xerr=rows["output_throughput_stderr"].fillna(0.0),
            yerr=rows["quality_stderr"].fillna(0.0),
            fmt="none",
            ecolor=FAINT,
            elinewidth=0.8,
            alpha=0.6,
            zorder=1,
        )
        axes.plot(line[x], line[y], color=BLUE, drawstyle="steps-pre", linewidth=1.6, zorder=2, label="front")
        healed = rows["healed"].fillna(False).astype(bool)
        base = rows["origin"].eq("base")
        colours = pd.Series(FAINT, index=rows.index).mask(is_named, VERMILION).mask(is_front, BLUE)
        markers = pd.Series("^", index=rows.index).mask(healed, "o").mask(base, "*")
        for (marker, colour), group in rows.groupby([markers, colours]):
            size, alpha = 140 if marker == "*" else 42, 0.55 if colour == FAINT else 1.0
            axes.scatter(
                group[x], group[y], s=size, marker=str(marker), color=colour, alpha=alpha, linewidths=0, zorder=3
            )
        for marker, name in (("*", "base"), ("o", "healed"), ("^", "not healed")):
            if markers.eq(marker).any():
                axes.scatter([], [], s=42, marker=marker, color=INK, label=name)
        axes.set_xlabel("output throughput (tokens/s)")
        axes.set_ylabel("quality")
        axes.grid(linewidth=0.6)
        axes.margins(0.09, 0.12)
        figure.legend(loc="outside upper left", ncols=4)
        labels = [
            (row[x], row[y], " ".join(_point_label(row)))
            for _, row in rows[is_front | is_named].sort_values(["point", "plan_id"]).iterrows()
        ]
        place_labels(figure, axes, labels, list(zip(rows[x], rows[y], strict=True)), FAINT)
        alt = (
            f"Quality over output throughput for {len(rows)} measured candidates; {len(line)} are on the front, "
            f"from {line[x].iloc[0]:.1f} tokens/s at quality {line[y].iloc[0]:.3f} "
            f"to {line[x].iloc[-1]:.1f} tokens/s at quality {line[y].iloc[-1]:.3f}."
        )
        return saved(figure, alt)


def sensitivity_picture(table: pd.DataFrame) -> Picture | None:
    """Draws the sensitivity (rows with `task` mean) of each layer with its interval, one panel for each treatment.

    Returns:
        The picture; None without such rows that are finite.
    """
    mean = table[table["task"].eq("mean") & np.isfinite(table["drop"])]
    if mean.empty:
        return None
    panels: list[Any] = list(mean.groupby(["treatment", "metric"], dropna=False, sort=False))
    several = mean["metric"].nunique(dropna=False) > 1
    layers = range(int(mean["layer"].min()), int(mean["layer"].max()) + 1)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(max(5.5, 1.4 + 0.22 * len(layers)), 0.9 + 2.3 * len(panels))
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        parts = []
        for axes, ((treatment, metric), rows) in zip(grid, panels, strict=True):
            low = (rows["drop"] - rows["drop_ci_low"]).clip(lower=0).fillna(0.0)
            high = (rows["drop_ci_high"] - rows["drop"]).clip(lower=0).fillna(0.0)
            axes.bar(
                rows["layer"].astype(int),
                rows["drop"],
                yerr=[low, high],
                color=treatment_colour(treatment),
                edgecolor=INK,
                linewidth=0.5,
                ecolor=INK,
                error_kw={"elinewidth": 1.0, "capsize": 2.0},
                width=0.78,
            )
            axes.axhline(0.0, color=INK, linewidth=0.8)
            name = f"{treatment} ({metric})" if several and pd.notna(metric) else treatment
            axes.set_title(name, loc="left")
            axes.set_ylabel("drop" if pd.isna(metric) else f"drop ({metric})")
            axes.grid(axis="y", linewidth=0.6)
            worst, least = rows.loc[rows["drop"].idxmax()], rows.loc[rows["drop"].idxmin()]
            parts.append(
                f"{name}: largest drop {worst['drop']:.3g} at layer {worst['layer']}, "
                f"smallest {least['drop']:.3g} at layer {least['layer']}"
            )
        grid[-1].set(xlabel="layer", xlim=(layers[0] - 0.8, layers[-1] + 0.8))
        step = math.ceil(len(layers) / 48)
        grid[-1].set_xticks(list(layers)[::step])
        grid[-1].tick_params(axis="x", labelsize=8)
        figure.align_ylabels(grid)
        return saved(figure, f"Drop of the score when one layer is treated, for each layer. {'; '.join(parts)}.")


def strips_picture(plans: Sequence[tuple[str, str]]) -> Picture | None:
    """Draws each plan as a strip of lettered, coloured layers.

    Args:
        plans: (label, plan string) from top to bottom.

    Returns:
        The picture; None without plans.
    """
    if not plans:
        return None
    n_layers, colours = max(len(plan) for _, plan in plans), letter_colours()
    with matplotlib.rc_context(STYLE):
        figure = new_figure(max(5.5, 2.6 + 0.2 * n_layers), 0.9 + 0.27 * len(plans))
        axes = figure.subplots()
        for row, (_, plan) in enumerate(plans):
            for layer, letter in enumerate(plan):
                fill, ink = colours[letter]
                axes.add_patch(Rectangle((layer - 0.46, row - 0.38), 0.92, 0.76, facecolor=fill, linewidth=0))
                axes.text(layer, row, letter, ha="center", va="center_baseline", fontsize=7.5, color=ink)
        axes.set(xlim=(-0.6, n_layers - 0.4), ylim=(len(plans) - 0.4, -0.6), xlabel="layer")
        axes.set_yticks(range(len(plans)), [label for label, _ in plans], fontsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        keys = [Rectangle((0, 0), 1, 1, facecolor=fill, linewidth=0) for fill, _ in colours.values()]
        figure.legend(keys, [f"{t.letter} {t.value}" for t in Treatment], loc="outside upper left", ncols=4)
        alt = "; ".join(f"{label}: {plan} ({letter_counts(plan)})" for label, plan in plans)
        return saved(figure, f"Treatment of each layer, first layer first. {alt}.")


def _point_label(row: pd.Series) -> list[str]:
    number = [] if pd.isna(row["point"]) else [str(int(row["point"]))]
    return number + ([] if row["origin"] == "search" else [row["origin"]])
