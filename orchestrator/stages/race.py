"""Runs the race in stage `search`: plans are judged on the first items, and the most promising of them on all items.

With `search.race` the search judges its plans on the first items alone (`RunInputs.first_quality_spec`). Then plans
that another one beats with the recipe's confidence drop out. Of the rest, those that may be healed are judged on all
items, several of them together, because plans share layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layerboost.evaluation.race import winners
from layerboost.evaluation.scores import SCORES as SCORES_OF_PLANS
from layerboost.evaluation.scores import QualityError, Scores, quality, retained
from layerboost.plan import Plan, Treatment
from layerboost.search.loop import fixed_points
from layerboost.sensitivity.drops import item_drops
from orchestrator.run.context import RunContext
from orchestrator.run.entries import Trial
from orchestrator.run.kinds import RACE, SCORES
from orchestrator.run.records import time_and_worker
from orchestrator.run.state import CANDIDATE_ORIGINS
from orchestrator.run.units import StageUnits, Unit
from orchestrator.stages.candidates import candidates
from orchestrator.stages.objective import objective
from orchestrator.stages.speed import speedup
from tasks.pool.finished import Finished
from tasks.pool.pool import UnitFailure
from tasks.sweep import PlansUnit, SweepWork, plans_units, sweep_units


def race_units(run: RunContext, trials: list[Trial] | None) -> list[Trial]:
    """Lists the plans that are judged in full, which are open while the first items are not judged.

    Args:
        run: The run.
        trials: The points of the search; None while they are not known.

    Returns:
        The points with those marked that are not judged in full; without points none.
    """
    if not run.inputs.races:
        return trials or []
    if trials is None:
        n_reference = len(fixed_points(run.inputs.search_spec, run.inputs.n_layers))
        n_leaders = min(run.inputs.n_leaders, run.inputs.search_spec.trials)
        run.list_units(RACE, [], n_open=n_reference + n_leaders)
        return []
    raced = _raced(run, trials)
    _list_plans(run, raced)
    return raced


def race(run: RunContext, trials: list[Trial]) -> list[Trial]:
    """Judges the leaders in full, and returns the points with the other ones marked.

    A plan whose judging fails is reported, and its point has failed.
    """
    if not run.inputs.races:
        if run.inputs.recipe.search.race is not None:
            run.progress.note("no race: the first items are all that plans are judged by")
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

        def judge(units: list[PlansUnit]) -> list[UnitFailure[SweepWork]]:
            watch = run.watch(RACE, _name, n_workers=workers.n_workers, of_each=max(len(unit.plans) for unit in units))
            return sweep_units(
                units,
                run.source,
                spec,
                workers,
                on_result=on_result,
                n_workers=run.n_workers,
                watch=watch,
            )

        failures = judge([unit for unit in _units(run, raced) if missing & set(unit.plans)])
        # A plan that cannot be judged must not take those with it that were to be judged beside it.
        together = [plan for failure in failures for plan in _plans_of(failure.unit) if plan in missing]
        if together:
            failures = judge([PlansUnit(spec, (plan,)) for plan in together])
        for failure in failures:
            run.failed(RACE, _name(failure.unit), failure.error)
            errors |= dict.fromkeys(_plans_of(failure.unit), failure.error)
        errors |= _not_finite(run, [plan for plan in missing if plan not in errors])
    points = {trial.plan: trial for trial in raced}.values()
    run.progress.note(
        "the race",
        plans=len(points),
        beaten=sum(trial.beaten_by is not None for trial in points),
        judged_in_full=sum(trial.share == 1 for trial in points),
    )
    run.progress.end_stage()
    return [
        replace(trial, status="failed", error=errors[trial.plan])
        if _is_judged(trial) and trial.plan in errors
        else trial
        for trial in _raced(run, trials)  # once more, because now the untouched model is judged in full
    ]


def _raced(run: RunContext, trials: list[Trial]) -> list[Trial]:
    """Returns the points, those that are not judged in full with their values on the first items.

    Their quality is that of the untouched model on all items times what they keep of it on the first ones; it is
    unknown as long as that model is not judged in full.
    """
    inputs, untouched = run.inputs, Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers)
    plans = list(dict.fromkeys(trial.plan for trial in trials if trial.status == "ok"))
    identities = [inputs.plan_scores(plan, inputs.first_quality_spec) for plan in (untouched, *plans)]
    identities.append(inputs.plan_scores(untouched, inputs.search_quality_spec))
    base, *found, whole = (
        None if record is None else Scores.from_dict(record["scores"]) for record in run.all_recorded(identities)
    )
    judged = {plan: scores for plan, scores in zip(plans, found, strict=True) if scores is not None}
    if base is None:
        return trials
    beaten_by = _beaten_by(run, trials, base, judged)
    first = [
        replace(
            trial,
            quality=quality(judged[trial.plan])[0],
            objective=objective(run, base, judged[trial.plan]),
            speedup=speedup(run, trial.plan),
            share=inputs.first_share,
            beaten_by=beaten_by.get(trial.plan),
        )
        if trial.plan in judged
        else trial
        for trial in trials
    ]
    in_full = {trial.plan for trial in trials if trial.origin != "search"} | _leaders(run, first)

    def marked(trial: Trial, before: Trial) -> Trial:
        if trial.plan not in judged or trial.plan in in_full:
            return before
        if whole is None:
            return replace(trial, quality=None)
        at_all = quality(whole)[0]
        kept, stderr = retained(base, judged[trial.plan])
        return replace(trial, quality=at_all * kept, quality_stderr=None if stderr is None else at_all * stderr)

    return [marked(trial, before) for trial, before in zip(first, trials, strict=True)]


def _beaten_by(
    run: RunContext, trials: list[Trial], base: Scores, judged: dict[Plan, Scores]
) -> dict[Plan, str | None]:
    """Returns the id of a plan that beats each plan of the search, or None.

    Only plans that can be healed beat others. Nobody does if the objective is no mean of items in every task.
    """
    recipe, settings = run.inputs.recipe, run.inputs.recipe.search.race
    assert settings is not None
    score = "benchmark" if run.inputs.first_quality_spec.tasks else "nll"
    if recipe.search.objective == "score":
        score = recipe.sensitivity.score
    try:
        losses = [item_drops(base, scores, score) for scores in judged.values()]
    except QualityError:
        return {}
    n_metrics = {len(SCORES_OF_PLANS[score].pairs(base, scores)) for scores in judged.values()}
    if n_metrics != {len(of_plan) for of_plan in losses}:
        return {}  # some tasks have no items
    origins = {trial.plan: trial.origin for trial in reversed(trials)}
    may_win = [origins[plan] in CANDIDATE_ORIGINS and run.inputs.plan_space.holds(plan) for plan in judged]
    names, speeds = list(judged), [speedup(run, plan) for plan in judged]
    found = winners(speeds, losses, may_win, confidence=settings.confidence)
    return {
        plan: None if winner is None or origins[plan] != "search" else names[winner].plan_id
        for plan, winner in zip(names, found, strict=True)
    }


def _leaders(run: RunContext, first: list[Trial]) -> set[Plan]:
    """Returns the plans of the search that are judged in full: those that would be healed by the first items.

    Plans that are beaten are among them only if there are not enough others to heal.
    """
    first = [replace(trial, share=1.0) for trial in first]
    unbeaten = [replace(trial, quality=None) if trial.beaten_by is not None else trial for trial in first]
    leaders: dict[Plan, None] = {}
    for points, n in ((unbeaten, run.inputs.n_leaders), (first, run.inputs.n_healed)):
        new = [plan for plan in candidates(run, n, trials=points) if plan not in leaders]
        leaders |= dict.fromkeys(new[: max(0, n - len(leaders))])
    return set(leaders)


def _is_judged(trial: Trial) -> bool:
    """Returns whether a point is one that is judged on all items."""
    return trial.status == "ok" and trial.share == 1


def _list_plans(run: RunContext, trials: Sequence[Trial]) -> StageUnits:
    spec = run.inputs.search_quality_spec
    plans = [plan for unit in _units(run, trials) for plan in unit.plans]
    units = [Unit(SCORES, (run.inputs.plan_scores(plan, spec),), {"plan": str(plan)}, plan) for plan in plans]
    return run.list_units(RACE, units)


def _units(run: RunContext, trials: Sequence[Trial]) -> list[PlansUnit]:
    """Returns the units of all plans that are judged on all items, also of those that are recorded.

    They depend on nothing else, so that a run that was interrupted rounds as one that was not.
    """
    return plans_units(run.inputs.search_quality_spec, list({trial.plan for trial in trials if _is_judged(trial)}))


def _not_finite(run: RunContext, plans: Sequence[Plan]) -> dict[Plan, str]:
    """Reports plans whose objective on all items is no finite number; returns the error of each."""
    untouched, spec = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers), run.inputs.search_quality_spec
    base, *found = run.all_recorded([run.inputs.plan_scores(plan, spec) for plan in (untouched, *plans)])
    errors: dict[Plan, str] = {}
    for plan, record in zip(plans, found, strict=True):
        if base is None or record is None:
            continue
        value = objective(run, Scores.from_dict(base["scores"]), Scores.from_dict(record["scores"]))
        if not math.isfinite(value):
            errors[plan] = f"its objective on all items is {value}"
            run.failed(RACE, {"plan": str(plan)}, errors[plan])
    return errors


def _plans_of(unit: SweepWork) -> tuple[Plan, ...]:
    assert isinstance(unit, PlansUnit)
    return unit.plans


def _name(unit: SweepWork) -> dict[str, Any]:
    return {"plans": " ".join(map(str, _plans_of(unit)))}
