"""The first part of stage `search`: the speed of all plans from the measured speed of a few.

What is measured are timings like those of the finalists, under the same conditions, so that the uniform plans and the
given ones are measured once. `run.state.speed` holds `measured` (`plan`, `window`, `concurrency`, `key` of each timing
that a model was fitted to) and `models` (one `SpeedModel.to_dict()` for each concurrency).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerboost.families import native_windows
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.speed.speed_model import SpeedFitError, SpeedModel, counts, design_plans
from orchestrator.run.context import RunContext
from orchestrator.run.folder import canonical_json
from orchestrator.run.kinds import SPEED, THROUGHPUT
from orchestrator.run.records import find_record
from orchestrator.stages.timing import measuring_hardware, throughput_unit, time_models
from tasks.timing import ThroughputUnit


def measure_speed(run: RunContext) -> None:
    """Times the designed plans and fits a model for each concurrency, in `run.state.speed`.

    With `search.speed: bytes` nothing is measured. A failed timing is named, and the fit does without it.
    """
    recipe = run.inputs.recipe
    if recipe.search.speed == "bytes":
        run.state.speed = None
        return
    hardware, native = measuring_hardware(run), native_windows(run.inputs.facts.config)
    units: dict[ThroughputUnit, tuple[dict[str, Any], str | None]] = {}
    plans: dict[ThroughputUnit, Plan] = {}
    for concurrency in recipe.throughput.concurrency:
        alike = _recorded_alike(run, concurrency, hardware, native)
        for plan in designed_plans(run):
            unit = _unit(run, plan, concurrency)
            if run.recorded(run.inputs.throughput(unit, hardware, None), (THROUGHPUT,)) is None:
                plan = alike.get((counts(plan, native), plan.window), plan)
                unit = _unit(run, plan, concurrency)
            units[unit], plans[unit] = ({"plan": str(plan)}, None), plan
    keys = time_models(run, SPEED, units, hardware)
    measured, models = [], []
    for concurrency in recipe.throughput.concurrency:
        points = []
        for unit in (unit for unit in units if unit.concurrency == concurrency):
            if (record := find_record(run.folder, keys[unit], (THROUGHPUT,))) is not None:
                points.append((plans[unit], *_step_s(record)))
                measured.append({**plans[unit].to_dict(), "concurrency": concurrency, "key": keys[unit]})
        try:
            models.append(SpeedModel.fit(points, concurrency=concurrency, native_windows=native).to_dict())
        except SpeedFitError as error:
            run.progress.note("speed predicted from bytes", concurrency=concurrency, because=error)
    run.state.speed = {"measured": measured, "models": models}


def designed_plans(run: RunContext) -> list[Plan]:
    """The plans to measure: the fixed points of the search, which are finalists in any case, and mixtures."""
    search, n_layers = run.inputs.recipe.search, run.inputs.n_layers
    return design_plans(
        n_layers,
        tuple(Treatment),  # the fixed points have all of them
        search.window,
        search.speed_plans,
        native_windows=native_windows(run.inputs.facts.config),
        given=[Plan.parse(plan, search.window) for plan in search.plans],
    )


def speedup(run: RunContext, plan: Plan) -> float:
    """Predicted throughput of a plan over the base's at `run.inputs.condition`.

    By bytes where no model was fitted, and for a window that none was fitted to.
    """
    model = _model(run)
    predicted = None if model is None else model.predict(plan)
    if model is None or predicted is None:
        return run.inputs.predicted_speedup(plan)
    base = model.predict(Plan.uniform(Treatment.SOFTMAX, run.inputs.n_layers))
    assert base is not None  # every model was fitted to the base too
    return predicted[0] / base[0]


def layer_times(run: RunContext) -> dict[Treatment, list[float]]:
    """What each layer's attention adds to a decode step at `run.inputs.condition`, first layer first, by treatment.

    In seconds; in steps of the base where no model was fitted, by bytes.
    """
    model = _model(run)
    if model is not None:
        return model.layer_times()
    n_layers, window = run.inputs.n_layers, run.inputs.recipe.search.window
    steps = {
        treatment: [
            1 / run.inputs.predicted_speedup(single_layer_plan(n_layers, layer, treatment, window))
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
    """The model of the condition that the search predicts speed for."""
    models = [SpeedModel.from_dict(model) for model in (run.state.speed or {"models": []})["models"]]
    return next((model for model in models if model.concurrency == run.inputs.condition.concurrency), None)


def _unit(run: RunContext, plan: Plan, concurrency: int) -> ThroughputUnit:
    untouched = plan.count(Treatment.SOFTMAX) == len(plan)
    return throughput_unit(run, None if untouched else plan, concurrency)


def _recorded_alike(
    run: RunContext, concurrency: int, hardware: str, native: Sequence[int | None]
) -> dict[tuple, Plan]:
    """An unhealed plan that is recorded under this condition, by what decides its speed."""
    wanted = canonical_json(run.inputs.throughput(throughput_unit(run, None, concurrency), hardware, None))
    found: dict[tuple, Plan] = {}
    for record in run.folder.records(THROUGHPUT):
        if record.identity["plan"] and canonical_json({**record.identity, "plan": None}) == wanted:
            plan = Plan.from_dict(record.identity["plan"])
            found.setdefault((counts(plan, native), plan.window), plan)
    return found


def _step_s(record: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a decode step and their standard error."""
    throughput = record["output_throughput_tok_per_s"]
    seconds = record["concurrency"] / throughput
    return seconds, seconds * record["output_throughput_stderr"] / throughput
