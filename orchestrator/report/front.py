"""The front of one serving condition in words: its rows, the headline, a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from layerboost.plan import Treatment
from orchestrator.report.tables import CONDITION_COLUMNS

Row = Mapping[str, Any]

MIN_RETAINED = 0.99
"""Share of base's quality that a headline asks for: the bar of MLPerf Inference, 99 % of the reference's accuracy."""


class Condition(NamedTuple):
    """One way of serving; a front is only ever drawn inside one."""

    hardware: str
    engine: str
    concurrency: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}, {self.prompt_tokens} + {self.new_tokens} tokens, {self.hardware}"


def conditions(pareto: pd.DataFrame) -> list[Condition]:
    """The serving conditions of a pareto table, highest concurrency first."""
    known = pareto.dropna(subset=CONDITION_COLUMNS)[CONDITION_COLUMNS].drop_duplicates()
    found = [Condition(*row) for row in known.itertuples(index=False, name=None)]
    return sorted(found, key=lambda c: (-c.concurrency, c.hardware, c.engine, c.prompt_tokens, c.new_tokens))


def under(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """The rows of one serving condition."""
    mask = pd.Series(True, index=pareto.index)
    for name, value in condition._asdict().items():
        mask &= (pareto[name] == value).fillna(False)
    return pareto[mask]


def front_rows(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """The front of one condition, best quality first, with its number in a column `point` (1 is the best quality)."""
    rows = under(pareto, condition)
    rows = rows[rows["on_front"].fillna(False).astype(bool)]
    rows = rows.sort_values(["quality", "plan_id"], ascending=[False, True], kind="stable")
    return rows.assign(point=range(1, len(rows) + 1))


def marked(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """All rows of one condition, with the number of those on the front in a column `point`, missing elsewhere."""
    rows = under(pareto, condition)
    return rows.assign(point=front_rows(pareto, condition)["point"].reindex(rows.index).astype("Int64"))


def plan_labels(pareto: pd.DataFrame, candidates: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """What to call each plan: (label, plan string) by plan_id; base, then the front, then the rest.

    A label is the plan_id or a baseline's name (both where several plans have the name), and the point's number on the
    front at the highest concurrency.
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
    """The row that a headline speaks of: the fastest candidate on the front that keeps `min_retained` of the quality.

    Where none keeps as much, the one that keeps the most; None without a candidate on the front.
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
    """One sentence on a pareto row: `1.52x throughput at 99.1 ± 0.4 % of the quality (concurrency 100, ...)`."""
    return f"{trade(row)} ({Condition(*(row[name] for name in CONDITION_COLUMNS))})"


def trade(row: Row | pd.Series) -> str:
    """The headline without its serving condition."""
    quality: str = "unknown quality" if pd.isna(row["quality_retained"]) else f"{shown_retained(row)} of the quality"
    speed: str = "unknown" if pd.isna(row["speedup"]) else f"{row['speedup']:.2f}x"
    return f"{speed} throughput at {quality}"


def letter_counts(plan: str) -> str:
    """How many layers got each treatment, such as `24 S, 12 N`."""
    counts = ((treatment.letter, plan.count(treatment.letter)) for treatment in Treatment)
    return ", ".join(f"{count} {letter}" for letter, count in counts if count)


FRONT_HEADER = ("point", "plan", "layers", "origin", "healed", "quality retained", "tok/s", "speedup", "KV bytes/token")
"""Headings of the cells that `front_cells` gives."""


def front_and_base(pareto: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    """The rows that a table of the front shows: base first where it is dominated (no `point`), then the front."""
    rows = front_rows(pareto, condition)
    base = under(pareto, condition)
    return pd.concat([base[(base["origin"] == "base") & ~base.index.isin(rows.index)], rows])


def front_cells(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """Rows of `front_and_base` as rounded text under `FRONT_HEADER`."""
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
    """The front at the highest concurrency as plain text for a terminal, one block for each such condition."""
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
    """A cell for a reader: formatted, `yes`/`no` with the form `yes`, a dash for missing."""
    if value is None or pd.isna(value):
        return "-"
    if form == "yes":
        return "yes" if value else "no"
    return format(int(value) if form == "d" else float(value), form) + unit


def shown_retained(row: Row | pd.Series) -> str:
    """Retained quality in percent with its standard error."""
    stderr = row["quality_retained_stderr"]
    margin: str = "" if pd.isna(stderr) else f" ± {100 * stderr:.1f}"
    return shown(100 * row["quality_retained"], ".1f", margin + " %")
