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

from layerboost.affine import MapsSpec
from layerboost.checkpoint import ModelSource
from layerboost.environ import keep_freed_memory
from layerboost.healing.spec import TRANSFER, HealingSpec, Phase, mark_steps, phases_of
from layerboost.healing.training import CurveRow, accumulation_rounds
from layerboost.plan import Plan
from layerboost.text.batches import PackedText
from layerboost.text.sources import TextSource, pack_sources
from tasks.cluster.resources import WorkerResources
from tasks.healing.termination import CLOUDS, MetadataServers

TOGETHER, BY_LAYER = "together", "by_layer"

_ONE_WORKER = WorkerResources(1, 1.0, 0.0)


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
    """Reports one step to the driver; the last two follow from its phase since the job (re)started."""

    phase: str
    step: int
    total_steps: int
    tokens: int
    loss: float
    elapsed_s: float
    remaining_s: float
    tok_per_s: float


class ProgressClock:
    """Times the steps that follow the run's step `first_step`."""

    def __init__(self, first_step: int):
        self.first_step, self.start = first_step, time.monotonic()

    def progress(self, row: CurveRow, total_steps: int) -> HealingProgress:
        elapsed_s = time.monotonic() - self.start
        of_each_s = elapsed_s / (row.step - self.first_step)
        remaining_s, tok_per_s = of_each_s * (total_steps - row.step), row.tokens / row.step / of_each_s
        return HealingProgress(
            row.phase, row.step, total_steps, row.tokens, row.loss, elapsed_s, remaining_s, tok_per_s
        )


@dataclass(frozen=True)
class HealingText:
    """Describes the text that a healing reads.

    Attributes:
        sources, apart: the text in the form that `pack_sources` takes; every worker must reach it.
    """

    sources: tuple[TextSource, ...]
    apart: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: there are none; name at least one text")


@dataclass(frozen=True)
class Checkpoints:
    """Names the place of the checkpoints from which an interrupted healing continues.

    Attributes:
        storage_path, name: the place of the checkpoints, a folder or URL that every host reaches, and the name of the
            job in it. A job with the same two continues the run, on any number of workers and in any ZeRO stage. With
            another plan, spec, mixture of texts or way of transfer it starts over. Another model, teacher or text needs
            another name.
        every_steps: the steps from one checkpoint to the next.
    """

    storage_path: str
    name: str
    every_steps: int = 50

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"checkpoints.every_steps: {self.every_steps} must be at least 1")

    @property
    def folder(self) -> str:
        """Returns the folder or URL of this job's files."""
        return f"{self.storage_path.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class Snapshots:
    """Says which trained parameters a healing stores for `student_from`, with its checkpoint or instead of it.

    Attributes:
        url: the folder or fsspec URL of the snapshots; rank 0's host must reach it.
        shares: the shares of the budget at which a snapshot is written.
    """

    url: str | None = None
    shares: tuple[float, ...] = ()

    def file(self, step: int) -> str:
        """Returns the path or URL of the snapshot after a step."""
        assert self.url is not None
        return f"{self.url.rstrip('/')}/{step}.safetensors"


@dataclass(frozen=True)
class TeacherCache:
    """Says where the jobs of one teacher and dtype share its hidden states.

    Attributes:
        folder: a local folder that all workers reach. ZeRO stage 3 does not use it: all workers must run the teacher,
            whose weights are divided among them, or none.
        max_gib: size from which on nothing is added.
    """

    folder: str
    max_gib: float = 8.0


@dataclass(frozen=True)
class ZeroSettings:
    """Says how DeepSpeed's ZeRO divides what the workers hold.

    Attributes:
        stage: DeepSpeed's ZeRO stage, 0 to 3; 0 runs as 1, which notices gradients that are NaN or infinite.
        offload_optimizer: whether the optimizer's state stays in the host's memory and steps there; this needs ZeRO.
        options: further settings of DeepSpeed's `zero_optimization`.
    """

    stage: int = 2
    offload_optimizer: bool = False
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"zero.stage: {self.stage} is unknown; use 0, 1, 2 or 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(f"zero.offload_optimizer: {self.offload_optimizer} needs stage 1, 2 or 3, not 0")


@dataclass(frozen=True)
class Survival:
    """Says which failures a job survives.

    Attributes:
        max_failures: the worker failures that the job survives, -1 for any number; a transfer by layer counts them for
            each layer.
        step_timeout_s: a process of the job that finishes no step for this time counts as hung and ends itself, which
            is one of the failures to survive; None waits for ever.
        metadata_servers: the servers to ask whether a worker's spot machine will be taken away.
    """

    max_failures: int = 3
    step_timeout_s: float | None = None
    metadata_servers: MetadataServers = CLOUDS


@dataclass(frozen=True, kw_only=True)
class HealingJob:
    """Describes the healing of one plan.

    The fields after `transfer` change where and how safely the job runs, but not its result.

    Attributes:
        parent: the untouched model. Its `device` is ignored, because `workers` says where the job computes.
        plan: the plan that the parent is converted to.
        spec: the way in which it is trained. float16 models are trained in float32.
        text: the text that it is trained on.
        teacher: another model of the same vocabulary that the healed model learns from; None takes the parent.
            Attention is always transferred from the parent.
        maps: what the maps of affine layers are fitted on, one after another, before the healing begins; None leaves
            those of the parent's source. A layer's rank is that of its map there, and full if there is none.
        transfer: `together` fits all linear_window layers in one pass of the parent; `by_layer` gives each a Ray task
            of its own, which needs the memory of one layer and runs the models once for each layer.
        checkpoints: the name of the job, and the place of what it continues from.
        output: the folder or fsspec URL of the healed checkpoint; rank 0's host must reach it. With None the job saves
            no checkpoint but a snapshot of what was trained after the last step.
        snapshots: the states on the way that are kept.
        teacher_cache: where jobs on the same text share what the teacher computes; None computes it in each job.
        workers: the workers of the Train job; a transfer by layer fits as many layers at once.
        zero: the division of the state among the workers.
        survival: the failures that the job survives.
        on_step: called in every process after each step and its checkpoint.
        card: facts for the model card.
    """

    parent: ModelSource
    plan: Plan
    spec: HealingSpec
    text: HealingText
    teacher: ModelSource | None = None
    maps: MapsSpec | None = None
    transfer: str = TOGETHER
    checkpoints: Checkpoints
    output: str | None
    snapshots: Snapshots = Snapshots()
    teacher_cache: TeacherCache | None = None
    workers: WorkerResources = _ONE_WORKER
    zero: ZeroSettings = ZeroSettings()
    survival: Survival = Survival()
    on_step: Callable[[StepEvent], None] | None = None
    card: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.transfer not in (TOGETHER, BY_LAYER):
            raise ValueError(f"transfer: '{self.transfer}' is unknown; use {TOGETHER} or {BY_LAYER}")
        if (self.snapshots.shares or self.output is None) and self.snapshots.url is None:
            raise ValueError("snapshots.url: None leaves no place for the snapshots; give a folder or URL")
        if self.workers.n_workers < 1:
            raise ValueError(f"workers.n_workers: {self.workers.n_workers} must be at least 1")
        accumulation_rounds(self.spec, self.workers.n_workers)

    @property
    def name(self) -> str:
        """Returns the name of the job, which is unique in its storage path."""
        return self.checkpoints.name

    @property
    def fingerprint(self) -> str:
        """Identifies the jobs that can resume a checkpoint of this job.

        It leaves out the places of model and texts, which may move, and the micro batch, which may shrink when memory
        runs out.
        """
        texts = [[source.weight, source.split, source.field, source.format] for source in self.text.sources]
        teacher = [False, None] if self.teacher is None else [True, self.teacher.revision]
        plan, spec = self.plan.plan_id, replace(self.spec, micro_batch_sequences=None).to_dict()
        same = [self.parent.revision, self.parent.dtype, plan, spec, texts, self.text.apart, teacher, self.transfer]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    @property
    def snapshot_steps(self) -> list[int]:
        """Returns the steps after which a snapshot is taken."""
        return list(mark_steps(self.spec, self.snapshots.shares))

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

    def found_model(source: ModelSource) -> ModelSource:
        return replace(source, path=found(source.path), maps=None if source.maps is None else absolute(source.maps))

    def found_text(source: TextSource) -> TextSource:
        return replace(source, path=found(str(source.path)))

    sources = tuple(map(found_text, job.text.sources))
    return replace(
        job,
        parent=found_model(job.parent),
        teacher=None if job.teacher is None else found_model(job.teacher),
        text=replace(job.text, sources=sources),
        maps=None if job.maps is None else replace(job.maps, source=found_text(job.maps.source)),
        output=None if job.output is None else absolute(job.output),
        checkpoints=replace(job.checkpoints, storage_path=absolute(job.checkpoints.storage_path)),
        snapshots=replace(job.snapshots, url=None if job.snapshots.url is None else absolute(job.snapshots.url)),
        teacher_cache=None
        if job.teacher_cache is None
        else replace(job.teacher_cache, folder=absolute(job.teacher_cache.folder)),
    )


def prepare_process(job: HealingJob) -> None:
    """Prepares a process of the job before anything is loaded: the accelerator, the threads and a quieter log."""
    import transformers

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(job.workers.threads)
    keep_freed_memory()
    logging.getLogger().setLevel(logging.WARNING)  # Ray reports every checkpoint outside its own loggers
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def load_parent(job: HealingJob) -> PreTrainedModel:
    """Loads the untouched parent in the job's dtype, on the CPU."""
    parent: PreTrainedModel = replace(job.parent, device="cpu").load()
    return parent.float() if parent.dtype == torch.float16 else parent


def load_text(job: HealingJob, tokenizer: PreTrainedTokenizerBase) -> PackedText:
    """Loads the job's sequences: first those of all its steps, then those that are held out."""
    spec = job.spec
    n_sequences = spec.steps * spec.batch_sequences
    if spec.stop_when_flat is not None:
        n_sequences += spec.held_out_sequences
    return pack_sources(job.text.sources, tokenizer, spec.sequence_tokens, n_sequences, apart=job.text.apart)
