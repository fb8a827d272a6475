"""Runs stage `search`: it proposes plans by the recipe's method, and judges their quality against predicted speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from layerboost.evaluation.scores import Scores, quality
from layerboost.plan import Plan, Treatment
from layerboost.search.loop import Outcome, SearchSpec, SearchState, TrialResult, Values, fixed_points
from layerboost.search.methods import METHODS
from layerboost.search.proposers import make_proposer
from orchestrator.results.sensitivity import cost_matrix
from orchestrator.run.context import RunContext
from orchestrator.run.entries import SpeedFit, Trial
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import FOUND_TRIALS, RACE, SCORES, SPEED, TRIALS
from orchestrator.run.records import all_records, each_of_kind, find_records, time_and_worker
from orchestrator.run.units import StageUnits, Unit
from orchestrator.stages.objective import objective
from orchestrator.stages.race import race, race_units
from orchestrator.stages.refine import refine, refine_units
from orchestrator.stages.speed import layer_times, measure_speed, speed_units, speedup
from tasks.evaluation import EvaluationUnit, plan_evaluator_maker
from tasks.pool.finished import Finished
from tasks.pool.pool import UnitFailure
from tasks.pool.watch import Watch
from tasks.search import run_search


def units(run: RunContext) -> None:
    """Lists the timings for speed, the plans that the search has proposed by now, and the refined ones.

    Proposed plans follow from the records, because a repeated search proposes the same plans. Later plans are open; all
    plans but the fixed points are, as long as the sweep or the timings are missing. Puts the trials into the run's
    state; until the search is complete these are the fixed points, without qualities.
    """
    speed_units(run)
    trials = None
    if run.is_settled("sensitivity", SPEED) and _is_scored(run):
        trials = _Trials(run).replayed()
    else:
        n_open = _n_distinct(run.inputs.search_spec)
        _list_plans(run, [plan for _, plan in fixed_points(run.inputs.search_spec, run.inputs.n_layers)], n_open)
    if trials is None:
        points = fixed_points(run.inputs.search_spec, run.inputs.n_layers)
        _set_trials(run, [Trial(plan, origin, status="open") for origin, plan in points], {})
        race_units(run, None)
        refine_units(run, known=False)
        return
    judged: dict[Plan, dict[str, Any]] = {}
    trials = race_units(run, trials)
    _set_trials(run, trials, judged)
    refined = refine_units(run, known=run.is_settled(RACE))
    _set_trials(run, _with_refined(trials, refined), judged)


def search(run: RunContext) -> bool:
    """Evaluates the fixed points and the searched plans; a failure is reported and the other plans continue."""
    measure_speed(run)
    trials = _Trials(run).searched()
    run.progress.end_stage()
    trials = race(run, trials)
    judged: dict[Plan, dict[str, Any]] = {}
    _set_trials(run, trials, judged)
    _set_trials(run, _with_refined(trials, refine(run)), judged)
    return True


def _with_refined(trials: list[Trial], refined: list[Trial]) -> list[Trial]:
    """Returns the points with those that refinement found; these are judged on all items, also if a race left them."""
    found = {trial.plan for trial in refined}
    return [replace(trial, share=1.0, beaten_by=None) if trial.plan in found else trial for trial in trials] + refined


def _is_scored(run: RunContext) -> bool:
    """Returns whether all scores by which layers are ranked are recorded."""
    keys = {key for entry in run.state.sensitivity for key in (entry.key, entry.base_key) if key is not None}
    return bool(keys) and None not in find_records(run.folder, sorted(keys))


def _list_plans(run: RunContext, plans: Sequence[Plan], n_open: int) -> StageUnits:
    """Lists plans that the search judges; the plan with softmax in every layer is the untouched model."""
    spec = run.inputs.first_quality_spec
    distinct = dict.fromkeys(plans)
    units = [Unit(SCORES, (run.inputs.plan_scores(plan, spec),), {"plan": str(plan)}, plan) for plan in distinct]
    return run.list_units("search", units, n_open=n_open)


def _n_distinct(spec: SearchSpec) -> int:
    """Returns the expected number of distinct plans among the trials of a search."""
    if not METHODS[spec.method].counts_repeats:
        return spec.trials
    # This method draws pairs of thresholds evenly, so that many pairs give a plan that an earlier pair already gave.
    n_layers = spec.space.n_layers
    n_pairs = (n_layers + 1) * (n_layers + 2) // 2
    return round(n_pairs * (1 - (1 - 1 / n_pairs) ** spec.trials))


class _Trials:
    """Gives the trials of the run's search, from their record or by repeating the search on the recorded plans."""

    def __init__(self, run: RunContext):
        self._run, inputs = run, run.inputs
        self._costs = cost_matrix(run.folder, run.state)
        models = [model.to_dict() for model in (run.state.speed or SpeedFit()).models]
        self._identity = inputs.search(self._costs, models)

    @cached_property
    def _known(self) -> dict[str, dict[str, Any]]:
        return known_plans(self._run)

    def replayed(self) -> list[Trial] | None:
        """Lists the plans that are proposed by now; returns the trials if all of them are recorded, else None."""
        trials, listing = self._recorded()
        if trials is None or listing.todo:
            state, listing = self._replay()
            trials = [_trial(point) for point in state.results()]
        return trials if listing.is_complete else None

    def searched(self) -> list[Trial]:
        """Returns the trials, after evaluating those that are not recorded."""
        run = self._run
        trials, listing = self._recorded()
        if trials is not None and not listing.todo:
            run.begin(listing)
            return trials
        failures: list[UnitFailure[Plan]] = []
        state, listing = self._replay()
        if listing.is_complete:
            run.begin(listing)
            points = state.results()
        else:
            points, failures = self._search(listing)
        trials = [_trial(point) for point in points]
        for failure in failures:
            run.failed("search", {"plan": str(failure.unit)}, failure.error)
        if not failures:
            run.record(TRIALS, self._identity, {"trials": [trial.proposal() for trial in trials]})
        _list_plans(run, [point.plan for point in points], 0)
        return trials

    def _recorded(self) -> tuple[list[Trial] | None, StageUnits]:
        recorded = self._run.recorded(self._identity, FOUND_TRIALS)
        trials = [] if recorded is None else [Trial.from_dict(trial) for trial in recorded["trials"]]
        judged = [trial.plan for trial in trials if trial.status == "ok"]
        return (None if recorded is None else trials), _list_plans(self._run, judged, 0)

    def _state(self) -> SearchState:
        run, spec = self._run, self._run.inputs.search_spec
        times = layer_times(run)
        proposer = make_proposer(spec, self._costs, times, _rest_time(run, times))
        return SearchState(spec, proposer, lambda *judged: objectives(run, *judged), self._known)

    def _replay(self) -> tuple[SearchState, StageUnits]:
        """Repeats the search as far as its plans are recorded; lists the plans that come next too."""
        state = self._state()
        while state.next_plan() is not None:
            pass  # the state adds the plan to its points, which are listed below
        met = [point.plan for point in state.points]
        n_searched = len({point.plan for point in state.points if point.origin == "search"})
        n_open = min(state.n_left, max(0, _n_distinct(state.spec) - n_searched))
        # If any trial is left, at least one plan is open, even if the expected number of plans was exceeded.
        return state, _list_plans(self._run, met, max(n_open, min(1, state.n_left)))

    def _search(self, listing: StageUnits) -> tuple[list[TrialResult], list[UnitFailure[Plan]]]:
        run, inputs, spec = self._run, self._run.inputs, self._run.inputs.first_quality_spec
        state, workers = self._state(), run.workers()
        run.begin(listing, workers=workers.n_workers)

        def on_plan(done: Finished[Plan, dict[str, Any]]) -> None:
            result = {name: done.result[name] for name in ("scores", "evaluation_s")}
            run.record("search", inputs.plan_scores(done.unit, spec), {**result, **time_and_worker(done)})
            run.progress.finish_unit(done.seconds, plan=done.unit, quality=f"{done.result['quality']:.4f}")

        failures: list[UnitFailure[Plan]] = []
        evaluator = plan_evaluator_maker(run.source, spec, workers)
        watch: Watch[Plan] = run.watch("search", lambda plan: {"plan": str(plan)}, n_workers=workers.n_workers)
        points = run_search(state, evaluator, workers, on_plan=on_plan, on_failure=failures.append, watch=watch)
        return points, failures


def objectives(run: RunContext, plan: Plan, values: Values, base: Values) -> Outcome:
    """Returns what the search maximises: the objective from the scores of plan and base, and the predicted speed."""
    before, after = (Scores.from_dict(of["scores"]) for of in (base, values))
    return objective(run, before, after), speedup(run, plan)


def _set_trials(run: RunContext, trials: list[Trial], judged: dict[Plan, dict[str, Any]]) -> None:
    """Puts points into the run's state, with the recorded values of their plans.

    Args:
        run: The run.
        trials: The points.
        judged: Qualities and objectives of plans. Missing ones are read and added to it, so that the scores of a plan
            are read only once, however often points are put into the state.
    """
    untouched, spec = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers), run.inputs.search_quality_spec
    keys = {plan: unit_key(run.inputs.plan_scores(plan, spec)) for plan in {trial.plan: None for trial in trials}}
    ok = dict.fromkeys(trial.plan for trial in trials if trial.status == "ok" and trial.share == 1)
    unread = [plan for plan in ok if plan not in judged]
    base = run.recorded(run.inputs.plan_scores(untouched, spec)) if unread else None
    if base is not None:
        records = each_of_kind(run.folder, (keys[plan] for plan in unread), SCORES)
        for plan, record in zip(unread, records, strict=True):
            if record is not None:
                judged[plan] = _judged(run, plan, record.result, base)
    unknown: dict[str, Any] = dict.fromkeys(("quality", "quality_stderr", "objective", "speedup"))

    def with_values(trial: Trial) -> Trial:
        if trial.share < 1:
            return trial
        known = judged.get(trial.plan, unknown) if trial.status == "ok" else unknown
        return replace(trial, key=keys[trial.plan], **known)

    run.state.trials = [with_values(trial) for trial in trials]


def _judged(run: RunContext, plan: Plan, values: Values, base: Values) -> dict[str, Any]:
    """Returns the values that the state holds for a plan, computed from its recorded scores and the base's."""
    value, stderr = quality(Scores.from_dict(values["scores"]))
    kept, speed = objectives(run, plan, values, base)
    return {"quality": value, "quality_stderr": stderr, "objective": kept, "speedup": speed}


def _rest_time(run: RunContext, times: dict[Treatment, list[float]]) -> float:
    """Returns the time of a decode step outside the layers' attention, in the unit of `times`."""
    removed = speedup(run, Plan.uniform(Treatment.NONE, run.inputs.n_layers))
    return sum(times[Treatment.SOFTMAX]) / (removed - 1) if removed > 1 else 1.0


def _trial(point: TrialResult) -> Trial:
    status = "ok" if point.error is None else "failed"
    return Trial(point.plan, point.origin, point.remove_below, point.keep_above, status, point.error)


def known_plans(run: RunContext) -> dict[str, dict[str, Any]]:
    """Returns `quality`, `quality_stderr` and `scores` of every recorded plan, by plan_id."""
    wanted = run.inputs.scores(EvaluationUnit(), run.inputs.first_quality_spec)
    known: dict[str, dict[str, Any]] = {}
    for record in all_records(run.folder, SCORES):
        if {**record.identity, "plan": None} != wanted:
            continue
        plan = Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers)
        if record.identity["plan"] is not None:
            plan = Plan.from_dict(record.identity["plan"])
        if record.identity["plan"] != run.inputs.plan_scores(plan, run.inputs.first_quality_spec)["plan"]:
            continue  # its affine layers had other maps
        scores = record.result["scores"]
        value, stderr = quality(Scores.from_dict(scores))
        known[plan.plan_id] = {"quality": value, "quality_stderr": stderr, "scores": scores}
    return known
