"""Runs the race in stage `search`: plans that lose on the first items are asked no more, the others are judged in full.

With `search.race` the search judges its plans on the first items alone (`RunInputs.first_quality_spec`). Then the plans
that another one beats with the recipe's confidence drop out, and the others are judged on all items, several of them
together, because plans share layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from layerboost.evaluation.race import winners
from layerboost.evaluation.scores import QualityError, Scores
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import item_drops
from orchestrator.run.context import RunContext
from orchestrator.run.entries import BEATEN, Trial
from orchestrator.run.kinds import RACE, SCORES
from orchestrator.run.records import time_and_worker
from orchestrator.run.state import CANDIDATE_ORIGINS
from orchestrator.run.units import StageUnits, Unit
from orchestrator.stages.objective import objective
from orchestrator.stages.speed import speedup
from tasks.pool.finished import Finished
from tasks.sweep import PlansUnit, SweepWork, sweep_units

_PLANS_OF_A_UNIT = 8
"""Number of plans that one worker judges together: enough for them to share most of their layers."""

_STAYING = 0.5
"""Share of the plans that is expected to stay in the race, before any of them is judged."""


def race_units(run: RunContext, trials: list[Trial] | None, *, n_expected: int = 0) -> list[Trial]:
    """Lists the plans that are judged in full, which are open while the first items are not judged.

    Args:
        run: The run.
        trials: The points of the search; None while they are not known.
        n_expected: Expected number of plans of the search, if they are not known.

    Returns:
        The points with those marked that are out of the race; without points none.
    """
    if not run.inputs.races:
        return trials or []
    if trials is None:
        run.list_units(RACE, [], n_open=round(_STAYING * n_expected))
        return []
    raced = _raced(run, trials)
    _list_plans(run, raced)
    return raced


def race(run: RunContext, trials: list[Trial]) -> list[Trial]:
    """Judges the plans that may be on the front in full, and returns the points with the other ones marked.

    A plan whose judging fails is reported, and its point has failed.
    """
    if not run.inputs.races:
        return trials
    raced = _raced(run, trials)
    listing, spec = _list_plans(run, raced), run.inputs.search_quality_spec
    workers = run.workers() if listing.todo else None
    run.begin(listing, workers=workers.n_workers if workers else 1)
    errors: dict[Plan, str] = {}
    if workers:
        missing = {unit.work for unit in listing.todo}

        def on_result(done: Finished[SweepWork, dict[str, Any]]) -> None:
            assert isinstance(done.unit, PlansUnit)
            each_s = done.seconds / len(done.unit.plans)
            for plan, scores in zip(done.unit.plans, done.result["scores"], strict=True):
                if plan in missing:
                    result = {"scores": scores, **time_and_worker(done, each_s)}
                    run.record(RACE, run.inputs.plan_scores(plan, spec), result)
                    run.progress.finish_unit(each_s, plan=plan)

        failures = sweep_units(
            [unit for unit in _units(run, raced) if missing & set(unit.plans)],
            run.inputs.source,
            spec,
            workers,
            on_result=on_result,
            n_workers=run.n_workers,
            watch=run.watch(RACE, _name, n_workers=workers.n_workers, of_each=_PLANS_OF_A_UNIT),
        )
        for failure in failures:
            assert isinstance(failure.unit, PlansUnit)
            run.failed(RACE, _name(failure.unit), failure.error)
            errors |= dict.fromkeys(failure.unit.plans, failure.error)
    n_out = len({trial.plan for trial in raced if trial.status == BEATEN})
    run.progress.note("the race", plans=len({trial.plan for trial in raced}), beaten=n_out)
    run.progress.end_stage()
    return [
        replace(trial, status="failed", error=errors[trial.plan])
        if trial.status == "ok" and trial.plan in errors
        else trial
        for trial in raced
    ]


def _raced(run: RunContext, trials: list[Trial]) -> list[Trial]:
    """Returns the points, with each plan of the search marked that another one beats on the first items.

    Only plans that can be healed beat others. As many as are healed stay, whoever beats them: those with the best
    objective first. Nobody is beaten if the objective is no mean of items, by which plans could be compared.
    """
    inputs, settings = run.inputs, run.inputs.recipe.search.race
    assert settings is not None
    spec, untouched = inputs.first_quality_spec, Plan.uniform(Treatment.SOFTMAX, inputs.n_layers)
    plans = list(dict.fromkeys(trial.plan for trial in trials if trial.status == "ok"))
    recorded = run.all_recorded([inputs.plan_scores(plan, spec) for plan in (untouched, *plans)])
    base, *found = (None if record is None else Scores.from_dict(record["scores"]) for record in recorded)
    judged = {plan: scores for plan, scores in zip(plans, found, strict=True) if scores is not None}
    if base is None or not judged:
        return trials
    by_plan = {trial.plan: trial for trial in reversed(trials)}
    may_win = [by_plan[plan].origin in CANDIDATE_ORIGINS and inputs.plan_space.holds(plan) for plan in judged]
    try:
        losses = [_losses(run, base, scores) for scores in judged.values()]
    except QualityError:
        return trials
    speeds = [speedup(run, plan) for plan in judged]
    names, values = list(judged), {plan: objective(run, base, scores) for plan, scores in judged.items()}
    winner_of = dict(zip(judged, winners(speeds, losses, may_win, confidence=settings.confidence), strict=True))
    racing = [plan for plan in judged if by_plan[plan].origin == "search"]
    out = sorted((plan for plan in racing if winner_of[plan] is not None), key=lambda plan: (values[plan], str(plan)))
    n_out = max(0, len(racing) - _n_healed(run))
    beaten_by = {plan: names[winner].plan_id for plan in out[:n_out] if (winner := winner_of[plan]) is not None}
    return [
        replace(
            trial,
            status=BEATEN,
            beaten_by=beaten_by[trial.plan],
            objective=values[trial.plan],
            speedup=speedup(run, trial.plan),
        )
        if trial.plan in beaten_by
        else trial
        for trial in trials
    ]


def _losses(run: RunContext, base: Scores, scores: Scores) -> dict[str, np.ndarray]:
    """Returns what a plan lost on each item by the objective, by task."""
    recipe = run.inputs.recipe
    if recipe.search.objective == "score":
        return item_drops(base, scores, recipe.sensitivity.score)
    return item_drops(base, scores, "benchmark" if run.inputs.first_quality_spec.tasks else "nll")


def _n_healed(run: RunContext) -> int:
    """Returns how many of the search's plans are healed at most."""
    healing = run.inputs.recipe.healing
    return max(healing.candidates, 0 if healing.halving is None else healing.halving.plans)


def _list_plans(run: RunContext, trials: Sequence[Trial]) -> StageUnits:
    spec = run.inputs.search_quality_spec
    plans = [plan for unit in _units(run, trials) for plan in unit.plans]
    units = [Unit(SCORES, (run.inputs.plan_scores(plan, spec),), {"plan": str(plan)}, plan) for plan in plans]
    return run.list_units(RACE, units)


def _units(run: RunContext, trials: Sequence[Trial]) -> list[PlansUnit]:
    """Returns the plans that are still in the race, those with the same first layers together.

    The units depend on nothing else, so that a run that was interrupted rounds as one that was not.
    """
    plans = sorted({trial.plan for trial in trials if trial.status == "ok"}, key=str)
    return [
        PlansUnit(run.inputs.search_quality_spec, tuple(plans[first : first + _PLANS_OF_A_UNIT]))
        for first in range(0, len(plans), _PLANS_OF_A_UNIT)
    ]


def _name(unit: SweepWork) -> dict[str, Any]:
    assert isinstance(unit, PlansUnit)
    return {"plans": " ".join(map(str, unit.plans))}
