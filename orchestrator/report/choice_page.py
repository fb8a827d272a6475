"""Builds the page's tables that help to choose a plan: lengths, halving, predicted speed, cost.

A builder returns None where there are no rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from orchestrator.report.cells import Table, text_of, window_text, with_stderr
from orchestrator.report.front import shown, shown_retained


def lengths_cells(table: pd.DataFrame) -> Table | None:
    """Lists every timing over the lengths of the prompt."""
    rows = [
        [
            row["plan"],
            row["origin"],
            shown(row["healed"], "yes"),
            shown(row["concurrency"], "d"),
            shown(row["prompt_tokens"], ",.0f"),
            shown(row["new_tokens"], ",.0f"),
            with_stderr(row["output_throughput_tok_per_s"], row["output_throughput_stderr"]),
            shown(row["ttft_ms_p50"], ",.4g"),
            shown(row["tpot_ms_p50"], ",.4g"),
            shown(row["peak_memory_mib"], ",.0f"),
            row["status"] if pd.isna(row["error"]) else f"{row['status']}: {row['error']}",
        ]
        for _, row in table.iterrows()
    ]
    header = ["plan", "origin", "healed", "concurrency", "prompt tokens", "new tokens", "tok/s", "TTFT ms", "TPOT ms"]
    header += ["peak MiB", "status"]
    caption = "Timings over the length of the prompt; ± is one standard error"
    return _table("All lengths", caption, header, rows, {0, 1, 2, 10}, strips={0})


def halving_cells(table: pd.DataFrame, names: Mapping[str, str]) -> Table | None:
    """Lists every plan in every rung."""
    rows = [
        [
            names.get(row["plan_id"], row["plan_id"]),
            row["plan"],
            shown(row["rung"], "d"),
            shown(row["share"], ".3g"),
            shown(row["tokens"], ",.0f"),
            shown_retained(row),
            with_stderr(row["quality"], row["quality_stderr"]),
            shown(row["objective"], ".4g"),
            shown(row["speedup"], ".2f", "x"),
            shown(row["survived"], "yes"),
            shown(row["final_quality"], ".4g"),
        ]
        for _, row in table.iterrows()
    ]
    header = ["called", "plan", "rung", "share of the budget", "tokens", "quality retained", "quality", "objective"]
    header += ["predicted speedup", "went on", "final quality"]
    caption = "Plans that were healed a little, and which of them went on; ± is one standard error"
    return _table("All rungs", caption, header, rows, {0, 1, 9}, strips={1})


def fidelity_cells(table: pd.DataFrame) -> Table | None:
    """Lists every pair of shares of the budget with the correlation between their orders."""
    rows = [
        [
            row["of"],
            shown(row["share_a"], ".3g"),
            shown(row["share_b"], ".3g"),
            shown(row["n_plans"], "d"),
            shown(row["spearman"], ".2f"),
            f"{shown(row['spearman_low'], '.2f')} to {shown(row['spearman_high'], '.2f')}",
        ]
        for _, row in table.iterrows()
    ]
    header = ["ranked by", "share", "later share", "plans", "Spearman", "interval"]
    return _table("How early ranks predict later ones", "Rank correlation between two shares", header, rows, {0})


def speed_cells(table: pd.DataFrame) -> Table | None:
    """Lists every predicted and measured throughput."""
    rows = [
        [
            row["plan"],
            shown(row["healed"], "yes"),
            window_text(row),
            shown(row["concurrency"], "d"),
            shown(row["in_fit"], "yes"),
            with_stderr(row["predicted_throughput_tok_per_s"], row["predicted_throughput_stderr"]),
            shown(row["output_throughput_tok_per_s"], ",.5g"),
            shown(100 * row["relative_error"], "+.1f", " %"),
        ]
        for _, row in table.iterrows()
    ]
    header = [
        "plan",
        "healed",
        "window",
        "concurrency",
        "predicted from",
        "predicted tok/s",
        "measured tok/s",
        "off by",
    ]
    caption = "Predicted and measured throughput; ± is one standard error of the prediction"
    return _table("All predicted and measured throughputs", caption, header, rows, {0, 1, 4}, strips={0})


def estimates_cells(table: pd.DataFrame) -> Table | None:
    """Lists the expected and the actual cost of each stage; columns without any value are left out."""
    forms = {
        "units": ("units", "d"),
        "estimated_s": ("estimated s", ",.0f"),
        "actual_s": ("actual s", ",.0f"),
        "ratio": ("actual / estimated", ".2f"),
        "estimated_tokens": ("estimated tokens", ",.0f"),
        "actual_tokens": ("actual tokens", ",.0f"),
        "estimated_gpu_hours": ("estimated GPU h", ",.3g"),
        "actual_gpu_hours": ("actual GPU h", ",.3g"),
        "memory_mib": ("memory MiB", ",.0f"),
    }
    kept = {name: form for name, form in forms.items() if table[name].notna().any()}
    rows = [
        [row["stage"], *(shown(row[name], form) for name, (_, form) in kept.items())] for _, row in table.iterrows()
    ]
    header = ["stage", *(title for title, _ in kept.values())]
    caption = "Cost by stage: what was expected before the run, and what was measured"
    return _table("Cost by stage", caption, header, rows, {0})


def plain_cells(caption: str, table: pd.DataFrame | None) -> Table | None:
    """Shows any table as it is."""
    if table is None or table.empty:
        return None
    rows = [[text_of(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return Table(caption, caption, [str(name) for name in table.columns], rows)


def _table(
    name: str,
    caption: str,
    header: list[str],
    rows: list[list[str]],
    text_columns: set[int],
    strips: set[int] | None = None,
) -> Table | None:
    if not rows:
        return None
    return Table(name, caption, header, rows, frozenset(text_columns), strip_columns=frozenset(strips or ()))
