"""Measures what the two branches of linear_window layers are worth: the loss of a text without one of them.

A converted model can look healed although its linear branch does nothing and the window alone carries it ("bypassed").
Only zeroing the branch reveals this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..evaluation.likelihood import score_sequences
from ..evaluation.statistics import paired_difference
from .attention_transfer import linear_window_layers

BRANCHES = ("linear", "window")


@dataclass(frozen=True)
class BranchLoss:
    """Holds the loss of a text with one branch of every linear_window layer zeroed.

    Attributes:
        zeroed: `linear` or `window`; None if both branches are active.
        nll: Nats per token.
        nll_loss: Increase of the NLL by zeroing, paired over the sequences; positive is worse.
        nll_loss_stderr: Standard error of `nll_loss`; None for a single sequence.
        n_items: Number of sequences.
    """

    zeroed: str | None
    nll: float
    nll_loss: float
    nll_loss_stderr: float | None
    n_items: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def branch_check(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int = 8) -> list[BranchLoss]:
    """Returns the losses of a text with both branches, without the linear one, and without the window.

    Args:
        model: A converted model with linear_window layers.
        sequences: Token ids (n, tokens), at least two tokens long.
        batch_size: Sequences in a forward pass.

    Raises:
        ValueError: The model has no linear_window layer.
    """
    if not linear_window_layers(model):
        raise ValueError("model: no layer has a linear_window, so there is no branch to check; give another model")
    both = score_sequences(model, sequences, batch_size=batch_size).nll
    found = [_loss(None, both, both)]
    for branch in BRANCHES:
        with without_branch(model, branch):
            found.append(_loss(branch, score_sequences(model, sequences, batch_size=batch_size).nll, both))
    return found


@contextmanager
def without_branch(model: nn.Module, branch: str) -> Iterator[None]:
    """Zeroes one branch of every linear_window layer of a converted model.

    Args:
        branch: `linear` keeps only softmax inside the window; `window` keeps each query's own key and everything
            older than the window. It works for whole sequences only, not with a cache.
    """
    if branch not in BRANCHES:
        raise ValueError(f"branch: '{branch}' is unknown; use {' or '.join(BRANCHES)}")
    layers = linear_window_layers(model)
    try:
        for _, treated in layers:
            treated.zeroed = branch
        yield
    finally:
        for _, treated in layers:
            treated.zeroed = None


def _loss(zeroed: str | None, nll: list[float], both: list[float]) -> BranchLoss:
    difference = paired_difference(nll, both, resamples=1)
    return BranchLoss(zeroed, sum(nll) / len(nll), difference.mean, difference.stderr, difference.n_items)
