"""What each worker of a healing job does: the phases in a DeepSpeed engine, checkpoints, the healed model's folder."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layerboost.adapters import add_lora
from layerboost.batches import GlobalBatches, PackedText
from layerboost.checkpoint import load_model, load_tokenizer, save_checkpoint
from layerboost.convert import convert
from layerboost.data import pack, read_documents
from layerboost.distillation import make_trainee
from layerboost.healing_spec import Phase, phases_of
from layerboost.training import (
    ADAM_BETAS,
    CurveRow,
    NonFiniteLossError,
    accumulation_rounds,
    finish_student,
    run_phase,
)

from .healing import HealingJob, HealingProgress, StepEvent

_PROGRESS_FILE, _ENGINE_TAG = "progress.json", "engine"

log = logging.getLogger(__name__)


def run_healing_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's function on each worker: all phases from the last checkpoint on, then the checkpoint's folder.

    Args:
        config: `job`, and `progress`, an actor handle or None.

    Returns:
        `curve` as dictionaries, or `error`, the message of a NonFiniteLossError (returned, since to try again would
        only find it again).
    """
    import transformers
    from ray import train

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, int(config["job"].cpus_per_worker)))
    logging.getLogger().setLevel(logging.WARNING)  # Ray reports every checkpoint outside its own loggers
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    checkpoint = train.get_checkpoint()
    try:
        if checkpoint is None:
            return _Worker(config["job"], config["progress"], None).run()
        with checkpoint.as_directory() as folder:
            return _Worker(config["job"], config["progress"], Path(folder)).run()
    except NonFiniteLossError as error:
        return {"error": str(error)}


class _Worker:
    """One worker's way through the phases of a job."""

    def __init__(self, job: HealingJob, progress: Any, restored: Path | None):
        from ray import train
        from ray.train.torch import get_device

        self.job, self.spec, self.progress = job, job.spec, progress
        self.rank, self.world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
        self.device = get_device()
        self.curve: list[dict[str, Any]] = []
        self.restored = self._usable(restored)
        self.tokenizer = load_tokenizer(job.model, revision=job.revision, trust_remote_code=job.trust_remote_code)
        documents = read_documents(job.text, split=job.split, field=job.field)
        n_sequences = self.spec.steps * self.spec.batch_sequences
        sequences = pack(documents, self.tokenizer, self.spec.sequence_tokens, limit_sequences=n_sequences)
        self.batches = GlobalBatches(PackedText(sequences), self.spec.batch_sequences, self.spec.seed)

    def _usable(self, folder: Path | None) -> Path | None:
        """The restored folder, if it is of this job; takes its curve over."""
        if folder is None:
            return None
        state = json.loads((folder / _PROGRESS_FILE).read_text())
        if state["fingerprint"] != self.job.fingerprint:
            log.warning("checkpoint of %s is of another job, workers or ZeRO stage: starting over", self.job.name)
            return None
        self.curve = state["curve"]
        return folder

    def run(self) -> dict[str, Any]:
        trained: dict[str, torch.Tensor] = {}
        for phase in phases_of(self.spec, self.job.plan, self._load_config().hidden_size):
            done = len(self.curve) - phase.first_step
            resumes = self.restored is not None and self.curve[-1]["phase"] == phase.name
            if done >= phase.steps and not resumes:
                continue  # the checkpoint is of a later phase
            trained = self._run_phase(phase, trained, done if resumes else 0, resumes)
        if self.rank == 0:
            self._save(trained)
        return {"curve": self.curve}

    def _run_phase(self, phase: Phase, trained: dict, start: int, resumes: bool) -> dict[str, torch.Tensor]:
        """Trains a phase; returns what it trained, by the student's parameter names, on every worker."""
        teacher, student = self._load_pair(trained)
        trainee = make_trainee(phase.name, teacher, student, self.spec)
        engine = self._engine(trainee, phase)
        if resumes:
            engine.load_checkpoint(str(self.restored), tag=_ENGINE_TAG, load_module_strict=False)
        clock = _Clock(phase.first_step + start)

        def on_step(row: CurveRow) -> None:
            self.curve.append(row.to_dict())
            if self.rank == 0 and self.progress is not None:
                self.progress.put.remote(clock.progress(row, self.spec.steps))
            ends = row.step == phase.first_step + phase.steps
            if ends or row.step % self.job.checkpoint_every_steps == 0:
                self._report(engine, row)
            if self.job.on_step is not None:
                self.job.on_step(StepEvent(phase.name, row.step, self.rank))

        run_phase(
            engine,
            phase,
            self.batches,
            self.spec,
            start=start,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            sum_over_workers=_sum_over_workers,
            on_step=on_step,
        )
        trained = trained_parameters(student, self._zero_stage(student))
        engine.destroy()
        return trained

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(
            self.job.model, revision=self.job.revision, trust_remote_code=self.job.trust_remote_code
        ).get_text_config()

    def _load_pair(self, trained: dict[str, torch.Tensor]) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The parent from disk and its conversion, which shares its parameters and holds what was trained so far."""
        job = self.job
        teacher = load_model(
            job.model,
            dtype="auto" if job.dtype == "auto" else getattr(torch, job.dtype),
            revision=job.revision,
            trust_remote_code=job.trust_remote_code,
        )
        if teacher.dtype == torch.float16:
            teacher = teacher.float()
        student = convert(teacher, job.plan, parent=job.model, revision=job.revision)
        _load_trained(student, trained)
        return teacher, student

    def _zero_stage(self, module: nn.Module) -> int:
        return max(self.job.zero_stage, 1) if next(module.parameters()).dtype == torch.bfloat16 else self.job.zero_stage

    def _engine(self, trainee: nn.Module, phase: Phase) -> Any:
        import deepspeed

        # DeepSpeed would compile this at first use, and a worker killed meanwhile leaves a lock that stops all others.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        trainable = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.0, betas=ADAM_BETAS, weight_decay=self.spec.weight_decay)
        in_bfloat16 = next(trainee.parameters()).dtype == torch.bfloat16
        engine, *_ = deepspeed.initialize(
            model=trainee,
            optimizer=optimizer,
            model_parameters=trainable,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,  # for its own log only: the loop deals out the batches
                "gradient_accumulation_steps": accumulation_rounds(self.spec, self.world_size),
                "gradient_clipping": phase.gradient_clip,
                "zero_optimization": {"stage": self._zero_stage(trainee), **(self.job.zero_options or {})},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": in_bfloat16},
                "steps_per_print": 10**9,
            },
        )
        return engine

    def _report(self, engine: Any, row: CurveRow) -> None:
        from ray import train

        with tempfile.TemporaryDirectory() as folder:
            engine.save_checkpoint(folder, tag=_ENGINE_TAG, exclude_frozen_parameters=True)
            if self.rank == 0:
                state = {"fingerprint": self.job.fingerprint, "curve": self.curve}
                (Path(folder) / _PROGRESS_FILE).write_text(json.dumps(state))
            train.report(row.to_dict(), checkpoint=train.Checkpoint.from_directory(folder))

    def _save(self, trained: dict[str, torch.Tensor]) -> None:
        _, student = self._load_pair({})
        if self.spec.method == "lora":
            add_lora(student, self.spec.rank, self.spec.alpha, self.spec.seed)
        _load_trained(student, trained)
        finish_student(student, self.spec)
        card = dict(self.job.card) if self.job.card is not None else None
        publish_folder(lambda folder: save_checkpoint(student, self.tokenizer, folder, card=card), self.job.output)


class _Clock:
    """Times a stretch of steps that starts behind the run's step `first_step`."""

    def __init__(self, first_step: int):
        self.first_step, self.start = first_step, time.monotonic()

    def progress(self, row: CurveRow, total_steps: int) -> HealingProgress:
        elapsed_s = time.monotonic() - self.start
        remaining_s = elapsed_s / (row.step - self.first_step) * (total_steps - row.step)
        return HealingProgress(row.phase, row.step, total_steps, row.tokens, row.loss, elapsed_s, remaining_s)


def trained_parameters(student: nn.Module, zero_stage: int) -> dict[str, torch.Tensor]:
    """Whole trainable parameters of a student inside an engine, by name, on the CPU; all workers must call it."""
    import deepspeed

    trained = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=zero_stage == 3):
                trained[name] = parameter.detach().cpu().clone()
    return trained


def _load_trained(student: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Gives a student its trained parameters, as parameters of its own where they are shared."""
    replaced = {id(p): torch.nn.Parameter(trained[n]) for n, p in student.named_parameters() if n in trained}
    for module in student.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in replaced:
                module._parameters[name] = replaced[id(parameter)]


def publish_folder(write: Callable[[str], Any], output: str) -> None:
    """Writes a folder so that it is at `output` whole or not at all; `output` is a path or an fsspec URL.

    Args:
        write: writes the files into the local folder that it is given.
        output: replaced if it is there.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    filesystem, path = fsspec.core.url_to_fs(output)
    path = path.rstrip("/")
    part = f"{path}.writing"
    if filesystem.exists(part):
        filesystem.rm(part, recursive=True)
    if isinstance(filesystem, LocalFileSystem):
        Path(part).mkdir(parents=True)
        write(part)
        if Path(path).exists():
            filesystem.rm(path, recursive=True)
        os.rename(part, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        filesystem.put(f"{folder}/", f"{part}/", recursive=True)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)
    filesystem.mv(f"{part}/", f"{path}/", recursive=True)


def _sum_over_workers(value: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    dist.all_reduce(value)
    return value
