"""Computes the objective of the search, by which plans for healing are chosen too."""

from __future__ import annotations

from layerboost.evaluation.scores import Scores, quality
from layerboost.sensitivity.drops import mean_drop
from orchestrator.run.context import RunContext


def objective(run: RunContext, base: Scores, scores: Scores) -> float:
    """Returns what the search maximises besides speed: quality, or minus the drop of the recipe's sensitivity score."""
    recipe = run.inputs.recipe
    if recipe.search.objective == "quality":
        return quality(scores)[0]
    return 0.0 - mean_drop(base, scores, recipe.sensitivity.score, intervals=False).drop
