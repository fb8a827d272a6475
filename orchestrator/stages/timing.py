"""Times models for every stage that needs it: one condition after the other, each time with the untouched parent.

The speed of a machine drifts. Therefore models are timed in groups that begin with the parent, and the times of a group
are scaled to the speed of the parent when it was first recorded. All speeds of a run are comparable, whenever they were
measured. The server of a serving engine (vLLM) takes a minute to start. With such an engine a group is one model under
all conditions, and the parent's group comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from layerboost.plan import Plan
from layerboost.registry import resolved
from layerboost.speed.hardware import hardware_name
from layerboost.speed.vllm_environment import ServingEnvironment
from orchestrator.checks.serving import serving_environment
from orchestrator.run.context import RunContext
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import THROUGHPUT, TIMINGS
from orchestrator.run.records import time_and_worker
from orchestrator.run.units import StageUnits, Unit
from tasks.engines import ENGINES, Engine
from tasks.pool.finished import Finished
from tasks.pool.pool import UnitFailure
from tasks.timing import ERROR, Group, ThroughputUnit, measure_groups, on_measuring_node


def list_timings(
    run: RunContext,
    stage: str,
    units: Mapping[ThroughputUnit, tuple[dict[str, Any], str | None]],
    hardware: str,
    *,
    n_open: int = 0,
) -> StageUnits:
    """Lists the timings of `time_models` for a stage; `n_open` counts further ones of models that are not known yet."""
    named = [
        Unit(TIMINGS, (run.inputs.throughput(unit, hardware, healed),), name | _condition(unit), unit)
        for unit, (name, healed) in units.items()
    ]
    return run.list_units(stage, named, n_open=n_open)


def time_models(
    run: RunContext,
    stage: str,
    units: Mapping[ThroughputUnit, tuple[dict[str, Any], str | None]],
    hardware: str,
) -> dict[ThroughputUnit, str]:
    """Times the models that are not recorded; a failure is reported and the other models continue.

    Args:
        run: The run.
        stage: Name of the stage for progress and failures.
        units: The models to time, each with its name and the key of its healing.
        hardware: Result of `measuring_hardware`.

    Returns:
        The key of each unit's record, whether the record exists or not.
    """
    identities = {unit: run.inputs.throughput(unit, hardware, healed) for unit, (_, healed) in units.items()}
    listing = list_timings(run, stage, units, hardware)
    todo = [unit.work for unit in listing.todo]
    run.begin(listing)
    serves = _engine(run).serves
    parents: dict[ThroughputUnit, dict] = {}

    def on_result(done: Finished[Group, list[dict[str, Any]]]) -> None:
        group = done.unit
        measured = dict(zip(group, done.result, strict=True))
        if not serves:
            parents.clear()  # only models timed in the parent's group share its drift
        parents.update({unit: result for unit, result in measured.items() if unit == parent_of(unit)})
        n_here = max(1, len(set(group) & set(todo)))
        for unit, result in measured.items():
            if unit not in todo or run.recorded(identities[unit], TIMINGS) is not None:
                continue
            named = units[unit][0] | _condition(unit)
            if ERROR in result:
                run.failed(stage, named, result[ERROR])
                continue
            result = _at_recorded_speed(run, unit, result, parents.get(parent_of(unit), {}), hardware)
            each_s = done.seconds / n_here
            run.record(THROUGHPUT, identities[unit], {**result, **time_and_worker(done, each_s)})
            tok_per_s = round(result["output_throughput_tok_per_s"], 1)
            run.progress.finish_unit(each_s, **named, tok_per_s=tok_per_s)

    if todo:
        run.connect()
        on_gpu = not _is_cpu(hardware)
        in_groups = server_groups(todo, on_gpu=on_gpu) if serves else groups(todo, on_gpu=on_gpu)
        watch = run.watch(stage, _group_name, of_each=max(map(len, in_groups)))
        where = run.inputs.recipe.placement.labels.time
        failures = measure_groups(in_groups, run.source, on_result=on_result, watch=watch, labels=where)
        # A model that cannot be timed must not fail the others of its group, so each is timed again in its own pair.
        if not serves and (pairs := [pair for failure in failures for pair in _pairs(failure.unit)]):
            alone = [failure for failure in failures if not _pairs(failure.unit)]
            failures = alone + measure_groups(pairs, run.source, on_result=on_result, watch=watch, labels=where)
        for unit, error in _failed_units(failures, todo):
            if run.recorded(identities[unit], TIMINGS) is None:
                run.failed(stage, {**units[unit][0], **_condition(unit)}, error)
    run.progress.end_stage()
    return {unit: unit_key(identity) for unit, identity in identities.items()}


def groups(units: Sequence[ThroughputUnit], *, on_gpu: bool) -> list[Group]:
    """Groups what is timed together: the parent with all plans of a condition, then the parent with each checkpoint.

    A checkpoint on a GPU is timed alone: there may be no room for the parent's weights as well, and the speed of a GPU
    does not drift like that of a shared CPU.
    """
    found: list[Group] = []
    in_order = sorted(units, key=lambda unit: tuple(unit.condition.values()))
    for _, together in groupby(in_order, key=lambda unit: unit.condition):
        of_condition = list(together)
        base = parent_of(of_condition[0])
        plans = [unit for unit in of_condition if unit.checkpoint is None and unit != base]
        if plans or base in of_condition:
            found.append((base, *plans))
        checkpoints = [unit for unit in of_condition if unit.checkpoint is not None]
        found += [(unit,) if on_gpu else (base, unit) for unit in checkpoints]
    return found


def server_groups(units: Sequence[ThroughputUnit], *, on_gpu: bool) -> list[Group]:
    """Groups the units by model, one server each: the parent under all conditions, then each model under its own.

    On a GPU, whose speed does not drift, the parent is left out unless its own timing was asked for.
    """
    of_model: dict[tuple[Plan | None, str | None], list[ThroughputUnit]] = {(None, None): []}
    for unit in units:
        base = parent_of(unit)
        if base not in of_model[None, None] and (base in units or not on_gpu):
            of_model[None, None].append(base)
        if unit != base:
            of_model.setdefault((unit.plan, unit.checkpoint), []).append(unit)
    return [tuple(group) for group in of_model.values() if group]


def parent_of(unit: ThroughputUnit) -> ThroughputUnit:
    """Returns the unit of the untouched parent under the same condition."""
    return replace(unit, plan=None, checkpoint=None)


def throughput_unit(
    run: RunContext,
    plan: Plan | None,
    concurrency: int,
    *,
    prompt_tokens: int | None = None,
    checkpoint: str | None = None,
) -> ThroughputUnit:
    """Returns the unit that times a model under one of the recipe's conditions, or with another prompt length."""
    recipe = run.inputs.recipe.throughput
    return ThroughputUnit(
        concurrency=concurrency,
        prompt_tokens=prompt_tokens or recipe.prompt_tokens,
        new_tokens=recipe.new_tokens,
        plan=plan,
        checkpoint=checkpoint,
        repeats=recipe.repeats,
        environment=_environment(run),
        engine=recipe.engine,
    )


def measuring_hardware(run: RunContext) -> str:
    """Returns the measuring worker's hardware: that of the engine's environment, this machine or a cluster node."""
    if (environment := _environment(run)) is not None:
        return environment.hardware
    if run.address is None:
        return _device_name()
    run.connect()
    return on_measuring_node(run.inputs.recipe.placement.labels.time, _device_name)


def _environment(run: RunContext) -> ServingEnvironment | None:
    recipe, labels = run.inputs.recipe.throughput, run.inputs.recipe.placement.labels.time
    if _engine(run).find_environment is None:
        return None
    return serving_environment(recipe.engine, recipe.environment, run.address, tuple(labels.items()))


def _engine(run: RunContext) -> Engine:
    return ENGINES[run.inputs.recipe.throughput.engine]


def _at_recorded_speed(
    run: RunContext, unit: ThroughputUnit, result: dict, parent_now: dict, hardware: str
) -> dict[str, Any]:
    """Scales a result to the speed at which the parent was recorded; unchanged if the parent was not timed again."""
    speed = "output_throughput_tok_per_s"
    recorded = run.recorded(run.inputs.throughput(parent_of(unit), hardware, None), TIMINGS)
    if recorded is None or speed not in parent_now:
        return result
    kind = resolved(ENGINES[unit.engine].measurement)
    factor = recorded[speed] / parent_now[speed]
    return {**kind.from_dict(result).scaled(factor).to_dict(), "scaled_by": factor}


def _pairs(group: Group) -> list[Group]:
    """Splits a group into pairs of the parent and one model; returns an empty list for a group of at most two."""
    return [(group[0], unit) for unit in group[1:]] if len(group) > 2 else []


def _failed_units(
    failures: Sequence[UnitFailure[Group]], todo: Sequence[ThroughputUnit]
) -> list[tuple[ThroughputUnit, str]]:
    """Returns each unit of `todo` whose group failed, once, with the error."""
    errors = {unit: failure.error for failure in failures for unit in failure.unit if unit in todo}
    return list(errors.items())


def _group_name(group: Group) -> dict[str, Any]:
    return {"models": len({(unit.plan, unit.checkpoint) for unit in group}), **_condition(group[0])}


def _condition(unit: ThroughputUnit) -> dict[str, Any]:
    return {"concurrency": unit.concurrency, "prompt_tokens": unit.prompt_tokens}


def _device_name() -> str:
    return hardware_name("cuda" if torch.cuda.is_available() else "cpu")


def _is_cpu(hardware: str) -> bool:
    return hardware.endswith("cores)")
