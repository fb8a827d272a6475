"""Computes the losses of healing over chunks of positions, so that no tensor of batch x length x vocabulary exists.

The gradient by the logits has a closed form, so a chunk's logits are needed only once: the forward pass computes its
gradient, and the backward pass only scales it. Every loss is a mean over targets, the tokens to be predicted, so that
slices of a batch, weighted by their targets, give the whole batch's loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..attention import wide
from ..registry import resolved
from .divergences import DIVERGENCES, Divergence

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps hidden states (N, d) to logits (N, vocabulary)."""


_LOGITS_OF_PRODUCT = {"cpu": 2**25, "cuda": 2**26}
"""Maximum number of logits of one product with the head's weights: large products run fastest."""
_POSITIONS_OF_PRODUCT = {"cpu": 512}
"""Maximum number of positions of one product, where more of them bring no speed."""
_LOGITS_OF_TERMS = {"cpu": 2**18, "cuda": 2**26}
"""Maximum number of logits per thread whose softmax exists at once: 1 MiB in fp32 stays in the cache of a CPU."""
_LOGITS_WITH_GRAPH = {"cpu": 2**22, "cuda": 2**26}
"""Maximum number of logits that autograd keeps at once while the head is trained."""


def positions_at_once(vocabulary: int, device: torch.device, *, head_trains: bool = False) -> tuple[int, int]:
    """Returns `chunk_tokens` and `block_tokens` of `distillation_loss`, so that memory does not grow with the text."""

    def within(limits: dict[str, int]) -> int:
        return max(1, limits.get(device.type, limits["cuda"]) // vocabulary)

    if head_trains:
        return within(_LOGITS_WITH_GRAPH), within(_LOGITS_WITH_GRAPH)
    chunk = within(_LOGITS_OF_PRODUCT)
    chunk = min(chunk, _POSITIONS_OF_PRODUCT.get(device.type, chunk))
    n_threads = torch.get_num_threads() if device.type == "cpu" else 1
    return chunk, min(chunk, n_threads * within(_LOGITS_OF_TERMS))


def divergence_and_gradient(
    kind: Divergence, student_logits: torch.Tensor, teacher_logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the divergence in nats (N,) and its gradient by the student's logits, from logits (N, V) in fp32."""
    return resolved(DIVERGENCES[kind].value_and_gradient, __package__)(student_logits, teacher_logits)


def forward_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes KL(teacher || student) and its gradient, as `DivergenceEntry.value_and_gradient`."""
    # Logarithms of whole rows would cost more than all the rest; this form needs only two for each row.
    student, teacher = F.softmax(student_logits, dim=-1), F.softmax(teacher_logits, dim=-1)
    value = torch.linalg.vecdot(teacher, teacher_logits - student_logits)
    value += _log_normaliser(student_logits, student) - _log_normaliser(teacher_logits, teacher)
    return value, student.sub_(teacher)


def reverse_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes KL(student || teacher) and its gradient, as `DivergenceEntry.value_and_gradient`."""
    student_logs, teacher_logs = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    student, ratio = student_logs.exp(), student_logs - teacher_logs
    value = torch.linalg.vecdot(student, ratio)
    return value, student.mul_(ratio.sub_(value[:, None]))


def jensen_shannon(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the mean KL of both to their mean, and its gradient, as `DivergenceEntry.value_and_gradient`."""
    student_logs, teacher_logs = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    student, teacher = student_logs.exp(), teacher_logs.exp()
    mixed_logs = torch.logaddexp(student_logs, teacher_logs) - math.log(2)
    ratio = student_logs - mixed_logs
    to_student = torch.linalg.vecdot(student, ratio)
    to_teacher = torch.linalg.vecdot(teacher, teacher_logs - mixed_logs)
    return 0.5 * (to_student + to_teacher), student.mul_(ratio.sub_(to_student[:, None])).mul_(0.5)


def _log_normaliser(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Returns log sum exp of each row (N,), computed from the row's likeliest entry."""
    return logits.amax(dim=-1) - probabilities.amax(dim=-1).log()


def distillation_loss(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    input_ids: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    head_trains: bool = False,
    divergence: Divergence = Divergence.FORWARD_KL,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    chunk_tokens: int = 1024,
    block_tokens: int | None = None,
) -> torch.Tensor:
    """Returns the mean over targets of the divergence from the teacher's next token and the text's cross-entropy.

    Args:
        student_states, teacher_states: (B, T, d), the inputs of the heads.
        student_head, teacher_head: Map (N, d) to logits (N, vocabulary).
        input_ids: (B, T).
        targets: (B, T) bool, True for a token to be predicted; None for all but each row's first.
        head_trains: Whether parameters of `student_head` need gradients; its chunks are then computed again in the
            backward pass.
        divergence: The divergence.
        temperature: Both logits are divided by it and the divergence is multiplied by its square (Hinton et al., 2015).
        divergence_weight, cross_entropy_weight: Weights of the two terms.
        chunk_tokens: Number of positions whose logits exist at the same time.
        block_tokens: Number of positions whose probabilities exist at the same time; None for those of a chunk. It has
            no effect while the head is trained.

    Returns:
        Scalar in fp32 (fp64 for states in fp64), nats per target; zero if there are no targets.
    """
    next_ids = input_ids[:, 1:].reshape(-1)
    student_states, teacher_states = (x[:, :-1].flatten(0, 1) for x in (student_states, teacher_states))
    if targets is not None:  # positions without a target cost nothing
        kept = targets[:, 1:].reshape(-1).nonzero()[:, 0]
        next_ids, student_states, teacher_states = next_ids[kept], student_states[kept], teacher_states[kept]
    scale = 1.0 / max(len(next_ids), 1)
    terms = _Terms(Divergence(divergence), temperature, divergence_weight, cross_entropy_weight)
    arguments = (student_states, teacher_states, next_ids, scale, student_head, teacher_head, terms, chunk_tokens)
    return _recomputed_loss(*arguments) if head_trains else _ChunkedLoss.apply(*arguments, block_tokens or chunk_tokens)


@dataclass(frozen=True)
class _Terms:
    """Computes the weighted terms of the loss of some positions, and their gradient by the student's logits."""

    divergence: Divergence
    temperature: float
    divergence_weight: float
    cross_entropy_weight: float

    def __call__(
        self, logits: torch.Tensor, teacher_logits: torch.Tensor, next_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum of the loss over positions, and its gradient (N, V)."""
        total, gradient = logits.new_zeros(()), None
        if self.divergence_weight:
            if self.temperature == 1:
                values, gradient = divergence_and_gradient(self.divergence, logits, teacher_logits)
            else:
                cooled = logits / self.temperature, teacher_logits / self.temperature
                values, gradient = divergence_and_gradient(self.divergence, *cooled)
            total = total + self.divergence_weight * self.temperature**2 * values.sum()
            gradient = gradient.mul_(self.divergence_weight * self.temperature)
        if self.cross_entropy_weight:
            logs = F.log_softmax(logits, dim=-1)
            total = total - self.cross_entropy_weight * logs.gather(1, next_ids[:, None]).sum()
            of_text = logs.exp().scatter_add_(1, next_ids[:, None], logits.new_full((len(logits), 1), -1.0))
            of_text = of_text.mul_(self.cross_entropy_weight)
            gradient = of_text if gradient is None else gradient.add_(of_text)
        return total, torch.zeros_like(logits) if gradient is None else gradient


class _ChunkedLoss(torch.autograd.Function):
    """Computes the loss by chunks of positions, and the gradient by the states in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        teacher_states: torch.Tensor,
        next_ids: torch.Tensor,
        scale: float,
        head: Head,
        teacher_head: Head,
        terms: _Terms,
        chunk_tokens: int,
        block_tokens: int,
    ) -> torch.Tensor:
        total = torch.zeros((), device=states.device, dtype=wide(states[:0]).dtype)
        ctx.gradient = torch.empty_like(states) if states.requires_grad else None
        buffer: torch.Tensor | None = None  # the same for all chunks, because new memory costs time
        for part in _chunks(len(states), chunk_tokens):
            chunk = states[part].detach().requires_grad_(states.requires_grad)
            with torch.set_grad_enabled(states.requires_grad):
                logits = head(chunk)
            of_student, of_teacher = logits.detach(), teacher_head(teacher_states[part])
            if buffer is None and ctx.gradient is not None:
                buffer = torch.empty_like(of_student)
            for block in _chunks(len(chunk), block_tokens):
                loss, gradient = terms(wide(of_student[block]), wide(of_teacher[block]), next_ids[part][block])
                total += loss * scale
                if buffer is not None:
                    buffer[: len(chunk)][block] = gradient.mul_(scale)
            if buffer is not None:
                (ctx.gradient[part],) = torch.autograd.grad(logits, chunk, buffer[: len(chunk)])
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.gradient * grad_outputs[0], *[None] * 8


def _recomputed_loss(
    states: torch.Tensor,
    teacher_states: torch.Tensor,
    next_ids: torch.Tensor,
    scale: float,
    head: Head,
    teacher_head: Head,
    terms: _Terms,
    chunk_tokens: int,
) -> torch.Tensor:
    """Computes the loss by chunks of positions, and each chunk again in the backward pass."""

    def chunk_sum(chunk: torch.Tensor, teacher_chunk: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        logits = wide(head(chunk))
        with torch.no_grad():
            loss, gradient = terms(logits, wide(teacher_head(teacher_chunk)), ids)
        # The result has the value of `loss`, and `gradient` as its gradient by the logits.
        carrier = (logits * gradient).sum()
        return loss + carrier - carrier.detach()

    total = torch.zeros((), device=states.device, dtype=wide(states[:0]).dtype)
    for part in _chunks(len(states), chunk_tokens):
        chunk = states[part], teacher_states[part], next_ids[part]
        total = total + checkpoint(chunk_sum, *chunk, use_reentrant=False, preserve_rng_state=False) * scale
    return total


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, n, size))


def relative_error(
    student: torch.Tensor, teacher: torch.Tensor, sequence_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the squared error divided by the teacher's variance within each sequence, as a mean over sequences.

    Args:
        student, teacher: (B, T, d).
        sequence_weights: Weights (B,) of the mean; None means equal weights.
    """
    teacher = teacher.float()
    error = (student.float() - teacher).square().mean(dim=(1, 2))
    errors = error / teacher.var(dim=(1, 2), correction=0).clamp(min=1e-12)
    if sequence_weights is None:
        return errors.mean()
    return (errors * sequence_weights).sum() / sequence_weights.sum().clamp(min=1)
