"""Runs healing as a Ray Train job: each worker has a DeepSpeed engine around `layerboost`'s training loop.

The result depends only on model, plan, text and spec. Workers share each global batch, and their number and the ZeRO
stage change only where parameters are stored. A checkpoint holds the trained parameters as whole tensors, the
optimizer's state, the loss curve and the measured values so far. After the death of a worker, or in a driver that is
started again with the same storage path and name, the run continues from the last checkpoint on any number of workers.
"""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from layerboost.environ import environment
from layerboost.healing.spec import HeldOut
from layerboost.healing.training import CurveRow, NonFiniteLossError
from layerboost.storage.errors import DiskFullError
from tasks.healing.job import HealingJob, HealingProgress, located
from tasks.healing.micro_batch import forget_micro_batch, noted_micro_batch
from tasks.healing.termination import MetadataServers, TerminationNoticeError, listen_for_notices

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_POLL_VARIABLE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"


@dataclass(frozen=True)
class HealingResult:
    """Describes a healed model.

    Attributes:
        output: the place of its checkpoint; None if none was asked for.
        tokens: the number of tokens consumed; it is below the budget if the run stopped early.
        curve: the loss of each step; for a transfer, by layer or joint, the sum over the layers.
        final_loss: the last loss of the curve.
        wall_s: seconds since the driver's start; for a resumed run since its last start.
        tok_per_s: median speed of the healing phase's steps, without the job's start and its checkpoints; None if no
            step was timed.
        measured: the divergence on the held-out sequences, if the spec asks for it.
        stopped_early: whether the run stopped before its budget was spent, because the curve was flat.
        snapshots: the URL of the trained parameters after a step, by that step.
        micro_batch_sequences: the sequences that a worker ran at once since memory ran out; None if it did not.
    """

    output: str | None
    tokens: int
    curve: tuple[CurveRow, ...]
    final_loss: float
    wall_s: float
    tok_per_s: float | None = None
    measured: tuple[HeldOut, ...] = ()
    stopped_early: bool = False
    snapshots: Mapping[int, str] = field(default_factory=dict)
    micro_batch_sequences: int | None = None


def heal(job: HealingJob, *, on_progress: Callable[[HealingProgress], None] | None = None) -> HealingResult:
    """Heals one plan on the connected Ray cluster and saves the checkpoint, or what was trained.

    Args:
        job: the job.
        on_progress: called in the driver, on a thread, with each step that rank 0 has finished; in a transfer by layer
            it is called after each layer.

    Raises:
        NonFiniteLossError: a loss or gradient became NaN or infinite; no checkpoint was written after that.
        DiskFullError: the disk has no room for a checkpoint, a snapshot or the healed model; none is half written.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
        ray.exceptions.RayActorError: the job's controller died more often than `max_failures`.
        ray.exceptions.RayError: the task of a layer failed more often than `max_failures`, in a transfer by layer.
    """
    from tasks.healing.attention_transfer import fit_layers
    from tasks.healing.worker import Progress

    start = time.monotonic()
    job = located(job)
    with _progress_box(on_progress) as box, _train_settings():
        if job.transfer_phase is not None:
            fit_layers(job, job.transfer_phase, lambda step: None if box is None else box.put.remote(asdict(step)))
        outcome = _trained(job, box)
    if "error" in outcome:
        raise NonFiniteLossError(outcome["error"])
    if "disk_full" in outcome:
        raise DiskFullError(outcome["disk_full"])
    done = Progress.from_dict(outcome)
    last, micro_batch_sequences = done.curve[-1], noted_micro_batch(job)
    forget_micro_batch(job)
    return HealingResult(
        output=job.output,
        tokens=last.tokens,
        curve=tuple(done.curve),
        final_loss=last.loss,
        wall_s=time.monotonic() - start,
        tok_per_s=job.spec.tokens_per_step / statistics.median(done.step_s) if done.step_s else None,
        measured=tuple(done.measured),
        stopped_early=last.step < job.spec.steps,
        snapshots=done.snapshots,
        micro_batch_sequences=micro_batch_sequences,
    )


def _trained(job: HealingJob, box: Any) -> dict[str, Any]:
    """Runs the Train job and returns its result.

    The job is started again after a termination notice, after its controller died, and as long as workers that ran out
    of memory can run fewer sequences at once.
    """
    from ray import cloudpickle
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from tasks.healing.start import start_healing_worker

    on_gpu = job.workers.gpus > 0
    resources = {"CPU": job.workers.cpus} | ({"GPU": job.workers.gpus} if on_gpu else {})
    trainer = TorchTrainer(
        start_healing_worker,  # type: ignore[arg-type]
        train_loop_config={"job": cloudpickle.dumps(job), "progress": box},
        torch_config=_config_with_notices(
            TorchConfig(backend="nccl" if on_gpu else "gloo"), job.survival.metadata_servers
        ),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=job.workers.n_workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            label_selector=dict(job.workers.labels) or None,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=job.name,
            storage_path=job.checkpoints.storage_path,
            failure_config=FailureConfig(max_failures=job.survival.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    n_deaths = 0
    while True:
        micro_batch_before = noted_micro_batch(job)
        try:
            return _on_a_thread(trainer.fit).return_value
        except TrainingFailedError as error:
            if noted_micro_batch(job) == micro_batch_before and not _is_by_notice(error):
                raise
        except RayActorError as error:
            n_deaths += 1
            if n_deaths > job.survival.max_failures:
                raise
            logger.warning("the controller of a healing died: %s", str(error).splitlines()[0])


def _is_by_notice(error: Exception) -> bool:
    """Says whether the job stopped after a checkpoint because a worker will be ended; that is no failure of the job."""
    causes = getattr(error, "worker_failures", {}).values()
    return any(isinstance(getattr(cause, "_base_exc", cause), TerminationNoticeError) for cause in causes)


def _config_with_notices(config: Any, servers: MetadataServers) -> Any:
    """Makes a TorchConfig whose workers listen for termination notices.

    Signals need the main thread of a worker, and only Train's backend runs code there.
    """
    torch_backend = config.backend_cls

    class Backend(torch_backend):  # type: ignore[misc, valid-type]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_start(worker_group, backend_config)
            worker_group.execute(listen_for_notices, servers)

    class Config(type(config)):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type:
            return Backend

    return Config(backend=config.backend)


def _on_a_thread(call: Callable[[], Any]) -> Any:
    """Runs a call on a separate thread and returns its result, so that Ray Train leaves Ctrl-C to the caller.

    On the main thread Ray Train would take over SIGINT permanently and end the process with exit code 0.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="healing", daemon=True).start()
    return outcome.result()


@contextmanager
def _train_settings() -> Iterator[None]:
    """Sets the environment variables that Ray Train reads.

    Workers keep their working directory, because relative paths would change their meaning in a folder of Train's own.
    The controller polls more often than every two seconds, because each report of a checkpoint and the end of a run
    wait for it.
    """
    poll_s = os.environ.get(_POLL_VARIABLE, "0.5")
    with environment({"RAY_CHDIR_TO_TRIAL_DIR": "0", _POLL_VARIABLE: poll_s}):
        yield


@contextmanager
def _progress_box(on_progress: Callable[[HealingProgress], None] | None) -> Iterator[Any]:
    """Gives an actor that collects the workers' steps while a thread passes them to `on_progress`; without it None."""
    if on_progress is None:
        yield None
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tasks.healing.start import ProgressBox

    # Pin the actor to the caller's node: another node may be preempted.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here}
    box: Any = ray.remote(ProgressBox).options(**options).remote()
    stopped = threading.Event()
    errors: list[Exception] = []

    def poll() -> None:
        try:
            last_round = False
            while not last_round:
                last_round = stopped.wait(_POLL_S)
                for step in ray.get(box.take.remote()):
                    on_progress(HealingProgress(**step))
        except ray.exceptions.RayActorError as error:  # healing goes on although its steps are no longer reported
            logger.warning("the steps of a healing are no longer reported: %s", str(error).splitlines()[0])
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
