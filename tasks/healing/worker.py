"""Runs a worker of a healing job: trains the phases in a DeepSpeed engine, writes checkpoints and the healed model."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from layerboost.affine import FittedMap, Rank, load_maps
from layerboost.checkpoint import load_model, save_checkpoint
from layerboost.convert import convert
from layerboost.healing.adapters import load_trained
from layerboost.healing.distillation import make_trainee
from layerboost.healing.spec import HEAL, TRANSFER, HeldOut, Phase, annealing_start, last_step, phases_of
from layerboost.healing.teacher_states import TeacherStates
from layerboost.healing.training import CurveRow, NonFiniteLossError, run_phase, split_held_out, student_from
from layerboost.plan import Treatment
from layerboost.storage.errors import DiskFullError, is_disk_full, retried
from layerboost.storage.publish import publish_folder, publish_tensors
from layerboost.sweep.affine_fits import fit_maps_of_plan, read_sequences
from layerboost.text.batches import GlobalBatches
from tasks.healing.attention_transfer import read_fitted_layers
from tasks.healing.engine import make_engine, release, save_state, saved_parameters, trained_parameters
from tasks.healing.job import HealingJob, ProgressClock, StepEvent, load_parent, load_text, prepare_process
from tasks.healing.micro_batch import note_smaller_micro_batch, with_noted_micro_batch
from tasks.healing.termination import TerminationNoticeError, notice_given
from tasks.pool.out_of_memory import is_out_of_memory
from tasks.pool.watch import HungProcess, ends_if_hung

_PROGRESS_FILE, _STATE_FILE = "progress.json", "state.safetensors"

log = logging.getLogger(__name__)


def run_healing_worker(job: HealingJob, listener: Any) -> dict[str, Any]:
    """Runs all phases from the last checkpoint on, then saves the healed model; Ray Train calls it on each worker.

    Args:
        job: the job.
        listener: an actor handle of a `ProgressBox`, or None.

    Returns:
        A `Progress` as a dictionary; or `error`, the message of a NonFiniteLossError; or `disk_full`, that of a
        DiskFullError. These two are returned and not raised, because Ray Train would try again and meet them again.
    """
    from ray import train

    job = with_noted_micro_batch(job)
    prepare_process(job)
    checkpoint = train.get_checkpoint()
    try:
        with (
            nullcontext() if checkpoint is None else checkpoint.as_directory() as folder,
            ends_if_hung(job.survival.step_timeout_s) as hung,
        ):
            restored = None if folder is None else Path(folder)
            return _Worker(job, listener, restored, hung).run()
    except NonFiniteLossError as error:
        return {"error": str(error)}
    except DiskFullError as error:
        return {"disk_full": str(error)}
    except Exception as error:
        if is_out_of_memory(error):  # Ray Train restarts all workers from the last checkpoint
            note_smaller_micro_batch(job, train.get_context().get_world_size())
        raise


@dataclass(frozen=True)
class Progress:
    """Holds how far a run is; a checkpoint stores it next to the state, and the run returns it. It grows in place.

    `step_s` are the seconds of each step of the healing phase, without snapshots and checkpoints.
    """

    curve: list[CurveRow] = field(default_factory=list)
    measured: list[HeldOut] = field(default_factory=list)
    snapshots: dict[int, str] = field(default_factory=dict)
    step_s: list[float] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Progress:
        return cls(
            curve=[CurveRow(**row) for row in data["curve"]],
            step_s=list(data.get("step_s", [])),  # checkpoints of earlier versions have none
            measured=[HeldOut(**row) for row in data["measured"]],
            snapshots={int(step): url for step, url in data["snapshots"].items()},
        )


def read_progress(folder: Path, fingerprint: str) -> Progress | None:
    """Reads the progress in a checkpoint's folder; None if the checkpoint belongs to a job of another fingerprint."""
    state = json.loads((folder / _PROGRESS_FILE).read_text())
    return Progress.from_dict(state) if state["fingerprint"] == fingerprint else None


class _Worker:
    """Takes one worker through the phases of a job."""

    def __init__(self, job: HealingJob, listener: Any, restored: Path | None, hung: HungProcess):
        from ray import train
        from ray.train.torch import get_device

        self.job, self.spec, self.listener, self.hung = job, job.spec, listener, hung
        self.rank, self.world_size = train.get_context().get_world_rank(), train.get_context().get_world_size()
        self.device = get_device()
        found = None if restored is None else read_progress(restored, job.fingerprint)
        if restored is not None and found is None:
            log.warning("checkpoint of %s is of another plan, spec or text: starting over", job.name)
        self.is_going = False
        self.restored = restored if found is not None else None
        self.done = found or Progress()
        self.tokenizer = job.parent.load_tokenizer()
        text, self.held_out = split_held_out(load_text(job, self.tokenizer), self.spec)
        self.batches = GlobalBatches(text, self.spec.batch_sequences, self.spec.seed)

    def run(self) -> dict[str, Any]:
        trained: dict[str, torch.Tensor] = {}
        if self.restored is None and (phase := self.job.transfer_phase) is not None:
            trained = self._take_over_layers(phase)
        for phase in phases_of(self.spec, self.job.plan, self._load_config().hidden_size):
            resumes = self.restored is not None and self.done.curve[-1].phase == phase.name
            if resumes or len(self.done.curve) <= phase.first_step:  # otherwise this phase is done already
                trained = self._run_phase(phase, trained, resumes)
        if self.job.output is None:
            self._snapshot(self.done.curve[-1].step, trained)
        else:
            output = self.job.output
            self._together(lambda: self._save(trained, output) if self.rank == 0 else None, output)
        return asdict(self.done)

    def _take_over_layers(self, phase: Phase) -> dict[str, torch.Tensor]:
        """Returns what a transfer by layer trained; adds its curve to the progress and writes its snapshots."""
        fitted = read_fitted_layers(self.job, phase)
        for step, loss in enumerate(fitted.losses, start=1):
            self.done.curve.append(CurveRow(TRANSFER, step, step * self.spec.tokens_per_step, loss))
        for step in self.job.snapshot_steps:
            if step <= phase.steps:
                self._snapshot(step, fitted.parameters[step])
        return fitted.parameters[phase.steps]

    def _run_phase(self, phase: Phase, trained: dict[str, torch.Tensor], resumes: bool) -> dict[str, torch.Tensor]:
        """Trains a phase and returns the trained parameters by the student's names; workers that need none get none."""
        parent, student = self._load_pair(trained, fits_maps=phase.name == HEAL and not resumes)
        state_file = self.restored / _STATE_FILE if resumes and self.restored is not None else None
        start = len(self.done.curve) - phase.first_step
        keeps = self.rank == 0 or phase.name == TRANSFER  # all workers continue a transfer, rank 0 saves the model
        if state_file is not None and phase.first_step + start >= self._end_of(phase):
            return saved_parameters(state_file, student.dtype) if keeps else {}
        teacher = self._load_teacher(parent) if phase.name == HEAL else parent
        trainee = make_trainee(phase.name, teacher, student, self.spec, self._teacher_states())
        del parent, teacher
        engine = make_engine(trainee, self.job, phase, self.world_size, state_file)
        clock = ProgressClock(phase.first_step + start)
        step_start = time.monotonic()

        def on_step(row: CurveRow) -> None:
            nonlocal step_start
            if phase.name == HEAL:
                self.done.step_s.append(time.monotonic() - step_start)
            self.hung.alive()
            self.done.curve.append(row)
            if self.rank == 0 and self.listener is not None:
                self.listener.put.remote(asdict(clock.progress(row, self.spec.steps)))
            if row.step in self.job.snapshot_steps:
                self._snapshot(row.step, trained_parameters(engine, keep=self.rank == 0))
            is_going = self.is_going  # summed with the step's loss, so that it is the same on all ranks
            if is_going or row.step == self._end_of(phase) or row.step % self.job.checkpoints.every_steps == 0:
                self._report(engine, row)
            if self.job.on_step is not None:
                self.job.on_step(StepEvent(phase.name, row.step, self.rank))
            if is_going:
                raise TerminationNoticeError(f"a worker will be ended; stopped after the checkpoint of step {row.step}")
            step_start = time.monotonic()

        run_phase(
            engine,
            phase,
            self.batches,
            self.spec,
            start=start,
            held_out=self.held_out,
            measured=self.done.measured,
            rank=self.rank,
            world_size=self.world_size,
            device=self.device,
            sum_over_workers=self._sum,
            on_step=on_step,
        )
        trained = trained_parameters(engine, keep=keeps)
        release(engine)
        return trained

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums a number over the workers; the same call tells all of them whether one has got a termination notice."""
        noticed = torch.full_like(value, float(notice_given()))
        summed = _sum_over_workers(torch.stack([value, noticed]))
        self.is_going = bool(summed[1] > 0)
        return summed[0]

    def _end_of(self, phase: Phase) -> int:
        """Returns the step that ends a phase, judged by the held-out divergence measured so far."""
        return last_step(phase, annealing_start(self.spec, self.done.measured) if phase.name == HEAL else None)

    def _load_config(self) -> Any:
        parent = self.job.parent
        config = AutoConfig.from_pretrained(
            parent.path, revision=parent.revision, trust_remote_code=parent.trust_remote_code
        )
        return config.get_text_config()

    def _load_pair(
        self, trained: dict[str, torch.Tensor], *, fits_maps: bool
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Loads the parent and converts it; the student shares its parameters and holds what was trained so far.

        The maps of affine layers are fitted when healing begins. Before it nothing reads them, and what goes on holds
        its own.
        """
        parent: Any = load_parent(self.job)
        if self.job.zero.stage < 3:  # in stage 3 DeepSpeed moves only its part to each GPU
            parent = parent.to(self.device)
        maps = self._plans_maps(parent) if fits_maps else None
        source = self.job.parent
        student = convert(parent, self.job.plan, maps=maps, parent=source.path, revision=source.revision)
        load_trained(student, trained)
        return parent, student

    def _plans_maps(self, parent: PreTrainedModel) -> dict[int, FittedMap] | None:
        """Fits the maps of the plan's affine layers one after another; None if it has none.

        Every worker fits the same maps. They keep the ranks that were chosen for each layer alone.
        """
        spec, layers = self.job.maps, self.job.plan.layers(Treatment.AFFINE)
        if spec is None or not layers:
            return None
        alone = {} if self.job.parent.maps is None else load_maps(self.job.parent.maps)
        ranks: dict[int, Rank] = {layer: alone[layer].rank or "full" if layer in alone else "full" for layer in layers}
        sequences = read_sequences(spec, self.job.parent.load_tokenizer())
        return fit_maps_of_plan(parent, self.job.plan, sequences, rank=ranks, on_layer=self.hung.alive)

    def _load_teacher(self, parent: PreTrainedModel) -> PreTrainedModel:
        teacher = self.job.teacher
        if teacher is None:
            return parent
        return load_model(
            teacher.path,
            dtype=parent.dtype,
            device=parent.device,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
        )

    def _teacher_states(self) -> TeacherStates | None:
        cache = self.job.teacher_cache
        if cache is None or self.job.zero.stage == 3:
            return None
        return TeacherStates(cache.folder, cache.max_gib * 2**30)

    def _snapshot(self, step: int, trained: dict[str, torch.Tensor]) -> None:
        url = self.job.snapshots.file(step)
        self._together(lambda: publish_tensors(trained, url) if self.rank == 0 else None, url)
        self.done.snapshots[step] = url

    def _report(self, engine: Any, row: CurveRow) -> None:
        """Hands Ray Train the checkpoint of rank 0; the other ranks report without one, because Train waits for all."""
        from ray import train

        with tempfile.TemporaryDirectory() as folder:

            def save() -> None:
                save_state(engine, Path(folder) / _STATE_FILE if self.rank == 0 else None)
                state = {"fingerprint": self.job.fingerprint, **asdict(self.done)}
                (Path(folder) / _PROGRESS_FILE).write_text(json.dumps(state))

            def report() -> None:
                whole = {"checkpoint": train.Checkpoint.from_directory(folder), "checkpoint_upload_fn": _upload}
                train.report(row.to_dict(), **(whole if self.rank == 0 else {}))

            self._together(save, folder)
            self._together(report, self.job.checkpoints.folder)

    def _together(self, write: Callable[[], None], place: str) -> None:
        """Writes something on all ranks; a full disk on one rank ends all of them, so that none waits for another.

        Raises:
            DiskFullError: the disk of a rank is full; it is raised on every rank.
        """
        self.hung.alive()
        reason = ""
        try:
            write()
        except Exception as error:
            if not is_disk_full(error):
                raise
            reason = str(error)
        if _sum_over_workers(torch.tensor(float(bool(reason)), device=self.device)):
            raise DiskFullError(f"{place}: {reason or 'no room'}")

    def _save(self, trained: dict[str, torch.Tensor], output: str) -> None:
        job = self.job
        path, revision = job.parent.path, job.parent.revision
        student = student_from(load_parent(job), job.plan, self.spec, trained, parent=path, revision=revision)
        card = {"healing tokens": self.done.curve[-1].tokens, **(job.card or {})}
        publish_folder(lambda folder: save_checkpoint(student, self.tokenizer, folder, card=card), output)


def _upload(checkpoint: Any, name: str) -> Any:
    """Stores a checkpoint as Ray Train does, but retries when storage fails and removes what is half written."""
    from ray import train

    storage = train.get_context().get_storage()
    try:
        return retried(storage.persist_current_checkpoint)(checkpoint, name)
    except BaseException:
        with suppress(OSError):
            storage.storage_filesystem.delete_dir(storage.build_checkpoint_path_from_name(name))
        raise


def _sum_over_workers(value: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist

    dist.all_reduce(value)
    return value
