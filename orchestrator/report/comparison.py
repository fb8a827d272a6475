"""Compares several runs: their fronts in one figure, their differences, and all candidates in one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from orchestrator.report.cells import Table
from orchestrator.report.chart import Chart, Point, charts
from orchestrator.report.front import Condition, conditions, marked, shown
from orchestrator.report.front_page import RETAINED, SPEEDUP, Headline, headlines, points
from orchestrator.report.html import flat, render_page
from orchestrator.report.tables import PARETO_COLUMNS, to_csv, with_score_columns

if TYPE_CHECKING:
    from orchestrator.report.data import ReportData

MAX_RUNS = 6
"""The most runs that the colours of one figure can tell apart."""


@dataclass(frozen=True)
class Run:
    """Holds a run's data under the name that the comparison gives it."""

    name: str
    data: ReportData

    @property
    def hardware(self) -> list[str]:
        return sorted({condition.hardware for condition in conditions(self.data.pareto)})


@dataclass(frozen=True)
class ComparisonView:
    """Holds what the comparison of several runs shows of one serving condition."""

    label: str
    headlines: list[tuple[str, Headline | None]]
    """(letter and name, headline) of each run; the headline is None where no candidate of the run is on this front."""
    charts: list[Chart]
    key: list[tuple[str, str, str, str]]


def letter(index: int) -> str:
    """Returns the letter that stands for a run in the figure."""
    return chr(ord("A") + index)


def comparison_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Builds comparison.csv: the rows of each run's pareto.csv after columns `run` and `model`.

    Cells of columns that a run lacks are empty.
    """
    tables = [run.data.pareto.assign(run=run.name, model=run.data.title) for run in runs]
    names = [name for table in tables for name in table.columns if name not in {*PARETO_COLUMNS, "run", "model"}]
    scores = [name for name in dict.fromkeys(names) if f"{name}_stderr" in names]
    columns = {"run": "str", "model": "str", **with_score_columns(PARETO_COLUMNS, scores)}
    return pd.concat([table.reindex(columns=list(columns)) for table in tables], ignore_index=True).astype(columns)


def render_comparison(runs: Sequence[Run]) -> dict[str, bytes]:
    """Renders comparison.html and comparison.csv without touching a disk; equal runs give equal bytes."""
    views = [_view(runs, concurrency) for concurrency in _concurrencies(runs)]
    page = render_page(
        "comparison.html.j2",
        title=f"{len(runs)} runs compared",
        runs=[(letter(index), run) for index, run in enumerate(runs)],
        views=views,
        notes=_notes(runs),
        n_points=max((len(chart.marks) for view in views for chart in view.charts), default=0),
        recipe=_differences("Recipe fields that differ", runs, lambda run: yaml.safe_load(run.data.recipe_yaml) or {}),
        environment=_differences("Versions and hardware that differ", runs, lambda run: dict(run.data.environment)),
        cost=_cost(runs),
    )
    return {"comparison.html": page, "comparison.csv": to_csv(comparison_table(runs))}


def comparison_summary(runs: Sequence[Run]) -> str:
    """Returns the text for the terminal: each run's headline at its highest concurrency."""
    lines = []
    for run in runs:
        found = conditions(run.data.pareto)
        sentences = headlines(run.data.pareto, found[0], run.data.best) if found else []
        lines.append(f"{run.name}: {sentences[0].sentence if sentences else 'nothing measured yet'}")
    return "\n".join(lines)


def _concurrencies(runs: Sequence[Run]) -> list[int]:
    """Returns the concurrencies of all runs: those that most runs share come first, then the highest."""
    found = [n for run in runs for n in {condition.concurrency for condition in conditions(run.data.pareto)}]
    return sorted(set(found), key=lambda n: (-found.count(n), -n))


def _view(runs: Sequence[Run], concurrency: int) -> ComparisonView:
    sentences: list[tuple[str, Headline | None]] = []
    drawn: list[Point] = []
    key = []
    for index, run in enumerate(runs):
        name = f"{letter(index)}: {run.name}"
        condition = next((c for c in conditions(run.data.pareto) if c.concurrency == concurrency), None)
        found = headlines(run.data.pareto, condition, run.data.best) if condition else []
        sentences.append((name, found[0] if found else None))
        if condition:
            drawn += list(_points(run, condition, index))
            key.append((f"run-{index}", "line", name, ""))
    if any(point.look == "faint" for point in drawn):
        key.append(("faint", "circle", "dominated in its run", ""))
    return ComparisonView(f"concurrency {concurrency}", sentences, charts(drawn, SPEEDUP, RETAINED), key)


def _points(run: Run, condition: Condition, index: int) -> Iterator[Point]:
    """Yields a run's points in its colour, numbered after its letter; points dominated in their own run are grey."""
    axes = ("speedup", SPEEDUP), ("quality_retained", RETAINED)
    for point in points(marked(run.data.pareto, condition), axes):
        number = point.label.split(" ")[0] if point.in_front else ""
        yield replace(
            point,
            look=f"run-{index}" if point.in_front else "faint",
            label=f"{letter(index)}{number}" if point.in_front else "",
            must_label=False,
            name=f"Run {letter(index)}, {run.name}. {point.name}",
            details=(("run", f"{letter(index)}: {run.name}"), *point.details),
        )


def _notes(runs: Sequence[Run]) -> list[str]:
    """Returns the warnings that a reader needs before comparing the runs."""
    notes = ["Speed-up and quality retained are relative to the base of the same run."]
    if len({run.data.title for run in runs}) > 1:
        notes.append(
            "The runs start from different models: a larger speed-up here says nothing about which model is faster."
        )
    for what, fields in (
        ("on different hardware", ("hardware",)),
        ("by different engines", ("engine",)),
        ("at different lengths of prompt and output", ("prompt_tokens", "new_tokens")),
    ):
        seen = [{tuple(getattr(c, name) for name in fields) for c in conditions(run.data.pareto)} for run in runs]
        if len({frozenset(values) for values in seen if values}) > 1:
            notes.append(f"The runs were timed {what}.")
    return notes


def _differences(caption: str, runs: Sequence[Run], values: Callable[[Run], dict[str, Any]]) -> Table | None:
    """Lists the fields that differ between runs: one row for each field, one column for each run."""
    found = [dict(flat(values(run))) for run in runs]
    fields = dict.fromkeys(name for of_run in found for name in of_run)
    rows = [
        [name, *(of_run.get(name, "-") for of_run in found)]
        for name in fields
        if len({of_run.get(name) for of_run in found}) > 1
    ]
    header = ["field", *(letter(index) for index in range(len(runs)))]
    return Table(caption, caption, header, rows, frozenset(range(len(header)))) if rows else None


def _cost(runs: Sequence[Run]) -> Table | None:
    """Lists the worker seconds of each stage, with one column for each run."""
    column = "worker seconds"
    costs = [run.data.cost for run in runs]
    found = [
        {} if cost is None or column not in cost else dict(zip(cost["stage"], cost[column], strict=True))
        for cost in costs
    ]
    stages = dict.fromkeys(stage for of_run in found for stage in of_run)
    rows = [[stage, *(shown(of_run.get(stage), ",.1f") for of_run in found)] for stage in stages]
    rows.append(["all", *(shown(sum(of_run.values()), ",.1f") for of_run in found)])
    header = ["stage", *(letter(index) for index in range(len(runs)))]
    return Table("Cost", "Worker seconds of each stage", header, rows) if stages else None
