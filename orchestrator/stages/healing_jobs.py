"""The jobs of stage `heal`: what heals a plan of this run, on what part of the cluster, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from layerboost.healing.spec import HealingSpec, mark_steps
from layerboost.plan import Plan
from layerboost.text.sources import TextSource
from orchestrator.recipe.healing import SAMPLED
from orchestrator.run.content import shipped
from orchestrator.run.context import RunContext, placed
from orchestrator.run.inputs import RunInputs
from orchestrator.stages.curve import snapshot_folder
from orchestrator.stages.sampled import sampled_folder
from tasks.cluster import connection
from tasks.cluster.resources import (
    MAX_AUTO_CPU_WORKERS_PER_NODE,
    NodeResources,
    WorkerResources,
    labelled,
    with_node_to_come,
)
from tasks.evaluation import EvaluationUnit
from tasks.healing.job import Checkpoints, HealingJob, HealingText, Snapshots, Survival, ZeroSettings
from tasks.healing.run import HealingResult
from tasks.pool.finished import SHRUNK

CHECKPOINTS = "healing"
"""Where the checkpoints of healing that is under way are kept, in the run folder."""


def healed_name(plan: Plan) -> str:
    """Name of a healed checkpoint in the run folder."""
    return f"healed/{plan.plan_id}"


def healed_folder(run: RunContext, plan: Plan) -> str:
    """Path or URL of a healed checkpoint."""
    return run.folder.place(healed_name(plan))


def healing_result(job: HealingJob, result: HealingResult, duration_s: float) -> dict[str, Any]:
    """What is recorded of a healing."""
    shares = mark_steps(job.spec, job.snapshots.shares)
    return {
        "tokens": result.tokens,
        "budget": job.spec.steps * job.spec.tokens_per_step,
        "final_loss": result.final_loss,
        "curve": [row.to_dict() for row in result.curve],
        "held_out": [{"step": at.step, "divergence": at.divergence} for at in result.measured],
        "stopped_early": result.stopped_early,
        "snapshots": [
            {"step": step, "share": shares.get(step, step / job.spec.steps)} for step in sorted(result.snapshots)
        ],
        "duration_s": duration_s,
        "n_workers": job.workers.n_workers,
        **({SHRUNK: {"micro_batch_sequences": smaller}} if (smaller := result.micro_batch_sequences) else {}),
    }


def healing_job(run: RunContext, plan: Plan, key: str, workers: WorkerResources) -> HealingJob:
    """The job that heals a plan; its name is the unit's key, so that it resumes from its own checkpoints."""
    inputs, folder = run.inputs, run.folder
    healing, spec, teacher = inputs.recipe.healing, inputs.healing_spec, inputs.facts.teacher
    return HealingJob(
        parent=inputs.source,
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
        workers=workers,
        zero=ZeroSettings(healing.zero_stage, healing.offload_optimizer),
        # As if a step took as long as all that lie between two checkpoints, one of which it may have to write.
        survival=Survival(
            healing.max_failures,
            run.unit_timeout_s("heal", of_each=min(1.0, healing.checkpoint_every_steps / spec.steps)),
        ),
        card={"healing method": spec.method},
    )


def rung_job(run: RunContext, plan: Plan, key: str, spec: HealingSpec, workers: WorkerResources) -> HealingJob:
    """The job that heals a plan by another spec, and keeps what it trained instead of a checkpoint."""
    job = healing_job(run, plan, key, workers)
    return replace(job, spec=spec, output=None, snapshots=replace(job.snapshots, shares=()))


def healing_sources(run: RunContext) -> tuple[TextSource, ...]:
    """The recipe's texts as healing reads them; sampled text is where `sample_text` has left it."""
    return tuple(
        TextSource(sampled_folder(run), weight=text.weight or 1.0, format="tokens")
        if text.format == SAMPLED
        else text.source()
        for text in run.inputs.healing_texts
    )


def healing_workers(run: RunContext, n_jobs: int = 1) -> WorkerResources:
    """As the recipe says; `auto` takes every GPU that a step has a sequence for, or one worker with a node's CPUs.

    Args:
        n_jobs: jobs that may run side by side.
    """
    run.connect()
    labels = run.inputs.recipe.placement.labels.heal
    nodes = with_node_to_come(connection.resources(), connection.addable(), labels)
    wanted = healing_placement(run.inputs, nodes, n_jobs)
    return placed(lambda: connection.resolve_workers(*wanted, nodes=nodes, labels=labels))


def healing_placement(inputs: RunInputs, nodes: Sequence[NodeResources], n_jobs: int = 1) -> tuple[int, float, float]:
    """Workers of one job, and CPUs and GPUs of each, that healing takes of some nodes; they may be more than there are.

    Jobs side by side share the CPUs, since starting a job keeps one CPU busy however many it has. They do not share the
    GPUs: fewer for each would have to hold more.
    """
    placement, batch = inputs.recipe.placement, inputs.healing_spec.batch_sequences
    nodes = labelled(nodes, placement.labels.heal)
    n_gpus = 0 if placement.gpus_per_worker == 0 else int(sum(node.gpus for node in nodes))
    asked = placement.healing_workers
    n_workers = max(1, min(n_gpus, batch)) if asked == "auto" else int(asked)
    if n_gpus:
        return n_workers, 1.0, 1.0
    # As many CPUs for each as all of them can have, whatever node they come to lie on.
    largest = int(max((node.cpus for node in nodes), default=1))
    n_jobs = min(n_jobs, max(1, MAX_AUTO_CPU_WORKERS_PER_NODE * len(nodes) // n_workers))
    fitting = (c for c in range(largest, 1, -1) if sum(node.cpus // c for node in nodes) >= n_workers * n_jobs)
    return n_workers, float(next(fitting, 1)), 0.0


def healed_unit(run: RunContext, plan: Plan) -> EvaluationUnit:
    """What judges a healed checkpoint."""
    return EvaluationUnit(checkpoint=healed_folder(run, plan))
