"""Builds the tables and sentences that help to choose a plan.

They cover prompt lengths, successive halving, predicted speed and the cost of each stage.


The cells follow `orchestrator.report.tables`: a missing value is an empty cell, floats are unrounded, and the order of
rows does not depend on the order in which they came.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd

from orchestrator.report.tables import Row, candidate_order, checked_rows, frame

LENGTH_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "window": "Int64",
    "origin": "str",
    "healed": "boolean",
    "engine": "str",
    "hardware": "str",
    "concurrency": "Int64",
    "prompt_tokens": "Int64",
    "new_tokens": "Int64",
    "output_throughput_tok_per_s": "float64",
    "output_throughput_stderr": "float64",
    "ttft_ms_p50": "float64",
    "tpot_ms_p50": "float64",
    "peak_memory_mib": "float64",
    "kv_bytes_per_token": "float64",
    "status": "str",
    "error": "str",
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of lengths.csv, in order.

Rows are sorted by base, baselines, search, then by plan_id, then unhealed before healed, then by concurrency and
prompt_tokens.
"""

HALVING_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "window": "Int64",
    "origin": "str",
    "rung": "Int64",  # from 1
    "share": "float64",  # share of the healing budget spent at the end of the rung
    "tokens": "Int64",
    "quality": "float64",
    "quality_stderr": "float64",
    "quality_retained": "float64",
    "quality_retained_stderr": "float64",
    "objective": "float64",  # the value by which the plans of a rung are compared; larger is better
    "speedup": "float64",  # predicted
    "survived": "boolean",  # went on to the next rung
    "final_quality": "float64",  # after the whole budget; empty for plans that were dropped
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of halving.csv, in order. Rows are sorted by rung, then by base, baselines, search, then by plan_id."""

FIDELITY_COLUMNS = {
    "of": "str",  # the value by which the plans are ranked
    "rung_a": "Int64",
    "rung_b": "Int64",  # the later rung; the end of healing counts as one rung after the last
    "share_a": "float64",
    "share_b": "float64",
    "n_plans": "Int64",
    "spearman": "float64",  # correlation between the orders of the same plans at both rungs
    "spearman_low": "float64",
    "spearman_high": "float64",
}
"""Columns of fidelity.csv, in order. Rows are sorted by of, share_a and share_b."""

SPEED_COLUMNS = {
    "plan_id": "str",
    "plan": "str",
    "window": "Int64",
    "healed": "boolean",
    "concurrency": "Int64",
    "in_fit": "boolean",  # measured before the search; the prediction was fitted to it
    "predicted_throughput_tok_per_s": "float64",
    "predicted_throughput_stderr": "float64",
    "output_throughput_tok_per_s": "float64",
    "relative_error": "float64",  # predicted over measured, minus 1
    "sinks": "Int64",  # first tokens that the window holds; empty where it holds none
}
"""Columns of speed.csv, in order. The table has one row for each measured plan and concurrency.

Rows are sorted by concurrency and plan_id.
"""

ESTIMATE_COLUMNS = {
    "stage": "str",
    "units": "Int64",
    "estimated_s": "float64",
    "actual_s": "float64",
    "ratio": "float64",  # actual over estimated
    "estimated_tokens": "Int64",
    "actual_tokens": "Int64",
    "estimated_gpu_hours": "float64",
    "actual_gpu_hours": "float64",
    "memory_mib": "float64",
}
"""Columns of estimates.csv, in order. Rows keep the order in which the stages run."""


def lengths_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds lengths.csv from rows keyed by `LENGTH_COLUMNS`.

    Raises:
        ValueError: a row has a key that is no column, or lacks plan_id, plan, origin, prompt_tokens or status.
    """
    checked = checked_rows(rows, LENGTH_COLUMNS, ("plan_id", "plan", "origin", "prompt_tokens", "status"))
    checked.sort(
        key=lambda row: (
            *candidate_order(row),
            bool(row.get("healed")),
            row.get("concurrency") or 0,
            row["prompt_tokens"],
        )
    )
    return frame(checked, LENGTH_COLUMNS)


def halving_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds halving.csv from rows keyed by `HALVING_COLUMNS`.

    Raises:
        ValueError: a row has a key that is no column, or lacks plan_id, plan, origin or rung.
    """
    checked = checked_rows(rows, HALVING_COLUMNS, ("plan_id", "plan", "origin", "rung"))
    return frame(sorted(checked, key=lambda row: (row["rung"], *candidate_order(row))), HALVING_COLUMNS)


def fidelity_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds fidelity.csv from rows keyed by `FIDELITY_COLUMNS`.

    Raises:
        ValueError: a row has a key that is no column, or lacks of, share_a or share_b.
    """
    checked = checked_rows(rows, FIDELITY_COLUMNS, ("of", "share_a", "share_b"))
    return frame(sorted(checked, key=lambda row: (row["of"], row["share_a"], row["share_b"])), FIDELITY_COLUMNS)


def speed_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds speed.csv from rows keyed by `SPEED_COLUMNS`; an absent `relative_error` is computed.

    Raises:
        ValueError: a row has a key that is no column, or lacks plan_id, plan or concurrency.
    """
    checked = checked_rows(rows, SPEED_COLUMNS, ("plan_id", "plan", "concurrency"))
    checked.sort(key=lambda row: (row["concurrency"], row["plan_id"], bool(row.get("healed"))))
    table = frame(checked, SPEED_COLUMNS)
    error = table["predicted_throughput_tok_per_s"] / table["output_throughput_tok_per_s"] - 1
    table["relative_error"] = table["relative_error"].fillna(error)
    return table


def estimates_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Builds estimates.csv from rows keyed by `ESTIMATE_COLUMNS`, in the order given; an absent `ratio` is computed.

    Raises:
        ValueError: a row has a key that is no column, or lacks stage.
    """
    table = frame(checked_rows(rows, ESTIMATE_COLUMNS, ("stage",)), ESTIMATE_COLUMNS)
    ratio = table["actual_s"] / table["estimated_s"].where(table["estimated_s"] > 0)
    table["ratio"] = table["ratio"].fillna(ratio)
    return table


def fidelity_sentences(table: pd.DataFrame) -> Iterator[str]:
    """Yields one sentence for each pair of shares, on how well the earlier order of plans predicts the later one."""
    for _, row in table.iterrows():
        ends = f"{_share(row['share_a'])} and at {_share(row['share_b'])} of the healing budget"
        if pd.isna(row["spearman"]):
            yield f"{row['n_plans']} plans were ranked by {row['of']} at {ends}, too few for a correlation."
            continue
        interval = ""
        if pd.notna(row["spearman_low"]) and pd.notna(row["spearman_high"]):
            interval = f" ({row['spearman_low']:.2f} to {row['spearman_high']:.2f})"
        yield (
            f"The orders of {row['n_plans']} plans by {row['of']} at {ends} correlate at "
            f"{row['spearman']:.2f}{interval} (Spearman): {_trust(row)}."
        )


def speed_sentences(table: pd.DataFrame) -> Iterator[str]:
    """Yields sentences on how far predicted throughput is from measured throughput.

    Plans that the prediction had not seen and plans that it was fitted to get one sentence each.
    """
    known = table[table["relative_error"].notna()]
    in_fit = known["in_fit"].fillna(False).astype(bool)
    for rows, which in ((known[~in_fit], "that the prediction had not seen"), (known[in_fit], "that it was made from")):
        if len(rows):
            error = 100 * rows["relative_error"].abs()
            yield (
                f"Of {len(rows)} {'measurement' if len(rows) == 1 else 'measurements'} {which}, the predicted "
                f"throughput is off by {error.median():.1f} % in the median and {error.max():.1f} % at most."
            )


def _share(share: float) -> str:
    return f"{100 * share:.3g} %"


def _trust(row: pd.Series) -> str:
    """Says what the interval allows to conclude; without an interval, what the correlation alone suggests."""
    low = row["spearman_low"]
    if pd.notna(low) and low <= 0:
        return "so few plans do not show that the early order predicts the later one"
    if row["spearman"] >= 0.8:
        return "the early order predicts the later one well"
    return (
        "the early order predicts the later one in part" if row["spearman"] > 0.4 else "the early order predicts little"
    )
