"""Stage `report`: the finalists judged by everything and timed under every serving condition."""

from __future__ import annotations

from typing import Any

from layerboost.plan import Treatment
from orchestrator.run.context import RunContext
from orchestrator.run.entries import BranchesEntry, Finalist, FinalistEntry, TimingEntry
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import THROUGHPUT
from orchestrator.run.state import REFINED
from orchestrator.stages.healing_jobs import healed_folder, healed_unit
from orchestrator.stages.timing import measuring_hardware, throughput_unit, time_models
from tasks.evaluation import EvaluationUnit, base_unit

LENGTHS = "lengths"
"""What progress and failures call the timings over prompt lengths."""


def measure(run: RunContext) -> bool:
    """Judges, then times. Failed finalists stay as rows; the rest goes on."""
    found = finalists(run)
    units = {finalist: evaluation_unit(run, finalist) for finalist in found}
    spec = run.inputs.full_spec
    names: dict[EvaluationUnit, dict[str, Any]] = {unit: _name(finalist) for finalist, unit in units.items()}
    healed_keys = {units[finalist]: finalist.healed_key for finalist in found if finalist.healed_key is not None}
    run.state.finalists = [
        FinalistEntry(finalist, unit_key(run.inputs.scores(unit, spec, finalist.healed_key)))
        for finalist, unit in units.items()
    ]
    branches = branch_units(run)
    names |= {unit: {**_name(finalist), "kind": "branches"} for unit, finalist in branches.items()}
    healed_keys |= {unit: finalist.healed_key for unit, finalist in branches.items() if finalist.healed_key is not None}
    run.state.branches = [
        BranchesEntry(finalist, unit_key(run.inputs.scores(unit, spec, finalist.healed_key)))
        for unit, finalist in branches.items()
    ]
    run.evaluate("measure", spec, names, healed_keys)
    run.save()
    _time(run, found)
    return True


def finalists(run: RunContext) -> list[Finalist]:
    """The rows of pareto.csv: the base, the fixed points of the search, the healed candidates."""
    origins = {trial.plan: trial.origin for trial in reversed(run.state.trials)}
    unhealed = [Finalist(plan, origin) for plan, origin in origins.items() if origin not in ("search", REFINED)]
    order = [trial.origin for trial in run.state.trials]
    unhealed.sort(key=lambda finalist: order.index(finalist.origin))
    return unhealed + _healed(run)


def branch_units(run: RunContext) -> dict[EvaluationUnit, Finalist]:
    """What asks healed plans for the worth of their branches, where a text reaches the linear one."""
    spec = run.inputs.full_spec
    return {
        EvaluationUnit("branches", checkpoint=healed_folder(run, finalist.plan)): finalist
        for finalist in _healed(run)
        # Sequences that a window covers never reach the linear branch.
        if finalist.plan.count(Treatment.LINEAR_WINDOW)
        and spec.text is not None
        and spec.sequence_tokens > (finalist.plan.window or 0)
    }


def _healed(run: RunContext) -> list[Finalist]:
    return [Finalist(entry.plan, entry.origin, entry.key) for entry in run.state.healed]


def evaluation_unit(run: RunContext, finalist: Finalist) -> EvaluationUnit:
    """What judges a finalist."""
    if finalist.healed_key is not None:
        return healed_unit(run, finalist.plan)
    return base_unit() if finalist.origin == "base" else EvaluationUnit(plan=finalist.plan)


def _name(finalist: Finalist) -> dict[str, str]:
    return {"plan": str(finalist.plan), "origin": finalist.origin, "healed": "yes" if finalist.healed_key else "no"}


def _time(run: RunContext, found: list[Finalist]) -> None:
    """Times the finalists under every serving condition, then over lengths."""
    recipe = run.inputs.recipe.throughput
    conditions = [(concurrency, recipe.prompt_tokens) for concurrency in recipe.concurrency]
    hardware = measuring_hardware(run)
    run.state.throughput = _timings(run, THROUGHPUT, found, conditions, hardware)
    if recipe.lengths is not None:
        conditions = [(recipe.lengths.concurrency, tokens) for tokens in recipe.lengths.prompt_tokens]
        run.state.lengths = _timings(run, LENGTHS, found, conditions, hardware)


def _timings(
    run: RunContext, stage: str, found: list[Finalist], conditions: list[tuple[int, int]], hardware: str
) -> list[TimingEntry]:
    """What `run.json` lists of the timings of finalists under pairs of concurrency and prompt tokens."""
    units = {}
    for finalist in found:
        judged = evaluation_unit(run, finalist)
        for concurrency, prompt_tokens in conditions:
            unit = throughput_unit(
                run, judged.plan, concurrency, prompt_tokens=prompt_tokens, checkpoint=judged.checkpoint
            )
            units[unit] = finalist
    named = {unit: (_name(finalist), finalist.healed_key) for unit, finalist in units.items()}
    keys = time_models(run, stage, named, hardware)
    return [
        TimingEntry(finalist, unit.concurrency, unit.prompt_tokens, unit.new_tokens, keys[unit])
        for unit, finalist in units.items()
    ]
