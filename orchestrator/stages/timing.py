"""What every stage that times models shares: one condition after the other, with the untouched parent beside.

The speed of a machine drifts. So models are timed in groups that begin with the parent, and the times of a group are
scaled to where the parent stood when it was first recorded: all speeds of a run compare, whenever they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from layerboost.decoding import DecodeMeasurement
from layerboost.hardware import hardware_name
from layerboost.plan import Plan
from orchestrator.context import Identity, RunContext
from orchestrator.run_folder import unit_key
from tasks import cluster
from tasks.measurement import Group, ThroughputUnit, exclusive_worker, measure_groups
from tasks.units import UnitFailure

THROUGHPUT = "throughput"
"""Stage of the records that hold timings."""


def time_models(
    run: RunContext,
    stage: str,
    units: Mapping[ThroughputUnit, tuple[dict[str, Any], str | None]],
    hardware: str,
) -> dict[ThroughputUnit, str]:
    """Times what is not recorded; failures are named, the rest goes on.

    Args:
        run: the run.
        stage: what progress and failures call this; the records are those of stage `throughput`.
        units: what is to be timed: its name, and the key of its healing. Of one condition beside each other.
        hardware: as `measuring_hardware` gives it.

    Returns:
        The key of each unit's record, whether it is there or not.
    """
    identities = {unit: run.inputs.throughput(unit, hardware, healed) for unit, (_, healed) in units.items()}
    todo = [unit for unit in units if run.recorded(identities[unit], (THROUGHPUT,)) is None]
    run.progress.start_stage(stage, len(units), recorded=len(units) - len(todo))

    def on_result(group: Group, results: list[dict], duration_s: float, info: dict) -> None:
        for unit, result in _at_recorded_speed(run, group, results, hardware):
            if unit in todo and run.recorded(identities[unit], (THROUGHPUT,)) is None:
                each_s = duration_s / max(1, len(set(group) & set(todo)))
                run.record(THROUGHPUT, identities[unit], {**result, "duration_s": each_s, "worker": info})
                tok_per_s = round(result["output_throughput_tok_per_s"], 1)
                named = units[unit][0] | _condition(unit)
                run.progress.finish_unit(each_s, **named, tok_per_s=tok_per_s)

    if todo:
        run.connect()
        failures = measure_groups(groups(todo, on_gpu=not _is_cpu(hardware)), run.inputs.source, on_result=on_result)
        # One model that cannot be timed must not take with it those beside it.
        if pairs := [pair for failure in failures for pair in _pairs(failure.unit)]:
            alone = [failure for failure in failures if not _pairs(failure.unit)]
            failures = alone + measure_groups(pairs, run.inputs.source, on_result=on_result)
        for unit, error in _failed_units(failures, todo):
            if run.recorded(identities[unit], (THROUGHPUT,)) is None:
                run.failed(stage, {**units[unit][0], **_condition(unit)}, error)
    run.progress.end_stage()
    return {unit: unit_key(identity) for unit, identity in identities.items()}


def groups(units: Sequence[ThroughputUnit], *, on_gpu: bool) -> list[Group]:
    """What is timed side by side: the parent and all plans of a condition, then the parent and each checkpoint.

    A checkpoint on a GPU is timed alone: there may be no room for the parent's weights beside it, and a GPU's speed
    does not drift as that of a shared CPU does.
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


def parent_of(unit: ThroughputUnit) -> ThroughputUnit:
    """The untouched parent under a unit's condition."""
    return replace(unit, plan=None, checkpoint=None)


def throughput_unit(
    run: RunContext,
    plan: Plan | None,
    concurrency: int,
    *,
    prompt_tokens: int | None = None,
    checkpoint: str | None = None,
) -> ThroughputUnit:
    """A model under one of the recipe's conditions, or with prompts of another length."""
    recipe = run.inputs.recipe.throughput
    return ThroughputUnit(
        concurrency=concurrency,
        prompt_tokens=prompt_tokens or recipe.prompt_tokens,
        new_tokens=recipe.new_tokens,
        plan=plan,
        checkpoint=checkpoint,
        repeats=recipe.repeats,
    )


def measuring_hardware(run: RunContext) -> str:
    """What the measuring worker runs on: this machine, or what a cluster says."""
    if run.address is None:
        return _device_name()
    run.connect()
    import ray

    worker = exclusive_worker(cluster.resources())
    return ray.get(ray.remote(_device_name).options(**worker.actor_options()).remote())


def _at_recorded_speed(
    run: RunContext, group: Group, results: list[dict], hardware: str
) -> list[tuple[ThroughputUnit, dict]]:
    """The results as they would have been when the parent was recorded; as they are where it is not among them."""
    base = parent_of(group[0])
    identity: Identity = run.inputs.throughput(base, hardware, None)
    recorded = run.recorded(identity, (THROUGHPUT,))
    if group[0] != base or recorded is None:
        return list(zip(group, results, strict=True))
    speed = "output_throughput_tok_per_s"
    factor = recorded[speed] / results[0][speed]
    scaled = [DecodeMeasurement.from_dict(result).scaled(factor).to_dict() for result in results]
    return [(unit, {**result, "scaled_by": factor}) for unit, result in zip(group, scaled, strict=True)]


def _pairs(group: Group) -> list[Group]:
    """A group's models one by one, each beside the parent; nothing for a group that is no larger."""
    return [(group[0], unit) for unit in group[1:]] if len(group) > 2 else []


def _failed_units(failures: Sequence[UnitFailure], todo: Sequence[ThroughputUnit]) -> list[tuple[ThroughputUnit, str]]:
    """Each unit that was to be timed and failed with a group, once."""
    errors = {unit: failure.error for failure in failures for unit in failure.unit if unit in todo}
    return list(errors.items())


def _condition(unit: ThroughputUnit) -> dict[str, Any]:
    return {"concurrency": unit.concurrency, "prompt_tokens": unit.prompt_tokens}


def _device_name() -> str:
    return hardware_name("cuda" if torch.cuda.is_available() else "cpu")


def _is_cpu(hardware: str) -> bool:
    return hardware.endswith("cores)")
