"""Writes the report as one HTML page that opens offline: it embeds its pictures and uses no script and no network."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from orchestrator.report.candidates_page import (
    candidates_cells,
    failure_lines,
    race_sentences,
    scores_cells,
    searched_cells,
    sensitivity_cells,
)
from orchestrator.report.canvas import GRID, INK, PAPER, Picture
from orchestrator.report.cells import text_of
from orchestrator.report.certainty import (
    interaction_sentences,
    reading_sentences,
    stability_sentences,
    tier_sentences,
)
from orchestrator.report.certainty_page import correlations_cells, interactions_cells, rankings_cells, tiers_cells
from orchestrator.report.chart import SHAPES
from orchestrator.report.choice import fidelity_sentences, speed_sentences
from orchestrator.report.choice_page import (
    estimates_cells,
    fidelity_cells,
    halving_cells,
    lengths_cells,
    plain_cells,
    speed_cells,
)
from orchestrator.report.front_page import front_views
from orchestrator.report.healing import (
    baseline_sentences,
    baselines_cells,
    branch_sentences,
    branches_cells,
    early_stop_sentences,
    pace_sentences,
    quality_curve_cells,
)

if TYPE_CHECKING:
    from orchestrator.report.data import ReportData

_SVG_STYLE = f"""<style>
:root {{ --ink: {INK}; --paper: {PAPER}; --grid: {GRID}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e7eb; --paper: #15191e; --grid: #363d45; }} }}
</style>"""


@dataclass(frozen=True)
class Drawings:
    """Holds the pictures of a report; a picture with nothing to draw is None.

    The page draws the front itself, from `front_page`.
    """

    names: Mapping[str, str]
    """The name by which readers recognise a plan, by plan_id."""
    front: Picture | None
    plans: Picture | None
    sensitivity: Picture | None
    healing: Picture | None
    quality_curve: Picture | None
    correlations: Picture | None
    interactions: Picture | None
    lengths: Picture | None
    halving: Picture | None
    speed: Picture | None


def page(data: ReportData, drawings: Drawings) -> bytes:
    """Renders the page. All text is escaped, because names of models and tasks come from outside the project."""
    views = front_views(data.pareto, data.best)
    problems = [*data.warnings, *failure_lines(data.pareto)]
    names = drawings.names
    return render_page(
        "report.html.j2",
        title=f"{data.title} report",
        data=data,
        drawings=drawings,
        views=views,
        n_points=max((len(chart.marks) for view in views for chart in view.charts), default=0),
        problems=problems,
        n_problems=len(problems),
        lengths=lengths_cells(data.lengths),
        halving=halving_cells(data.halving, names),
        fidelity=fidelity_cells(data.fidelity),
        fidelity_sentences=list(fidelity_sentences(data.fidelity)),
        speed=speed_cells(data.speed),
        speed_sentences=list(speed_sentences(data.speed)),
        estimates=estimates_cells(data.estimates),
        cost=plain_cells("What each stage took", data.cost),
        sensitivity=list(sensitivity_cells(data.sensitivity)),
        rankings=rankings_cells(data.rankings),
        stability=[*reading_sentences(data.stable), *stability_sentences(data.rankings)],
        correlations=correlations_cells(data.correlations),
        interactions=interactions_cells(data.interactions),
        independence=interaction_sentences(data.interactions),
        tiers=tiers_cells(data.tiers),
        uncertain=[(names.get(key, key), plan, text) for key, plan, text in tier_sentences(data.tiers)],
        healing=[
            *pace_sentences(data.healing_paces),
            *early_stop_sentences(data.early_stops, names),
            *baseline_sentences(data.baselines, names),
            *branch_sentences(data.branches, names),
        ],
        healing_tables=[
            quality_curve_cells(data.quality_curve, names),
            baselines_cells(data.baselines, names),
            branches_cells(data.branches, names),
        ],
        candidates=candidates_cells(data.pareto),
        scores=scores_cells(data.pareto),
        race=list(race_sentences(data.candidates)),
        searched=searched_cells(data.candidates),
        environment=list(flat(data.environment)),
    )


def render_page(template: str, **values: Any) -> bytes:
    """Renders a template of this package with everything escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("orchestrator.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.globals["shapes"] = {**SHAPES, "line": ""}
    return environment.get_template(template).render(**values).encode()


def data_uri(picture: Picture) -> str:
    """Returns the picture's SVG as a data URI whose ink, paper and grid follow the reader's light or dark scheme."""
    svg = picture.svg.decode()
    start = svg.index(">", svg.index("<svg")) + 1
    body = svg[start:]
    for colour, name in ((INK, "ink"), (PAPER, "paper"), (GRID, "grid")):
        body = body.replace(colour, f"var(--{name})")
    adapted = svg[:start] + _SVG_STYLE + body
    return "data:image/svg+xml;base64," + base64.b64encode(adapted.encode()).decode()


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the names and texts of a mapping; names of nested mappings are joined by dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", text_of(value)
