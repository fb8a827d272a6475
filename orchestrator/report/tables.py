"""Defines the tables that users read: their columns, their builders from records, and how CSV is written and read.

A missing value is an empty cell, floats are unrounded, booleans are `true` or `false`. The order of rows does not
depend on the order in which the units finished. A failed unit is a row with its `status`, never a gap.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from layerboost.plan import TREATMENTS, Plan, Treatment
from layerboost.search.baselines import CONTROL
from layerboost.search.pareto import front

Row = Mapping[str, Any]

SENSITIVITY_COLUMNS = {
    "layer": "Int64",  # 0 is the layer after the embedding
    "treatment": "str",  # a name of `layerboost.plan.TREATMENTS`
    "task": "str",  # a benchmark, `text`, or `mean`, which is the sensitivity over the benchmarks
    "metric": "str",
    "n_items": "Int64",  # the number of items that both models answered
    "base": "float64",
    "ablated": "float64",  # the same score with this one layer treated
    "drop": "float64",  # positive is worse, whatever the metric's direction
    "drop_stderr": "float64",  # paired over items
    "drop_ci_low": "float64",
    "drop_ci_high": "float64",
}
"""Columns of sensitivity.csv, in order, with their pandas types.

Rows are sorted by layer, treatment, task (`mean` first) and metric.
"""

CANDIDATE_COLUMNS = {
    "plan_id": "str",  # 12 hex digits; may look like a number, so read it as text
    "plan": "str",  # a treatment's letter for each layer, first layer first
    "window": "Int64",  # tokens; empty where no layer needs one
    "origin": "str",  # base | search | the baseline's name
    "remove_below": "float64",
    "keep_above": "float64",
    "quality": "float64",
    "quality_stderr": "float64",
    "output_throughput_tok_per_s": "float64",  # measured; empty where it was not
    "on_front": "boolean",
    "status": "str",  # ok | failed
    "objective": "float64",  # the search maximises it: minus the drop of the score, or the quality
    "predicted_throughput_tok_per_s": "float64",
    "predicted_throughput_stderr": "float64",
    "share": "float64",  # of the items that it was judged on; below 1 where it did not lead the race
    "beaten_by": "str",  # plan_id of a plan that is better for certain on the first items; empty where there is none
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of candidates.csv, in order. The table has one row for each distinct plan that was tried.

Rows are sorted by base, baselines, search.
"""

PARETO_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "window": "Int64",
    "origin": "str",
    "healed": "boolean",
    "heal_tokens": "Int64",
    **{f"n_{treatment}": "Int64" for treatment in TREATMENTS.names()},  # layers of each
    "engine": "str",
    "hardware": "str",
    "concurrency": "Int64",  # requests decoded at once
    "prompt_tokens": "Int64",
    "new_tokens": "Int64",
    "output_throughput_tok_per_s": "float64",
    "output_throughput_stderr": "float64",
    "ttft_ms_p50": "float64",
    "tpot_ms_p50": "float64",
    "peak_memory_mib": "float64",
    "kv_bytes_per_token": "float64",
    # `<task>_<metric>` and `<task>_<metric>_stderr` of each benchmark stand here, in the base's order.
    "quality": "float64",
    "quality_stderr": "float64",
    "quality_retained": "float64",  # quality over base's quality
    "quality_retained_stderr": "float64",  # paired
    "speedup": "float64",  # output throughput over base's under the same condition
    "on_front": "boolean",  # no ok row but the control's dominates it in (quality, output throughput)
    "status": "str",
    "error": "str",
    "predicted_throughput_tok_per_s": "float64",  # predicted from the plans measured before the search
    "predicted_throughput_stderr": "float64",
    "feasible": "boolean",  # holds the recipe's constraints; empty where there are none
    "flags": "str",  # what a candidate lost although its accuracy held: generation, retrieval, calibration
    # The transformers engine does not report the following columns; vllm does.
    "engine_version": "str",
    "ttft_ms_p99": "float64",
    "tpot_ms_p99": "float64",
    "itl_ms_p50": "float64",
    "itl_ms_p99": "float64",
    "kv_cache_tokens": "Int64",  # tokens that the KV cache holds at once, in sequences of the longest length
    # The control is the untouched parent, healed like the candidates (`healing.baselines: [parent]`).
    "control_retained": "float64",  # quality over the control's quality; empty without a control
    "control_retained_stderr": "float64",  # paired
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of pareto.csv, in order. The table has one row for each candidate and serving condition.

Rows are sorted by base, baselines, search, then by plan_id, then unhealed before healed, then by condition.
"""

CONDITION_COLUMNS = ["hardware", "engine", "concurrency", "prompt_tokens", "new_tokens"]
"""Two rows are comparable in speed where they agree in all of these columns."""

_AFTER_SCORES = "quality"
_OBJECTIVES = ["quality", "output_throughput_tok_per_s"]


def sensitivity_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds sensitivity.csv from rows keyed by `SENSITIVITY_COLUMNS`; absent keys become empty cells.

    Raises:
        ValueError: a row has a key that is no column, or lacks layer or treatment.
    """
    checked = checked_rows(rows, SENSITIVITY_COLUMNS, required=("layer", "treatment"))
    checked.sort(
        key=lambda row: (
            row["layer"],
            treatment_rank(row["treatment"]),
            row.get("task") != "mean",
            str(row.get("task")),
            str(row.get("metric")),
        )
    )
    return frame(checked, SENSITIVITY_COLUMNS)


def candidates_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds candidates.csv from rows keyed by `CANDIDATE_COLUMNS`.

    `on_front` is kept where a row has it (a search may know its objectives better than this table) and otherwise
    computed from quality and output throughput among the ok rows. An `error` key is allowed and not written.

    Raises:
        ValueError: a row has a key that is no column, or lacks plan_id, plan, origin or status.
    """
    required = ("plan_id", "plan", "origin", "status")
    checked = checked_rows(rows, {**CANDIDATE_COLUMNS, "error": "str"}, required)
    checked.sort(key=candidate_order)
    table = frame(checked, CANDIDATE_COLUMNS)
    table["on_front"] = table["on_front"].fillna(_front_mask(table))
    return table


def pareto_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds pareto.csv from rows keyed by `PARETO_COLUMNS` plus `scores`.

    `scores` is a list of mappings with task, metric, value and stderr (as `Scores.to_dict()` holds them); each gives
    two columns. The counts of treatments, `speedup` and `on_front` are computed here.

    Raises:
        ValueError: a row has a key that is no column, lacks plan_id, plan, origin or status, or two scores would
            share a column.
    """
    required = ("plan_id", "plan", "origin", "status")
    checked = checked_rows(rows, {**PARETO_COLUMNS, "scores": "list"}, required)
    checked.sort(key=lambda row: (*candidate_order(row), bool(row.get("healed")), *_condition_order(row)))
    owners: dict[str, tuple[str, str]] = {}
    for row in checked:
        row.update(_counts(row["plan"]))
        row.update(score_cells(row.pop("scores", None) or (), owners, PARETO_COLUMNS))
    table = frame(checked, with_score_columns(PARETO_COLUMNS, owners))
    table["speedup"] = math.nan
    for _, group in table.groupby(CONDITION_COLUMNS, dropna=False, sort=False):
        ok = group[group["status"] == "ok"]
        base = ok.loc[ok["origin"] == "base", "output_throughput_tok_per_s"].dropna()
        if len(base):
            table.loc[ok.index, "speedup"] = ok["output_throughput_tok_per_s"] / base.iloc[0]
        table.loc[group.index, "on_front"] = _front_mask(group)
    return table


def with_score_columns(columns: Mapping[str, str], scores: Iterable[str]) -> dict[str, str]:
    """Inserts the score columns, named `<task>_<metric>`, before `quality`, each with its `_stderr` column."""
    found: dict[str, str] = {}
    for name, dtype in columns.items():
        if name == _AFTER_SCORES:
            for score in scores:
                found |= {score: "float64", f"{score}_stderr": "float64"}
        found[name] = dtype
    return found


def score_column(task: str, metric: str) -> str:
    """Returns the name of a score's column, `<task>_<metric>`.

    Each run of characters other than letters, digits, `_`, `.` and `-` becomes one `_`.
    """
    return re.sub(r"[^\w.-]+", "_", f"{task}_{metric}")


def to_csv(table: pd.DataFrame) -> bytes:
    """Writes a table as UTF-8 CSV: unrounded floats, `true`/`false`, empty cells for missing."""
    written = table.copy()
    for name in written.select_dtypes(["boolean", "bool"]).columns:
        written[name] = written[name].astype(object).map({True: "true", False: "false"})
    return written.to_csv(index=False, lineterminator="\n").encode()


def read_csv(content: bytes, columns: Mapping[str, str]) -> pd.DataFrame:
    """Reads exactly what `to_csv` wrote. A column that `columns` lacks belongs to a benchmark and is read as floats."""
    header = pd.read_csv(io.BytesIO(content), nrows=0).columns
    dtypes = {name: columns.get(name, "float64") for name in header}
    return pd.read_csv(
        io.BytesIO(content),
        dtype=dtypes,
        keep_default_na=False,
        na_values=[""],
        float_precision="round_trip",
    )


def checked_rows(rows: Iterable[Row], columns: Mapping[str, str], required: Sequence[str]) -> list[dict[str, Any]]:
    """Copies the rows and checks their keys.

    Raises:
        ValueError: a row has a key that is no column, or lacks a required one.
    """
    checked = [dict(row) for row in rows]
    for row in checked:
        if unknown := sorted(set(row) - set(columns)):
            raise ValueError(f"row {row}: '{unknown[0]}' is no column; use {', '.join(columns)}")
        if missing := [name for name in required if row.get(name) is None]:
            raise ValueError(f"row {row}: '{missing[0]}' is missing; every row needs {', '.join(required)}")
    return checked


def frame(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pd.DataFrame:
    """Makes a table of the rows with these columns and types; absent keys become empty cells."""
    return pd.DataFrame(
        {name: pd.Series([row.get(name) for row in rows], dtype=dtype) for name, dtype in columns.items()}
    )


def candidate_order(row: Row) -> tuple[int, str]:
    """Sorts base before the baselines before the search, each by plan_id."""
    return {"base": 0, "search": 2}.get(row["origin"], 1), row["plan_id"]


def treatment_rank(treatment: str) -> int:
    """Sorts treatments as `Treatment` lists them, unknown names last."""
    names = [known.value for known in Treatment]
    return names.index(treatment) if treatment in names else len(names)


def _front_mask(rows: pd.DataFrame) -> pd.Series:
    """Returns which rows no other dominates; failed ones and the control, which is no plan to serve, take no part."""
    points = rows[_OBJECTIVES].where((rows["status"] == "ok") & (rows["origin"] != CONTROL))
    return pd.Series(front(list(points.itertuples(index=False, name=None))), index=rows.index, dtype="boolean")


def _condition_order(row: Row) -> tuple[Any, ...]:
    return tuple(str(row.get(name) or "") for name in CONDITION_COLUMNS[:2]) + tuple(
        row.get(name) or 0 for name in CONDITION_COLUMNS[2:]
    )


def _counts(plan: str) -> dict[str, int]:
    parsed = Plan.parse(plan, window=1)
    return {f"n_{treatment.value}": parsed.count(treatment) for treatment in Treatment}


def score_cells(
    scores: Iterable[Row], owners: dict[str, tuple[str, str]], columns: Mapping[str, str]
) -> dict[str, float | None]:
    """Returns the score cells of one row; `owners` records, over all rows, which score each column belongs to.

    Raises:
        ValueError: two scores would share a column, or a score would take one of the table's own columns.
    """
    cells: dict[str, float | None] = {}
    for score in scores:
        owner = (score["task"], score["metric"])
        column = score_column(*owner)
        others = [other for other in owners if other != column]
        taken = {*columns, *cells, *others, *(f"{other}_stderr" for other in others)}
        if owners.setdefault(column, owner) != owner or {column, f"{column}_stderr"} & taken:
            raise ValueError(f"task {owner[0]!r}, metric {owner[1]!r}: column '{column}' is taken; rename the task")
        cells |= {column: score["value"], f"{column}_stderr": score.get("stderr")}
    return cells
