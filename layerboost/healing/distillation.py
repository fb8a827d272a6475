"""Distils a converted model from its untouched parent, or from a larger teacher with the same vocabulary.

Teacher and student may share parameters: with LoRA they are one copy of the weights with adapters on or off. The
teacher always runs without gradients.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import add_lora, freeze_all_but_feature_maps, unshare_parameters
from .attention_transfer import AttentionTransfer, draw_windows, full_windows
from .fused_loss import fused_divergence, fused_heads
from .losses import Head, distillation_loss, positions_at_once, relative_error
from .spec import TRANSFER, HealingSpec
from .teacher_states import TeacherStates


class Distillation(nn.Module):
    """Returns, as a module's forward, the healing loss of a student, for any engine that wraps modules.

    Args:
        teacher, student: Causal language models with the same vocabulary.
        spec: Gives the loss weights and the temperature.
        stored: Where the teacher's final hidden states are kept; None computes them each time. Without a split head,
            or with a loss over every layer, they are computed each time, too.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        spec: HealingSpec,
        stored: TeacherStates | None = None,
    ):
        super().__init__()
        check_teacher(teacher, student, spec)
        self.teacher, self.student, self.spec = teacher, student, spec
        self.splits_head = all(_has_split_head(model) for model in (teacher, student))
        self.stored = stored if self.splits_head else None
        can_fuse = self.splits_head and not spec.cross_entropy_weight
        # A tuple keeps the heads from being registered as modules a second time.
        self.fused_heads = fused_heads(teacher, student, spec.divergence, spec.temperature) if can_fuse else None

    def begin_step(self, step: int, *, whole_windows: bool = False) -> None:
        """Draws the student's windows for the run's step (from 0); call it before the step's first forward pass."""
        draw_windows(self.student, self.spec, step, whole=whole_windows)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        *,
        measure: bool = False,
    ) -> torch.Tensor:
        """Returns the loss of a slice of a batch, a mean over its targets.

        Args:
            input_ids, position_ids, targets: As in `PackedText`.
            measure: Return only the divergence instead, with whole windows and no gradient, for the held-out curve.
        """
        if measure:
            return self._measured(input_ids, position_ids, targets)
        spec = self.spec
        with_layers = spec.hidden_weight > 0
        teacher_states, teacher_layers = self._teach(input_ids, position_ids, with_layers)
        student_states, student_layers = self._run(self.student, input_ids, position_ids, with_layers)
        loss = self._divergence(
            student_states,
            teacher_states,
            input_ids,
            targets,
            divergence_weight=spec.divergence_weight,
            cross_entropy_weight=spec.cross_entropy_weight,
        )
        if with_layers:
            weights = None if targets is None else targets[:, 1:].sum(dim=1)
            errors = [relative_error(s, t, weights) for s, t in zip(student_layers, teacher_layers, strict=True)]
            loss = loss + spec.hidden_weight * torch.stack(errors).mean()
        return loss

    @torch.no_grad()
    def _measured(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, targets: torch.Tensor | None
    ) -> torch.Tensor:
        with full_windows(self.student):
            student_states, _ = self._run(self.student, input_ids, position_ids, False)
        teacher_states, _ = self._teach(input_ids, position_ids, False)
        return self._divergence(student_states, teacher_states, input_ids, targets)

    def _divergence(
        self,
        student_states: torch.Tensor,
        teacher_states: torch.Tensor,
        input_ids: torch.Tensor,
        targets: torch.Tensor | None,
        *,
        divergence_weight: float = 1.0,
        cross_entropy_weight: float = 0.0,
    ) -> torch.Tensor:
        # The fused kernel bypasses the head's forward, in which alone ZeRO-3 gathers the head's sharded weights.
        if self.fused_heads is not None and not any(hasattr(head.weight, "ds_id") for head in self.fused_heads):
            return fused_divergence(
                student_states,
                teacher_states,
                *self.fused_heads,
                input_ids,
                targets=targets,
                divergence=self.spec.divergence,
                temperature=self.spec.temperature,
                divergence_weight=divergence_weight,
            )
        head = self.student.get_output_embeddings()
        head_trains = torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())
        chunk, block = positions_at_once(self.student.config.vocab_size, input_ids.device, head_trains=head_trains)
        return distillation_loss(
            student_states,
            teacher_states,
            self._head(self.student),
            self._head(self.teacher),
            input_ids,
            targets=targets,
            head_trains=head_trains,
            divergence=self.spec.divergence,
            temperature=self.spec.temperature,
            divergence_weight=divergence_weight,
            cross_entropy_weight=cross_entropy_weight,
            chunk_tokens=chunk,
            block_tokens=block,
        )

    @torch.no_grad()
    def _teach(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, with_layers: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns what `_run` returns for the teacher."""
        if self.stored is None or with_layers:
            return self._run(self.teacher, input_ids, position_ids, with_layers)

        def compute() -> torch.Tensor:
            return self._run(self.teacher, input_ids, position_ids, False)[0]

        return self.stored.states(input_ids, position_ids, compute), ()

    def _run(
        self, model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None, with_layers: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns the head's input (B, T, d), or logits if not split, and the hidden state after every layer."""
        output = (model.base_model if self.splits_head else model)(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, output_hidden_states=with_layers
        )
        states = output.last_hidden_state if self.splits_head else output.logits
        return states, output.hidden_states[1:] if with_layers else ()

    def _head(self, model: PreTrainedModel) -> Head:
        return (lambda states: head_logits(model, states)) if self.splits_head else (lambda logits: logits)


def head_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Returns logits (N, vocabulary) of final hidden states (N, d), scaled and capped as known families do."""
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
    """Returns whether `head_logits` of the backbone's output equals the model's own logits, tried on a few tokens."""
    device = next(model.parameters()).device
    n_tokens = min(8, model.config.vocab_size)
    input_ids = torch.arange(n_tokens, device=device)[None]
    expected = model(input_ids=input_ids, use_cache=False).logits.float()
    states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    actual = head_logits(model, states).float()
    return actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)


def check_teacher(teacher: PreTrainedModel, student: PreTrainedModel, spec: HealingSpec) -> None:
    """Raises ValueError if a teacher cannot teach the student: other tokens, or no layers to compare."""
    vocabularies = teacher.config.get_text_config().vocab_size, student.config.get_text_config().vocab_size
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"teacher: has a vocabulary of {vocabularies[0]} tokens and the model one of {vocabularies[1]}; "
            "take a teacher with the same tokenizer"
        )
    shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (teacher, student)]
    if spec.hidden_weight and shapes[0] != shapes[1]:
        raise ValueError(
            f"hidden_weight: {spec.hidden_weight} needs layers of the teacher that correspond to the model's; "
            "use 0 with a teacher of another shape"
        )


def make_trainee(
    phase: str,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    spec: HealingSpec,
    stored: TeacherStates | None = None,
) -> nn.Module:
    """Returns the module to train in a phase, after making the right parameters of `student` trainable, in place.

    `transfer` trains the feature maps. `heal` adds LoRA, or copies the student's parameters (`full`), so that the
    teacher, which may share them, does not change. The teacher is frozen; its states may be `stored`.
    """
    teacher.requires_grad_(False).eval()
    student.eval()
    if phase == TRANSFER:
        freeze_all_but_feature_maps(student)
        return AttentionTransfer(teacher, student, spec)
    if spec.method == "lora":
        add_lora(student, spec.rank, spec.alpha, spec.seed)
    else:
        unshare_parameters(student)
        student.requires_grad_(True)
    if spec.activation_checkpointing:
        _checkpoint_activations(student)
    return Distillation(teacher, student, spec, stored)


def _checkpoint_activations(student: PreTrainedModel) -> None:
    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()  # transformers checkpoints only in training mode
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
        if getattr(module, "attention_dropout", None):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010
