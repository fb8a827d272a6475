"""Builds the page's headlines, figure and table for each serving condition; the page switches all three together."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import pandas as pd

from orchestrator.report.cells import Table, text_of, with_stderr
from orchestrator.report.chart import Axis, Chart, Point, charts
from orchestrator.report.front import (
    FRONT_HEADER,
    MIN_RETAINED,
    Condition,
    conditions,
    front_and_base,
    front_cells,
    front_rows,
    headline,
    headline_row,
    marked,
    shown,
    shown_retained,
    trade,
)

SPEEDUP = Axis("throughput over that of the base", lambda value: f"{value:g}x")
THROUGHPUT = Axis("output throughput (tokens/s)", lambda value: f"{value:,g}")
RETAINED = Axis("quality retained (%)", lambda value: f"{value:g}")
QUALITY = Axis("quality", lambda value: f"{value:g}")

FOUND = ("search", "refined", "given")
"""Origins of plans that are no baselines. Such a plan has no name, so the page calls it by its plan_id."""

Axes = tuple[tuple[str, Axis], tuple[str, Axis]]
"""(column, axis) of the horizontal axis, then of the vertical axis."""


@dataclass(frozen=True)
class Headline:
    """Holds a sentence on one plan, the plan string, and a remark on its name and on why it was chosen."""

    sentence: str
    plan: str
    remark: str


@dataclass(frozen=True)
class FrontView:
    """Holds what the front page shows of one serving condition."""

    condition: Condition
    label: str
    """The values in which this condition differs from the others."""
    headlines: list[Headline]
    charts: list[Chart]
    table: Table

    @property
    def key(self) -> list[tuple[str, str, str, str]]:
        """Returns (look, shape, text, further CSS class) of each entry that the key of the figure needs."""
        shown_points = [mark.point for mark in self.charts[0].marks]
        present = {(point.look, point.shape) for point in shown_points}
        entries = [("front", "line", "front", ""), ("named", "triangle", "baseline", "")]
        entries += [("faint", "triangle", "dominated", "")]
        found = [entry for entry in entries if any(look == entry[0] for look, _ in present)]
        for shape, text in (("star", "base"), ("circle", "healed"), ("triangle", "not healed")):
            if any(shape == other for _, other in present):
                found.append(("plain", shape, text, ""))
        if any(point.hollow for point in shown_points):
            found.append(("plain", "circle", "does not hold the constraints", "hollow"))
        if any(point.flagged for point in shown_points):
            found.append(("plain", "circle", "flagged", "flagged"))
        return found


def front_views(pareto: pd.DataFrame, best: Collection[int]) -> list[FrontView]:
    """Builds one view for each serving condition, highest concurrency first.

    Args:
        pareto: rows of pareto.csv.
        best: index labels of the rows that are best under the constraints, at most one for each condition.
    """
    found = conditions(pareto)
    varying = [name for name in Condition._fields if len({getattr(condition, name) for condition in found}) > 1]
    return [
        FrontView(
            condition,
            ", ".join(f"{name.replace('_', ' ')} {getattr(condition, name)}" for name in varying),
            headlines(pareto, condition, best),
            _charts(marked(pareto, condition)),
            _front_table(pareto, condition),
        )
        for condition in found
    ]


def _charts(rows: pd.DataFrame) -> list[Chart]:
    axes = _axes(rows)
    return charts(points(rows, axes), axes[0][1], axes[1][1])


def _axes(rows: pd.DataFrame) -> Axes:
    """Chooses the columns and axes of a figure: relative to the base where that is known, else absolute."""
    x = ("speedup", SPEEDUP) if rows["speedup"].notna().any() else ("output_throughput_tok_per_s", THROUGHPUT)
    y = ("quality_retained", RETAINED) if rows["quality_retained"].notna().any() else ("quality", QUALITY)
    return x, y


def points(rows: pd.DataFrame, axes: Axes) -> list[Point]:
    """Turns the rows of one condition that have both values into points; the front comes last, to be drawn on top.

    Args:
        rows: rows of pareto.csv; a column `point` numbers those on the front.
        axes: the columns to draw and their axes.
    """
    (x, _), (y, _) = axes
    rows = rows[rows["status"].eq("ok") & rows[x].notna() & rows[y].notna()]
    scale = 100 if y == "quality_retained" else 1
    base = rows[rows["origin"] == "base"]
    found = []
    for _, row in rows.sort_values(["point", "plan_id"], ascending=[False, True], na_position="first").iterrows():
        on_front, is_named = pd.notna(row["point"]), row["origin"] not in FOUND
        is_base = row["origin"] == "base"
        number = str(int(row["point"])) if on_front else ""
        called = " ".join(filter(None, (number, row["origin"] if is_named else "")))
        details = point_details(row)
        place = f"point {number} on the front" if on_front else "not on the front"
        found.append(
            Point(
                x=float(row[x]),
                y=scale * float(row[y]),
                x_error=_speedup_error(row, base) if x == "speedup" else _known(row["output_throughput_stderr"]),
                y_error=scale * _known(row[f"{y}_stderr"]),
                shape="star" if is_base else "circle" if shown(row["healed"], "yes") == "yes" else "triangle",
                look="front" if on_front else "named" if is_named else "faint",
                label=" ".join(filter(None, (called, _lost(row["flags"])))),
                short_label=called,
                must_label=bool(on_front or is_base),
                name=f"Plan {row['plan']}, {place}: {'; '.join(f'{term} {value}' for term, value in details)}",
                plan=row["plan"],
                details=(("place", place), *details),
                hollow=shown(row["feasible"], "yes") == "no",
                flagged=pd.notna(row["flags"]),
                in_front=bool(on_front),
            )
        )
    return found


_MOST_LOSSES = 2
"""Losses that the label of a point names; the page has all of them."""


def _lost(flags: object) -> str:
    """Returns what stands beside a flagged point: the names of its losses, without their sizes."""
    names = [loss.rsplit(" ", 1)[0] for loss in text_of(flags).split("; ") if loss != "-"]
    if not names:
        return ""
    more = f" and {len(names) - _MOST_LOSSES} more" if len(names) > _MOST_LOSSES else ""
    return f"(lost {', '.join(names[:_MOST_LOSSES])}{more})"


def point_details(row: pd.Series) -> tuple[tuple[str, str], ...]:
    """Returns the facts that the page shows for a point, as (term, value); unknown values are left out."""
    cells = [
        ("origin", row["origin"]),
        ("healed", shown(row["healed"], "yes")),
        ("quality retained", shown_retained(row)),
        ("of the control", shown_retained(row, "control_retained")),
        ("quality", with_stderr(row["quality"], row["quality_stderr"])),
        ("speed-up", shown(row["speedup"], ".2f", "x")),
        ("tokens/s", with_stderr(row["output_throughput_tok_per_s"], row["output_throughput_stderr"])),
        ("TPOT", shown(row["tpot_ms_p50"], ".3g", " ms")),
        ("KV bytes/token", shown(row["kv_bytes_per_token"], ",.0f")),
        ("holds the constraints", shown(row["feasible"], "yes")),
        ("flags", text_of(row["flags"])),
    ]
    return tuple((term, value) for term, value in cells if value != "-")


def _known(value: float) -> float:
    return 0.0 if pd.isna(value) else float(value)


def _speedup_error(row: pd.Series, base: pd.DataFrame) -> float:
    """Returns the standard error of a speed-up.

    Both throughputs were timed independently, so their relative errors add in quadrature. The base's own speed-up is
    exactly 1 and has no error.
    """
    if row["origin"] == "base" or base.empty:
        return 0.0
    relative = [
        _known(timed["output_throughput_stderr"]) / timed["output_throughput_tok_per_s"]
        for timed in (row, base.iloc[0])
    ]
    return float(row["speedup"] * math.hypot(*relative))


def headlines(pareto: pd.DataFrame, condition: Condition, best: Collection[int]) -> list[Headline]:
    """Returns a sentence on each plan of the front, without the base.

    The best plan under the constraints leads, even where it is dominated; without one, `headline_row` leads.
    """
    front = front_rows(pareto, condition)
    front = front[front["origin"] != "base"]
    here = marked(pareto, condition)
    chosen = here[here.index.isin(list(best))]
    bar = f"{100 * MIN_RETAINED:.0f} %"
    lead = headline_row(pareto, condition)
    why = "Best under the constraints."
    if len(chosen):
        lead = chosen.iloc[0]
    elif lead is not None and lead["quality_retained"] >= MIN_RETAINED:
        why = f"The fastest on the front that keeps at least {bar} of the quality of the base."
    else:
        why = f"No plan on the front keeps {bar} of the quality of the base; this one keeps the most."
    if lead is None:
        return []
    rest = front[front.index != lead.name].sort_values("quality_retained", ascending=False, kind="stable")
    return [
        Headline(headline(lead), lead["plan"], " ".join([_called(lead), why, *_warned(lead)])),
        *(Headline(trade(row), row["plan"], " ".join([_called(row), *_warned(row)])) for _, row in rest.iterrows()),
    ]


def _called(row: pd.Series) -> str:
    point = f"Point {int(row['point'])}" if pd.notna(row["point"]) else "Not on the front"
    healed = "healed" if shown(row["healed"], "yes") == "yes" else "not healed"
    return f"{point}, {row['plan_id'] if row['origin'] in FOUND else row['origin']}, {healed}."


def _warned(row: pd.Series) -> list[str]:
    warnings = [] if pd.isna(row["flags"]) else [f"Flagged: {row['flags']}."]
    return warnings + (["Does not hold the constraints."] if shown(row["feasible"], "yes") == "no" else [])


def _front_table(pareto: pd.DataFrame, condition: Condition) -> Table:
    rows = front_and_base(pareto, condition)
    header, cells = list(FRONT_HEADER), [list(found) for found in front_cells(rows)]
    for line in cells:  # a number stays on a line with its letter
        line[2] = line[2].replace(" ", "\u00a0").replace(",\u00a0", ", ")
    text_columns = {0, 1, 2, 3, 4}
    if rows["control_retained"].notna().any():
        header.append("of the control")
        for line, (_, row) in zip(cells, rows.iterrows(), strict=True):
            line.append(shown_retained(row, "control_retained"))
    for name, title in (("feasible", "holds constraints"), ("flags", "flags")):
        if rows[name].notna().any():
            text_columns.add(len(header))
            header.append(title)
            for line, value in zip(cells, rows[name], strict=True):
                line.append(shown(value, "yes") if name == "feasible" else text_of(value))
    return Table(
        "Front",
        f"The front, best quality first ({condition}, {condition.engine})",
        header,
        cells,
        frozenset(text_columns),
        strip_columns=frozenset({1}),
    )
