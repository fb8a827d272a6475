"""The report of a run: CSVs, pictures and one page, all computed from tables alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from orchestrator.report.canvas import Picture
from orchestrator.report.certainty import correlations_table, interactions_table, rankings_table, tiers_table
from orchestrator.report.certainty_figures import correlation_picture, interaction_picture
from orchestrator.report.choice import (
    estimates_table,
    fidelity_table,
    halving_table,
    lengths_table,
    speed_table,
)
from orchestrator.report.choice_figures import halving_picture, lengths_picture, speed_picture
from orchestrator.report.figures import pareto_picture, sensitivity_picture, strips_picture
from orchestrator.report.front import conditions, format_front_table, headline, headline_row, marked, plan_labels
from orchestrator.report.healing import baselines_table, branches_table, healing_table, quality_curve_table
from orchestrator.report.healing_figures import healing_picture, quality_curve_picture
from orchestrator.report.html import Drawings, page
from orchestrator.report.tables import candidates_table, pareto_table, sensitivity_table, to_csv

__all__ = [
    "ReportData",
    "baselines_table",
    "branches_table",
    "candidates_table",
    "conditions",
    "correlations_table",
    "estimates_table",
    "fidelity_table",
    "format_front_table",
    "halving_table",
    "headline",
    "headline_row",
    "healing_table",
    "interactions_table",
    "lengths_table",
    "pareto_table",
    "quality_curve_table",
    "rankings_table",
    "render",
    "sensitivity_table",
    "speed_table",
    "tiers_table",
    "to_csv",
]


MAX_STRIPS = 40
"""Plans drawn as strips in a picture, those on the front first; the tables list all."""


@dataclass
class ReportData:
    """All that a report shows. A run that stopped early leaves the later tables empty."""

    title: str
    recipe_yaml: str
    """The resolved recipe."""
    sensitivity: pd.DataFrame = field(default_factory=lambda: sensitivity_table([]))
    candidates: pd.DataFrame = field(default_factory=lambda: candidates_table([]))
    pareto: pd.DataFrame = field(default_factory=lambda: pareto_table([]))
    healing_curves: pd.DataFrame = field(default_factory=lambda: healing_table([]))
    quality_curve: pd.DataFrame = field(default_factory=lambda: quality_curve_table([]))
    baselines: pd.DataFrame = field(default_factory=lambda: baselines_table([]))
    branches: pd.DataFrame = field(default_factory=lambda: branches_table([]))
    early_stops: list[dict[str, Any]] = field(default_factory=list)
    """`plan_id`, `tokens` and `budget` of each healed plan whose budget was not spent."""
    rankings: pd.DataFrame = field(default_factory=lambda: rankings_table([]))
    correlations: pd.DataFrame = field(default_factory=lambda: correlations_table([]))
    interactions: pd.DataFrame = field(default_factory=lambda: interactions_table([]))
    tiers: pd.DataFrame = field(default_factory=lambda: tiers_table([]))
    lengths: pd.DataFrame = field(default_factory=lambda: lengths_table([]))
    halving: pd.DataFrame = field(default_factory=lambda: halving_table([]))
    fidelity: pd.DataFrame = field(default_factory=lambda: fidelity_table([]))
    speed: pd.DataFrame = field(default_factory=lambda: speed_table([]))
    estimates: pd.DataFrame = field(default_factory=lambda: estimates_table([]))
    verdict: list[str] = field(default_factory=list)
    """Which plan is the best under the recipe's constraints, or which of them to loosen: whole sentences."""
    best: list[int] = field(default_factory=list)
    """Index labels of the rows of `pareto` that are best under the constraints, at most one for each condition."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions and hardware by name; mappings inside are flattened for the page."""
    cost: pd.DataFrame | None = None
    """What each stage took, columns as they should read."""
    warnings: list[str] = field(default_factory=list)


_TABLES = {
    "sensitivity.csv": "sensitivity",
    "candidates.csv": "candidates",
    "pareto.csv": "pareto",
    "healing_curves.csv": "healing_curves",
    "healing_quality.csv": "quality_curve",
    "baselines.csv": "baselines",
    "branches.csv": "branches",
    "rankings.csv": "rankings",
    "rank_correlations.csv": "correlations",
    "interactions.csv": "interactions",
    "tiers.csv": "tiers",
    "lengths.csv": "lengths",
    "halving.csv": "halving",
    "fidelity.csv": "fidelity",
    "speed.csv": "speed",
    "estimates.csv": "estimates",
}
_PICTURES = {
    "pareto": "front",
    "sensitivity": "sensitivity",
    "healing": "healing",
    "healing_quality": "quality_curve",
    "plans": "plans",
    "rank_correlations": "correlations",
    "interactions": "interactions",
    "lengths": "lengths",
    "halving": "halving",
    "speed": "speed",
}
REPORT_FILES = ("report.html", *_TABLES, *(f"{name}.{form}" for name in _PICTURES for form in ("png", "svg")))
"""All that a report may consist of; what there is nothing to say in is left out."""


def render(data: ReportData) -> dict[str, bytes]:
    """Renders a report without touching a disk; equal data gives equal bytes.

    Args:
        data: tables as the builders of `tables`, `certainty`, `healing` and `choice` make them.

    Returns:
        Contents by file name: always report.html; a CSV for each table with rows (sensitivity.csv, candidates.csv,
        pareto.csv, healing_curves.csv, healing_quality.csv, baselines.csv, branches.csv, rankings.csv,
        rank_correlations.csv, interactions.csv, tiers.csv, lengths.csv, halving.csv, fidelity.csv, speed.csv,
        estimates.csv); PNG and SVG of each picture there is something to draw for (pareto at the highest concurrency,
        sensitivity, healing, healing_quality, plans, rank_correlations, interactions, lengths, halving, speed).
    """
    drawings = _draw(data)
    files = {name: to_csv(table) for name, of in _TABLES.items() if len(table := getattr(data, of))}
    for name, of in _PICTURES.items():
        picture: Picture | None = getattr(drawings, of)
        if picture is not None:
            files |= {f"{name}.png": picture.png, f"{name}.svg": picture.svg}
    return files | {"report.html": page(data, drawings)}


def _draw(data: ReportData) -> Drawings:
    labels = plan_labels(data.pareto, data.candidates)
    names = _names(labels, data.pareto)
    found = conditions(data.pareto)
    return Drawings(
        names=names,
        front=pareto_picture(marked(data.pareto, found[0])) if found else None,
        plans=strips_picture(list(labels.values())[:MAX_STRIPS]),
        sensitivity=sensitivity_picture(data.sensitivity),
        healing=healing_picture(data.healing_curves, names),
        quality_curve=quality_curve_picture(data.quality_curve, names),
        correlations=correlation_picture(data.correlations),
        interactions=interaction_picture(data.interactions),
        lengths=lengths_picture(data.lengths, names),
        halving=halving_picture(data.halving, names),
        speed=speed_picture(data.speed),
    )


def _names(labels: Mapping[str, tuple[str, str]], pareto: pd.DataFrame) -> dict[str, str]:
    """What to call each plan: its label with its id; a baseline by the name that it was healed under."""
    names = {key: label if key in label else f"{label} {key}" for key, (label, _) in labels.items()}
    healed = pareto[pareto["healed"].fillna(False).astype(bool)]
    for key, origin in zip(healed["plan_id"], healed["origin"], strict=True):
        if origin != "search" and origin not in names[key].split():
            names[key] = f"{origin} {key}"
    return names
