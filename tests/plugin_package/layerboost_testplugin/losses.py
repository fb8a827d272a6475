"""Implements the divergence `total_variation`: half the sum of absolute differences of two distributions."""

from __future__ import annotations

import torch


def total_variation(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = student_logits.softmax(-1), teacher_logits.softmax(-1)
    signs = (student - teacher).sign() / 2
    value = (signs * (student - teacher)).sum(-1)
    return value, student * (signs - (student * signs).sum(-1, keepdim=True))
