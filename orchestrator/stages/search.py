"""Stage `search`: plans from pairs of thresholds, quality against predicted speed."""

from __future__ import annotations

from typing import Any

from layerboost.evaluation import Scores, quality
from layerboost.plan import Plan, Treatment
from orchestrator.context import RunContext
from orchestrator.results import SCORE_STAGES, layer_drops
from orchestrator.run_folder import unit_key
from orchestrator.stages.refine import refine
from tasks.ablation import EvaluationUnit, plan_evaluator_maker
from tasks.search import TrialResult, fixed_points, run_search
from tasks.units import UnitFailure

TRIALS = "search-trials"
"""Stage of the record that holds which thresholds were tried, and which plan each pair gave."""


def search(run: RunContext) -> bool:
    """Evaluates the fixed points and the searched plans. Failed ones are named; the rest goes on."""
    inputs = run.inputs
    identity = inputs.search(layer_drops(run.folder, run.state))
    recorded = run.folder.read_record(TRIALS, unit_key(identity))
    if recorded is not None:
        trials = recorded.result["trials"]
        run.progress.start_stage("search", len(trials), recorded=len(trials))
    else:
        points, failures = _search(run, identity["drops"])
        trials = [_trial(point) for point in points]
        for failure in failures:
            run.failed("search", {"plan": str(failure.unit)}, failure.error)
        if not failures:
            run.record(TRIALS, identity, {"trials": trials})
    _set_trials(run, trials)
    run.progress.end_stage()
    _set_trials(run, [*trials, *refine(run)])
    return True


def _set_trials(run: RunContext, trials: list[dict[str, Any]]) -> None:
    """Puts points into the run's state, with what is known of their plans."""
    outcomes, spec = known_plans(run), run.inputs.search_quality_spec
    nothing = {"quality": None, "quality_stderr": None, "speedup": None}
    run.state.trials = []
    for trial in trials:
        plan = Plan.from_dict(trial)
        key = unit_key(run.inputs.plan_scores(plan, spec))
        run.state.trials.append({**trial, **outcomes.get(plan.plan_id, nothing), "key": key})


def _search(run: RunContext, drops: list[float]) -> tuple[list[TrialResult], list[UnitFailure]]:
    inputs, spec, workers = run.inputs, run.inputs.search_quality_spec, run.workers()
    known = known_plans(run)
    n_plans = len(fixed_points(inputs.search_spec, inputs.n_layers)) + inputs.search_spec.trials
    # Pairs of thresholds that give a plan already met cost nothing, so the stage may end before its count does.
    run.progress.start_stage("search", n_plans, recorded=0, workers=workers.n_workers)

    def on_plan(plan: Plan, values: dict, duration_s: float, info: dict) -> None:
        result = {name: values[name] for name in ("scores", "evaluation_s")}
        run.record("search", inputs.plan_scores(plan, spec), {**result, "duration_s": duration_s, "worker": info})
        run.progress.finish_unit(duration_s, plan=plan, quality=f"{values['quality']:.4f}")

    failures: list[UnitFailure] = []
    points = run_search(
        drops,
        inputs.search_spec,
        plan_evaluator_maker(inputs.source, spec, inputs.condition, workers),
        workers,
        on_plan=on_plan,
        on_failure=failures.append,
        known=known,
    )
    return points, failures


def _trial(point: TrialResult) -> dict[str, Any]:
    return {
        **point.plan.to_dict(),
        "origin": point.origin,
        "remove_below": point.remove_below,
        "keep_above": point.keep_above,
        "status": "ok" if point.error is None else "failed",
        "error": point.error,
    }


def known_plans(run: RunContext) -> dict[str, dict[str, Any]]:
    """Quality and predicted speed of every plan that is recorded, by plan_id.

    Speed is predicted anew: it depends on the serving condition, which no record of scores knows.
    """
    wanted = run.inputs.scores(EvaluationUnit(), run.inputs.search_quality_spec)
    known: dict[str, dict[str, Any]] = {}
    for stage in SCORE_STAGES:
        for record in run.folder.records(stage):
            if {**record.identity, "plan": None} != wanted:
                continue
            plan = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers)
            if record.identity["plan"] is not None:
                plan = Plan.from_dict(record.identity["plan"])
            value, stderr = quality(Scores.from_dict(record.result["scores"]))
            known[plan.plan_id] = {
                "quality": value,
                "quality_stderr": stderr,
                "speedup": run.inputs.predicted_speedup(plan),
            }
    return known
