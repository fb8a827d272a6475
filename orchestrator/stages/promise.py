"""What the search maximises, and which plans are worth healing by what they may be expected to keep after it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from layerboost.evaluation import Scores, quality
from layerboost.pareto import choose_spread
from layerboost.sensitivity import mean_drop
from orchestrator.context import RunContext

_LEFT = 0.2
"""Of what a plan loses, the share that healing leaves: 0.15 to 0.2 at losses worth serving (docs/method.md)."""

_TARGET = 0.99
"""Share of the quality that candidates are aimed at where the recipe asks for none; as the report's headline."""


def objective(run: RunContext, base: Scores, scores: Scores) -> float:
    """What the search maximises beside speed: the quality, or minus the drop of the recipe's sensitivity score."""
    recipe = run.inputs.recipe
    if recipe.search.objective == "quality":
        return quality(scores)[0]
    return 0.0 - mean_drop(base, scores, recipe.sensitivity.score).drop


def most_promising(run: RunContext, entries: Sequence[dict[str, Any]], n: int) -> list[int]:
    """The plans that spread best over expected quality and predicted speed, counted from a floor below the target.

    From a far corner the fastest plans would come first however bad they are. What lies below the floor comes last, the
    slowest first. The floor is twice as far below 1 as the target: healing may do better than is expected.

    Args:
        run: the run.
        entries: `objective` and `speedup` of each plan; those without an objective are never chosen.
        n: how many to choose at most.

    Returns:
        Indices, the best first.
    """
    target = run.inputs.recipe.constraints.at_least.get("quality_retained", _TARGET)
    kept = [_kept(run, entry["objective"]) for entry in entries]
    order = sorted(range(len(entries)), key=lambda index: entries[index]["speedup"])
    points = [(1 - _LEFT * (1 - kept[index]), entries[index]["speedup"]) for index in order]
    return [order[index] for index in choose_spread(points, n, (1 - 2 * (1 - target), 1.0))]


def _kept(run: RunContext, objective: float | None) -> float:
    """The share of the base's quality, or likelihood, that a value of the search's objective stands for."""
    if objective is None:
        return math.nan
    recipe = run.inputs.recipe
    is_quality = recipe.search.objective == "quality"
    if not is_quality and recipe.sensitivity.score != "benchmark":
        return math.exp(objective)
    base = next((trial["quality"] for trial in run.state.trials if trial["origin"] == "base"), None)
    loss = (base or 0.0) - objective if is_quality else -objective
    return 1 - loss / base if base else objective
