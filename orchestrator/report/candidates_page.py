"""Builds the page's tables on single layers and on candidates.

A builder of one table returns None where there are no rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from orchestrator.report.cells import Table, text_of, window_text, with_stderr
from orchestrator.report.front import shown, shown_retained
from orchestrator.report.tables import PARETO_COLUMNS


def sensitivity_cells(table: pd.DataFrame) -> Iterator[Table]:
    """Yields one table for each treatment, with a row for each layer and a column for each task's drop."""
    for treatment, rows in table.groupby("treatment", sort=False):
        keys = rows[["task", "metric"]].drop_duplicates()
        columns = [(text_of(task), text_of(metric)) for task, metric in keys.itertuples(index=False, name=None)]
        cells: dict[int, dict[tuple[str, str], str]] = {}
        for _, row in rows.iterrows():
            column = text_of(row["task"]), text_of(row["metric"])
            cells.setdefault(row["layer"], {})[column] = with_stderr(row["drop"], row["drop_stderr"], "+")
        yield Table(
            f"Numbers for treatment {treatment}",
            f"Drop ± standard error with one layer's attention turned into {treatment}; positive is worse",
            ["layer", *(" ".join(column) for column in columns)],
            [[str(layer), *(found.get(column, "-") for column in columns)] for layer, found in cells.items()],
        )


def candidates_cells(pareto: pd.DataFrame) -> Table | None:
    """Lists every candidate under every serving condition; unused columns of constraints and flags are left out."""
    if pareto.empty:
        return None
    header = ["plan", "origin", "healed", "on front", "status", "engine", "concurrency", "quality", "retained"]
    header += ["tok/s", "speedup", "TTFT ms", "TPOT ms", "peak MiB", "KV bytes/token", "id"]
    rows = [
        [
            row["plan"],
            row["origin"],
            shown(row["healed"], "yes"),
            shown(row["on_front"], "yes"),
            row["status"],
            text_of(row["engine"]),
            shown(row["concurrency"], "d"),
            with_stderr(row["quality"], row["quality_stderr"]),
            shown_retained(row),
            with_stderr(row["output_throughput_tok_per_s"], row["output_throughput_stderr"]),
            shown(row["speedup"], ".2f", "x"),
            shown(row["ttft_ms_p50"], ".4g"),
            shown(row["tpot_ms_p50"], ".4g"),
            shown(row["peak_memory_mib"], ",.0f"),
            shown(row["kv_bytes_per_token"], ",.0f"),
            row["plan_id"],
        ]
        for _, row in pareto.iterrows()
    ]
    text_columns = {0, 1, 2, 3, 4, 5, 15}
    for name, title in (("feasible", "holds constraints"), ("flags", "flags")):
        if pareto[name].notna().any():
            text_columns.add(len(header))
            header.append(title)
            for line, value in zip(rows, pareto[name], strict=True):
                line.append(shown(value, "yes") if name == "feasible" else text_of(value))
    caption = "Every candidate under every serving condition; ± is one standard error"
    return Table("All candidates", caption, header, rows, frozenset(text_columns), frozenset({15}), frozenset({0}))


def scores_cells(pareto: pd.DataFrame) -> Table | None:
    """Lists the score of each candidate in each benchmark."""
    names = [name for name in pareto.columns if name not in PARETO_COLUMNS]
    names = [name for name in names if f"{name}_stderr" in names]
    if not names or pareto.empty:
        return None
    rows = [
        [
            row["plan"],
            row["origin"],
            shown(row["healed"], "yes"),
            *(with_stderr(row[name], row[f"{name}_stderr"]) for name in names),
        ]
        for _, row in pareto.drop_duplicates(["plan_id", "healed"]).iterrows()
    ]
    header = ["plan", "origin", "healed", *names]
    text_columns, strips = frozenset({0, 1, 2}), frozenset({0})
    return Table(
        "Scores of each benchmark", "Scores ± standard error", header, rows, text_columns, strip_columns=strips
    )


def race_sentences(candidates: pd.DataFrame) -> Iterator[str]:
    """Yields a sentence on the plans that were not judged on all items, if there are any."""
    partly = candidates["share"].lt(1)
    if partly.any():
        yield (
            f"{partly.sum()} of {len(candidates)} plans were judged on the first items alone "
            f"({candidates['share'].min():.0%} of them), because they would not be healed; their quality is estimated "
            f"from what they keep there. {candidates['beaten_by'].notna().sum()} of them are beaten for certain by a "
            "plan that is at least as fast."
        )


def searched_cells(candidates: pd.DataFrame) -> Table | None:
    """Lists every plan that the search tried."""
    if candidates.empty:
        return None
    rows = [
        [
            row["plan"],
            row["plan_id"],
            row["origin"],
            row["status"],
            shown(row["on_front"], "yes"),
            shown(row["share"], ".0%"),
            window_text(row),
            shown(row["remove_below"], ".4g"),
            shown(row["keep_above"], ".4g"),
            with_stderr(row["quality"], row["quality_stderr"]),
            shown(row["objective"], ".4g"),
            with_stderr(row["predicted_throughput_tok_per_s"], row["predicted_throughput_stderr"]),
            shown(row["output_throughput_tok_per_s"], ",.5g"),
        ]
        for _, row in candidates.iterrows()
    ]
    header = [
        "plan",
        "id",
        "origin",
        "status",
        "on front",
        "judged on",
        "window",
        "remove below",
        "keep above",
        "quality",
    ]
    header += ["objective", "predicted tok/s", "tok/s"]
    text_columns = frozenset(range(5))
    caption = "Every plan that was tried"
    return Table("All plans of the search", caption, header, rows, text_columns, frozenset({1}), frozenset({0}))


def failure_lines(pareto: pd.DataFrame) -> list[str]:
    """Returns one line for each pair of candidate and error; the line names all concurrencies that met the error."""
    failed = pareto[pareto["status"] != "ok"]
    lines = []
    for (plan, origin, healed, error), rows in failed.groupby(
        ["plan", "origin", "healed", "error"], dropna=False, sort=False
    ):
        at = ", ".join(shown(value, "d") for value in rows["concurrency"].drop_duplicates())
        state = "healed" if shown(healed, "yes") == "yes" else "not healed"
        lines.append(f"{plan} ({origin}, {state}, concurrency {at}): {text_of(error)}")
    return lines
