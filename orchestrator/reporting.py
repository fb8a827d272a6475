"""The report of a run from its records: tables, pictures, and what the terminal says."""

from __future__ import annotations

from pathlib import Path

import yaml

from orchestrator.best_plan import best_rows, feasible, verdict
from orchestrator.constraints import ConstraintsSection
from orchestrator.estimate import estimate_rows
from orchestrator.halving_results import fidelity_rows, halving_rows
from orchestrator.healing_results import baseline_rows, branch_rows, early_stops, healing_rows, quality_curve_rows
from orchestrator.rankings import correlation_rows, interaction_rows, ranking_rows, tier_rows, views
from orchestrator.report import (
    ReportData,
    baselines_table,
    branches_table,
    candidates_table,
    correlations_table,
    estimates_table,
    fidelity_table,
    format_front_table,
    halving_table,
    headline,
    headline_row,
    healing_table,
    interactions_table,
    lengths_table,
    pareto_table,
    quality_curve_table,
    rankings_table,
    render,
    sensitivity_table,
    speed_table,
    tiers_table,
)
from orchestrator.report.front import conditions
from orchestrator.results import (
    RECIPE_FILE,
    candidate_rows,
    cost_table,
    load_state,
    pareto_rows,
    sensitivity_rows,
)
from orchestrator.run_folder import RunFolder
from orchestrator.speed_results import length_rows, predictions, speed_rows


def report_files(folder: RunFolder) -> tuple[dict[str, bytes], str]:
    """The report's files by name, and what the terminal says: the front, and the best plan of it."""
    data = report_data(folder)
    summary = ""
    if serving := conditions(data.pareto):
        row = headline_row(data.pareto, serving[0])
        said = data.verdict[:1] or ([] if row is None else [headline(row)])
        summary = "\n\n".join([format_front_table(data.pareto), *said]) + "\n"
    return render(data), summary


def report_data(folder: RunFolder) -> ReportData:
    """All that a report of a run shows, from its records.

    Raises:
        InputError: the folder holds no run.
    """
    state, recipe_yaml = load_state(folder), folder.read_text(RECIPE_FILE)
    constraints = ConstraintsSection.model_validate(yaml.safe_load(recipe_yaml).get("constraints", {}))
    found, predict = views(folder, state), predictions(state)
    pareto = pareto_table(pareto_rows(folder, state, predict))
    pareto["feasible"] = feasible(pareto, constraints)
    return ReportData(
        # A folder is often called `model`: the one around it says whose.
        title="/".join(Path(state.model).parts[-2:]),
        recipe_yaml=recipe_yaml,
        sensitivity=sensitivity_table(sensitivity_rows(folder, state)),
        candidates=candidates_table(candidate_rows(folder, state, predict)),
        pareto=pareto,
        verdict=verdict(pareto, constraints),
        best=best_rows(pareto, constraints),
        speed=speed_table(speed_rows(folder, state)),
        lengths=lengths_table(length_rows(folder, state)),
        halving=halving_table(halving_rows(folder, state)),
        fidelity=fidelity_table(fidelity_rows(folder, state)),
        healing_curves=healing_table(healing_rows(folder, state)),
        quality_curve=quality_curve_table(quality_curve_rows(folder, state)),
        baselines=baselines_table(baseline_rows(folder, state)),
        branches=branches_table(branch_rows(folder, state)),
        early_stops=early_stops(folder, state),
        environment=state.environment,
        estimates=estimates_table(estimate_rows(folder, state)),
        cost=cost_table(folder, state),
        rankings=rankings_table(ranking_rows(found)),
        correlations=correlations_table(correlation_rows(found)),
        interactions=interactions_table(interaction_rows(folder, state)),
        tiers=tiers_table(tier_rows(folder, state)),
        warnings=[
            f"{failure['stage']} failed for {failure['name']}: {failure['error'].splitlines()[0]}"
            for failure in state.failures
        ],
    )
