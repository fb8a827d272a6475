"""Runs the first part of stage `search`: it predicts the speed of all plans from the measured speed of a few.

The timings are like those of the finalists and use the same conditions, so that uniform and given plans are measured
only once. `run.state.speed` holds `measured` (`plan`, `window`, `concurrency` and `key` of each timing that a model was
fitted to) and `models` (one `SpeedModel` for each concurrency).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerboost.families import native_windows
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.speed.speed_model import SpeedFitError, SpeedModel, counts, design_plans
from orchestrator.run.context import RunContext
from orchestrator.run.entries import FittedTiming, SpeedFit
from orchestrator.run.folder import canonical_json
from orchestrator.run.kinds import SPEED, TIMINGS
from orchestrator.run.records import all_records, find_record
from orchestrator.stages.timing import list_timings, measuring_hardware, throughput_unit, time_models
from tasks.timing import ThroughputUnit


def measure_speed(run: RunContext) -> None:
    """Times the designed plans and fits a model for each concurrency, in `run.state.speed`.

    With `search.speed: bytes` nothing is measured. A failed timing is reported, and the fit omits it.
    """
    if run.inputs.recipe.search.speed == "bytes":
        run.state.speed = None
        return
    hardware = measuring_hardware(run)
    plans = _timed_plans(run, hardware)
    _fit(run, plans, time_models(run, SPEED, _named(plans), hardware))


def speed_units(run: RunContext) -> None:
    """Lists the timings of `measure_speed`; fits the models in the run's state if all timings are recorded."""
    run.state.speed = None
    if run.inputs.recipe.search.speed == "bytes":
        return
    hardware = measuring_hardware(run)
    plans = _timed_plans(run, hardware)
    listing = list_timings(run, SPEED, _named(plans), hardware)
    if listing.is_complete:
        _fit(run, plans, {unit.work: unit.key for unit in listing.units})


def _timed_plans(run: RunContext, hardware: str) -> dict[ThroughputUnit, Plan]:
    """Returns the designed plans under each condition; a recorded plan of equal speed replaces an unrecorded one."""
    native = native_windows(run.inputs.facts.config)
    plans: dict[ThroughputUnit, Plan] = {}
    for concurrency in run.inputs.recipe.throughput.concurrency:
        alike = _recorded_alike(run, concurrency, hardware, native)
        for plan in designed_plans(run):
            unit = _unit(run, plan, concurrency)
            if run.recorded(run.inputs.throughput(unit, hardware, None), TIMINGS) is None:
                plan = alike.get((counts(plan, native), plan.window, plan.sinks), plan)
                unit = _unit(run, plan, concurrency)
            plans[unit] = plan
    return plans


def _named(plans: Mapping[ThroughputUnit, Plan]) -> dict[ThroughputUnit, tuple[dict[str, Any], str | None]]:
    return {unit: ({"plan": str(plan)}, None) for unit, plan in plans.items()}


def _fit(run: RunContext, plans: Mapping[ThroughputUnit, Plan], keys: Mapping[ThroughputUnit, str]) -> None:
    """Fits a model for each concurrency to the recorded timings, in `run.state.speed`."""
    native = native_windows(run.inputs.facts.config)
    measured, models = [], []
    for concurrency in run.inputs.recipe.throughput.concurrency:
        points = []
        for unit in (unit for unit in plans if unit.concurrency == concurrency):
            if (record := find_record(run.folder, keys[unit], TIMINGS)) is not None:
                points.append((plans[unit], *_step_s(record)))
                measured.append(FittedTiming(plans[unit], concurrency, keys[unit]))
        try:
            models.append(SpeedModel.fit(points, concurrency=concurrency, native_windows=native))
        except SpeedFitError as error:
            run.progress.note("speed predicted from bytes", concurrency=concurrency, because=error)
    run.state.speed = SpeedFit(tuple(measured), tuple(models))


def designed_plans(run: RunContext) -> list[Plan]:
    """Returns the plans to measure: the fixed points of the search, which are finalists anyway, and mixtures."""
    search, n_layers = run.inputs.recipe.search, run.inputs.n_layers
    return design_plans(
        n_layers,
        # The fixed points have all treatments but affine, whose layers are there only if the recipe names them.
        tuple(t for t in Treatment if t is not Treatment.AFFINE or t in run.inputs.treatments),
        search.window,
        search.speed_plans,
        native_windows=native_windows(run.inputs.facts.config),
        given=[Plan.parse(plan, search.window, search.sinks) for plan in search.plans],
        sinks=search.sinks,
    )


def speedup(run: RunContext, plan: Plan) -> float:
    """Returns the predicted throughput of a plan divided by the base's at `run.inputs.condition`.

    The prediction uses bytes if no model was fitted, or none for the plan's window.
    """
    model = _model(run)
    predicted = None if model is None else model.predict(plan)
    if model is None or predicted is None:
        return run.inputs.predicted_speedup(plan)
    base = model.predict(Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers))
    assert base is not None  # every model was fitted to the base too
    return predicted[0] / base[0]


def layer_times(run: RunContext) -> dict[Treatment, list[float]]:
    """Returns the time that each layer's attention adds to a decode step at `run.inputs.condition`, by treatment.

    Layers are listed first to last. The unit is seconds if a model was fitted; otherwise the times are predicted from
    bytes, in units of a decode step of the base.
    """
    model = _model(run)
    if model is not None:
        return model.layer_times()
    n_layers, search = run.inputs.n_layers, run.inputs.recipe.search
    steps = {
        treatment: [
            1 / run.inputs.predicted_speedup(single_layer_plan(n_layers, layer, treatment, search.window, search.sinks))
            for layer in range(n_layers)
        ]
        for treatment in Treatment
        if treatment is not Treatment.SOFTMAX
    } | {Treatment.SOFTMAX: [1.0] * n_layers}
    removed = steps[Treatment.NONE]
    return {
        treatment: [step - least for step, least in zip(of_layers, removed, strict=True)]
        for treatment, of_layers in steps.items()
    }


def _model(run: RunContext) -> SpeedModel | None:
    """Returns the model for the condition at which the search predicts speed."""
    models = (run.state.speed or SpeedFit()).models
    return next((model for model in models if model.concurrency == run.inputs.condition.concurrency), None)


def _unit(run: RunContext, plan: Plan, concurrency: int) -> ThroughputUnit:
    return throughput_unit(run, None if plan.is_untouched else plan, concurrency)


def _recorded_alike(
    run: RunContext, concurrency: int, hardware: str, native: Sequence[int | None]
) -> dict[tuple, Plan]:
    """Returns the recorded unhealed plans under this condition, one for each layer counts, window and sinks."""
    wanted = canonical_json(run.inputs.throughput(throughput_unit(run, None, concurrency), hardware, None))
    found: dict[tuple, Plan] = {}
    for record in all_records(run.folder, TIMINGS):
        if record.identity.get("plan") and canonical_json({**record.identity, "plan": None}) == wanted:
            plan = Plan.from_dict(record.identity["plan"])
            found.setdefault((counts(plan, native), plan.window, plan.sinks), plan)
    return found


def _step_s(record: dict[str, Any]) -> tuple[float, float]:
    """Returns the seconds of a decode step and their standard error."""
    throughput = record["output_throughput_tok_per_s"]
    seconds = record["concurrency"] / throughput
    return seconds, seconds * record["output_throughput_stderr"] / throughput
