"""Builds the page's tables on how sure a ranking of layers is; a builder returns None where there are no rows."""

from __future__ import annotations

import pandas as pd

from orchestrator.report.cells import Table, text_of, window_text, with_stderr
from orchestrator.report.front import shown


def rankings_cells(table: pd.DataFrame) -> Table | None:
    """Lists every ranking with its stability."""
    header = ["treatment", "score", "source", "context tokens", "chosen", "items", "halves"]
    header += ["items until stable", "cannot be told apart", "least to most sensitive"]
    rows = [
        [
            row["treatment"],
            row["score"],
            row["source"],
            shown(row["context_tokens"], "d"),
            shown(row["chosen"], "yes"),
            shown(row["n_items"], "d"),
            _with_interval(row["split_half_spearman"], row["split_half_low"], row["split_half_high"], ".2f"),
            shown(row["items_until_stable"], "d"),
            text_of(row["indistinct_pairs"]),
            text_of(row["ranking"]),
        ]
        for _, row in table.iterrows()
    ]
    caption = (
        "Halves: Spearman correlation between the orders by two halves of the items (interval); "
        "3<5: layer 5 seems more sensitive than 3, but within the noise"
    )
    return _table("All rankings", caption, header, rows, frozenset({0, 1, 2, 4, 8, 9}), frozenset({8, 9}))


def correlations_cells(table: pd.DataFrame) -> Table | None:
    """Lists every pair of rankings with its correlations."""
    rows = [
        [
            row["treatment"],
            row["view_a"],
            row["view_b"],
            row["method"],
            _with_interval(row["correlation"], row["ci_low"], row["ci_high"], ".3f"),
        ]
        for _, row in table.iterrows()
    ]
    header = ["treatment", "ranking", "other ranking", "method", "correlation"]
    caption = "Rank correlation between two rankings of the same layers (interval)"
    return _table("All pairs of rankings", caption, header, rows, frozenset(range(4)))


def interactions_cells(table: pd.DataFrame) -> Table | None:
    """Lists every plan with its predicted and measured drop."""
    rows = [
        [
            row["plan"],
            row["plan_id"],
            row["origin"],
            row["score"],
            window_text(row),
            shown(row["predicted_drop"], "+,.4g"),
            with_stderr(row["measured_drop"], row["measured_drop_stderr"], "+"),
            with_stderr(row["interaction"], row["interaction_stderr"], "+"),
        ]
        for _, row in table.iterrows()
    ]
    header = ["plan", "id", "origin", "score", "window", "predicted drop", "measured drop", "interaction"]
    caption = (
        "Predicted and measured drop ± standard error; a positive interaction says that the layers need each other"
    )
    return _table("All predicted and measured drops", caption, header, rows, frozenset(range(4)), frozenset({0, 1}))


def tiers_cells(table: pd.DataFrame) -> Table | None:
    """Lists every layer of the chosen candidates with its interval and the thresholds."""
    rows = [
        [
            row["plan"],
            row["plan_id"],
            shown(row["layer"], "d"),
            row["treatment"],
            _with_interval(row["drop"], row["drop_ci_low"], row["drop_ci_high"], "+.4g"),
            shown(row["remove_below"], "+.4g"),
            shown(row["keep_above"], "+.4g"),
            text_of(row["straddles"]),
        ]
        for _, row in table.iterrows()
    ]
    header = ["plan", "id", "layer", "treatment", "drop", "remove below", "keep above", "inside the interval"]
    caption = "Drop of each layer (interval) and the thresholds that gave it its treatment"
    return _table("All tiers", caption, header, rows, frozenset({0, 1, 3, 7}), frozenset({0, 1}))


def _table(
    name: str,
    caption: str,
    header: list[str],
    rows: list[list[str]],
    text_columns: frozenset[int],
    code_columns: frozenset[int] = frozenset(),
) -> Table | None:
    return Table(name, caption, header, rows, text_columns, code_columns) if rows else None


def _with_interval(value: float, low: float, high: float, form: str) -> str:
    if pd.isna(low) or pd.isna(high):
        return shown(value, form)
    return shown(value, form, f" ({shown(low, form)} to {shown(high, form)})")
