"""Transfers attention layer by layer: a Ray task fits the feature map of each linear_window layer and stores it.

A layer learns the same whichever other layers are fitted with it, so the results equal those of one joint fit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from layerboost.convert import convert
from layerboost.healing.adapters import feature_map_layers, freeze_all_but_feature_maps
from layerboost.healing.attention_transfer import AttentionTransfer
from layerboost.healing.spec import TRANSFER, HealingSpec, Phase
from layerboost.healing.training import (
    CurveRow,
    NonFiniteLossError,
    TorchEngine,
    accumulation_rounds,
    run_phase,
    split_held_out,
)
from layerboost.plan import Plan
from layerboost.storage.errors import DiskFullError, is_disk_full
from layerboost.storage.publish import publish_tensors, read_tensors
from layerboost.text.batches import GlobalBatches
from tasks.healing.job import (
    HealingJob,
    HealingProgress,
    ProgressClock,
    StepEvent,
    load_parent,
    load_text,
    prepare_process,
)
from tasks.healing.micro_batch import note_smaller_micro_batch, with_noted_micro_batch
from tasks.pool.out_of_memory import in_memory
from tasks.pool.watch import ends_if_hung

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedLayers:
    """Holds what a transfer learned for one layer, or for several together.

    Attributes:
        losses: the sum of the layers' errors in each step.
        parameters: for each requested step the feature maps after it, by the student's parameter names.
    """

    losses: tuple[float, ...]
    parameters: dict[int, dict[str, torch.Tensor]]


def fit_layer(
    model: PreTrainedModel,
    plan: Plan,
    layer: int,
    phase: Phase,
    batches: GlobalBatches,
    spec: HealingSpec,
    *,
    keep_after: Sequence[int],
    on_step: Callable[[CurveRow], None] = lambda row: None,
) -> FittedLayers:
    """Fits the feature map of one layer to the parent's attention, in this process.

    Args:
        model: the untouched parent, on the device to train on; it keeps its values and is left frozen.
        layer: the index of a linear_window layer of `plan`, from 0.
        phase: the transfer phase.
        keep_after: the steps (from 1) after which the parameters are kept.

    Raises:
        NonFiniteLossError: the loss or a gradient of the layer became NaN or infinite.
    """
    student = convert(model, plan)
    name = feature_map_layers(student)[linear_window_layers_of(plan).index(layer)]
    freeze_all_but_feature_maps(student)
    for other, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and other.startswith(f"{name}."))
    trainee = AttentionTransfer(model.eval(), student.eval(), spec, layers=[name])
    engine = TorchEngine(trainee, spec, accumulation_rounds(spec), phase.gradient_clip)
    losses: list[float] = []
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def after_step(row: CurveRow) -> None:
        losses.append(row.loss)
        if row.step in keep_after:
            trained = ((n, p) for n, p in student.named_parameters() if p.requires_grad)
            kept[row.step] = {n: p.detach().cpu().clone() for n, p in trained}
        on_step(row)

    run_phase(engine, phase, batches, spec, device=model.device, on_step=after_step)
    return FittedLayers(tuple(losses), kept)


def linear_window_layers_of(plan: Plan) -> list[int]:
    """Returns the indices, from 0, of the layers whose parameters attention transfer fits."""
    return [layer for layer, treatment in enumerate(plan.treatments) if treatment.is_transferred]


def fit_layers(job: HealingJob, phase: Phase, on_progress: Callable[[HealingProgress], None]) -> None:
    """Fits every layer of a job that is not stored yet; each is a Ray task and `job.n_workers` run at a time.

    Args:
        phase: the transfer phase.
        on_progress: called after each layer with the corresponding share of the phase's steps.

    Raises:
        NonFiniteLossError: the loss or a gradient of a layer became NaN or infinite; the layer is not stored.
        DiskFullError: the disk has no room for a layer.
        ray.exceptions.RayError: a task failed more often than `job.survival.max_failures`.
    """
    import ray

    task: Any = ray.remote(_fit_and_store).options(
        num_cpus=job.workers.cpus,
        num_gpus=job.workers.gpus,
        max_retries=job.survival.max_failures,
        retry_exceptions=True,
        label_selector=dict(job.workers.labels) or None,
        scheduling_strategy="DEFAULT",  # run on any node: a trial that calls this holds no room itself
    )
    layers = linear_window_layers_of(job.plan)
    waiting = [layer for layer in layers if _stored(job, phase, layer) is None]
    clock = ProgressClock(0)
    n_fitted, loss = len(layers) - len(waiting), 0.0
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < job.workers.n_workers:
                running.append(task.remote(job, phase, waiting.pop(0)))
            (done,), running = ray.wait(running)
            outcome: _LayerOutcome = ray.get(done)
            if outcome.non_finite is not None:
                raise NonFiniteLossError(outcome.non_finite)
            if outcome.disk_full is not None:
                raise DiskFullError(outcome.disk_full)
            n_fitted, loss = n_fitted + 1, loss + outcome.loss
            step = phase.steps * n_fitted // len(layers)
            if step:
                row = CurveRow(TRANSFER, step, step * job.spec.tokens_per_step, loss)
                on_progress(clock.progress(row, job.spec.steps))
    finally:
        for reference in running:
            ray.cancel(reference)


@dataclass(frozen=True)
class _LayerOutcome:
    """Describes what the task of a layer gives.

    Attributes:
        loss: the loss of the last step.
        non_finite: the message of a NonFiniteLossError, None if there was none.
        disk_full: the message of a DiskFullError, None if there was none.
    """

    loss: float = 0.0
    non_finite: str | None = None
    disk_full: str | None = None


def _fit_and_store(job: HealingJob, phase: Phase, layer: int) -> _LayerOutcome:
    """Fits one layer and stores it; this is the Ray task.

    Returns:
        The outcome. It holds a NonFiniteLossError or a DiskFullError as its message, because Ray would repeat a task
        that raises and meet the error again.
    """
    prepare_process(job)
    tokenizer = job.parent.load_tokenizer()
    text, _ = split_held_out(load_text(job, tokenizer), job.spec)
    batches = GlobalBatches(text, job.spec.batch_sequences, job.spec.seed)

    def after_step(row: CurveRow) -> None:
        hung.alive()
        if job.on_step is not None:
            job.on_step(StepEvent(TRANSFER, row.step, layer))

    model: Any = load_parent(job)
    model = model.to("cuda" if job.workers.gpus > 0 else "cpu")
    steps = _kept_steps(job, phase)

    def fit() -> FittedLayers:
        spec = with_noted_micro_batch(job).spec
        return fit_layer(model, job.plan, layer, phase, batches, spec, keep_after=steps, on_step=after_step)

    try:
        with ends_if_hung(job.survival.step_timeout_s) as hung:
            fitted = in_memory(fit, lambda: note_smaller_micro_batch(with_noted_micro_batch(job), 1))
    except NonFiniteLossError as error:
        return _LayerOutcome(non_finite=f"layer {layer}: {error}")
    tensors = {f"{step}/{name}": tensor for step in steps for name, tensor in fitted.parameters[step].items()}
    metadata = {"fingerprint": job.fingerprint, "losses": json.dumps(fitted.losses)}
    try:
        publish_tensors(tensors, _file(job, layer), metadata)
    except Exception as error:
        if not is_disk_full(error):
            raise
        return _LayerOutcome(disk_full=f"{_file(job, layer)}: {error}")
    return _LayerOutcome(fitted.losses[-1])


def read_fitted_layers(job: HealingJob, phase: Phase) -> FittedLayers:
    """Reads the stored layers of a job and merges them into what one joint fit would have left.

    Raises:
        FileNotFoundError: a layer is not stored.
    """
    found = []
    for layer in linear_window_layers_of(job.plan):
        fitted = _stored(job, phase, layer)
        if fitted is None:
            raise FileNotFoundError(f"transfer: layer {layer} is not in {_file(job, layer)}; start the job again")
        found.append(fitted)
    losses = tuple(sum(at_step) for at_step in zip(*(fitted.losses for fitted in found), strict=True))
    together = {step: _merged(fitted.parameters[step] for fitted in found) for step in _kept_steps(job, phase)}
    return FittedLayers(losses, together)


def _merged(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _stored(job: HealingJob, phase: Phase, layer: int) -> FittedLayers | None:
    """Returns what is stored of a layer if it is intact, belongs to this job and has all its snapshots."""
    try:
        tensors, metadata = read_tensors(_file(job, layer))
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.warning("%s is damaged (%s): fitting layer %d again", _file(job, layer), error, layer)
        return None
    kept: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        step, _, name = key.partition("/")
        kept.setdefault(int(step), {})[name] = tensor
    if metadata.get("fingerprint") != job.fingerprint or not kept.keys() >= set(_kept_steps(job, phase)):
        return None
    return FittedLayers(tuple(json.loads(metadata["losses"])), kept)


def _kept_steps(job: HealingJob, phase: Phase) -> list[int]:
    return sorted({phase.steps, *(step for step in job.snapshot_steps if step < phase.steps)})


def _file(job: HealingJob, layer: int) -> str:
    return f"{job.checkpoints.folder}/transfer/{layer}.safetensors"
