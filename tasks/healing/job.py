"""Defines a healing job and what each of its processes loads."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerboost.checkpoint import load_model
from layerboost.healing.spec import TRANSFER, HealingSpec, Phase, mark_steps, phases_of
from layerboost.healing.training import CurveRow, accumulation_rounds
from layerboost.plan import Plan
from layerboost.text.batches import PackedText
from layerboost.text.sources import TextSource, pack_sources
from tasks.healing.termination import CLOUDS, MetadataServers

TOGETHER, BY_LAYER = "together", "by_layer"


@dataclass(frozen=True)
class StepEvent:
    """Reports the step that a process has just finished; `step` counts from 1 over both phases.

    `rank` is the rank of the worker. In a transfer by layer, where each layer has its own process, it is the layer.
    """

    phase: str
    step: int
    rank: int


@dataclass(frozen=True)
class HealingProgress:
    """Reports one step to the driver; `remaining_s` follows from the pace since the job (re)started its phase."""

    phase: str
    step: int
    total_steps: int
    tokens: int
    loss: float
    elapsed_s: float
    remaining_s: float


class ProgressClock:
    """Times the steps that follow the run's step `first_step`."""

    def __init__(self, first_step: int):
        self.first_step, self.start = first_step, time.monotonic()

    def progress(self, row: CurveRow, total_steps: int) -> HealingProgress:
        elapsed_s = time.monotonic() - self.start
        remaining_s = elapsed_s / (row.step - self.first_step) * (total_steps - row.step)
        return HealingProgress(row.phase, row.step, total_steps, row.tokens, row.loss, elapsed_s, remaining_s)


@dataclass(frozen=True)
class HealingJob:
    """Describes one plan to heal.

    The attributes after `output` are placement: they change where and how safely the job runs, but not its result.

    Attributes:
        model: path or hub name of the untouched parent.
        sources, apart: the text in the form that `pack_sources` takes; every worker must reach it.
        teacher, teacher_revision: another model of the same vocabulary that the healed model learns from; None takes
            the parent. Attention is always transferred from the parent.
        output: folder or fsspec URL of the healed checkpoint; rank 0's host must reach it. With None only a snapshot of
            the trained parameters is saved, after the last step.
        storage_path, name: place and name of the job's checkpoints; every host must reach the folder or URL. A job with
            the same two continues the run, on any number of workers and in any ZeRO stage; with another plan, spec,
            mixture of texts or way of transfer it starts over. Another model, teacher or text needs another name.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; float16 is trained in float32.
        snapshots, snapshot_url: shares of the budget at which the trained parameters are written to
            `<snapshot_url>/<step>.safetensors` (a folder or fsspec URL that rank 0's host reaches), for `student_from`.
        n_workers: the workers of the Train job; a transfer by layer fits this number of layers at once.
        node_labels: the labels of the nodes on which workers may run; without labels any node will do.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3; 0 runs as 1, which notices NaN and infinite gradients.
        zero_options: further settings of DeepSpeed's `zero_optimization`.
        offload_optimizer: whether the optimizer's state stays in the host's memory and steps there; this needs ZeRO.
        transfer: `together` fits all linear_window layers in one pass of the parent. `by_layer` gives each layer its
            own Ray task, which needs the memory of one layer only but runs the models once for each layer.
        max_failures: the worker failures that the job survives, -1 for any number; a transfer by layer counts them for
            each layer.
        step_timeout_s: a process that finishes no step for this time counts as hung and ends itself, which is one of
            the failures to survive; None waits for ever.
        metadata_servers: the servers that give notice before a worker's spot machine is taken away.
        on_step: called in every process after each step and its checkpoint.
        card: facts for the model card.
    """

    model: str
    plan: Plan
    spec: HealingSpec
    sources: tuple[TextSource, ...]
    output: str | None
    storage_path: str
    name: str
    revision: str | None = None
    teacher: str | None = None
    teacher_revision: str | None = None
    apart: bool = False
    dtype: str = "auto"
    trust_remote_code: bool = False
    snapshots: tuple[float, ...] = ()
    snapshot_url: str | None = None
    n_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    node_labels: tuple[tuple[str, str], ...] = ()
    zero_stage: int = 2
    zero_options: Mapping[str, Any] | None = None
    offload_optimizer: bool = False
    transfer: str = TOGETHER
    checkpoint_every_steps: int = 50
    max_failures: int = 3
    step_timeout_s: float | None = None
    metadata_servers: MetadataServers = CLOUDS
    on_step: Callable[[StepEvent], None] | None = None
    card: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: there are none; name at least one text")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage: {self.zero_stage} is unknown; use 0, 1, 2 or 3")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(f"offload_optimizer: {self.offload_optimizer} needs zero_stage 1, 2 or 3, not 0")
        if self.transfer not in (TOGETHER, BY_LAYER):
            raise ValueError(f"transfer: '{self.transfer}' is unknown; use {TOGETHER} or {BY_LAYER}")
        if (self.snapshots or self.output is None) and self.snapshot_url is None:
            raise ValueError("snapshot_url: None leaves no place for the snapshots; give a folder or URL")
        for name in ("n_workers", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        accumulation_rounds(self.spec, self.n_workers)

    @property
    def fingerprint(self) -> str:
        """Identifies the jobs that can resume a checkpoint of this job.

        It leaves out the places of model and texts, which may move, and the micro batch, which may shrink when memory
        runs out.
        """
        texts = [[source.weight, source.split, source.field, source.format] for source in self.sources]
        teacher = [self.teacher is not None, self.teacher_revision]
        plan, spec = self.plan.plan_id, replace(self.spec, micro_batch_sequences=None).to_dict()
        same = [self.revision, self.dtype, plan, spec, texts, self.apart, teacher, self.transfer]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    @property
    def snapshot_steps(self) -> list[int]:
        """Returns the steps after which a snapshot is taken."""
        return list(mark_steps(self.spec, self.snapshots))

    @property
    def transfer_phase(self) -> Phase | None:
        """Returns the phase that a transfer by layer runs outside the Train job; None without one."""
        phases = phases_of(self.spec, self.plan, hidden_size=1)  # matters only to the healing phase
        return phases[0] if self.transfer == BY_LAYER and phases[0].name == TRANSFER else None


def located(job: HealingJob) -> HealingJob:
    """Returns the job with paths that mean the same to driver and workers.

    In a Ray job with a working directory, relative paths of models and texts stay as they are: every node unpacks that
    directory at another place, and its workers run there.
    """
    import ray

    ships_folder = ray.is_initialized() and ray.get_runtime_context().runtime_env.get("working_dir")

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    def found(path: str) -> str:
        return path if ships_folder or not Path(path).expanduser().exists() else absolute(path)

    return replace(
        job,
        model=found(job.model),
        teacher=None if job.teacher is None else found(job.teacher),
        sources=tuple(replace(source, path=found(str(source.path))) for source in job.sources),
        output=None if job.output is None else absolute(job.output),
        storage_path=absolute(job.storage_path),
        snapshot_url=None if job.snapshot_url is None else absolute(job.snapshot_url),
    )


def prepare_process(job: HealingJob) -> None:
    """Prepares a process of the job before anything is loaded: the accelerator, the threads and a quieter log."""
    import transformers

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, int(job.cpus_per_worker)))
    logging.getLogger().setLevel(logging.WARNING)  # Ray reports every checkpoint outside its own loggers
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def load_parent(job: HealingJob) -> PreTrainedModel:
    """Loads the untouched parent in the job's dtype, on the CPU."""
    parent = load_model(
        job.model,
        dtype="auto" if job.dtype == "auto" else getattr(torch, job.dtype),
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    return parent.float() if parent.dtype == torch.float16 else parent


def load_text(job: HealingJob, tokenizer: PreTrainedTokenizerBase) -> PackedText:
    """Loads the job's sequences: first those of all its steps, then those that are held out."""
    spec = job.spec
    n_sequences = spec.steps * spec.batch_sequences
    if spec.stop_when_flat is not None:
        n_sequences += spec.held_out_sequences
    return pack_sources(job.sources, tokenizer, spec.sequence_tokens, n_sequences, apart=job.apart)
