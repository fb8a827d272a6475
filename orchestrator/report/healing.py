"""Describes healing in tables and sentences: losses, the quality curve, baselines against candidates, branches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from orchestrator.report.cells import Table, text_of, with_stderr
from orchestrator.report.front import shown, shown_retained
from orchestrator.report.tables import Row, candidate_order, checked_rows, frame, score_cells, with_score_columns

NEGLIGIBLE_NLL = 0.01
"""A branch whose removal costs less than this many nats per token is called bypassed."""

HEALING_COLUMNS = {
    "plan_id": "str",
    "phase": "str",  # transfer | heal
    "step": "Int64",  # counts from 1 over both phases; 0 is a measurement before the first step
    "tokens": "Int64",
    "loss": "float64",  # loss of the step's batch
    "held_out_divergence": "float64",  # to the teacher, on text outside training; empty: not measured
}
"""Columns of healing_curves.csv, in order."""

QUALITY_CURVE_COLUMNS = {
    "plan_id": "str",
    "origin": "str",
    "share": "float64",  # share of the budget; 0 is before healing, the last row is the checkpoint
    "tokens": "Int64",
    # `<task>_<metric>` and `<task>_<metric>_stderr` of each benchmark and the text (`text_nll`, `text_kl`) stand here.
    "quality": "float64",
    "quality_stderr": "float64",
    "quality_retained": "float64",
    "quality_retained_stderr": "float64",  # paired
}
"""Columns of healing_quality.csv, in order.

Rows are sorted by candidates before baselines, then by plan_id, then by tokens.
"""

BASELINE_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "window": "Int64",
    "origin": "str",  # the baseline's name
    "candidate_id": "str",  # the healed candidate with as many layers of each treatment
    "candidate": "str",
    "quality_ratio": "float64",  # the baseline's quality over the candidate's
    "quality_ratio_stderr": "float64",  # paired over the items
    "nll_gain": "float64",  # the candidate's NLL minus the baseline's, nats per token; positive: baseline better
    "nll_gain_stderr": "float64",  # paired over the sequences
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of baselines.csv, in order.

The table has one row for each healed baseline and candidate of the same attention budget.
"""

BRANCH_COLUMNS = {
    "plan_id": "str",
    "origin": "str",
    "window": "Int64",
    "branch_zeroed": "str",  # linear | window; empty where both branches work
    "nll": "float64",
    "nll_loss": "float64",  # rise of the NLL when the branch is zeroed, nats per token
    "nll_loss_stderr": "float64",  # paired over the sequences
    "n_items": "Int64",
}
"""Columns of branches.csv, in order."""

_Z_95 = 1.959963984540054


def healing_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds healing_curves.csv from rows keyed by `HEALING_COLUMNS`, sorted by plan_id, keeping the order inside."""
    checked = checked_rows(rows, HEALING_COLUMNS, required=("plan_id",))
    return frame(sorted(checked, key=lambda row: row["plan_id"]), HEALING_COLUMNS)


def quality_curve_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds healing_quality.csv from rows keyed by `QUALITY_CURVE_COLUMNS` plus `scores`, as in `pareto_table`.

    Raises:
        ValueError: a row has a key that is no column or lacks plan_id, origin, share or tokens, or two scores would
            share a column.
    """
    required = ("plan_id", "origin", "share", "tokens")
    checked = checked_rows(rows, {**QUALITY_CURVE_COLUMNS, "scores": "list"}, required)
    checked.sort(key=lambda row: (-candidate_order(row)[0], row["plan_id"], row["tokens"]))
    owners: dict[str, tuple[str, str]] = {}
    for row in checked:
        row.update(score_cells(row.pop("scores", None) or (), owners, QUALITY_CURVE_COLUMNS))
    return frame(checked, with_score_columns(QUALITY_CURVE_COLUMNS, owners))


def baselines_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds baselines.csv from rows keyed by `BASELINE_COLUMNS`, by candidate, then by origin."""
    checked = checked_rows(rows, BASELINE_COLUMNS, required=("plan_id", "plan", "origin", "candidate_id", "candidate"))
    checked.sort(key=lambda row: (row["candidate_id"], row["origin"], row["plan_id"]))
    return frame(checked, BASELINE_COLUMNS)


def branches_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds branches.csv from rows keyed by `BRANCH_COLUMNS`, by plan_id, keeping the order inside."""
    checked = checked_rows(rows, BRANCH_COLUMNS, required=("plan_id", "origin", "nll"))
    return frame(sorted(checked, key=lambda row: row["plan_id"]), BRANCH_COLUMNS)


def pace_sentences(tok_per_s: Sequence[float]) -> Iterator[str]:
    """Yields a sentence on the speed of the healings' steps, if any was timed."""
    if not tok_per_s:
        return
    slowest, fastest = round(min(tok_per_s)), round(max(tok_per_s))
    speed = f"{slowest:,}" if slowest == fastest else f"{slowest:,} to {fastest:,}"
    yield f"Healing took its steps at {speed} tokens a second (medians, without the start of jobs and checkpoints)."


def early_stop_sentences(stops: Iterable[Row], names: Mapping[str, str]) -> Iterator[str]:
    """Yields one sentence for each healed plan that stopped before its budget was spent."""
    for stop in stops:
        yield (
            f"{names.get(stop['plan_id'], stop['plan_id'])} stopped after {stop['tokens']:,} of {stop['budget']:,} "
            "tokens, because its divergence on held-out text no longer fell."
        )


def baseline_sentences(table: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    """Yields one sentence for each healed baseline that beats its candidate beyond the paired error.

    Where no baseline does, one sentence says so.
    """
    better = 0
    for _, row in table.iterrows():
        parts = []
        if _is_above(row["quality_ratio"] - 1, row["quality_ratio_stderr"]):
            parts.append(f"{_percent(row['quality_ratio'], row['quality_ratio_stderr'])} of its quality")
        if _is_above(row["nll_gain"], row["nll_gain_stderr"]):
            parts.append(f"{with_stderr(row['nll_gain'], row['nll_gain_stderr'])} nats per token less on the text")
        is_worse = _is_above(1 - row["quality_ratio"], row["quality_ratio_stderr"])
        if not parts or is_worse or _is_above(-row["nll_gain"], row["nll_gain_stderr"]):
            continue
        better += 1
        name, candidate = (names.get(row[key], row[key]) for key in ("plan_id", "candidate_id"))
        yield (
            f"The baseline {name} is better than the candidate {candidate} of the same attention budget, healed by "
            f"the same settings: {' and '.join(parts)}."
        )
    if len(table) and not better:
        yield (
            f"No healed baseline of the same attention budget is better than its candidate beyond the paired error "
            f"({len(table)} {'comparison' if len(table) == 1 else 'comparisons'})."
        )


def branch_sentences(table: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    """Yields one sentence for each healed plan whose linear branch is bypassed: zeroing it costs nothing measurable."""
    for _, row in table[table["branch_zeroed"].eq("linear")].iterrows():
        if pd.isna(row["nll_loss_stderr"]):
            continue
        # A cost that is not significant may still be large: the upper end of its interval must be negligible too.
        at_most = row["nll_loss"] + 1.96 * row["nll_loss_stderr"]
        if not _is_above(row["nll_loss"], row["nll_loss_stderr"]) and at_most < NEGLIGIBLE_NLL:
            name = names.get(row["plan_id"], row["plan_id"])
            yield (
                f"The linear branch of {name} is bypassed: zeroing it costs "
                f"{with_stderr(row['nll_loss'], row['nll_loss_stderr'], '+')} nats per token, nothing measurable. "
                "Set healing.window_dropout to make it learn, or use plain windows, which do as well."
            )


def quality_curve_cells(table: pd.DataFrame, names: Mapping[str, str]) -> Table | None:
    """Lists every point of the quality curve."""
    scores = [name for name in table.columns if f"{name}_stderr" in table.columns and name not in QUALITY_CURVE_COLUMNS]
    rows = [
        [
            names.get(row["plan_id"], row["plan_id"]),
            row["origin"],
            shown(row["share"], ".3g"),
            shown(row["tokens"], ",.0f"),
            shown_retained(row),
            *(with_stderr(row[name], row[f"{name}_stderr"]) for name in scores),
        ]
        for _, row in table.iterrows()
    ]
    header = ["plan", "origin", "share of the budget", "tokens", "quality retained", *scores]
    return _table("All points of the quality curve", "Scores ± standard error while healing", header, rows, {0, 1})


def baselines_cells(table: pd.DataFrame, names: Mapping[str, str]) -> Table | None:
    """Lists every healed baseline next to the candidates of the same attention budget."""
    rows = [
        [
            row["plan"],
            row["origin"],
            row["candidate"],
            names.get(row["candidate_id"], row["candidate_id"]),
            _percent(row["quality_ratio"], row["quality_ratio_stderr"]),
            with_stderr(row["nll_gain"], row["nll_gain_stderr"], "+"),
        ]
        for _, row in table.iterrows()
    ]
    header = ["baseline", "origin", "candidate", "called", "quality over the candidate's", "nats per token less"]
    caption = "Baselines of the same attention budget, healed by the same settings; ± is one paired standard error"
    return _table("All baselines of the same attention budget", caption, header, rows, {0, 1, 2, 3}, {0, 2})


def branches_cells(table: pd.DataFrame, names: Mapping[str, str]) -> Table | None:
    """Lists every healed plan with linear_window layers, with and without each branch."""
    rows = [
        [
            names.get(row["plan_id"], row["plan_id"]),
            row["origin"],
            shown(row["window"], "d"),
            text_of(row["branch_zeroed"]),
            shown(row["nll"], ".4f"),
            with_stderr(row["nll_loss"], row["nll_loss_stderr"], "+"),
            shown(row["n_items"], "d"),
        ]
        for _, row in table.iterrows()
    ]
    header = ["plan", "origin", "window", "branch zeroed", "NLL", "loss", "sequences"]
    caption = "NLL of the text with one branch of all linear_window layers zeroed; ± is one paired standard error"
    return _table("Branches of linear_window layers", caption, header, rows, {0, 1, 3})


def _is_above(value: Any, stderr: Any) -> bool:
    """Says whether a value is above 0 beyond its error at 95 % confidence."""
    return bool(pd.notna(value) and pd.notna(stderr) and value > _Z_95 * stderr)


def _percent(value: float, stderr: float) -> str:
    margin: str = "" if pd.isna(stderr) else f" ± {100 * stderr:.1f}"
    return shown(100 * value, ".1f", margin + " %")


def _table(
    name: str,
    caption: str,
    header: list[str],
    rows: list[list[str]],
    text_columns: set[int],
    code_columns: set[int] | None = None,
) -> Table | None:
    if not rows:
        return None
    return Table(name, caption, header, rows, frozenset(text_columns), frozenset(code_columns or ()))
