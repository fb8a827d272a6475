"""Describes the front of one serving condition: its rows, the headline and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from layerboost.plan import Treatment
from orchestrator.report.tables import CONDITION_COLUMNS

Row = Mapping[str, Any]

MIN_RETAINED = 0.99
"""The share of the base's quality that a plan must keep to be a headline.

It is the bar of MLPerf Inference: 99 % of the reference's accuracy.
"""


class Condition(NamedTuple):
    """Names one serving condition. Speeds are comparable only inside one, so each front is drawn inside one."""

    hardware: str
    engine: str
    concurrency: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}, {self.prompt_tokens} + {self.new_tokens} tokens, {self.hardware}"


def conditions(pareto: pd.DataFrame) -> list[Condition]:
    """Returns the serving conditions of a pareto table, highest concurrency first."""
    known = pareto.dropna(subset=CONDITION_COLUMNS)[CONDITION_COLUMNS].drop_duplicates()
    found = [Condition(*row) for row in known.itertuples(index=False, name=None)]
    return sorted(found, key=lambda c: (-c.concurrency, c.hardware, c.engine, c.prompt_tokens, c.new_tokens))


def under(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """Returns the rows of one serving condition."""
    mask = pd.Series(True, index=pareto.index)
    for name, value in condition._asdict().items():
        mask &= (pareto[name] == value).fillna(False)
    return pareto[mask]


def front_rows(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """Returns the front of one condition, best quality first, numbered from 1 in a column `point`."""
    rows = under(pareto, condition)
    rows = rows[rows["on_front"].fillna(False).astype(bool)]
    rows = rows.sort_values(["quality", "plan_id"], ascending=[False, True], kind="stable")
    return rows.assign(point=range(1, len(rows) + 1))


def marked(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """Returns all rows of one condition; a column `point` numbers those on the front and is missing elsewhere."""
    rows = under(pareto, condition)
    return rows.assign(point=front_rows(pareto, condition)["point"].reindex(rows.index).astype("Int64"))


def plan_labels(pareto: pd.DataFrame, candidates: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Returns (label, plan string) by plan_id; the base comes first, then the front, then the rest.

    A label is the plan_id or a baseline's name, or both where several plans share the name. It also holds the number
    that the plan's point has on the front at the highest concurrency.
    """
    known = pd.concat([table[["plan_id", "plan", "origin"]] for table in (pareto, candidates)], ignore_index=True)
    known = known.drop_duplicates("plan_id").set_index("plan_id")
    found = conditions(pareto)
    rows = front_rows(pareto, found[0]) if found else pareto.iloc[:0].assign(point=0)
    points: dict[str, list[str]] = {}
    for plan_id, point in zip(rows["plan_id"], rows["point"], strict=True):
        points.setdefault(plan_id, []).append(str(point))
    order = [*known.index[known["origin"] == "base"], *points, *known.index]
    n_plans = known["origin"].value_counts()
    labels = {}
    for plan_id in dict.fromkeys(order):
        plan, origin = str(known.at[plan_id, "plan"]), str(known.at[plan_id, "origin"])
        point = f" (point {', '.join(points[plan_id])})" if plan_id in points else ""
        name = plan_id if origin == "search" else origin if n_plans[origin] == 1 else f"{origin} {plan_id}"
        labels[plan_id] = (name + point, plan)
    return labels


def headline_row(pareto: pd.DataFrame, condition: Condition, *, min_retained: float = MIN_RETAINED) -> pd.Series | None:
    """Returns the row for the headline: the fastest candidate on the front that keeps `min_retained` of the quality.

    Where none keeps as much, it returns the one that keeps the most; without a candidate on the front, None.
    """
    rows = front_rows(pareto, condition)
    rows = rows[(rows["origin"] != "base") & rows["speedup"].notna()]
    if rows.empty:
        return None
    good = rows[rows["quality_retained"] >= min_retained]
    if len(good):
        return good.iloc[int(good["speedup"].argmax())]
    return rows.iloc[0]


def headline(row: Row | pd.Series) -> str:
    """Sums a pareto row up in a sentence: `1.52x throughput at 99.1 ± 0.4 % of the quality (concurrency 100, ...)`."""
    return f"{trade(row)} ({Condition(*(row[name] for name in CONDITION_COLUMNS))})"


def trade(row: Row | pd.Series) -> str:
    """Returns the headline without its serving condition."""
    quality: str = "unknown quality" if pd.isna(row["quality_retained"]) else f"{shown_retained(row)} of the quality"
    speed: str = "unknown" if pd.isna(row["speedup"]) else f"{row['speedup']:.2f}x"
    control: str = ""
    if not pd.isna(row.get("control_retained")):
        control = f", {shown_retained(row, 'control_retained')} of the control's"
    return f"{speed} throughput at {quality}{control}"


def letter_counts(plan: str) -> str:
    """Counts the layers of each treatment, such as `24 S, 12 N`."""
    counts = ((treatment.letter, plan.count(treatment.letter)) for treatment in Treatment)
    return ", ".join(f"{count} {letter}" for letter, count in counts if count)


FRONT_HEADER = ("point", "plan", "layers", "origin", "healed", "quality retained", "tok/s", "speedup", "KV bytes/token")
"""The headings of the cells that `front_cells` returns."""


def front_and_base(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """Returns the rows of a table of the front; a dominated base comes first, without a `point`."""
    rows = front_rows(pareto, condition)
    base = under(pareto, condition)
    return pd.concat([base[(base["origin"] == "base") & ~base.index.isin(rows.index)], rows])


def front_cells(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """Formats rows of `front_and_base` as rounded text under `FRONT_HEADER`."""
    return [
        (
            shown(row.get("point"), "d"),
            row["plan"],
            letter_counts(row["plan"]),
            row["origin"],
            shown(row["healed"], "yes"),
            shown_retained(row),
            shown(row["output_throughput_tok_per_s"], ",.1f"),
            shown(row["speedup"], ".2f", "x"),
            shown(row["kv_bytes_per_token"], ",.0f"),
        )
        for _, row in rows.iterrows()
    ]


def format_front_table(pareto: pd.DataFrame) -> str:
    """Formats the front at the highest concurrency as text for a terminal, one block for each such condition."""
    found = conditions(pareto)
    blocks = []
    for condition in (c for c in found if c.concurrency == found[0].concurrency):
        cells = [FRONT_HEADER, *front_cells(front_and_base(pareto, condition))]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                text.rjust(width) if index > 4 else text.ljust(width)
                for index, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]
        blocks.append("\n".join([f"Front: {condition}, {condition.engine}", *lines]))
    return "\n\n".join(blocks) if blocks else "Front: nothing measured yet."


def shown(value: Any, form: str, unit: str = "") -> str:
    """Formats a cell for a reader.

    The form `yes` writes `yes` or `no`, the form `d` an integer; other forms are format specifications of a float. A
    missing value becomes a dash.
    """
    if value is None or pd.isna(value):
        return "-"
    if form == "yes":
        return "yes" if value else "no"
    return format(int(value) if form == "d" else float(value), form) + unit


def shown_retained(row: Row | pd.Series, column: str = "quality_retained") -> str:
    """Formats the retained quality, or what another column retains, in percent with its standard error."""
    stderr = row[f"{column}_stderr"]
    margin: str = "" if pd.isna(stderr) else f" ± {100 * stderr:.1f}"
    return shown(100 * row[column], ".1f", margin + " %")
