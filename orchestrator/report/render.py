"""Renders a report, which is its CSVs, pictures and page, from tables alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pandas as pd

from orchestrator.report.canvas import Picture
from orchestrator.report.certainty_figures import correlation_picture, interaction_picture
from orchestrator.report.choice_figures import halving_picture, lengths_picture, speed_picture
from orchestrator.report.data import ReportData
from orchestrator.report.figures import pareto_picture, sensitivity_picture, strips_picture
from orchestrator.report.front import conditions, letter_counts, marked, plan_labels
from orchestrator.report.front_page import FOUND
from orchestrator.report.healing_figures import healing_picture, line_looks, quality_curve_picture
from orchestrator.report.html import Drawings, page
from orchestrator.report.tables import to_csv

MAX_STRIPS = 40
"""The most plans that the picture of strips draws, those on the front first; the tables list all plans."""


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
"""All files that a report may hold; a table without rows and a picture without data are left out."""


def render(data: ReportData) -> dict[str, bytes]:
    """Renders a report without touching a disk; equal data gives equal bytes.

    Args:
        data: tables as the builders of `tables`, `certainty`, `healing` and `choice` make them.

    Returns:
        The contents by file name. report.html is always there. Each table with rows gives a CSV (sensitivity.csv,
        candidates.csv, pareto.csv, healing_curves.csv, healing_quality.csv, baselines.csv, branches.csv, rankings.csv,
        rank_correlations.csv, interactions.csv, tiers.csv, lengths.csv, halving.csv, fidelity.csv, speed.csv,
        estimates.csv). Each picture with something to draw gives a PNG and an SVG (pareto at the highest concurrency,
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
    legend = legend_names(names, {key: plan for key, (_, plan) in labels.items()})
    halving = data.halving[data.halving["rung"] == data.halving["rung"].max()]  # the others are grey
    drawn = (data.lengths, data.healing_curves, data.quality_curve, halving)
    in_lines = {key for table in drawn for key in table["plan_id"]}
    looks = line_looks([*(key for key in names if key in in_lines), *sorted(in_lines.difference(names))])
    found = conditions(data.pareto)
    return Drawings(
        names=names,
        front=pareto_picture(marked(data.pareto, found[0])) if found else None,
        plans=strips_picture(list(labels.values())[:MAX_STRIPS]),
        sensitivity=sensitivity_picture(data.sensitivity),
        healing=healing_picture(data.healing_curves, legend, looks),
        quality_curve=quality_curve_picture(data.quality_curve, legend, looks),
        correlations=correlation_picture(data.correlations),
        interactions=interaction_picture(data.interactions),
        lengths=lengths_picture(data.lengths, legend, looks),
        halving=halving_picture(data.halving, legend, looks),
        speed=speed_picture(data.speed),
    )


_BY_LETTERS = {"", *FOUND}
"""Origins that many plans have."""

_LONGEST_LETTERS = 36
"""Layers up to which a legend names a plan by its letters."""


def legend_names(names: Mapping[str, str], plans: Mapping[str, str]) -> dict[str, str]:
    """Names each plan for legends: a baseline by its name, a found or given one by its letters, with its point if any.

    Args:
        names: names of the plans by plan_id, which hold the plan_id.
        plans: letters of the plans by plan_id.
    """
    rest = {key: " ".join(name.replace(key, "").split()) for key, name in names.items()}
    letters = {
        key: plan if len(plan) <= _LONGEST_LETTERS else f"{letter_counts(plan)}, {key}" for key, plan in plans.items()
    }
    n_alike = Counter(rest.values())
    return {
        key: f"{letters[key]} {text}".strip()
        if n_alike[text] > 1 or text.split(" (")[0] in _BY_LETTERS or text.startswith("(")
        else text
        for key, text in rest.items()
    }


def _names(labels: Mapping[str, tuple[str, str]], pareto: pd.DataFrame) -> dict[str, str]:
    """Names each plan by its label and its id.

    A healed plan that several origins share is named after the baseline under which it was healed.
    """
    names = {key: label if key in label else f"{label} {key}" for key, (label, _) in labels.items()}
    healed = pareto[pareto["healed"].fillna(False).astype(bool)]
    for key, origin in zip(healed["plan_id"], healed["origin"], strict=True):
        if origin != "search" and origin not in names[key].split():
            names[key] = f"{origin} {key}"
    return names
