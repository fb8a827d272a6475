"""Chooses the searched plans that are healed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from layerboost.evaluation.scores import SCORES
from layerboost.plan import Plan
from layerboost.search.pareto import choose_spread
from orchestrator.run.context import RunContext
from orchestrator.run.entries import HalvingEntry, Trial
from orchestrator.run.state import CANDIDATE_ORIGINS


def candidates(run: RunContext, n: int | None = None, *, trials: Sequence[Trial] | None = None) -> list[Plan]:
    """Returns the plans to heal: the most promising searched and given ones that hold the recipe's pins and limits.

    Args:
        n: Maximum number of plans; None means the recipe's number.
        trials: The trials to choose from, the base's among them; None means those of the run.
    """
    trials = run.state.trials if trials is None else trials
    found = {plan: trial for plan, trial in _faster_plans(trials).items() if run.inputs.plan_space.holds(plan)}
    n = run.inputs.recipe.healing.candidates if n is None else n
    plans = list(found)
    return [plans[index] for index in most_promising(run, list(found.values()), n, trials=trials)]


def _faster_plans(trials: Sequence[Trial]) -> dict[Plan, Trial]:
    """Returns the trials of the plans that are faster than the base and judged on all items, slowest first."""
    trials = [trial for trial in trials if trial.quality is not None and trial.share == 1]
    distinct = {trial.plan: trial for trial in reversed(trials)}
    found = [trial for trial in distinct.values() if trial.origin in CANDIDATE_ORIGINS and _speedup(trial) > 1]
    return {trial.plan: trial for trial in sorted(found, key=lambda trial: (_speedup(trial), str(trial.plan)))}


def _speedup(entry: Trial | HalvingEntry) -> float:
    assert entry.speedup is not None  # an entry with a quality has a predicted speed too
    return entry.speedup


def say_that_none_is_allowed(run: RunContext) -> None:
    n_plans, space = len(_faster_plans(run.state.trials)), run.inputs.plan_space
    if n_plans:
        names = [*(f"pin.{layer}" for layer in space.pinned), *(f"at_most.{limit.name}" for limit in space.limits)]
        remedy = "loosen one, or let the search try more plans"
        run.failed("candidates", {"plans": n_plans}, f"none of them holds constraints.{', '.join(names)}; {remedy}")


_LEFT = 0.2
"""Share of a plan's loss that remains after healing: 0.15 to 0.2 at losses worth serving (docs/measurements.md)."""


_TARGET = 0.99
"""Share of the quality that candidates aim at if the recipe sets none; the report's headline uses the same share."""


def most_promising(
    run: RunContext, entries: Sequence[Trial | HalvingEntry], n: int, *, trials: Sequence[Trial] | None = None
) -> list[int]:
    """Chooses the plans that spread best over expected quality and predicted speed, measured from a quality floor.

    Without a floor the fastest plans would come first however bad they are. Plans below the floor come last, the
    slowest first. The floor is twice as far below 1 as the target, because healing may do better than expected.

    Args:
        run: The run.
        entries: Plans with their `objective` and `speedup`; plans without an objective are never chosen.
        n: Maximum number of plans to choose.
        trials: Trials of which the base's tells its quality; None means those of the run.

    Returns:
        Indices into `entries`, the best first.
    """
    target = run.inputs.recipe.constraints.at_least.get("quality_retained", _TARGET)
    trials = run.state.trials if trials is None else trials
    base = next((trial.quality for trial in trials if trial.origin == "base"), None)
    kept = [_kept(run, entry.objective, base) for entry in entries]
    order = sorted(range(len(entries)), key=lambda index: _speedup(entries[index]))
    points = [(1 - _LEFT * (1 - kept[index]), _speedup(entries[index])) for index in order]
    return [order[index] for index in choose_spread(points, n, (1 - 2 * (1 - target), 1.0))]


def _kept(run: RunContext, objective: float | None, base: float | None) -> float:
    """Converts a value of the search's objective into the share of the base's quality, or likelihood, that is kept."""
    if objective is None:
        return math.nan
    recipe = run.inputs.recipe
    if recipe.search.objective != "quality":
        return SCORES[recipe.sensitivity.score].kept(objective, base)
    return 1 - (base - objective) / base if base else objective
