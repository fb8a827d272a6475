"""Says how a converted model is healed: budget, phases, losses and schedule, as plain values without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Plan
from .divergences import Divergence

TRANSFER, HEAL = "transfer", "heal"

FINAL_LEARNING_RATE = 0.1
"""Learning rate at the end of a phase's cosine, relative to the peak."""

ANNEALING_FRACTION = 0.1
"""Steps that an early stop still takes to bring the learning rate down, relative to the steps before it."""


@dataclass(frozen=True)
class HealingSpec:
    """Says how a converted model is healed. Equal specs give equal results on equal data, wherever they run.

    Attributes:
        tokens: Token budget of both phases together; it is never exceeded.
        sequence_tokens: Length of a packed sequence.
        batch_sequences: Sequences of one step, summed over all workers.
        method: `lora` trains adapters on every projection of attention and MLP and merges them at the end, `full`
            trains every parameter on a copy; both train the feature maps.
        rank, alpha: Rank and scale of the adapters; `alpha` None means the rank.
        learning_rate: Peak of the healing phase; None means 0.5 / hidden size (lora) or 0.1 / hidden size (full).
        transfer_fraction: Share of the tokens that goes to attention transfer if a plan has linear_window layers.
        transfer_learning_rate: Peak of the transfer phase.
        divergence: Divergence of the student's next token from the teacher's.
        temperature: Temperature of both models' softmax in the divergence.
        divergence_weight, cross_entropy_weight, hidden_weight: Weights of the divergence, of the cross-entropy of the
            text's own next tokens, and of the squared error of every layer's hidden state relative to the teacher's
            variance.
        window_dropout: Probability that a linear_window layer sees, for one step, only a shorter window drawn at
            random, so that its linear branch must represent what the window left out. It falls linearly to 0 at three
            quarters of the budget, and is 0 once a healing that stops early brings its learning rate down.
        warmup_fraction: Share of a phase's steps with linear warm-up; a cosine then falls to 10 % of the peak.
        gradient_clip: Maximum norm of the gradient in the healing phase. In the transfer phase layers are fitted
            independently of each other, therefore it is not clipped.
        weight_decay: Weight decay of AdamW.
        micro_batch_sequences: Maximum number of sequences that a worker runs at once. It changes memory, not results,
            except for the rounding of gradients in bfloat16.
        activation_checkpointing: Run the student's layers again in the backward pass; it changes memory, not results.
        stop_when_flat: Stop early once the last two tenths of the budget have brought less than this share of the fall
            of the held-out divergence so far; the learning rate is then still brought down. None spends the whole
            budget.
        held_out_sequences: First sequences of the text, which are not trained on if `stop_when_flat` is given.
        seed: Seed of the adapters and of the order of the text.
    """

    tokens: int
    sequence_tokens: int = 512
    batch_sequences: int = 4
    method: str = "lora"
    rank: int = 32
    alpha: float | None = None
    learning_rate: float | None = None
    transfer_fraction: float = 0.05
    transfer_learning_rate: float = 5e-2
    divergence: Divergence = Divergence.FORWARD_KL
    temperature: float = 1.0
    divergence_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    hidden_weight: float = 0.0
    window_dropout: float = 0.0
    warmup_fraction: float = 0.05
    gradient_clip: float = 1.0
    weight_decay: float = 0.0
    micro_batch_sequences: int | None = None
    activation_checkpointing: bool = False
    stop_when_flat: float | None = None
    held_out_sequences: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "divergence", Divergence(self.divergence))
        if self.method not in ("lora", "full"):
            raise ValueError(f"method: '{self.method}' is unknown; use lora or full")
        if self.sequence_tokens < 2:
            raise ValueError(f"sequence_tokens: {self.sequence_tokens} leaves nothing to predict; use at least 2")
        for name in ("batch_sequences", "rank", "temperature", "gradient_clip", "held_out_sequences"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be above 0")
        weights = ("divergence_weight", "cross_entropy_weight", "hidden_weight")
        for name in weights:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} is negative; use 0 to leave the term out")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"divergence_weight: {self.divergence_weight} leaves no loss; give one term a weight")
        if not 0 <= self.transfer_fraction < 1:
            raise ValueError(f"transfer_fraction: {self.transfer_fraction} must be at least 0 and below 1")
        if not 0 <= self.window_dropout <= 1:
            raise ValueError(f"window_dropout: {self.window_dropout} is no probability; use 0 to 1")
        if self.stop_when_flat is not None and not 0 < self.stop_when_flat < 1:
            raise ValueError(f"stop_when_flat: {self.stop_when_flat} must be above 0 and below 1, or None")
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
        """Number of steps of both phases together; a step that the budget does not pay for in full is not taken."""
        return self.tokens // self.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"divergence": self.divergence.value}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HealingSpec:
        return cls(**data)


@dataclass(frozen=True)
class Phase:
    """Describes one part of training: `steps` optimizer steps that follow the run's first `first_step` steps.

    `gradient_clip` is the maximum norm of the gradient, 0 for no limit.
    """

    name: str
    first_step: int
    steps: int
    learning_rate: float
    gradient_clip: float = 0.0


def phases_of(spec: HealingSpec, plan: Plan, hidden_size: int) -> tuple[Phase, ...]:
    """Returns the phases of a budget: transfer if the plan has linear_window layers, then healing."""
    transfer_steps = 0
    if plan.is_transferred:
        transfer_steps = int(spec.tokens * spec.transfer_fraction) // spec.tokens_per_step
    learning_rate = spec.learning_rate
    if learning_rate is None:
        learning_rate = (0.5 if spec.method == "lora" else 0.1) / hidden_size
    phases = (
        Phase(TRANSFER, 0, transfer_steps, spec.transfer_learning_rate),
        Phase(HEAL, transfer_steps, spec.steps - transfer_steps, learning_rate, spec.gradient_clip),
    )
    return tuple(phase for phase in phases if phase.steps)


def mark_steps(spec: HealingSpec, fractions: Sequence[float]) -> dict[int, float]:
    """Maps the steps (from 1) that end at given shares of the budget to the shares, except those below one step."""
    steps = {int(spec.steps * fraction + 1e-9): fraction for fraction in sorted(fractions, reverse=True)}
    return {step: steps[step] for step in sorted(steps) if 0 < step < spec.steps}


def window_dropout_at(spec: HealingSpec, step: int) -> float:
    """Returns the probability of a shorter window at a step (from 0) of the run."""
    return spec.window_dropout * max(0.0, 1.0 - step / (0.75 * spec.steps))


@dataclass(frozen=True)
class HeldOut:
    """Holds the divergence from the teacher on sequences that are not trained on, after `step` steps of the run."""

    step: int
    divergence: float


def held_out_steps(spec: HealingSpec, phase: Phase) -> list[int]:
    """Returns the steps after which the held-out divergence is measured: the healing phase's start and each tenth."""
    if spec.stop_when_flat is None or phase.name != HEAL:
        return []
    tenths = {phase.first_step + phase.steps * tenth // 10 for tenth in range(10)}
    return sorted(tenths)


def annealing_start(spec: HealingSpec, measured: Sequence[HeldOut]) -> int | None:
    """Returns the step after which the learning rate comes down because the curve is flat; None while it is not.

    It depends only on what was measured, so that a resumed run stops at the same step as an undisturbed one.
    """
    if spec.stop_when_flat is None:
        return None
    for last in range(3, len(measured)):
        fall = measured[0].divergence - measured[last].divergence
        recent = measured[last - 2].divergence - measured[last].divergence
        if recent < spec.stop_when_flat * max(fall, 0.0):
            return measured[last].step
    return None


def last_step(phase: Phase, annealed_from: int | None) -> int:
    """Returns the run's step that ends a phase, earlier than planned if its learning rate comes down early."""
    planned = phase.first_step + phase.steps
    if annealed_from is None:
        return planned
    return min(planned, annealed_from + max(1, round(ANNEALING_FRACTION * (annealed_from - phase.first_step))))


def learning_rate_at(phase: Phase, step: int, warmup_fraction: float, annealed_from: int | None = None) -> float:
    """Returns the learning rate of the run's step `step` (from 0), inside `phase`.

    It rises linearly in the warm-up, then falls along a cosine to 10 % of the peak. From `annealed_from` on it falls
    along a straight line to the same end.
    """
    final = FINAL_LEARNING_RATE * phase.learning_rate
    if annealed_from is not None and step >= annealed_from:
        start = learning_rate_at(phase, annealed_from - 1, warmup_fraction)
        progress = (step - annealed_from + 1) / (last_step(phase, annealed_from) - annealed_from)
        return start + (final - start) * progress
    local_step, warmup = step - phase.first_step, int(phase.steps * warmup_fraction)
    if local_step < warmup:
        return phase.learning_rate * (local_step + 1) / warmup
    progress = (local_step - warmup) / max(phase.steps - warmup - 1, 1)
    return final + (phase.learning_rate - final) * 0.5 * (1 + math.cos(math.pi * progress))
