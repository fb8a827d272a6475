"""Makes the report of a run from its records: tables, pictures, and the summary for the terminal."""

from __future__ import annotations

from pathlib import Path

import yaml

from layerboost.plan import Treatment
from orchestrator.recipe.constraints import ConstraintsSection
from orchestrator.report.certainty import correlations_table, interactions_table, rankings_table, tiers_table
from orchestrator.report.choice import estimates_table, fidelity_table, halving_table, lengths_table, speed_table
from orchestrator.report.data import ReportData
from orchestrator.report.front import conditions, format_front_table, headline, headline_row
from orchestrator.report.healing import baselines_table, branches_table, healing_table, quality_curve_table
from orchestrator.report.render import render
from orchestrator.report.tables import candidates_table, pareto_table, sensitivity_table
from orchestrator.results.ablations import Ablations
from orchestrator.results.best_plan import best_rows, feasible, verdict
from orchestrator.results.cost import cost_table
from orchestrator.results.estimates import estimate_rows
from orchestrator.results.halving import fidelity_rows, halving_rows
from orchestrator.results.healing import (
    baseline_rows,
    branch_rows,
    early_stops,
    healing_paces,
    healing_rows,
    quality_curve_rows,
)
from orchestrator.results.plans import candidate_rows, pareto_rows
from orchestrator.results.rankings import (
    correlation_rows,
    interaction_bases,
    interaction_rows,
    ranking_rows,
    tier_rows,
    views,
)
from orchestrator.results.reading import RecordReader
from orchestrator.results.speed import length_rows, predictions, speed_rows
from orchestrator.run.folder import RunFolder
from orchestrator.run.state import RECIPE_FILE, load_state


def report_files(folder: RunFolder) -> tuple[dict[str, bytes], str]:
    """Returns the report's files by name, and the summary for the terminal: the front and its best plan."""
    data = report_data(folder)
    summary = ""
    if serving := conditions(data.pareto):
        row = headline_row(data.pareto, serving[0])
        said = data.verdict[:1] or ([] if row is None else [headline(row)])
        summary = "\n\n".join([format_front_table(data.pareto), *said]) + "\n"
    return render(data), summary


def report_data(folder: RunFolder) -> ReportData:
    """Collects from the records everything that the report of a run shows.

    Raises:
        InputError: The folder holds no run.
    """
    state, recipe_yaml = load_state(folder), folder.read_text(RECIPE_FILE)
    recipe = yaml.safe_load(recipe_yaml)
    constraints = ConstraintsSection.model_validate(recipe.get("constraints", {}))
    removed = recipe.get("search", {}).get("removed", Treatment.NONE.value)
    records = RecordReader(folder)
    ablations = Ablations(records, state, interaction_bases(state))
    found, predict = views(ablations, state), predictions(state)
    pareto = pareto_table(pareto_rows(records, state, predict))
    pareto["feasible"] = feasible(pareto, constraints)
    return ReportData(
        # A model folder is often called `model`, so the title includes the parent folder to tell whose model it is.
        title="/".join(Path(state.model).parts[-2:]),
        recipe_yaml=recipe_yaml,
        sensitivity=sensitivity_table(ablations.rows),
        candidates=candidates_table(candidate_rows(records, state, predict)),
        pareto=pareto,
        verdict=verdict(pareto, constraints),
        best=best_rows(pareto, constraints),
        speed=speed_table(speed_rows(records, state)),
        lengths=lengths_table(length_rows(records, state)),
        halving=halving_table(halving_rows(records, state)),
        fidelity=fidelity_table(fidelity_rows(records, state)),
        healing_curves=healing_table(healing_rows(records, state)),
        quality_curve=quality_curve_table(quality_curve_rows(records, state)),
        baselines=baselines_table(baseline_rows(records, state)),
        branches=branches_table(branch_rows(records, state)),
        early_stops=early_stops(records, state),
        healing_paces=healing_paces(records, state),
        environment=state.environment,
        estimates=estimates_table(estimate_rows(folder, state)),
        cost=cost_table(records, state),
        stable=state.stable,
        rankings=rankings_table(ranking_rows(found)),
        correlations=correlations_table(correlation_rows(found)),
        interactions=interactions_table(interaction_rows(records, state, ablations)),
        tiers=tiers_table(tier_rows(ablations.rows, state, removed)),
        warnings=[
            f"{failure.stage} failed for {failure.name}: {failure.error.splitlines()[0]}" for failure in state.failures
        ],
    )
