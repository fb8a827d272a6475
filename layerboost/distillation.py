"""Healing as losses: attention transfer of feature maps, then distillation of logits from the untouched parent.

Teacher and student may share parameters; the teacher is only ever run without gradients. Every loss is a mean over
positions of a mean over sequences, so that a batch cut into slices gives the whole batch's loss and gradient when the
slices are weighted by their number of sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .adapters import add_lora, feature_map_layers, freeze_all_but_feature_maps, unshare_parameters
from .plan import Plan, Treatment

TRANSFER, HEAL = "transfer", "heal"

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps hidden states (N, d) to logits (N, vocabulary)."""


@dataclass(frozen=True)
class HealingSpec:
    """How a converted model is healed. Equal specs give equal results on equal data, wherever they run.

    Attributes:
        tokens: budget over both phases; it is never exceeded.
        sequence_tokens: length of a packed sequence.
        batch_sequences: sequences of one step over all workers.
        method: `lora` trains adapters on every projection of attention and MLP and merges them at the end, `full`
            trains every parameter on a copy; both train the feature maps.
        rank, alpha: of the adapters; `alpha` None means 2 * rank.
        learning_rate: peak of the healing phase; None means 1 / hidden size (lora) or 0.125 / hidden size (full).
        transfer_fraction: share of the tokens that goes to attention transfer when a plan has linear_window layers.
        transfer_learning_rate: peak of the transfer phase.
        temperature: of the softmax of both models in the KL term.
        kl_weight, cross_entropy_weight, hidden_weight: of KL(teacher || student), of the text's own next tokens, and of
            the squared error of every layer's hidden state relative to the teacher's variance.
        warmup_fraction: share of a phase's steps with linear warm-up; a cosine then falls to 10 % of the peak.
        gradient_clip: largest norm of the gradient.
        weight_decay: of AdamW.
        micro_batch_sequences: most sequences that a worker runs at once; changes memory, not results.
        chunk_tokens: positions whose logits exist at the same time; changes memory, not results.
        activation_checkpointing: run the student's layers again in the backward pass; changes memory, not results.
        seed: of the adapters and of the order of the text.
    """

    tokens: int
    sequence_tokens: int = 512
    batch_sequences: int = 8
    method: str = "lora"
    rank: int = 16
    alpha: float | None = None
    learning_rate: float | None = None
    transfer_fraction: float = 0.2
    transfer_learning_rate: float = 5e-2
    temperature: float = 1.0
    kl_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    hidden_weight: float = 0.0
    warmup_fraction: float = 0.05
    gradient_clip: float = 1.0
    weight_decay: float = 0.0
    micro_batch_sequences: int | None = None
    chunk_tokens: int = 1024
    activation_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("lora", "full"):
            raise ValueError(f"method: '{self.method}' is unknown; use lora or full")
        if self.sequence_tokens < 2:
            raise ValueError(f"sequence_tokens: {self.sequence_tokens} leaves nothing to predict; use at least 2")
        for name in ("batch_sequences", "rank", "chunk_tokens", "temperature", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
        if not 0 <= self.transfer_fraction < 1:
            raise ValueError(f"transfer_fraction: {self.transfer_fraction} must be at least 0 and below 1")
        if self.micro_batch_sequences is not None and self.micro_batch_sequences < 1:
            raise ValueError(f"micro_batch_sequences: {self.micro_batch_sequences} must be at least 1, or None")
        if self.tokens < self.tokens_per_step:
            raise ValueError(
                f"tokens: {self.tokens} is below one step of {self.batch_sequences} sequences of "
                f"{self.sequence_tokens} tokens; use at least {self.tokens_per_step} or a smaller batch"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_sequences * self.sequence_tokens

    @property
    def steps(self) -> int:
        """Steps of both phases together: as many as the budget pays for in full."""
        return self.tokens // self.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HealingSpec:
        return cls(**data)


@dataclass(frozen=True)
class Phase:
    """One stretch of training: `steps` optimizer steps, the first of which is the run's step `first_step` + 1."""

    name: str
    first_step: int
    steps: int
    learning_rate: float


def phases_of(spec: HealingSpec, plan: Plan, hidden_size: int) -> tuple[Phase, ...]:
    """The phases that a budget is divided into: transfer where the plan has linear_window layers, then healing."""
    transfer_steps = 0
    if plan.count(Treatment.LINEAR_WINDOW):
        transfer_steps = int(spec.tokens * spec.transfer_fraction) // spec.tokens_per_step
    learning_rate = spec.learning_rate
    if learning_rate is None:
        learning_rate = (1.0 if spec.method == "lora" else 0.125) / hidden_size
    phases = (
        Phase(TRANSFER, 0, transfer_steps, spec.transfer_learning_rate),
        Phase(HEAL, transfer_steps, spec.steps - transfer_steps, learning_rate),
    )
    return tuple(phase for phase in phases if phase.steps)


def distillation_loss(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    input_ids: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
    chunk_tokens: int = 1024,
) -> torch.Tensor:
    """KL(teacher || student) of the next token and its cross-entropy, a mean over the positions that predict one.

    Logits exist for `chunk_tokens` positions at a time, in the forward and in the backward pass, which computes each
    chunk again; value and gradient are those of the loss on whole logits.

    Args:
        student_states, teacher_states: (B, T, d), what the heads take.
        student_head, teacher_head: map (N, d) to logits (N, vocabulary).
        input_ids: (B, T).
        mask: (B, T) bool, True where the token is real text; a position counts when it and its next token are.
        temperature: both logits are divided by it and the KL is multiplied by its square (Hinton et al., 2015).

    Returns:
        Scalar in fp32, nats per position.
    """
    counted = torch.ones_like(input_ids[:, 1:], dtype=torch.bool)
    if mask is not None:
        counted = mask[:, :-1] & mask[:, 1:]
    targets, counted = input_ids[:, 1:].reshape(-1), counted.reshape(-1).float()
    student_states, teacher_states = (x[:, :-1].flatten(0, 1) for x in (student_states, teacher_states))

    def chunk_sum(student, teacher, targets, counted):
        logits = student_head(student).float()
        total = logits.new_zeros(())
        if kl_weight:
            with torch.no_grad():
                teacher_logs = F.log_softmax(teacher_head(teacher).float() / temperature, dim=-1)
            student_logs = F.log_softmax(logits / temperature, dim=-1)
            kl = F.kl_div(student_logs, teacher_logs, reduction="none", log_target=True).sum(dim=-1)
            total = total + kl_weight * temperature**2 * (kl * counted).sum()
        if cross_entropy_weight:
            cross_entropy = F.cross_entropy(logits, targets, reduction="none")
            total = total + cross_entropy_weight * (cross_entropy * counted).sum()
        return total

    total = torch.zeros((), device=input_ids.device)
    for chunk in zip(*(x.split(chunk_tokens) for x in (student_states, teacher_states, targets, counted)), strict=True):
        total = total + checkpoint(chunk_sum, *chunk, use_reentrant=False, preserve_rng_state=False)
    return total / counted.sum().clamp(min=1)


def relative_error(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared error over the teacher's variance, both within each sequence of (B, T, d), a mean over the sequences."""
    teacher = teacher.float()
    error = (student.float() - teacher).square().mean(dim=(1, 2))
    return (error / teacher.var(dim=(1, 2), correction=0).clamp(min=1e-12)).mean()


class Distillation(nn.Module):
    """Module whose forward is the healing loss of a student, for any engine that wraps modules.

    Args:
        teacher, student: causal language models over one vocabulary.
        spec: weights, temperature and chunk.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, spec: HealingSpec):
        super().__init__()
        self.teacher, self.student, self.spec = teacher, student, spec
        self.splits_head = all(_has_split_head(model) for model in (teacher, student))

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        spec = self.spec
        with torch.no_grad():
            teacher_states, teacher_layers = self._run(self.teacher, input_ids)
        student_states, student_layers = self._run(self.student, input_ids)
        loss = distillation_loss(
            student_states,
            teacher_states,
            self._head(self.student),
            self._head(self.teacher),
            input_ids,
            mask=mask,
            temperature=spec.temperature,
            kl_weight=spec.kl_weight,
            cross_entropy_weight=spec.cross_entropy_weight,
            chunk_tokens=spec.chunk_tokens,
        )
        if spec.hidden_weight:
            errors = [relative_error(s, t) for s, t in zip(student_layers, teacher_layers, strict=True)]
            loss = loss + spec.hidden_weight * torch.stack(errors).mean()
        return loss

    def _run(self, model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What the head takes (B, T, d or vocabulary), and the hidden state behind every layer."""
        output = (model.base_model if self.splits_head else model)(
            input_ids=input_ids, use_cache=False, output_hidden_states=self.spec.hidden_weight > 0
        )
        states = output.last_hidden_state if self.splits_head else output.logits
        return states, output.hidden_states[1:] if self.spec.hidden_weight else ()

    def _head(self, model: PreTrainedModel) -> Head:
        return (lambda states: head_logits(model, states)) if self.splits_head else (lambda logits: logits)


def head_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits (N, vocabulary) of final hidden states (N, d), with the scaling and capping that known families apply."""
    config = model.config
    logits = model.get_output_embeddings()(states)
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def _has_split_head(model: PreTrainedModel) -> bool:
    """Whether `head_logits` of the backbone's output is what the model's own forward gives; tried on a few tokens."""
    device = next(model.parameters()).device
    n_tokens = min(8, model.config.vocab_size)
    input_ids = torch.arange(n_tokens, device=device)[None]
    expected = model(input_ids=input_ids, use_cache=False).logits.float()
    states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    actual = head_logits(model, states).float()
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)


class AttentionTransfer(nn.Module):
    """Module whose forward is the error of every linear_window layer's attention output, on the teacher's hidden input.

    Each converted attention module gets the hidden state that the teacher's module of the same name got, and its
    output (after the output projection) is compared with the teacher's; no gradient passes from one layer to another.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel):
        super().__init__()
        self.teacher, self.student = teacher, student
        self.layers = feature_map_layers(student)
        if not self.layers:
            raise ValueError("student: no layer has a linear_window; there is nothing to transfer")

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        errors = self.layer_errors(input_ids)
        return torch.stack([errors[name] for name in self.layers]).mean()

    def layer_errors(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Squared error relative to the teacher's variance for each converted attention module, by its name."""
        inputs: dict[str, torch.Tensor] = {}
        targets: dict[str, torch.Tensor] = {}
        errors: dict[str, torch.Tensor] = {}

        def keep(name, hidden_states, output):
            inputs[name], targets[name] = hidden_states, output
            return output

        def compare(name, hidden_states, output):
            errors[name] = relative_error(output, targets.pop(name))
            return output.detach()

        with torch.no_grad(), _tapped(self.teacher, self.layers, lambda name, states: states, keep):
            self.teacher.base_model(input_ids=input_ids, use_cache=False)
        # The student runs as a whole, so that its layers get the masks and positions that it gives them itself.
        with _tapped(self.student, self.layers, lambda name, states: inputs.pop(name), compare):
            self.student.base_model(input_ids=input_ids, use_cache=False)
        return errors


@contextmanager
def _tapped(
    model: nn.Module,
    names: list[str],
    on_input: Callable[[str, torch.Tensor], torch.Tensor],
    on_output: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Passes the hidden input and the output of the named attention modules through functions."""

    def before(name):
        def hook(module, args, kwargs):
            if "hidden_states" in kwargs:
                return args, kwargs | {"hidden_states": on_input(name, kwargs["hidden_states"])}
            return (on_input(name, args[0]), *args[1:]), kwargs

        return hook

    def after(name):
        def hook(module, args, kwargs, output):
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (on_output(name, states, output[0]), *output[1:])

        return hook

    handles: list[RemovableHandle] = []
    try:
        for name in names:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def make_trainee(phase: str, teacher: PreTrainedModel, student: PreTrainedModel, spec: HealingSpec) -> nn.Module:
    """The module to train in a phase: makes the right parameters of `student` trainable, in place, and adds the loss.

    `transfer` trains the feature maps. `heal` adds LoRA, or copies the student's parameters (`full`) so that the
    teacher, which may share them, never moves. The teacher is frozen.
    """
    teacher.requires_grad_(False).eval()
    student.eval()
    if phase == TRANSFER:
        freeze_all_but_feature_maps(student)
        return AttentionTransfer(teacher, student)
    if spec.method == "lora":
        add_lora(student, spec.rank, spec.alpha, spec.seed)
    else:
        unshare_parameters(student)
        student.requires_grad_(True)
    if spec.activation_checkpointing:
        _checkpoint_activations(student)
    return Distillation(teacher, student, spec)


def _checkpoint_activations(student: PreTrainedModel) -> None:
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()  # transformers checkpoints only in training mode
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        if getattr(module, "attention_dropout", None):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010
