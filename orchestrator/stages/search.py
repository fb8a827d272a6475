"""Stage `search`: plans by the recipe's method, what they keep against predicted speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerboost.evaluation.scores import Scores, quality
from layerboost.plan import Plan, Treatment
from layerboost.search.loop import Outcome, SearchState, TrialResult, Values
from layerboost.search.proposers import make_proposer
from orchestrator.results.sensitivity import cost_matrix
from orchestrator.run.context import RunContext
from orchestrator.run.entries import Trial
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import SCORE_STAGES, TRIALS
from orchestrator.run.records import time_and_worker
from orchestrator.stages.objective import objective
from orchestrator.stages.refine import refine
from orchestrator.stages.speed import layer_times, measure_speed, speedup
from tasks.evaluation import EvaluationUnit, plan_evaluator_maker
from tasks.pool.finished import Finished
from tasks.pool.pool import UnitFailure
from tasks.pool.watch import Watch
from tasks.search import run_search


def search(run: RunContext) -> bool:
    """Evaluates the fixed points and the searched plans. Failed ones are named; the rest goes on."""
    measure_speed(run)
    costs = cost_matrix(run.folder, run.state)
    identity = run.inputs.search(costs, (run.state.speed or {"models": []})["models"])
    recorded = run.folder.read_record(TRIALS, unit_key(identity))
    if recorded is not None:
        trials = [Trial.from_dict(trial) for trial in recorded.result["trials"]]
        run.progress.start_stage("search", len(trials), recorded=len(trials))
    else:
        points, failures = _search(run, costs)
        trials = [_trial(point) for point in points]
        for failure in failures:
            run.failed("search", {"plan": str(failure.unit)}, failure.error)
        if not failures:
            run.record(TRIALS, identity, {"trials": [trial.proposal() for trial in trials]})
    judged: dict[Plan, dict[str, Any]] = {}
    _set_trials(run, trials, judged)
    run.progress.end_stage()
    _set_trials(run, [*trials, *refine(run)], judged)
    return True


def objectives(run: RunContext, plan: Plan, values: Values, base: Values) -> Outcome:
    """What the search maximises: the recipe's objective, of the scores of plan and base, and predicted speed."""
    before, after = (Scores.from_dict(of["scores"]) for of in (base, values))
    return objective(run, before, after), speedup(run, plan)


def _set_trials(run: RunContext, trials: list[Trial], judged: dict[Plan, dict[str, Any]]) -> None:
    """Puts points into the run's state, with what is known of their plans.

    Args:
        run: the run.
        trials: the points.
        judged: qualities and objectives of plans; those that are missing are read and added, so that the scores of a
            plan are read once, however often points are put into the state.
    """
    untouched, spec = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers), run.inputs.search_quality_spec
    keys = {plan: unit_key(run.inputs.plan_scores(plan, spec)) for plan in {trial.plan: None for trial in trials}}
    ok = dict.fromkeys(trial.plan for trial in trials if trial.status == "ok")
    unread = [plan for plan in ok if plan not in judged]
    base = run.recorded(run.inputs.plan_scores(untouched, spec)) if unread else None
    if base is not None:
        records = run.folder.each_record((keys[plan] for plan in unread), SCORE_STAGES)
        for plan, record in zip(unread, records, strict=True):
            if record is not None:
                judged[plan] = _judged(run, plan, record.result, base)
    unknown: dict[str, Any] = dict.fromkeys(("quality", "quality_stderr", "objective", "speedup"))
    run.state.trials = [
        replace(trial, key=keys[trial.plan], **(judged.get(trial.plan, unknown) if trial.status == "ok" else unknown))
        for trial in trials
    ]


def _judged(run: RunContext, plan: Plan, values: Values, base: Values) -> dict[str, Any]:
    """What the state says of a plan, by its recorded scores and the base's."""
    value, stderr = quality(Scores.from_dict(values["scores"]))
    kept, speed = objectives(run, plan, values, base)
    return {"quality": value, "quality_stderr": stderr, "objective": kept, "speedup": speed}


def _search(run: RunContext, costs: dict[Treatment, list[float]]) -> tuple[list[TrialResult], list[UnitFailure[Plan]]]:
    inputs, spec, workers = run.inputs, run.inputs.search_quality_spec, run.workers()
    times = layer_times(run)
    proposer = make_proposer(inputs.search_spec, costs, times, _rest_time(run, times))
    state = SearchState(inputs.search_spec, proposer, lambda *judged: objectives(run, *judged), known_plans(run))
    # Plans that were met already cost nothing, so the stage may end before its count does.
    n_plans = len(state.points) + inputs.search_spec.trials
    run.progress.start_stage("search", n_plans, recorded=0, workers=workers.n_workers)

    def on_plan(done: Finished[Plan, dict[str, Any]]) -> None:
        result = {name: done.result[name] for name in ("scores", "evaluation_s")}
        run.record("search", inputs.plan_scores(done.unit, spec), {**result, **time_and_worker(done)})
        run.progress.finish_unit(done.seconds, plan=done.unit, quality=f"{done.result['quality']:.4f}")

    failures: list[UnitFailure[Plan]] = []
    evaluator = plan_evaluator_maker(inputs.source, spec, workers)
    watch: Watch[Plan] = run.watch("search", lambda plan: {"plan": str(plan)}, n_workers=workers.n_workers)
    points = run_search(state, evaluator, workers, on_plan=on_plan, on_failure=failures.append, watch=watch)
    return points, failures


def _rest_time(run: RunContext, times: dict[Treatment, list[float]]) -> float:
    """What a decode step takes beside the layers' times, which count from `none` in every layer."""
    removed = speedup(run, Plan.uniform(Treatment.NONE, run.inputs.n_layers))
    return sum(times[Treatment.SOFTMAX]) / (removed - 1) if removed > 1 else 1.0


def _trial(point: TrialResult) -> Trial:
    status = "ok" if point.error is None else "failed"
    return Trial(point.plan, point.origin, point.remove_below, point.keep_above, status, point.error)


def known_plans(run: RunContext) -> dict[str, dict[str, Any]]:
    """`quality`, `quality_stderr` and `scores` of every plan that is recorded, by plan_id."""
    wanted = run.inputs.scores(EvaluationUnit(), run.inputs.search_quality_spec)
    known: dict[str, dict[str, Any]] = {}
    for stage in SCORE_STAGES:
        for record in run.folder.each_record(run.folder.record_keys(stage), [stage]):
            if record is None or {**record.identity, "plan": None} != wanted:
                continue
            plan = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers)
            if record.identity["plan"] is not None:
                plan = Plan.from_dict(record.identity["plan"])
            scores = record.result["scores"]
            value, stderr = quality(Scores.from_dict(scores))
            known[plan.plan_id] = {"quality": value, "quality_stderr": stderr, "scores": scores}
    return known
