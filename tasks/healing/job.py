"""What a healing job is, and what each of its processes loads."""

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
    """What a process has just done: `step` counts from 1 over both phases.

    `rank` is a worker's; in a transfer by layer, where each layer has a process of its own, it is the layer.
    """

    phase: str
    step: int
    rank: int


@dataclass(frozen=True)
class HealingProgress:
    """One step as the driver sees it; `remaining_s` is judged by the pace since the job (re)started its phase."""

    phase: str
    step: int
    total_steps: int
    tokens: int
    loss: float
    elapsed_s: float
    remaining_s: float


class ProgressClock:
    """Times a stretch of steps that starts behind the run's step `first_step`."""

    def __init__(self, first_step: int):
        self.first_step, self.start = first_step, time.monotonic()

    def progress(self, row: CurveRow, total_steps: int) -> HealingProgress:
        elapsed_s = time.monotonic() - self.start
        remaining_s = elapsed_s / (row.step - self.first_step) * (total_steps - row.step)
        return HealingProgress(row.phase, row.step, total_steps, row.tokens, row.loss, elapsed_s, remaining_s)


@dataclass(frozen=True)
class HealingJob:
    """One plan to heal. What follows `output` is placement: it changes where and how safely, not the result.

    Attributes:
        model: path or hub name of the untouched parent.
        sources, apart: the text, as `pack_sources` takes it; every worker must reach it.
        teacher, teacher_revision: another model of the same vocabulary that the healed one learns from; the parent if
            None. Attention is always transferred from the parent.
        output: folder or fsspec URL of the healed checkpoint; rank 0's host must reach it. None saves none, but a
            snapshot of what was trained after the last step.
        storage_path, name: where the checkpoints are kept, a folder or URL that every host reaches. The same two again
            go on with the run, on any number of workers and in any ZeRO stage; with another plan, spec, mixture of
            texts or way of transfer they start over. Another model, teacher or text needs another name.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; float16 is trained in float32.
        snapshots, snapshot_url: shares of the budget at which the trained parameters are written to
            `<snapshot_url>/<step>.safetensors` (a folder or fsspec URL that rank 0's host reaches), for `student_from`.
        n_workers: of the Train job; as many layers are fitted at once in a transfer by layer.
        node_labels: of the nodes that workers may go to, none where any will do.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3; 0 is run as 1, which notices gradients that are not numbers.
        zero_options: further settings of DeepSpeed's `zero_optimization`.
        offload_optimizer: keep the optimizer's state in the host's memory and step there; needs ZeRO.
        transfer: `together` fits all linear_window layers in one pass of the parent; `by_layer` gives each a Ray task
            of its own, which needs the memory of one layer and runs the models once for each layer.
        max_failures: worker failures to survive, -1 for any number; of each layer in a transfer by layer.
        step_timeout_s: a process of the job that finishes no step for so long is taken for hung and ends itself, as
            one of the failures to survive; None waits for ever.
        metadata_servers: asked for notice that a worker's spot machine is going to be taken away.
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
        """Identifies what a checkpoint can be resumed by.

        Places of model and texts are not in it, since they may move, nor is the micro batch, since memory may run out.
        """
        texts = [[source.weight, source.split, source.field, source.format] for source in self.sources]
        teacher = [self.teacher is not None, self.teacher_revision]
        plan, spec = self.plan.plan_id, replace(self.spec, micro_batch_sequences=None).to_dict()
        same = [self.revision, self.dtype, plan, spec, texts, self.apart, teacher, self.transfer]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    @property
    def snapshot_steps(self) -> list[int]:
        """The steps that a snapshot is taken after."""
        return list(mark_steps(self.spec, self.snapshots))

    @property
    def transfer_phase(self) -> Phase | None:
        """The phase that a transfer by layer takes out of the Train job; None where there is none."""
        phases = phases_of(self.spec, self.plan, hidden_size=1)  # which matters to the healing phase alone
        return phases[0] if self.transfer == BY_LAYER and phases[0].name == TRANSFER else None


def located(job: HealingJob) -> HealingJob:
    """The job with paths that mean the same to driver and workers.

    Relative paths of models and texts stay as they are in a Ray job that ships a working directory: every node unpacks
    it at a place of its own, which is where its workers run.
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
    """Sets what a process of the job needs before anything is loaded: the accelerator, its threads, less to read."""
    import transformers

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, int(job.cpus_per_worker)))
    logging.getLogger().setLevel(logging.WARNING)  # Ray reports every checkpoint outside its own loggers
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def load_parent(job: HealingJob) -> PreTrainedModel:
    """The untouched parent in the job's dtype, on the CPU."""
    parent = load_model(
        job.model,
        dtype="auto" if job.dtype == "auto" else getattr(torch, job.dtype),
        revision=job.revision,
        trust_remote_code=job.trust_remote_code,
    )
    return parent.float() if parent.dtype == torch.float16 else parent


def load_text(job: HealingJob, tokenizer: PreTrainedTokenizerBase) -> PackedText:
    """The job's sequences: those of all its steps, and behind them those that are held out."""
    spec = job.spec
    n_sequences = spec.steps * spec.batch_sequences
    if spec.stop_when_flat is not None:
        n_sequences += spec.held_out_sequences
    return pack_sources(job.sources, tokenizer, spec.sequence_tokens, n_sequences, apart=job.apart)
