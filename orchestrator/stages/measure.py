"""Runs stage `report`: it judges the finalists by everything and times them under every serving condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerboost.plan import Treatment
from orchestrator.run.context import RunContext
from orchestrator.run.entries import BranchesEntry, Finalist, FinalistEntry, TimingEntry
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import LENGTHS, THROUGHPUT
from orchestrator.run.state import REFINED
from orchestrator.stages.healing_jobs import healed_folder, healed_unit
from orchestrator.stages.timing import list_timings, measuring_hardware, throughput_unit, time_models
from tasks.evaluation import EvaluationUnit, base_unit
from tasks.timing import ThroughputUnit


def measure(run: RunContext) -> bool:
    """Judges the finalists, then times them; a failed finalist stays as a row and the others continue."""
    found, spec = finalists(run), run.inputs.full_spec
    run.state.finalists = [
        FinalistEntry(finalist, unit_key(run.inputs.scores(evaluation_unit(run, finalist), spec, finalist.healed_key)))
        for finalist in found
    ]
    run.state.branches = [
        BranchesEntry(finalist, unit_key(run.inputs.scores(unit, spec, finalist.healed_key)))
        for unit, finalist in branch_units(run).items()
    ]
    run.evaluate("measure", spec, *_judged(run, found))
    run.save()
    _time(run, found)
    return True


def units(run: RunContext) -> None:
    """Lists the evaluations of the finalists, then their timings; those of plans that are not known yet are open."""
    found, spec = finalists(run), run.inputs.full_spec
    n_open_plans = run.listings["heal"].n_open if "heal" in run.listings else 0
    # The estimate assumes that half of the plans have a layer with branches.
    n_open_branches = 0 if spec.text is None else round(n_open_plans / 2)
    run.list_scores("measure", spec, *_judged(run, found), n_open=n_open_plans + n_open_branches)
    hardware = measuring_hardware(run)
    for stage, conditions in _conditions(run).items():
        timed = _timed(run, found, conditions)
        list_timings(run, stage, _named(timed), hardware, n_open=n_open_plans * len(conditions))


def _judged(
    run: RunContext, found: Sequence[Finalist]
) -> tuple[dict[EvaluationUnit, dict[str, Any]], dict[EvaluationUnit, str]]:
    """Returns the units that judge the finalists and their branches, with their names and the keys of healings."""
    asked: list[tuple[EvaluationUnit, Finalist, dict[str, str]]]
    asked = [(evaluation_unit(run, finalist), finalist, {}) for finalist in found]
    asked += [(unit, finalist, {"kind": "branches"}) for unit, finalist in branch_units(run).items()]
    names: dict[EvaluationUnit, dict[str, Any]] = {unit: {**_name(finalist), **more} for unit, finalist, more in asked}
    return names, {unit: of.healed_key for unit, of, _ in asked if of.healed_key is not None}


def finalists(run: RunContext) -> list[Finalist]:
    """Returns the rows of pareto.csv: the base, the fixed points of the search, the healed plans."""
    origins = {trial.plan: trial.origin for trial in reversed(run.state.trials)}
    unhealed = [Finalist(plan, origin) for plan, origin in origins.items() if origin not in ("search", REFINED)]
    order = [trial.origin for trial in run.state.trials]
    unhealed.sort(key=lambda finalist: order.index(finalist.origin))
    return unhealed + _healed(run)


def branch_units(run: RunContext) -> dict[EvaluationUnit, Finalist]:
    """Returns the units that measure the branches of healed plans, if the text is long enough to use the linear one."""
    spec = run.inputs.full_spec
    return {
        EvaluationUnit("branches", checkpoint=healed_folder(run, finalist.plan)): finalist
        for finalist in _healed(run)
        # Sequences that fit into the window never reach the linear branch.
        if finalist.plan.count(Treatment.LINEAR_WINDOW)
        and spec.text is not None
        and spec.sequence_tokens > (finalist.plan.window or 0)
    }


def _healed(run: RunContext) -> list[Finalist]:
    return [Finalist(entry.plan, entry.origin, entry.key) for entry in run.state.healed]


def evaluation_unit(run: RunContext, finalist: Finalist) -> EvaluationUnit:
    """Returns the unit that judges a finalist."""
    if finalist.healed_key is not None:
        return healed_unit(run, finalist.plan)
    return base_unit() if finalist.origin == "base" else EvaluationUnit(plan=finalist.plan)


def _name(finalist: Finalist) -> dict[str, str]:
    return {"plan": str(finalist.plan), "origin": finalist.origin, "healed": "yes" if finalist.healed_key else "no"}


def _time(run: RunContext, found: list[Finalist]) -> None:
    """Times the finalists under every serving condition, then over prompt lengths."""
    conditions, hardware = _conditions(run), measuring_hardware(run)
    run.state.throughput = _timings(run, THROUGHPUT, found, conditions[THROUGHPUT], hardware)
    if LENGTHS in conditions:
        run.state.lengths = _timings(run, LENGTHS, found, conditions[LENGTHS], hardware)


def _conditions(run: RunContext) -> dict[str, list[tuple[int, int]]]:
    """Returns the pairs of concurrency and prompt tokens for each stage that times finalists."""
    recipe = run.inputs.recipe.throughput
    conditions = {THROUGHPUT: [(concurrency, recipe.prompt_tokens) for concurrency in recipe.concurrency]}
    if recipe.lengths is not None:
        conditions[LENGTHS] = [(recipe.lengths.concurrency, tokens) for tokens in recipe.lengths.prompt_tokens]
    return conditions


def _timed(
    run: RunContext, found: Sequence[Finalist], conditions: Sequence[tuple[int, int]]
) -> dict[ThroughputUnit, Finalist]:
    """Returns the units that time the finalists under some conditions."""
    units = {}
    for finalist in found:
        judged = evaluation_unit(run, finalist)
        for concurrency, prompt_tokens in conditions:
            unit = throughput_unit(
                run, judged.plan, concurrency, prompt_tokens=prompt_tokens, checkpoint=judged.checkpoint
            )
            units[unit] = finalist
    return units


def _named(units: Mapping[ThroughputUnit, Finalist]) -> dict[ThroughputUnit, tuple[dict[str, Any], str | None]]:
    return {unit: (_name(finalist), finalist.healed_key) for unit, finalist in units.items()}


def _timings(
    run: RunContext, stage: str, found: list[Finalist], conditions: list[tuple[int, int]], hardware: str
) -> list[TimingEntry]:
    """Times finalists under pairs of concurrency and prompt tokens, and returns the entries of `run.json`."""
    units = _timed(run, found, conditions)
    keys = time_models(run, stage, _named(units), hardware)
    return [
        TimingEntry(finalist, unit.concurrency, unit.prompt_tokens, unit.new_tokens, keys[unit])
        for unit, finalist in units.items()
    ]
