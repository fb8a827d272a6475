"""Makes the jobs of stage `heal`: how and with which workers a plan of this run is healed, and what is recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from layerboost.healing.spec import HealingSpec, mark_steps
from layerboost.plan import Plan
from layerboost.text.sources import TextSource
from orchestrator.recipe.healing import SAMPLED
from orchestrator.run.content import shipped
from orchestrator.run.context import RunContext
from orchestrator.run.folder import unit_key
from orchestrator.stages.curve import snapshot_folder
from orchestrator.stages.sampled import sampled_folder
from tasks.cluster.resources import WorkerResources
from tasks.evaluation import EvaluationUnit
from tasks.healing.job import Checkpoints, HealingJob, HealingText, Snapshots, Survival, TeacherCache, ZeroSettings
from tasks.healing.run import HealingResult
from tasks.pool.finished import SHRUNK

CHECKPOINTS = "healing"
"""Folder inside the run folder that holds the checkpoints of running healings."""

TEACHER_CACHE = "teacher_states"
"""Folder inside the run folder that holds the teacher's hidden states while plans are healed."""


def healed_name(plan: Plan) -> str:
    """Returns the name of a healed checkpoint in the run folder."""
    return f"healed/{plan.plan_id}"


def healed_folder(run: RunContext, plan: Plan) -> str:
    """Returns the path or URL of a healed checkpoint."""
    return run.folder.place(healed_name(plan))


def healing_result(job: HealingJob, result: HealingResult, duration_s: float) -> dict[str, Any]:
    """Returns the result of a healing that is recorded."""
    shares = mark_steps(job.spec, job.snapshots.shares)
    return {
        "tokens": result.tokens,
        "budget": job.spec.steps * job.spec.tokens_per_step,
        "final_loss": result.final_loss,
        "curve": [row.to_dict() for row in result.curve],
        "held_out": [{"step": at.step, "divergence": at.divergence} for at in result.measured],
        "stopped_early": result.stopped_early,
        "tok_per_s": result.tok_per_s,
        "snapshots": [
            {"step": step, "share": shares.get(step, step / job.spec.steps)} for step in sorted(result.snapshots)
        ],
        "duration_s": duration_s,
        "n_workers": job.workers.n_workers,
        **({SHRUNK: {"micro_batch_sequences": smaller}} if (smaller := result.micro_batch_sequences) else {}),
    }


def healing_job(run: RunContext, plan: Plan, key: str, workers: WorkerResources) -> HealingJob:
    """Returns the job that heals a plan; its name is the unit's key, so that it resumes from its own checkpoints."""
    inputs, folder = run.inputs, run.folder
    healing, spec, teacher = inputs.recipe.healing, inputs.healing_spec, inputs.facts.teacher
    return HealingJob(
        parent=run.source,
        maps=inputs.maps_spec,
        plan=plan,
        spec=spec,
        text=HealingText(healing_sources(run), apart=healing.documents == "apart"),
        teacher=None
        if teacher is None
        else replace(inputs.source, path=shipped(teacher.path), revision=teacher.commit or healing.teacher_revision),
        transfer=healing.transfer,
        checkpoints=Checkpoints(folder.place(CHECKPOINTS), key, healing.checkpoint_every_steps),
        output=healed_folder(run, plan),
        snapshots=Snapshots(folder.place(snapshot_folder(key)), healing.curve),
        teacher_cache=teacher_cache(run),
        workers=workers,
        zero=ZeroSettings(healing.zero_stage, healing.offload_optimizer),
        # A step counts as long as all steps between two checkpoints, because it may have to write a checkpoint.
        survival=Survival(
            healing.max_failures,
            run.unit_timeout_s("heal", of_each=min(1.0, healing.checkpoint_every_steps / spec.steps)),
        ),
        card={"healing method": spec.method},
    )


def teacher_cache(run: RunContext) -> TeacherCache | None:
    """Returns where healings of this run share the teacher's states.

    It is None if there is one healing, or no disk, and where the states of the last layer are not all that is needed.
    """
    healing = run.inputs.recipe.healing
    n_healings = healing.candidates + len(healing.baselines) + (0 if healing.halving is None else healing.halving.plans)
    is_usable = healing.zero_stage < 3 and not healing.hidden_weight
    if not (healing.teacher_cache_gib and run.folder.is_local and n_healings > 1 and is_usable):
        return None
    name = unit_key(run.inputs.teacher)
    return TeacherCache(run.folder.place(f"{TEACHER_CACHE}/{name}"), healing.teacher_cache_gib)


def rung_job(run: RunContext, plan: Plan, key: str, spec: HealingSpec, workers: WorkerResources) -> HealingJob:
    """Returns the job that heals a plan by another spec, and keeps the trained parameters instead of a checkpoint."""
    job = healing_job(run, plan, key, workers)
    return replace(job, spec=spec, output=None, snapshots=replace(job.snapshots, shares=()))


def healing_sources(run: RunContext) -> tuple[TextSource, ...]:
    """Returns the recipe's texts as healing reads them; sampled text lies in the folder that `sample_text` wrote."""
    return tuple(
        TextSource(sampled_folder(run), weight=text.weight or 1.0, format="tokens")
        if text.format == SAMPLED
        else text.source()
        for text in run.inputs.healing_texts
    )


def healed_unit(run: RunContext, plan: Plan) -> EvaluationUnit:
    """Returns the unit that judges a healed checkpoint."""
    return EvaluationUnit(checkpoint=healed_folder(run, plan))
