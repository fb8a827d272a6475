"""The healing loop, for any engine: plain PyTorch here and in notebooks, DeepSpeed where `tasks` runs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import merge_lora
from .convert import convert
from .data import GlobalBatches
from .distillation import HealingSpec, Phase, make_trainee, phases_of
from .plan import Plan

ADAM_BETAS = (0.9, 0.95)
FINAL_LEARNING_RATE = 0.1
"""Share of a phase's peak learning rate that the cosine ends at."""


class NonFiniteLossError(ArithmeticError):
    """A loss or gradient that is not a number; the message names phase, step and batch."""


@dataclass(frozen=True)
class CurveRow:
    """One step of the loss curve: `step` counts from 1 over both phases, `tokens` is the budget consumed by then."""

    phase: str
    step: int
    tokens: int
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """What the loop needs of an engine; DeepSpeed's own engine has it.

    One optimizer step is `accumulation` rounds of forward, backward and step, where only the last `step` moves the
    parameters; `backward` divides the loss by the number of rounds and gradients are averaged over the workers.
    """

    optimizer: Any

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor: ...

    def backward(self, loss: torch.Tensor) -> Any: ...

    def step(self) -> Any: ...

    def get_global_grad_norm(self) -> float | torch.Tensor | None: ...


class TorchEngine:
    """One process, plain AdamW; parameters narrower than fp32 are trained through fp32 copies."""

    def __init__(self, module: nn.Module, spec: HealingSpec, accumulation: int = 1):
        self.module, self.spec, self.accumulation = module, spec, accumulation
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.masters: list[torch.Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float() for p in self.parameters
        ]
        self.optimizer = torch.optim.AdamW(self.masters, lr=0.0, betas=ADAM_BETAS, weight_decay=spec.weight_decay)
        self._rounds = 0
        self._norm: float | None = None

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.module(input_ids)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self._rounds += 1
        if self._rounds % self.accumulation:
            return
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        self._norm = float(nn.utils.clip_grad_norm_(self.masters, self.spec.gradient_clip))
        if math.isfinite(self._norm):
            self.optimizer.step()
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                if master is not parameter:
                    parameter.data.copy_(master)
        for tensor in (*self.parameters, *self.masters):
            tensor.grad = None

    def get_global_grad_norm(self) -> float | None:
        return self._norm


def learning_rate_at(phase: Phase, step: int, warmup_fraction: float) -> float:
    """Learning rate of a phase's step (from 0): linear warm-up, then a cosine to 10 % of the peak."""
    warmup = int(phase.steps * warmup_fraction)
    if step < warmup:
        return phase.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(phase.steps - warmup - 1, 1)
    share = FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
    return phase.learning_rate * share


def accumulation_rounds(spec: HealingSpec, world_size: int = 1) -> int:
    """Rounds that each worker divides its share of a batch into, the same on all workers."""
    if world_size > spec.batch_sequences:
        raise ValueError(
            f"batch_sequences: {spec.batch_sequences} cannot feed {world_size} workers; use at least {world_size}"
        )
    largest, smallest = -(-spec.batch_sequences // world_size), spec.batch_sequences // world_size
    return min(-(-largest // (spec.micro_batch_sequences or largest)), smallest)


def run_phase(
    engine: Engine,
    phase: Phase,
    batches: GlobalBatches,
    spec: HealingSpec,
    *,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    sum_over_workers: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    on_step: Callable[[CurveRow], None] = lambda row: None,
) -> None:
    """Trains one phase, from its step `start` (0 is its first) to its end.

    A worker runs its slice of each global batch; the slices' losses are weighted so that loss and gradient are those
    of the whole batch on any number of workers, also one that does not divide the batch.

    Args:
        engine: wraps the phase's module; made with `accumulation_rounds(spec, world_size)` rounds.
        sum_over_workers: adds a tensor over all workers.
        on_step: called after each step with the loss of the global batch, before the next.

    Raises:
        NonFiniteLossError: on all workers; the step with a non-finite loss has moved no parameter.
    """
    rounds = accumulation_rounds(spec, world_size)
    for local_step in range(start, phase.steps):
        step = phase.first_step + local_step
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate_at(phase, local_step, spec.warmup_fraction)
        share = batches.batch(step).tensor_split(world_size)[rank].to(device)
        total = torch.zeros((), device=device)
        for number, input_ids in enumerate(share.tensor_split(rounds), start=1):
            loss = engine(input_ids)
            part = len(input_ids) / spec.batch_sequences
            total += loss.detach().float() * part
            if number == rounds:
                batch_loss = float(sum_over_workers(total))
                _check_finite("loss", batch_loss, phase, step, batches)
            engine.backward(loss * (part * rounds * world_size))
            engine.step()
        norm = engine.get_global_grad_norm()
        if norm is not None:
            _check_finite("gradient norm", float(norm), phase, step, batches)
        on_step(CurveRow(phase.name, step + 1, (step + 1) * spec.tokens_per_step, batch_loss))


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
    batches: GlobalBatches,
    spec: HealingSpec,
    *,
    on_step: Callable[[CurveRow], None] = lambda row: None,
) -> PreTrainedModel:
    """Converts `model` by `plan` and heals the result on `batches`, in this process.

    `model` is the teacher and keeps its values to the bit. Parameters that healing did not change are shared with the
    result.

    Args:
        model: the untouched parent, on the device to train on.
        batches: of `spec.batch_sequences` sequences; as many steps as `spec` pays for are taken.
        on_step: called with each row of the loss curve.

    Returns:
        The healed model, plain (no adapters), in evaluation mode.

    Raises:
        NonFiniteLossError: `model` is still untouched.
    """
    device = next(model.parameters()).device
    was_trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    student = convert(model, plan)
    try:
        for phase in phases_of(spec, plan, model.config.hidden_size):
            trainee = make_trainee(phase.name, model, student, spec)
            engine = TorchEngine(trainee, spec, accumulation_rounds(spec))
            run_phase(engine, phase, batches, spec, device=device, on_step=on_step)
        finish_student(student, spec)
    finally:
        model.train(was_training)
        for parameter, requires_grad in was_trainable:
            parameter.requires_grad_(requires_grad)
    return student


def finish_student(student: PreTrainedModel, spec: HealingSpec) -> None:
    """Makes a trained student a plain model again, in place: adapters merged, evaluation mode."""
    if spec.method == "lora":
        merge_lora(student)
    if spec.activation_checkpointing:
        student.gradient_checkpointing_disable()
    student.requires_grad_(True).eval()
