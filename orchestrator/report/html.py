"""The report as one HTML page that opens offline: no script, no network, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import pandas as pd

from orchestrator.report.canvas import GRID, INK, PAPER, Picture
from orchestrator.report.cells import Table, text_of, with_stderr
from orchestrator.report.certainty import interaction_sentences, stability_sentences, tier_sentences
from orchestrator.report.certainty_page import correlations_cells, interactions_cells, rankings_cells, tiers_cells
from orchestrator.report.front import (
    FRONT_HEADER,
    MIN_RETAINED,
    Condition,
    front_cells,
    headline,
    headline_row,
    shown,
    shown_retained,
)
from orchestrator.report.healing import (
    baseline_sentences,
    baselines_cells,
    branch_sentences,
    branches_cells,
    early_stop_sentences,
    quality_curve_cells,
)
from orchestrator.report.tables import PARETO_COLUMNS

if TYPE_CHECKING:
    from orchestrator.report import ReportData

_SVG_STYLE = f"""<style>
:root {{ --ink: {INK}; --paper: {PAPER}; --grid: {GRID}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e7eb; --paper: #15191e; --grid: #363d45; }} }}
</style>"""


@dataclass(frozen=True)
class Drawings:
    """The pictures of a report; None where there is nothing to draw."""

    names: Mapping[str, str]
    """What to call a plan_id where a reader should recognise it."""
    fronts: Mapping[Condition, Picture | None]
    plans: Picture | None
    n_plans: tuple[int, int]
    """Plans drawn as strips, and plans in all."""
    sensitivity: Picture | None
    healing: Picture | None
    quality_curve: Picture | None
    correlations: Picture | None
    interactions: Picture | None


def page(data: ReportData, drawings: Drawings) -> bytes:
    """Renders the page. All text is escaped: names of models and tasks come from elsewhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestrator.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    template = environment.get_template("template.html.j2")
    headlines = [(c, *_headline(data.pareto, c)) for c in drawings.fronts]
    text = template.render(
        data=data,
        drawings=drawings,
        headlines=[(sentence, remark) for _, sentence, remark in headlines if sentence],
        fronts=[(c, picture, _front_table(data.pareto, c)) for c, picture in drawings.fronts.items()],
        sensitivity=list(_sensitivity_tables(data.sensitivity)),
        rankings=rankings_cells(data.rankings),
        stability=stability_sentences(data.rankings),
        correlations=correlations_cells(data.correlations),
        interactions=interactions_cells(data.interactions),
        independence=interaction_sentences(data.interactions),
        tiers=tiers_cells(data.tiers),
        uncertain=[(drawings.names.get(key, key), plan, text) for key, plan, text in tier_sentences(data.tiers)],
        healing=[
            *early_stop_sentences(data.early_stops, drawings.names),
            *baseline_sentences(data.baselines, drawings.names),
            *branch_sentences(data.branches, drawings.names),
        ],
        healing_tables=[
            quality_curve_cells(data.quality_curve, drawings.names),
            baselines_cells(data.baselines, drawings.names),
            branches_cells(data.branches, drawings.names),
        ],
        candidates=_candidates_table(data.pareto),
        scores=_scores_table(data.pareto),
        searched=_searched_table(data.candidates),
        failures=_failures(data),
        environment=list(_flat(data.environment)),
        cost=_plain_table("What each stage took", data.cost),
    )
    return text.encode()


def data_uri(picture: Picture) -> str:
    """The picture's SVG as a data URI whose ink, paper and grid follow the reader's light or dark scheme."""
    svg = picture.svg.decode()
    start = svg.index(">", svg.index("<svg")) + 1
    body = svg[start:]
    for colour, name in ((INK, "ink"), (PAPER, "paper"), (GRID, "grid")):
        body = body.replace(colour, f"var(--{name})")
    adapted = svg[:start] + _SVG_STYLE + body
    return "data:image/svg+xml;base64," + base64.b64encode(adapted.encode()).decode()


def _headline(pareto: pd.DataFrame, condition: Condition) -> tuple[str, str]:
    row = headline_row(pareto, condition)
    if row is None:
        return "", ""
    bar = f"{100 * MIN_RETAINED:.0f} %"
    if row["quality_retained"] >= MIN_RETAINED:
        why = f"the fastest on the front that keeps at least {bar} of the quality of the base"
    else:
        why = f"no point on the front keeps {bar} of the quality of the base; this one keeps the most"
    return headline(row), f"Point {row['point']}: {why}."


def _front_table(pareto: pd.DataFrame, condition: Condition) -> Table:
    return Table(
        "Front",
        "The front, best quality first",
        list(FRONT_HEADER),
        [list(cells) for cells in front_cells(pareto, condition)],
        frozenset({0, 1, 2, 3, 4}),
        frozenset({1}),
    )


def _sensitivity_tables(table: pd.DataFrame) -> Iterator[Table]:
    """One table for each treatment: a row for each layer, a column for each task's drop."""
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


def _candidates_table(pareto: pd.DataFrame) -> Table | None:
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
    caption = "Every candidate under every serving condition; ± is one standard error"
    return Table("All candidates", caption, header, rows, frozenset({0, 1, 2, 3, 4, 5, 15}), frozenset({0, 15}))


def _scores_table(pareto: pd.DataFrame) -> Table | None:
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
    return Table(
        "Scores of each benchmark", "Scores ± standard error", header, rows, frozenset({0, 1, 2}), frozenset({0})
    )


def _searched_table(candidates: pd.DataFrame) -> Table | None:
    if candidates.empty:
        return None
    rows = [
        [
            row["plan"],
            row["plan_id"],
            row["origin"],
            row["status"],
            shown(row["on_front"], "yes"),
            shown(row["window"], "d"),
            shown(row["remove_below"], ".4g"),
            shown(row["keep_above"], ".4g"),
            with_stderr(row["quality"], row["quality_stderr"]),
            shown(row["output_throughput_tok_per_s"], ",.5g"),
        ]
        for _, row in candidates.iterrows()
    ]
    header = ["plan", "id", "origin", "status", "on front", "window", "remove below", "keep above", "quality", "tok/s"]
    return Table(
        "All plans of the search", "Every plan that was tried", header, rows, frozenset(range(5)), frozenset({0, 1})
    )


def _failures(data: ReportData) -> list[str]:
    """One line for each candidate and error, however many conditions it met it under."""
    failed = data.pareto[data.pareto["status"] != "ok"]
    lines = []
    for (plan, origin, healed, error), rows in failed.groupby(
        ["plan", "origin", "healed", "error"], dropna=False, sort=False
    ):
        at = ", ".join(shown(value, "d") for value in rows["concurrency"].drop_duplicates())
        state = "healed" if shown(healed, "yes") == "yes" else "not healed"
        lines.append(f"{plan} ({origin}, {state}, concurrency {at}): {text_of(error)}")
    return lines


def _plain_table(caption: str, table: pd.DataFrame | None) -> Table | None:
    if table is None or table.empty:
        return None
    rows = [[text_of(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return Table(caption, caption, [str(name) for name in table.columns], rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", text_of(value)
