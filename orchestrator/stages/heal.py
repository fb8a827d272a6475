"""Stage `heal`: the most promising plans distilled from their parent, one Ray Train job each."""

from __future__ import annotations

import json
import time
from typing import Any

from layerboost.pareto import choose_spread
from layerboost.plan import Plan
from orchestrator.context import RunContext, placed
from orchestrator.identity import shipped
from orchestrator.run_folder import unit_key
from tasks import cluster
from tasks.healing import HealingJob, HealingProgress
from tasks.healing import heal as heal_on_cluster

CHECKPOINTS = "healing"
"""Where Ray Train keeps the checkpoints of healing that is under way, in the run folder."""

REFINED = "refined"
"""Origin of plans that refinement found."""

_MARKER = "healing.json"
_PROGRESS_LINES = 10


def heal(run: RunContext) -> bool:
    """Heals the candidates that are not healed yet. Failed ones are named; the rest goes on."""
    if not run.inputs.recipe.healing.tokens:
        return True
    plans = candidates(run)
    identities = {plan: run.inputs.healing(plan) for plan in plans}
    todo = [plan for plan in plans if not is_healed(run, plan, identities[plan])]
    run.progress.start_stage("heal", len(plans), recorded=len(plans) - len(todo))
    for plan in todo:
        _heal(run, plan, identities[plan])
    run.state.healed = [
        {**plan.to_dict(), "key": unit_key(identities[plan])}
        for plan in plans
        if is_healed(run, plan, identities[plan])
    ]
    run.progress.end_stage()
    return True


def candidates(run: RunContext) -> list[Plan]:
    """The searched and given plans to heal: those that spread best over quality and predicted speed."""
    trials = [trial for trial in run.state.trials if trial["quality"] is not None]
    distinct = {Plan.from_dict(trial): trial for trial in reversed(trials)}
    origins = ("search", "given", REFINED)
    pool = sorted(
        (plan for plan, trial in distinct.items() if trial["origin"] in origins and trial["speedup"] > 1),
        key=lambda plan: (distinct[plan]["speedup"], str(plan)),
    )
    points = [(distinct[plan]["quality"], distinct[plan]["speedup"]) for plan in pool]
    worst = min((trial["quality"] for trial in trials), default=0.0)
    return [pool[index] for index in choose_spread(points, run.inputs.recipe.healing.candidates, (worst, 1.0))]


def healed_name(plan: Plan) -> str:
    """Name of a healed checkpoint in the run folder."""
    return f"healed/{plan.plan_id}"


def healed_folder(run: RunContext, plan: Plan) -> str:
    """Path or URL of a healed checkpoint."""
    return (
        str(run.folder.local_path(healed_name(plan)))
        if run.folder.is_local
        else f"{run.folder.url}/{healed_name(plan)}"
    )


def is_healed(run: RunContext, plan: Plan, identity: dict[str, Any]) -> bool:
    """Whether the healing is recorded, and the checkpoint in its folder is the recorded one."""
    marker, key = f"{healed_name(plan)}/{_MARKER}", unit_key(identity)
    if run.folder.read_record("heal", key) is None or not run.folder.exists(marker):
        return False
    return json.loads(run.folder.read_bytes(marker))["key"] == key


def _heal(run: RunContext, plan: Plan, identity: dict[str, Any]) -> None:
    key, start = unit_key(identity), time.monotonic()
    job = healing_job(run, plan, key)
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

    try:
        result = heal_on_cluster(job, on_progress=on_progress)
    except Exception as error:  # whatever stopped it, the other candidates can still be healed
        run.failed("heal", plan.to_dict(), f"{type(error).__name__}: {error}")
        return
    run.folder.write_text(f"{healed_name(plan)}/{_MARKER}", json.dumps({"key": key, "tokens": result.tokens}))
    measured = {
        "tokens": result.tokens,
        "final_loss": result.final_loss,
        "curve": [row.to_dict() for row in result.curve],
        "duration_s": time.monotonic() - start,
        "n_workers": job.n_workers,
    }
    run.record("heal", identity, measured)
    run.folder.remove(f"{CHECKPOINTS}/{key}")
    run.progress.finish_unit(time.monotonic() - start, plan=plan, loss=f"{result.final_loss:.4f}")


def healing_job(run: RunContext, plan: Plan, key: str) -> HealingJob:
    """The Ray Train job that heals a plan; its name is the unit's key, so that it resumes from its own checkpoints."""
    inputs, folder = run.inputs, run.folder
    healing, spec = inputs.recipe.healing, inputs.healing_spec
    workers = healing_workers(run)
    assert healing.text is not None
    return HealingJob(
        model=inputs.source.path,
        plan=plan,
        spec=spec,
        text=shipped(healing.text),
        output=healed_folder(run, plan),
        storage_path=str(folder.local_path(CHECKPOINTS)) if folder.is_local else f"{folder.url}/{CHECKPOINTS}",
        name=key,
        revision=inputs.source.revision,
        dtype=inputs.source.dtype,
        trust_remote_code=inputs.source.trust_remote_code,
        split=healing.split,
        field=healing.field,
        n_workers=workers.n_workers,
        cpus_per_worker=workers.cpus,
        gpus_per_worker=workers.gpus,
        zero_stage=healing.zero_stage,
        checkpoint_every_steps=healing.checkpoint_every_steps,
        max_failures=healing.max_failures,
        card={"healing tokens": spec.steps * spec.tokens_per_step, "healing method": spec.method},
    )


def healing_workers(run: RunContext) -> cluster.WorkerResources:
    """As the recipe says; `auto` takes as many GPUs as divide the batch, or one worker with a node's CPUs."""
    run.connect()
    placement, batch = run.inputs.recipe.placement, run.inputs.healing_spec.batch_sequences
    nodes = cluster.resources()
    n_gpus = 0 if placement.gpus_per_worker == 0 else int(sum(node.gpus for node in nodes))
    if placement.healing_workers != "auto":
        n_workers = int(placement.healing_workers)
    else:
        n_workers = max(n for n in range(1, max(n_gpus, 1) + 1) if batch % n == 0)
    cpus = 1.0 if n_gpus else max(1.0, min(nodes[0].cpus, sum(node.cpus for node in nodes) // n_workers))
    return placed(lambda: cluster.resolve_workers(n_workers, cpus, 1.0 if n_gpus else 0.0))
