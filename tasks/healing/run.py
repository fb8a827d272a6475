"""Healing as a Ray Train job: one worker or many, each with a DeepSpeed engine around `layerboost`'s loop.

The result is a function of model, plan, text and spec alone: workers share each global batch, and their number and the
ZeRO stage change only where parameters lie. A checkpoint holds what is trained as whole tensors, the optimizer's state,
the loss curve and the measured values so far; a worker that dies, or a driver that is started again with the same
storage path and name, goes on from the last one, on as many workers as there are by then.
"""

from __future__ import annotations

import logging
import os
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
    """A healed model.

    Attributes:
        output: where its checkpoint is; None where none was asked for.
        tokens: consumed exactly; fewer than the budget where the run stopped early.
        curve: the loss of each step; of a transfer by layer the sum over the layers, as of a joint one.
        final_loss: the last of the curve.
        wall_s: seconds since the driver's start, the latest one of a resumed run.
        measured: divergence on the held-out sequences, where the spec wants it.
        stopped_early: whether the budget was not spent since the curve was flat.
        snapshots: step to URL of the trained parameters as they were then.
        micro_batch_sequences: what a worker ran at once since memory ran out; None where it did not.
    """

    output: str | None
    tokens: int
    curve: tuple[CurveRow, ...]
    final_loss: float
    wall_s: float
    measured: tuple[HeldOut, ...] = ()
    stopped_early: bool = False
    snapshots: Mapping[int, str] = field(default_factory=dict)
    micro_batch_sequences: int | None = None


def heal(job: HealingJob, *, on_progress: Callable[[HealingProgress], None] | None = None) -> HealingResult:
    """Heals one plan on the connected Ray cluster and saves the checkpoint, or what was trained.

    Args:
        on_progress: called in the driver, on a thread, with each step that rank 0 has finished; after each layer in a
            transfer by layer.

    Raises:
        NonFiniteLossError: a loss or gradient was not a number; no checkpoint was written since.
        DiskFullError: there is no room for a checkpoint, a snapshot or the healed model; none is half written.
        ray.train.TrainingFailedError: workers failed more often than `max_failures`.
        ray.exceptions.RayActorError: so did the job's controller.
        ray.exceptions.RayError: so did the task of a layer, in a transfer by layer.
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
        measured=tuple(done.measured),
        stopped_early=last.step < job.spec.steps,
        snapshots=done.snapshots,
        micro_batch_sequences=micro_batch_sequences,
    )


def _trained(job: HealingJob, box: Any) -> dict[str, Any]:
    """What the Train job returns.

    It goes on after a notice, while workers that lack memory take less at a time, and when its controller has died.
    """
    from ray import cloudpickle
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from tasks.healing.start import start_healing_worker

    on_gpu = job.gpus_per_worker > 0
    resources = {"CPU": job.cpus_per_worker} | ({"GPU": job.gpus_per_worker} if on_gpu else {})
    trainer = TorchTrainer(
        start_healing_worker,  # type: ignore[arg-type]
        train_loop_config={"job": cloudpickle.dumps(job), "progress": box},
        torch_config=_config_with_notices(TorchConfig(backend="nccl" if on_gpu else "gloo"), job.metadata_servers),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=job.n_workers,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            label_selector=dict(job.node_labels) or None,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=job.name,
            storage_path=job.storage_path,
            failure_config=FailureConfig(max_failures=job.max_failures),
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
            if n_deaths > job.max_failures:
                raise
            logger.warning("the controller of a healing died: %s", str(error).splitlines()[0])


def _is_by_notice(error: Exception) -> bool:
    """Whether the job stopped behind a checkpoint since a worker is about to go, which is no failure of the job."""
    causes = getattr(error, "worker_failures", {}).values()
    return any(isinstance(getattr(cause, "_base_exc", cause), TerminationNoticeError) for cause in causes)


def _config_with_notices(config: Any, servers: MetadataServers) -> Any:
    """A TorchConfig whose workers listen for notices; only Train's backend gets at their main thread, as signals do."""
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
    """What a call gives that runs on a thread of its own, so that Ray Train leaves Ctrl-C to the caller.

    On the main thread it would take SIGINT over for good, and end the process with exit code 0.
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
    """Settings of Ray Train that it takes from the environment.

    Workers stay out of a folder of its own, where relative paths would mean something else. And the controller, which
    every report of a checkpoint and the end of a run wait for, looks more often than every two seconds.
    """
    poll_s = os.environ.get(_POLL_VARIABLE, "0.5")
    with environment({"RAY_CHDIR_TO_TRIAL_DIR": "0", _POLL_VARIABLE: poll_s}):
        yield


@contextmanager
def _progress_box(on_progress: Callable[[HealingProgress], None] | None) -> Iterator[Any]:
    """An actor for the workers' steps while `on_progress` is called with them on a thread; None without a listener."""
    if on_progress is None:
        yield None
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tasks.healing.start import ProgressBox

    # Beside the one who asks: another node may go.
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
        except ray.exceptions.RayActorError as error:  # the healing goes on without its steps being told
            logger.warning("steps of a healing are not told any more: %s", str(error).splitlines()[0])
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
