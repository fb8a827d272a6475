"""Measures the quality curve of stage `heal`: each healed plan's quality before healing and at shares of its budget.

At those shares healing writes the parameters that it trains to `snapshots/<key>/`; they are deleted once judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerboost.healing.spec import HealingSpec, mark_steps
from layerboost.plan import Plan
from orchestrator.run.context import RunContext
from orchestrator.run.entries import CurvePoint
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import CURVE, HEALINGS
from orchestrator.run.records import find_record
from tasks.evaluation import EvaluationUnit, plan_unit

_SNAPSHOTS = "snapshots"


def snapshot_folder(key: str) -> str:
    """Returns the folder inside the run folder into which a healing writes its snapshots."""
    return f"{_SNAPSHOTS}/{key}"


def snapshot_name(key: str, step: int) -> str:
    """Returns the file inside the run folder that a healing writes after a step."""
    return f"{snapshot_folder(key)}/{step}.safetensors"


def measure_curves(run: RunContext, healed: Sequence[tuple[Plan, str]], unhealed: Sequence[Plan] = ()) -> None:
    """Judges plans before healing, and their snapshots, which are then deleted; failed snapshots are reported and kept.

    Args:
        run: The run.
        healed: Plans with the keys of their healing.
        unhealed: Further plans, which are judged only before healing.
    """
    kept = {plan: _kept_points(run, plan, key) for plan, key in healed}
    for plan, key in healed:
        _say_what_is_missing(run, plan, key, kept[plan])
    units, keys = _points(run, healed, unhealed, kept)
    if units:
        run.evaluate(CURVE, run.inputs.full_spec, units, keys)
    for plan, key in healed:
        if all(_is_judged(run, plan, key, point) for point in kept[plan]):
            run.folder.remove(snapshot_folder(key))


def curve_units(run: RunContext, to_heal: Sequence[tuple[Plan, str]], unhealed: Sequence[Plan], *, n_open: int) -> None:
    """Lists the points that `measure_curves` judges; a plan that is not healed yet has the points of the recipe.

    Args:
        run: The run.
        to_heal: Plans with the keys of their healing, whether it is recorded or not.
        unhealed: Further plans, which are judged only before healing.
        n_open: Number of points of plans that are not known yet.
    """
    marks = [
        {"step": step, "share": share}
        for step, share in mark_steps(run.inputs.healing_spec, run.inputs.recipe.healing.curve).items()
    ]
    points = {
        plan: marks if run.recorded(run.inputs.healing(plan), HEALINGS) is None else _kept_points(run, plan, key)
        for plan, key in to_heal
    }
    run.list_scores(CURVE, run.inputs.full_spec, *_points(run, to_heal, unhealed, points), n_open=n_open)


def _points(
    run: RunContext,
    healed: Sequence[tuple[Plan, str]],
    unhealed: Sequence[Plan],
    points: Mapping[Plan, Sequence[dict[str, Any]]],
) -> tuple[dict[EvaluationUnit, dict[str, Any]], dict[EvaluationUnit, str]]:
    """Returns the units that judge plans before healing and at some points, with names, and the points' state keys."""
    units: dict[EvaluationUnit, dict[str, Any]] = {
        plan_unit(plan): {"plan": str(plan), "share": 0} for plan in unhealed
    }
    keys: dict[EvaluationUnit, str] = {}
    for plan, key in healed:
        units[plan_unit(plan)] = {"plan": str(plan), "share": 0}
        for point in points[plan]:
            unit = snapshot_unit(run, plan, key, point["step"], run.inputs.healing_spec)
            keys[unit] = state_key(key, point["step"])
            units[unit] = {"plan": str(plan), "share": point["share"]}
    return units, keys


def curve_entries(run: RunContext, plan: Plan, key: str) -> list[CurvePoint]:
    """Returns the points of a healed plan's curve that `run.json` lists; share 0 comes first."""
    spec, inputs = run.inputs.healing_spec, run.inputs
    entries = [CurvePoint(0.0, 0, unit_key(inputs.plan_scores(plan, inputs.full_spec)))]
    for point in _recorded_points(run, key):
        tokens = point["step"] * spec.tokens_per_step
        entries.append(CurvePoint(point["share"], tokens, unit_key(_identity(run, plan, key, point["step"]))))
    return entries


def state_key(key: str, step: int) -> str:
    """Returns the key that identifies the parameters after a step of a healing."""
    return f"{key}@{step}"


def _recorded_points(run: RunContext, key: str) -> list[dict[str, Any]]:
    recorded = find_record(run.folder, key, HEALINGS)
    return [] if recorded is None else recorded["snapshots"]


def _kept_points(run: RunContext, plan: Plan, key: str) -> list[dict[str, Any]]:
    """Returns the points that are already judged or whose snapshot still exists."""
    return [
        point
        for point in _recorded_points(run, key)
        if _is_judged(run, plan, key, point) or run.folder.exists(snapshot_name(key, point["step"]))
    ]


def _say_what_is_missing(run: RunContext, plan: Plan, key: str, kept: Sequence[dict[str, Any]]) -> None:
    """Reports which of the recipe's points a healed plan lacks."""
    spec, recorded = run.inputs.healing_spec, find_record(run.folder, key, HEALINGS)
    assert recorded is not None
    steps, n_steps = {point["step"] for point in kept}, recorded["tokens"] // spec.tokens_per_step
    wanted = mark_steps(spec, run.inputs.recipe.healing.curve)
    if missing := [f"{share:g}" for step, share in wanted.items() if step < n_steps and step not in steps]:
        run.progress.note(f"healed without snapshots at shares {', '.join(missing)}: no such points", plan=plan)


def _is_judged(run: RunContext, plan: Plan, key: str, point: dict[str, Any]) -> bool:
    return run.recorded(_identity(run, plan, key, point["step"])) is not None


def snapshot_unit(run: RunContext, plan: Plan, key: str, step: int, spec: HealingSpec) -> EvaluationUnit:
    """Returns the unit that judges a plan with its parameters after a step of a healing by `spec`."""
    return EvaluationUnit(plan=plan, trained=run.folder.place(snapshot_name(key, step)), healing=spec)


def _identity(run: RunContext, plan: Plan, key: str, step: int) -> dict[str, Any]:
    unit = snapshot_unit(run, plan, key, step, run.inputs.healing_spec)
    return run.inputs.scores(unit, run.inputs.full_spec, state_key(key, step))
