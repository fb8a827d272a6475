"""Stage `heal`: the most promising plans and their baselines distilled from their parent, one job each."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from layerboost.healing_spec import mark_steps
from layerboost.pareto import choose_spread
from layerboost.plan import Plan
from layerboost.sources import TextSource
from orchestrator.context import RunContext, placed
from orchestrator.healing_recipe import SAMPLED
from orchestrator.identity import RunInputs, shipped
from orchestrator.results import CANDIDATE_ORIGINS
from orchestrator.run_folder import unit_key
from orchestrator.stages.baselines import baselines
from orchestrator.stages.curve import curve_entries, measure_curves, snapshot_folder
from orchestrator.stages.sampled import sample_text, sampled_folder
from tasks import cluster
from tasks.ablation import EvaluationUnit
from tasks.healing import HealingJob, HealingProgress
from tasks.healing import heal as heal_on_cluster

CHECKPOINTS = "healing"
"""Where the checkpoints of healing that is under way are kept, in the run folder."""

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
    for plan in todo:
        _heal(run, plan, origins[plan], identities[plan])
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
    searched = {Plan.from_dict(trial): trial["origin"] for trial in reversed(run.state.trials)}
    chosen = candidates(run)
    others = baselines(run, chosen)
    run.state.baselines = [
        {
            **plan.to_dict(),
            "origin": origin,
            "speedup": run.inputs.predicted_speedup(plan),
            "key": unit_key(run.inputs.plan_scores(plan, run.inputs.full_spec)),
        }
        for plan, origin in others.items()
    ]
    return {plan: searched[plan] for plan in chosen} | others


def _judge_curves(run: RunContext, keys: dict[Plan, str]) -> None:
    """Quality of the baselines, which no search has judged, before healing; then the curve of what is healed."""
    healed = list(keys.items()) if run.inputs.recipe.healing.curve else []
    measure_curves(run, healed, [Plan.from_dict(baseline) for baseline in run.state.baselines])


def healed_entry(run: RunContext, plan: Plan, origin: str, key: str) -> dict[str, Any]:
    """What `run.json` lists of a healed plan."""
    return {
        **plan.to_dict(),
        "origin": origin,
        "key": key,
        "quality_key": unit_key(run.inputs.scores(healed_unit(run, plan), run.inputs.full_spec, key)),
        "curve": curve_entries(run, plan, key) if run.inputs.recipe.healing.curve else [],
    }


def candidates(run: RunContext) -> list[Plan]:
    """The searched and given plans to heal: those that spread best over quality and predicted speed."""
    trials = [trial for trial in run.state.trials if trial["quality"] is not None]
    distinct = {Plan.from_dict(trial): trial for trial in reversed(trials)}
    pool = sorted(
        (plan for plan, trial in distinct.items() if trial["origin"] in CANDIDATE_ORIGINS and trial["speedup"] > 1),
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
    return run.folder.place(healed_name(plan))


def healed_unit(run: RunContext, plan: Plan) -> EvaluationUnit:
    """What judges a healed checkpoint."""
    return EvaluationUnit(checkpoint=healed_folder(run, plan))


def is_healed(run: RunContext, plan: Plan, identity: dict[str, Any]) -> bool:
    """Whether the healing is recorded, and the checkpoint in its folder is the recorded one."""
    marker, key = f"{healed_name(plan)}/{_MARKER}", unit_key(identity)
    if run.folder.read_record("heal", key) is None or not run.folder.exists(marker):
        return False
    return json.loads(run.folder.read_bytes(marker))["key"] == key


def _heal(run: RunContext, plan: Plan, origin: str, identity: dict[str, Any]) -> None:
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
    except Exception as error:  # whatever stopped it, the other plans can still be healed
        run.failed("heal", {**plan.to_dict(), "origin": origin}, f"{type(error).__name__}: {error}")
        return
    run.folder.write_text(f"{healed_name(plan)}/{_MARKER}", json.dumps({"key": key, "tokens": result.tokens}))
    shares = mark_steps(job.spec, job.snapshots)
    measured = {
        "tokens": result.tokens,
        "budget": job.spec.steps * job.spec.tokens_per_step,
        "final_loss": result.final_loss,
        "curve": [row.to_dict() for row in result.curve],
        "held_out": [{"step": at.step, "divergence": at.divergence} for at in result.measured],
        "stopped_early": result.stopped_early,
        "snapshots": [
            {"step": step, "share": shares.get(step, step / job.spec.steps)} for step in sorted(result.snapshots)
        ],
        "duration_s": time.monotonic() - start,
        "n_workers": job.n_workers,
    }
    run.record("heal", identity, measured)
    run.folder.remove(f"{CHECKPOINTS}/{key}")
    run.progress.finish_unit(time.monotonic() - start, plan=plan, origin=origin, loss=f"{result.final_loss:.4f}")


def healing_job(run: RunContext, plan: Plan, key: str) -> HealingJob:
    """The job that heals a plan; its name is the unit's key, so that it resumes from its own checkpoints."""
    inputs, folder = run.inputs, run.folder
    healing, spec, teacher = inputs.recipe.healing, inputs.healing_spec, inputs.facts.teacher
    workers = healing_workers(run)
    return HealingJob(
        model=inputs.source.path,
        plan=plan,
        spec=spec,
        sources=healing_sources(run),
        apart=healing.documents == "apart",
        output=healed_folder(run, plan),
        storage_path=folder.place(CHECKPOINTS),
        name=key,
        revision=inputs.source.revision,
        teacher=None if teacher is None else shipped(teacher.path),
        teacher_revision=None if teacher is None else teacher.commit or healing.teacher_revision,
        dtype=inputs.source.dtype,
        trust_remote_code=inputs.source.trust_remote_code,
        snapshots=healing.curve,
        snapshot_url=folder.place(snapshot_folder(key)),
        n_workers=workers.n_workers,
        cpus_per_worker=workers.cpus,
        gpus_per_worker=workers.gpus,
        zero_stage=healing.zero_stage,
        offload_optimizer=healing.offload_optimizer,
        transfer=healing.transfer,
        checkpoint_every_steps=healing.checkpoint_every_steps,
        max_failures=healing.max_failures,
        card={"healing method": spec.method},
    )


def healing_sources(run: RunContext) -> tuple[TextSource, ...]:
    """The recipe's texts as healing reads them; sampled text is where `sample_text` has left it."""
    return tuple(
        TextSource(sampled_folder(run), weight=text.weight or 1.0, format="tokens")
        if text.format == SAMPLED
        else text.source()
        for text in run.inputs.healing_texts
    )


def healing_workers(run: RunContext) -> cluster.WorkerResources:
    """As the recipe says; `auto` takes every GPU that a step has a sequence for, or one worker with a node's CPUs."""
    run.connect()
    nodes = cluster.resources()
    wanted = healing_placement(run.inputs, nodes)
    return placed(lambda: cluster.resolve_workers(*wanted, nodes=nodes))


def healing_placement(inputs: RunInputs, nodes: Sequence[cluster.NodeResources]) -> tuple[int, float, float]:
    """Workers, and CPUs and GPUs of each, that healing takes of some nodes; they may be more than there are."""
    placement, batch = inputs.recipe.placement, inputs.healing_spec.batch_sequences
    n_gpus = 0 if placement.gpus_per_worker == 0 else int(sum(node.gpus for node in nodes))
    asked = placement.healing_workers
    n_workers = max(1, min(n_gpus, batch)) if asked == "auto" else int(asked)
    if n_gpus:
        return n_workers, 1.0, 1.0
    # As many CPUs for each as all of them can have, whatever node they come to lie on.
    largest = int(max(node.cpus for node in nodes))
    fitting = (c for c in range(largest, 1, -1) if sum(node.cpus // c for node in nodes) >= n_workers)
    return n_workers, float(next(fitting, 1)), 0.0
