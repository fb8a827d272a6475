"""Draws the pictures that help to choose a plan: lengths, successive halving, predicted against measured speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullFormatter, ScalarFormatter

from layerboost.search.baselines import CONTROL
from orchestrator.report.canvas import BLUE, FAINT, INK, ORANGE, STYLE, Picture, new_figure, saved
from orchestrator.report.healing_figures import LineLook, line_looks

_PANELS = (("tpot_ms_p50", "decode latency (ms per token)"), ("peak_memory_mib", "peak memory (MiB)"))


def lengths_picture(
    table: pd.DataFrame, names: Mapping[str, str], looks: Mapping[str, LineLook] | None = None
) -> Picture | None:
    """Draws decode latency and peak memory over the length of the prompt, a panel each, a line for each plan.

    Args:
        table: rows of lengths.csv.
        names: what to call a plan_id in the legend.
        looks: how the line of a plan_id looks in all pictures; the markers of an unhealed plan are hollow.

    Returns:
        The picture; None where no plan was timed at two lengths.
    """
    table = table[table["status"].eq("ok") & table["tpot_ms_p50"].notna()]
    # Timings on different hardware or at another concurrency are not comparable, so each gets a line of its own.
    keys = ["plan_id", "healed", "concurrency", "hardware", "engine"]
    lines: list[Any] = [group for group in table.groupby(keys, dropna=False, sort=False) if len(group[1]) > 1]
    if not lines:
        return None
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 6.2)
        panels = figure.subplots(2, 1, sharex=True)
        parts = []
        several = table["concurrency"].nunique() > 1
        looks = looks or line_looks(list(dict.fromkeys(key[0] for key, _ in lines)))
        for key, rows in lines:
            name = _line_name(rows, names) + (f", concurrency {key[2]}" if several else "")
            colour, dashes, marker = looks[key[0]]
            is_healed = bool(rows["healed"].fillna(False).iloc[0])
            for axes, (column, label) in zip(panels, _PANELS, strict=True):
                axes.plot(
                    rows["prompt_tokens"].astype(float),
                    rows[column],
                    color=colour,
                    linestyle=dashes,
                    marker=marker,
                    markersize=4.5,
                    markerfacecolor=colour if is_healed else "white",
                    linewidth=1.4,
                    label=name,
                )
                axes.set_ylabel(label)
            tpot = rows["tpot_ms_p50"]
            parts.append(f"{name}: {tpot.iloc[0]:.3g} to {tpot.iloc[-1]:.3g} ms per token")
        lengths = sorted(table["prompt_tokens"].unique())
        for axes in panels:
            axes.set_xscale("log", base=2)
            axes.set_xticks([float(length) for length in lengths])
            axes.set_ylim(bottom=0)
            axes.grid(linewidth=0.6)
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
        panels[-1].set_xlabel("prompt tokens")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=2)
        span = f"{lengths[0]:,} to {lengths[-1]:,} prompt tokens"
        return saved(figure, f"Decode latency and peak memory over length, {span}. {'; '.join(parts)}.")


def halving_picture(
    table: pd.DataFrame, names: Mapping[str, str], looks: Mapping[str, LineLook] | None = None
) -> Picture | None:
    """Draws quality over the tokens of healing, a line for each plan; those dropped on the way are grey.

    Args:
        table: rows of halving.csv.
        names: what to call a plan_id in the legend.
        looks: how the line of a plan_id looks in all pictures.

    Returns:
        The picture; None without a finite quality.
    """
    table = table[np.isfinite(table["quality"]) & table["tokens"].notna()]
    if table.empty:
        return None
    # The picture counts every plan of the last rung as a survivor, even where that rung decides against it.
    survivors = set(table.loc[table["rung"] == table["rung"].max(), "plan_id"])
    styles = looks or line_looks(sorted(survivors))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 4.4)
        axes = figure.subplots()
        groups: list[Any] = sorted(table.groupby("plan_id"), key=lambda group: (group[0] in survivors, group[0]))
        for plan_id, rows in groups:
            survived = plan_id in survivors
            colour, dashes, marker = styles[plan_id] if survived else (FAINT, "-", "x")
            axes.errorbar(
                rows["tokens"].astype(float),
                rows["quality"],
                yerr=rows["quality_stderr"].fillna(0.0),
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=4.5,
                linewidth=1.4 if survived else 0.9,
                elinewidth=0.8,
                alpha=1.0 if survived else 0.7,
                label=names.get(plan_id, plan_id) if survived else None,
                zorder=3 if survived else 2,
            )
        if len(survivors) < len(groups):
            axes.plot([], [], color=FAINT, marker="x", label="dropped")
        axes.set_xscale("log")
        axes.set_xticks([float(tokens) for tokens in sorted(table["tokens"].unique()) if tokens > 0])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("tokens of healing")
        axes.set_ylabel("quality")
        axes.grid(linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=2)
        counts = ", ".join(str(count) for count in table.groupby("rung")["plan_id"].nunique())
        ends = [f"{names.get(key, key)}: {rows['quality'].iloc[-1]:.3f}" for key, rows in groups if key in survivors]
        alt = f"Quality over tokens of healing for {counts} plans in the rungs, those that stayed: {'; '.join(ends)}."
        return saved(figure, alt)


def speed_picture(table: pd.DataFrame) -> Picture | None:
    """Draws predicted over measured throughput, with the line where they agree.

    Args:
        table: rows of speed.csv.

    Returns:
        The picture; None without a row that has both.
    """
    predicted, measured = "predicted_throughput_tok_per_s", "output_throughput_tok_per_s"
    rows = table[(table[predicted] > 0) & (table[measured] > 0)]
    if rows.empty:
        return None
    in_fit = rows["in_fit"].fillna(False).astype(bool)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(7.6, 4.8)
        axes = figure.subplots()
        span = [rows[[predicted, measured]].min().min() * 0.85, rows[[predicted, measured]].max().max() * 1.18]
        axes.plot(span, span, color=INK, linewidth=0.9, linestyle="--", label="predicted = measured")
        for part, colour, marker, name in (
            (rows[in_fit], ORANGE, "s", "predicted from"),
            (rows[~in_fit], BLUE, "o", "not seen before"),
        ):
            if len(part):
                axes.errorbar(
                    part[measured],
                    part[predicted],
                    yerr=part["predicted_throughput_stderr"].fillna(0.0),
                    fmt=marker,
                    color=colour,
                    ecolor=FAINT,
                    elinewidth=0.8,
                    markersize=5,
                    label=name,
                )
        _log_both(axes, span)
        axes.set_xlabel("measured output throughput (tokens/s)")
        axes.set_ylabel("predicted (tokens/s)")
        axes.grid(linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3)
        worst = rows.iloc[int(rows["relative_error"].abs().argmax())]
        alt = (
            f"Predicted over measured throughput of {len(rows)} measurements; furthest from the line is "
            f"{worst['plan']} at concurrency {worst['concurrency']}, {100 * worst['relative_error']:+.1f} %."
        )
        return saved(figure, alt)


def _log_both(axes: Axes, span: list[float]) -> None:
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(EngFormatter(sep="") if span[1] / span[0] < 12 else NullFormatter())
    axes.tick_params(which="both", labelsize=8)


def _line_name(rows: pd.DataFrame, names: Mapping[str, str]) -> str:
    row = rows.iloc[0]
    if row["origin"] in ("base", CONTROL):  # the two are one plan
        return row["origin"]
    name = names.get(row["plan_id"], row["plan_id"])
    return name if row["healed"] else f"{name}, not healed"
