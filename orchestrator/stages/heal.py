"""Stage `heal`: the most promising plans and their baselines distilled from their parent, one job each."""

from __future__ import annotations

import json
import time
from typing import Any

from layerboost.plan import Plan
from orchestrator.run.context import RunContext
from orchestrator.run.entries import BaselineEntry, HealedEntry
from orchestrator.run.folder import unit_key
from orchestrator.stages.baselines import baselines
from orchestrator.stages.candidates import candidates, say_that_none_is_allowed
from orchestrator.stages.curve import curve_entries, measure_curves, snapshot_folder
from orchestrator.stages.halving import halve
from orchestrator.stages.healing_jobs import (
    CHECKPOINTS,
    healed_name,
    healed_unit,
    healing_job,
    healing_result,
)
from orchestrator.stages.sampled import sample_text
from orchestrator.stages.speed import speedup
from tasks.healing.job import HealingProgress
from tasks.healing.orphaned_groups import freeing_groups_of_the_dead
from tasks.healing.run import heal as heal_on_cluster
from tasks.pool.pool import finish_on_interrupt
from tasks.pool.watch import UnitEvent

_MARKER = "healing.json"
_PROGRESS_LINES = 10


def heal(run: RunContext) -> bool:
    """Heals the plans that are not healed yet. Failed ones are named; the rest goes on."""
    if not run.inputs.recipe.healing.tokens:
        return True
    origins = plans_to_heal(run)
    identities = {plan: run.inputs.healing(plan) for plan in origins}
    todo = [plan for plan in origins if not is_healed(run, plan, identities[plan])]
    if todo and not sample_text(run):
        todo = []  # what is healed already is measured all the same
    run.progress.start_stage("heal", len(origins), recorded=len(origins) - len(todo))
    with finish_on_interrupt() as interrupt, freeing_groups_of_the_dead():
        for plan in todo:
            _heal(run, plan, origins[plan], identities[plan])
            if interrupt.requested:
                raise KeyboardInterrupt
    run.progress.end_stage()
    keys = {plan: unit_key(identity) for plan, identity in identities.items() if is_healed(run, plan, identity)}
    _judge_curves(run, keys)
    for key in keys.values():  # a killed run may have left them
        run.folder.remove(f"{CHECKPOINTS}/{key}")
        if not run.inputs.recipe.healing.curve:
            run.folder.remove(snapshot_folder(key))
    run.state.healed = [healed_entry(run, plan, origins[plan], key) for plan, key in keys.items()]
    return True


def plans_to_heal(run: RunContext) -> dict[Plan, str]:
    """The candidates, then the baselines, each with its origin. Lists the baselines in the run's state."""
    searched = {trial.plan: trial.origin for trial in reversed(run.state.trials)}
    halving = run.inputs.recipe.healing.halving
    chosen = candidates(run, None if halving is None else halving.plans)
    if not chosen:
        say_that_none_is_allowed(run)
    if halving is not None:
        chosen = halve(run, chosen)
    others = baselines(run, chosen)
    run.state.baselines = [
        BaselineEntry(plan, origin, speedup(run, plan), unit_key(run.inputs.plan_scores(plan, run.inputs.full_spec)))
        for plan, origin in others.items()
    ]
    return {plan: searched[plan] for plan in chosen} | others


def _judge_curves(run: RunContext, keys: dict[Plan, str]) -> None:
    """Quality of the baselines, which no search has judged, before healing; then the curve of what is healed."""
    healed = list(keys.items()) if run.inputs.recipe.healing.curve else []
    measure_curves(run, healed, [baseline.plan for baseline in run.state.baselines])


def healed_entry(run: RunContext, plan: Plan, origin: str, key: str) -> HealedEntry:
    """What `run.json` lists of a healed plan."""
    quality_key = unit_key(run.inputs.scores(healed_unit(run, plan), run.inputs.full_spec, key))
    curve = curve_entries(run, plan, key) if run.inputs.recipe.healing.curve else []
    return HealedEntry(plan, origin, key, quality_key, tuple(curve))


def is_healed(run: RunContext, plan: Plan, identity: dict[str, Any]) -> bool:
    """Whether the healing is recorded, and the checkpoint in its folder is the recorded one."""
    marker, key = f"{healed_name(plan)}/{_MARKER}", unit_key(identity)
    if run.folder.read_record("heal", key) is None or not run.folder.exists(marker):
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
                left_s=round(step.remaining_s),
            )

    name = {"plan": str(plan), "origin": origin}
    run.progress.unit_event(UnitEvent("started", plan), name)
    try:
        result = heal_on_cluster(job, on_progress=on_progress)
    except Exception as error:  # whatever stopped it, the other plans can still be healed
        run.progress.unit_event(UnitEvent("failed", plan, seconds=time.monotonic() - start), name)
        run.failed("heal", {**plan.to_dict(), "origin": origin}, f"{type(error).__name__}: {error}")
        return
    run.progress.unit_event(UnitEvent("done", plan, seconds=time.monotonic() - start), name)
    run.folder.write_text(f"{healed_name(plan)}/{_MARKER}", json.dumps({"key": key, "tokens": result.tokens}))
    run.record("heal", identity, healing_result(job, result, time.monotonic() - start))
    run.folder.remove(f"{CHECKPOINTS}/{key}")
    run.progress.finish_unit(time.monotonic() - start, plan=plan, origin=origin, loss=f"{result.final_loss:.4f}")
