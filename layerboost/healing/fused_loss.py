"""Computes the divergence by a fused kernel (liger-kernel) if there is a GPU and it agrees with our own code."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .divergences import DIVERGENCES, Divergence
from .losses import distillation_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEVICES = ("cuda",)
_TRIAL_POSITIONS, _TRIAL_TOLERANCE = 16, 2e-2

log = logging.getLogger(__name__)


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Returns the head if a model's logits are only its product with the hidden states, None otherwise."""
    head, config = model.get_output_embeddings(), model.config
    changed = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    is_plain = isinstance(head, nn.Linear) and head.bias is None
    return head if is_plain and not any(getattr(config, name, None) for name in changed) else None


def fused_divergence(
    student_states: torch.Tensor,
    teacher_states: torch.Tensor,
    student_head: nn.Linear,
    teacher_head: nn.Linear,
    input_ids: torch.Tensor,
    *,
    targets: torch.Tensor | None = None,
    divergence: Divergence = Divergence.FORWARD_KL,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
) -> torch.Tensor:
    """Computes `distillation_loss` without cross-entropy by one kernel for each chunk of positions; on CUDA only.

    Arguments and result are those of `distillation_loss`.
    """
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    kept = torch.ones_like(input_ids[:, 1:], dtype=torch.bool) if targets is None else targets[:, 1:]
    student, teacher = (states[:, :-1][kept] for states in (student_states, teacher_states))
    if not len(student):
        return student.sum().float()
    kernel = LigerFusedLinearJSD(jsd_beta=DIVERGENCES[divergence].fused_beta, temperature=temperature)
    value = kernel(student, student_head.weight, teacher, teacher_head.weight)
    return divergence_weight * temperature**2 * value


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def fused_heads(
    teacher: PreTrainedModel, student: PreTrainedModel, divergence: Divergence, temperature: float
) -> tuple[nn.Linear, nn.Linear] | None:
    """Returns the heads of student and teacher if `fused_divergence` can be used with them, None otherwise.

    It needs CUDA, plain heads and a divergence that the kernel knows. Its value and gradient must agree with our own
    code on a few random states, because kernels are compiled for the present device and their library changes. A
    disagreement is logged.
    """
    if DIVERGENCES[divergence].fused_beta is None:
        return None
    heads = plain_head(student), plain_head(teacher)
    if heads[0] is None or heads[1] is None or not is_installed():
        return None
    if heads[0].weight.device.type not in _DEVICES:
        return None
    found = heads[0], heads[1]
    generator = torch.Generator(heads[0].weight.device).manual_seed(0)

    def random(head: nn.Linear) -> torch.Tensor:
        shape, weight = (1, _TRIAL_POSITIONS, head.in_features), head.weight
        return torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)

    states, teacher_states = random(found[0]), random(found[1])
    input_ids = torch.zeros(1, _TRIAL_POSITIONS, dtype=torch.long, device=states.device)
    losses: tuple[Callable[..., torch.Tensor], ...] = (fused_divergence, distillation_loss)
    results = []
    try:
        for loss in losses:
            leaf = states.clone().requires_grad_()
            with torch.enable_grad():
                value = loss(leaf, teacher_states, *found, input_ids, divergence=divergence, temperature=temperature)
            (gradient,) = torch.autograd.grad(value, leaf)
            results.append((value.detach().float(), gradient.float()))
    except Exception as error:  # healing works without the kernel, so a failed compilation must not stop it
        log.warning("fused loss: not used, liger-kernel failed on this device (%r)", error)
        return None
    for fused, chunked in zip(*results, strict=True):
        if not (fused - chunked).norm() <= _TRIAL_TOLERANCE * chunked.norm():  # also true if a value is NaN
            log.warning("fused loss: not used, liger-kernel gives another result than the plain form here")
            return None
    return found
