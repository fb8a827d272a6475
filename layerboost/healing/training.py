"""Runs the healing loop on any engine: plain PyTorch here and in notebooks, DeepSpeed in `tasks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..convert import convert
from ..plan import Plan
from ..text.batches import GlobalBatches, PackedText
from .adapters import add_lora, load_trained, merge_lora
from .attention_transfer import full_windows, restore_windows
from .distillation import make_trainee
from .spec import (
    HEAL,
    TRANSFER,
    HealingSpec,
    HeldOut,
    Phase,
    annealing_start,
    held_out_steps,
    last_step,
    learning_rate_at,
    mark_steps,
    phases_of,
)
from .teacher_states import TeacherStates

ADAM_BETAS = (0.9, 0.95)


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient is not a finite number; the message names phase, step and batch."""


@dataclass(frozen=True)
class CurveRow:
    """Holds one step of the loss curve: `step` counts from 1 over both phases, `tokens` is the budget used so far."""

    phase: str
    step: int
    tokens: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """Defines what the loop needs of an engine; DeepSpeed's own engine satisfies it.

    One optimizer step consists of `accumulation` rounds of forward, backward and step, of which only the last `step`
    changes the parameters. `backward` divides the loss by the number of rounds, and gradients are averaged over the
    workers.
    """

    optimizer: Any
    module: Any

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor) -> Any: ...

    def step(self) -> Any: ...

    def get_global_grad_norm(self) -> float | torch.Tensor | None: ...


class TorchEngine:
    """Trains in one process with plain AdamW; parameters narrower than fp32 are trained through fp32 copies."""

    def __init__(self, module: nn.Module, spec: HealingSpec, accumulation: int = 1, gradient_clip: float = 0.0):
        self.module, self.accumulation = module, accumulation
        self.gradient_clip = gradient_clip or math.inf
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters: list[torch.Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters
        ]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=ADAM_BETAS, weight_decay=spec.weight_decay)
        self._rounds = 0
        self._norm: float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self._rounds += 1
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter and parameter.grad is not None:  # gradients of the rounds are summed in fp32
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        if self._rounds % self.accumulation:
            return
        self._norm = float(nn.utils.clip_grad_norm_(self.masters, self.gradient_clip))
        if math.isfinite(self._norm):
            self.optimizer.step()
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.data.copy_(master)
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def get_global_grad_norm(self) -> float | None:
        return self._norm


def accumulation_rounds(spec: HealingSpec, world_size: int = 1) -> int:
    """Returns the number of rounds that each worker divides its share of a batch into, the same on all workers."""
    if world_size > spec.batch_sequences:
        raise ValueError(
            f"batch_sequences: {spec.batch_sequences} cannot feed {world_size} workers; use at least {world_size}"
        )
    largest, smallest = -(-spec.batch_sequences // world_size), spec.batch_sequences // world_size
    return min(-(-largest // (spec.micro_batch_sequences or largest)), smallest)


def split_held_out(text: PackedText, spec: HealingSpec) -> tuple[PackedText, PackedText | None]:
    """Returns the text to train on, and its first sequences as held-out text if the spec wants it.

    Raises:
        ValueError: Nothing is left to train on.
    """
    if spec.stop_when_flat is None:
        return text, None
    if len(text) <= spec.held_out_sequences:
        raise ValueError(
            f"held_out_sequences: {spec.held_out_sequences} of {len(text)} sequences leave nothing to train on; "
            "give a longer text"
        )
    # The first sequences are held out, because a short source of a mixture repeats further on.
    return text[spec.held_out_sequences :], text[: spec.held_out_sequences]


def run_phase(
    engine: Engine,
    phase: Phase,
    batches: GlobalBatches,
    spec: HealingSpec,
    *,
    start: int = 0,
    held_out: PackedText | None = None,
    measured: list[HeldOut] | None = None,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    sum_over_workers: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    on_step: Callable[[CurveRow], None] = lambda row: None,
) -> None:
    """Trains one phase, from its step `start` (0 is its first) to its end, or to where its curve is flat.

    A worker runs its slice of each global batch. The losses of the slices are weighted so that loss and gradient are
    those of the whole batch on any number of workers, even one that does not divide the batch.

    Args:
        engine: Engine around the phase's module, made with `accumulation_rounds(spec, world_size)` rounds.
        phase: The phase to train.
        batches: The global batches.
        spec: How to heal.
        start: First step to take, counted within the phase.
        held_out: Sequences of `split_held_out`; needed with `spec.stop_when_flat`.
        measured: What was measured on them so far; it grows in place.
        rank, world_size: This worker's number, and the number of workers.
        device: Device of this worker.
        sum_over_workers: Adds a tensor over all workers.
        on_step: Called after each step with the loss of the global batch, before the next step.

    Raises:
        NonFiniteLossError: A loss or gradient is not finite. It is raised on all workers, and the step with such a loss
            has changed no parameter.
    """
    rounds = accumulation_rounds(spec, world_size)
    measured = [] if measured is None else measured
    to_measure = held_out_steps(spec, phase)
    step = phase.first_step + start
    while True:
        if held_out is not None and step in to_measure and all(at.step != step for at in measured):
            divergence = _held_out_divergence(engine, held_out, spec, rank, world_size, device, sum_over_workers)
            measured.append(HeldOut(step, divergence))
        annealed_from = annealing_start(spec, measured) if phase.name == HEAL else None
        if step >= last_step(phase, annealed_from):
            return
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate_at(phase, step, spec.warmup_fraction, annealed_from)
        engine.module.begin_step(step, whole_windows=annealed_from is not None and step >= annealed_from)
        batch = batches.batch(step)
        share = list(batch.split(world_size))[rank]
        total = torch.zeros((), device=device)
        for number, part in enumerate(share.split(rounds), start=1):
            weight = part.n_targets / max(batch.n_targets, 1)
            loss = engine(**part.to(device).tensors())
            total += loss.detach().float() * weight
            if number == rounds:
                batch_loss = float(sum_over_workers(total))
                _check_finite("loss", batch_loss, phase, step, batches)
            engine.backward(loss * (weight * rounds * world_size))
            engine.step()
        norm = engine.get_global_grad_norm()
        if norm is not None:
            _check_finite("gradient norm", float(norm), phase, step, batches)
        step += 1
        on_step(CurveRow(phase.name, step, step * spec.tokens_per_step, batch_loss))


def _held_out_divergence(
    engine: Engine,
    held_out: PackedText,
    spec: HealingSpec,
    rank: int,
    world_size: int,
    device: torch.device | str,
    sum_over_workers: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """Returns the mean divergence over the held-out targets; sharded weights need equally many passes per worker."""
    per_pass = spec.micro_batch_sequences or max(1, spec.batch_sequences // world_size)
    n_passes = -(-len(held_out) // (per_pass * world_size))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for number in range(n_passes):
        first = (number * world_size + rank) * per_pass
        part = held_out[first : first + per_pass] if first < len(held_out) else held_out[:1]
        weight = part.n_targets / max(held_out.n_targets, 1) if first < len(held_out) else 0.0
        with torch.no_grad():
            total += engine(**part.to(device).tensors(), measure=True).double() * weight
    divergence = float(sum_over_workers(total))
    if not math.isfinite(divergence):
        raise NonFiniteLossError(f"held-out divergence: {divergence}; use a smaller learning_rate")
    return divergence


def _check_finite(what: str, value: float, phase: Phase, step: int, batches: GlobalBatches) -> None:
    if not math.isfinite(value):
        rows = ", ".join(map(str, batches.indices(step)))
        raise NonFiniteLossError(
            f"{what}: {value} in phase {phase.name} at step {step + 1}, batch {step} (sequences {rows}); "
            "use a smaller learning_rate or look at those sequences"
        )


def heal_locally(
    model: PreTrainedModel,
    plan: Plan,
    text: PackedText,
    spec: HealingSpec,
    *,
    teacher: PreTrainedModel | None = None,
    stored: TeacherStates | None = None,
    on_step: Callable[[CurveRow], None] = lambda row: None,
    on_mark: Callable[[float, PreTrainedModel], None] | None = None,
    marks: Sequence[float] = (),
) -> PreTrainedModel:
    """Converts `model` by `plan` and heals the result on `text`, in this process.

    `model` and `teacher` stay bitwise unchanged. Parameters that healing did not change are shared with the result.

    Args:
        model: The untouched parent, on the device to train on.
        plan: The plan to convert it by.
        text: Sequences of `spec.sequence_tokens`; as many steps as `spec` pays for are taken.
        spec: How to heal.
        teacher: The model whose predictions the student learns; the parent itself if None. Attention is always
            transferred from the parent.
        stored: Where the teacher's hidden states are kept for further healings on the same text.
        on_step: Called with each row of the loss curve.
        marks, on_mark: Shares of the budget at which `on_mark` is called with the share and the current student, for
            measurements; it must not change the student.

    Returns:
        The healed model, plain (no adapters), in evaluation mode.

    Raises:
        NonFiniteLossError: A loss or gradient is not finite; `model` is still unchanged.
    """
    device = next(model.parameters()).device
    student = convert(model, plan)
    text, held_out = split_held_out(text, spec)
    batches = GlobalBatches(text, spec.batch_sequences, spec.seed)
    at = mark_steps(spec, marks)

    def after_step(row: CurveRow) -> None:
        on_step(row)
        if on_mark is not None and row.step in at:
            with full_windows(student):
                on_mark(at[row.step], student)

    with _left_as_they_were(model, *([] if teacher is None else [teacher])):
        for phase in phases_of(spec, plan, model.config.hidden_size):
            taught_by = model if phase.name == TRANSFER else teacher or model
            trainee = make_trainee(phase.name, taught_by, student, spec, stored)
            engine = TorchEngine(trainee, spec, accumulation_rounds(spec), phase.gradient_clip)
            run_phase(engine, phase, batches, spec, held_out=held_out, device=device, on_step=after_step)
        finish_student(student, spec)
    return student


@contextmanager
def _left_as_they_were(*models: PreTrainedModel) -> Iterator[None]:
    """Restores the mode and the trainable parameters of models after a student that shares them has been trained."""
    was_training = [model.training for model in models]
    was_trainable = [(p, p.requires_grad) for model in models for p in model.parameters()]
    try:
        yield
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
        for parameter, requires_grad in was_trainable:
            parameter.requires_grad_(requires_grad)


def finish_student(student: PreTrainedModel, spec: HealingSpec) -> None:
    """Makes a trained student a plain model again, in place: merges adapters and sets evaluation mode."""
    if spec.method == "lora":
        merge_lora(student)
    if spec.activation_checkpointing:
        student.gradient_checkpointing_disable()
    restore_windows(student)
    student.requires_grad_(True).eval()


def student_from(
    model: PreTrainedModel,
    plan: Plan,
    spec: HealingSpec,
    trained: Mapping[str, torch.Tensor],
    *,
    parent: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Returns the plain student that a healing run had made of `model` when its trained parameters were `trained`.

    Args:
        model: The untouched parent, which keeps its values; parameters that were not trained are shared with it.
        plan: The student's plan.
        spec: How it was healed.
        trained: Trained parameters by the student's names, as in a snapshot: only feature maps during attention
            transfer, then also adapters (`lora`) or all parameters (`full`). The result may use these tensors.
        parent, revision: For the student's configuration, as in `convert`.

    Raises:
        ValueError: The student has no parameter of a given name and shape.
    """
    student = convert(model, plan, parent=parent, revision=revision)
    with _left_as_they_were(model):
        if any(".lora_A." in name for name in trained):
            add_lora(student, spec.rank, spec.alpha, spec.seed)
        load_trained(student, trained)
        finish_student(student, spec)
    return student
