"""The report of a run from its records: tables, pictures, and what the terminal says."""

from __future__ import annotations

from pathlib import Path

from orchestrator.healing_results import baseline_rows, branch_rows, early_stops, healing_rows, quality_curve_rows
from orchestrator.rankings import correlation_rows, interaction_rows, ranking_rows, tier_rows, views
from orchestrator.report import (
    ReportData,
    baselines_table,
    branches_table,
    candidates_table,
    correlations_table,
    format_front_table,
    headline,
    headline_row,
    healing_table,
    interactions_table,
    pareto_table,
    quality_curve_table,
    rankings_table,
    render,
    sensitivity_table,
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


def report_files(folder: RunFolder) -> tuple[dict[str, bytes], str]:
    """The report's files by name, and what the terminal says: the headline and the front."""
    state = load_state(folder)
    found = views(folder, state)
    pareto = pareto_table(pareto_rows(folder, state))
    data = ReportData(
        # A folder is often called `model`: the one around it says whose.
        title="/".join(Path(state.model).parts[-2:]),
        recipe_yaml=folder.read_text(RECIPE_FILE),
        sensitivity=sensitivity_table(sensitivity_rows(folder, state)),
        candidates=candidates_table(candidate_rows(folder, state)),
        pareto=pareto,
        healing_curves=healing_table(healing_rows(folder, state)),
        quality_curve=quality_curve_table(quality_curve_rows(folder, state)),
        baselines=baselines_table(baseline_rows(folder, state)),
        branches=branches_table(branch_rows(folder, state)),
        early_stops=early_stops(folder, state),
        environment=state.environment,
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
    summary = ""
    if serving := conditions(pareto):
        row = headline_row(pareto, serving[0])
        summary = "\n\n".join([format_front_table(pareto), *([] if row is None else [headline(row)])]) + "\n"
    return render(data), summary
