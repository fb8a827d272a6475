"""Runs stage `heal`: one job each distils the most promising plans and their baselines from their parent."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from layerboost.healing.spec import mark_steps
from layerboost.plan import Plan
from orchestrator.run.context import RunContext
from orchestrator.run.entries import BaselineEntry, HealedEntry
from orchestrator.run.folder import unit_key
from orchestrator.run.kinds import HALVING, HEALINGS, RACE, REFINE
from orchestrator.run.records import find_record
from orchestrator.run.units import StageUnits, Unit, recorded_seconds
from orchestrator.stages.baselines import baselines, n_open_baselines
from orchestrator.stages.candidates import candidates, say_that_none_is_allowed
from orchestrator.stages.curve import curve_entries, curve_units, measure_curves, snapshot_folder
from orchestrator.stages.halving import halve, halving_units
from orchestrator.stages.healing_jobs import (
    CHECKPOINTS,
    TEACHER_CACHE,
    healed_name,
    healed_unit,
    healing_job,
    healing_result,
)
from orchestrator.stages.sampled import list_documents, sample_text
from orchestrator.stages.speed import speedup
from tasks.healing.job import HealingProgress
from tasks.healing.orphaned_groups import freeing_groups_of_the_dead
from tasks.healing.run import heal as heal_on_cluster
from tasks.pool.pool import finish_on_interrupt
from tasks.pool.watch import UnitEvent

_MARKER = "healing.json"
_PROGRESS_LINES = 10


def units(run: RunContext) -> None:
    """Lists the documents, the healings of rungs, the full healings and the points of their curves.

    Candidates, and the baselines with the same budgets, are open until the search and the rungs have determined them.
    Puts the plans that will be healed into the run's state, with the keys of their healing.
    """
    healing = run.inputs.recipe.healing
    if not healing.tokens:
        return
    chosen = None
    if run.is_settled("search", RACE, REFINE):
        chosen = candidates(run, None if healing.halving is None else healing.halving.plans)
    if healing.halving is not None:
        chosen = halving_units(run, chosen)
    origins = _origins(run, chosen or [])
    n_open_others = n_open_baselines(run, chosen)
    n_open_candidates = healing.candidates if chosen is None else 0
    listing = _list_healings(run, origins, n_open=n_open_candidates + n_open_others)
    if run.inputs.sampling is not None:
        list_documents(run, needed=not (listing.is_complete and run.is_settled(HALVING)))
    keys = {unit.work: unit.key for unit in listing.units}
    run.state.healed = [healed_entry(run, plan, origins[plan], key) for plan, key in keys.items()]
    n_open = len(mark_steps(run.inputs.healing_spec, healing.curve)) * listing.n_open + n_open_others
    if healing.curve and run.inputs.search_quality_spec != run.inputs.full_spec:
        n_open += n_open_candidates
    curve_units(run, list(keys.items()) if healing.curve else [], _baseline_plans(run), n_open=n_open)


def _list_healings(run: RunContext, origins: Mapping[Plan, str], *, n_open: int = 0) -> StageUnits:
    """Lists the healings of some plans; a healing whose checkpoint is not in its folder has to run again."""

    def took(units: Sequence[Unit]) -> list[float | None]:
        seconds = recorded_seconds(run.folder, units)
        return [
            took if is_healed(run, unit.work, unit.identity) else None
            for unit, took in zip(units, seconds, strict=True)
        ]

    named = [
        Unit(HEALINGS, (run.inputs.healing(plan),), {"plan": str(plan), "origin": origin}, plan)
        for plan, origin in origins.items()
    ]
    return run.list_units("heal", named, n_open=n_open, look=took)


def heal(run: RunContext) -> bool:
    """Heals the plans that are not healed yet; a failure is reported and the other plans continue."""
    if not run.inputs.recipe.healing.tokens:
        return True
    origins = plans_to_heal(run)
    listing = _list_healings(run, origins)
    identities = {unit.work: unit.identity for unit in listing.units}
    todo = [unit.work for unit in listing.todo]
    if run.inputs.sampling is not None:
        list_documents(run, needed=bool(todo))
    if todo and not sample_text(run):
        todo = []  # without text nothing can be healed, but plans healed earlier are still measured
    run.begin(listing)
    with finish_on_interrupt() as interrupt, freeing_groups_of_the_dead():
        for plan in todo:
            _heal(run, plan, origins[plan], identities[plan])
            if interrupt.requested:
                raise KeyboardInterrupt
    run.progress.end_stage()
    keys = {plan: unit_key(identity) for plan, identity in identities.items() if is_healed(run, plan, identity)}
    _judge_curves(run, keys)
    for key in keys.values():  # a killed run may have left checkpoints and snapshots
        run.folder.remove(f"{CHECKPOINTS}/{key}")
        if not run.inputs.recipe.healing.curve:
            run.folder.remove(snapshot_folder(key))
    run.folder.remove(TEACHER_CACHE)
    run.state.healed = [healed_entry(run, plan, origins[plan], key) for plan, key in keys.items()]
    return True


def plans_to_heal(run: RunContext) -> dict[Plan, str]:
    """Returns the candidates, then the baselines, each with its origin; lists the baselines in the run's state."""
    halving = run.inputs.recipe.healing.halving
    chosen = candidates(run, None if halving is None else halving.plans)
    if not chosen:
        say_that_none_is_allowed(run)
    if halving is not None:
        chosen = halve(run, chosen)
    return _origins(run, chosen)


def _origins(run: RunContext, chosen: Sequence[Plan]) -> dict[Plan, str]:
    """Returns candidates and their baselines, each with its origin; lists the baselines in the run's state."""
    searched = {trial.plan: trial.origin for trial in reversed(run.state.trials)}
    others = baselines(run, chosen)
    run.state.baselines = [
        BaselineEntry(plan, origin, speedup(run, plan), unit_key(run.inputs.plan_scores(plan, run.inputs.full_spec)))
        for plan, origin in others.items()
    ]
    return {plan: searched[plan] for plan in chosen} | others


def _judge_curves(run: RunContext, keys: dict[Plan, str]) -> None:
    """Judges the baselines before healing, because no search has judged them, and the curves of the healed plans."""
    healed = list(keys.items()) if run.inputs.recipe.healing.curve else []
    measure_curves(run, healed, _baseline_plans(run))


def _baseline_plans(run: RunContext) -> list[Plan]:
    return [baseline.plan for baseline in run.state.baselines]


def healed_entry(run: RunContext, plan: Plan, origin: str, key: str) -> HealedEntry:
    """Returns the entry of `run.json` for a healed plan."""
    quality_key = unit_key(run.inputs.scores(healed_unit(run, plan), run.inputs.full_spec, key))
    curve = curve_entries(run, plan, key) if run.inputs.recipe.healing.curve else []
    return HealedEntry(plan, origin, key, quality_key, tuple(curve))


def is_healed(run: RunContext, plan: Plan, identity: dict[str, Any]) -> bool:
    """Returns whether the healing is recorded and the checkpoint in its folder is the recorded one."""
    marker, key = f"{healed_name(plan)}/{_MARKER}", unit_key(identity)
    if find_record(run.folder, key, HEALINGS) is None or not run.folder.exists(marker):
        return False
    return json.loads(run.folder.read_bytes(marker))["key"] == key


def _heal(run: RunContext, plan: Plan, origin: str, identity: dict[str, Any]) -> None:
    key, start = unit_key(identity), time.monotonic()
    job = healing_job(run, plan, key, run.healing_workers())
    every = max(1, job.spec.steps // _PROGRESS_LINES)

    def on_progress(step: HealingProgress) -> None:
        if step.step % every == 0 or step.step == step.total_steps:
            run.progress.note(
                f"heal step {step.step}/{step.total_steps}",
                plan=plan,
                phase=step.phase,
                loss=f"{step.loss:.4f}",
                tok_per_s=round(step.tok_per_s),
                left_s=round(step.remaining_s),
            )

    name = {"plan": str(plan), "origin": origin}
    run.progress.unit_event(UnitEvent("started", plan), name)
    try:
        result = heal_on_cluster(job, on_progress=on_progress)
    except Exception as error:  # whatever stopped this plan, the other plans can still be healed
        run.progress.unit_event(UnitEvent("failed", plan, seconds=time.monotonic() - start), name)
        run.failed("heal", {**plan.to_dict(), "origin": origin}, f"{type(error).__name__}: {error}")
        return
    run.progress.unit_event(UnitEvent("done", plan, seconds=time.monotonic() - start), name)
    run.folder.write_text(f"{healed_name(plan)}/{_MARKER}", json.dumps({"key": key, "tokens": result.tokens}))
    run.record("heal", identity, healing_result(job, result, time.monotonic() - start))
    run.folder.remove(f"{CHECKPOINTS}/{key}")
    run.progress.finish_unit(time.monotonic() - start, plan=plan, origin=origin, loss=f"{result.final_loss:.4f}")
