"""Healing as a Ray Train job: one worker or many, each with a DeepSpeed engine around `layerboost`'s loop.

The result is a function of model, plan, text and spec alone: workers share each global batch, and their number and the
ZeRO stage change only where parameters lie. A checkpoint holds the engine's sharded state without frozen weights and
the loss curve so far; a worker that dies, or a driver that is started again with the same storage path and name, goes
on from the last one.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerboost.healing_spec import HealingSpec
from layerboost.plan import Plan
from layerboost.process import environment
from layerboost.training import CurveRow, NonFiniteLossError, accumulation_rounds

_POLL_S = 1.0


@dataclass(frozen=True)
class StepEvent:
    """What a worker has just done: `step` counts from 1 over both phases."""

    phase: str
    step: int
    rank: int


@dataclass(frozen=True)
class HealingJob:
    """One plan to heal. What follows `output` is placement: it changes where and how safely, not the result.

    Attributes:
        model: path or hub name of the untouched parent.
        text, split, field: source of the text, as `read_documents` takes it; every worker must reach it.
        output: folder or fsspec URL of the healed checkpoint; rank 0's host must reach it.
        storage_path, name: where Ray Train keeps the checkpoints, a folder or URL that every host reaches. The same two
            again go on with the run; with another plan, spec, number of workers or ZeRO stage they start over. Another
            model or text needs another name.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; float16 is trained in float32.
        zero_stage: DeepSpeed's ZeRO stage, 0 to 3. bfloat16 needs at least 1, which 0 is raised to: without ZeRO
            DeepSpeed gives another loss in bfloat16.
        zero_options: further settings of DeepSpeed's `zero_optimization`, such as offloading.
        max_failures: worker failures to survive, -1 for any number.
        on_step: called in every worker after each step and its checkpoint.
        card: facts for the model card.
    """

    model: str
    plan: Plan
    spec: HealingSpec
    text: str
    output: str
    storage_path: str
    name: str
    revision: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    split: str = "train"
    field: str = "text"
    n_workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    zero_stage: int = 2
    zero_options: Mapping[str, Any] | None = None
    checkpoint_every_steps: int = 50
    max_failures: int = 3
    on_step: Callable[[StepEvent], None] | None = None
    card: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage: {self.zero_stage} is unknown; use 0, 1, 2 or 3")
        for name in ("n_workers", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        accumulation_rounds(self.spec, self.n_workers)

    @property
    def fingerprint(self) -> str:
        """Identifies what a checkpoint can be resumed by; places of model and text are not in it, they may move."""
        same = [self.revision, self.dtype, self.plan.plan_id, self.spec.to_dict(), self.n_workers, self.zero_stage]
        content = json.dumps(same, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


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


@dataclass(frozen=True)
class HealingResult:
    """A healed checkpoint: where it is, the tokens consumed exactly, the loss of each step, the last loss."""

    output: str
    tokens: int
    curve: tuple[CurveRow, ...]
    final_loss: float
    wall_s: float


def heal(job: HealingJob, *, on_progress: Callable[[HealingProgress], None] | None = None) -> HealingResult:
    """Heals one plan on the connected Ray cluster and saves the checkpoint.

    Args:
        on_progress: called in the driver, on a thread, with each step that rank 0 has finished.

    Raises:
        NonFiniteLossError: a loss or gradient was not a number; no checkpoint was written since.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
    """
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from .healing_worker import run_healing_worker

    start = time.monotonic()
    job = _located(job)
    on_gpu = job.gpus_per_worker > 0
    resources = {"CPU": job.cpus_per_worker} | ({"GPU": job.gpus_per_worker} if on_gpu else {})
    with _progress_box(on_progress) as box, _workers_keep_their_folder():
        trainer = TorchTrainer(
            run_healing_worker,  # type: ignore[arg-type]
            train_loop_config={"job": job, "progress": box},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=job.n_workers, use_gpu=on_gpu, resources_per_worker=resources),
            run_config=RunConfig(  # type: ignore[call-arg]
                name=job.name,
                storage_path=job.storage_path,
                failure_config=FailureConfig(max_failures=job.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]
    if "error" in outcome:
        raise NonFiniteLossError(outcome["error"])
    curve = tuple(CurveRow(**row) for row in outcome["curve"])
    return HealingResult(job.output, curve[-1].tokens, curve, curve[-1].loss, time.monotonic() - start)


def _located(job: HealingJob) -> HealingJob:
    """The job with paths that mean the same to driver and workers.

    Relative paths of model and text stay as they are in a Ray job that ships a working directory: every node unpacks
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
        text=found(job.text),
        output=absolute(job.output),
        storage_path=absolute(job.storage_path),
    )


@contextmanager
def _workers_keep_their_folder() -> Iterator[None]:
    """Keeps Ray Train from running workers in a folder of its own, where relative paths would mean something else."""
    with environment({"RAY_CHDIR_TO_TRIAL_DIR": "0"}):
        yield


class _ProgressBox:
    """Actor that holds steps until the driver takes them."""

    def __init__(self) -> None:
        self._steps: list[HealingProgress] = []

    def put(self, step: HealingProgress) -> None:
        self._steps.append(step)

    def take(self) -> list[HealingProgress]:
        steps, self._steps = self._steps, []
        return steps


@contextmanager
def _progress_box(on_progress: Callable[[HealingProgress], None] | None) -> Iterator[Any]:
    """An actor for the workers' steps while `on_progress` is called with them on a thread; None without a listener."""
    if on_progress is None:
        yield None
        return
    import ray

    box: Any = ray.remote(num_cpus=0)(_ProgressBox).remote()
    stopped = threading.Event()
    errors: list[Exception] = []

    def poll() -> None:
        try:
            last_round = False
            while not last_round:
                last_round = stopped.wait(_POLL_S)
                for step in ray.get(box.take.remote()):
                    on_progress(step)
        except Exception as error:  # raised below, on the caller's thread
            errors.append(error)

    thread = threading.Thread(target=poll, name="healing-progress", daemon=True)
    thread.start()
    try:
        yield box
    finally:
        stopped.set()
        thread.join()
        ray.kill(box)
    if errors:
        raise errors[0]
