"""Runs prefill of `linear_window` by kernels, forward and backward: `layerboost.attention` on whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .backward import backward
from .forward import forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = range(16, 257)


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    segments: torch.Tensor | None,
    softcap: float | None,
) -> bool:
    """Returns whether `linear_window_prefill` can handle the arguments.

    It cannot handle packed documents, a cap on scores, a gradient to a state, dtypes and head sizes other than those
    above, or a GPU that lacks the tensor cores for them (before NVIDIA's Ampere).
    """
    if query.is_cuda and (torch.version.cuda is None or torch.cuda.get_device_capability(query.device) < (8, 0)):
        return False
    needs_state_gradient = state is not None and any(part.requires_grad for part in state)
    return (
        segments is None
        and softcap is None
        and not needs_state_gradient
        and query.dtype == key.dtype == value.dtype
        and query.dtype in DTYPES
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in HEAD_DIMS
    )


def linear_window_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logits: torch.Tensor,
    features: torch.Tensor,
    *,
    scaling: float,
    window: int,
    logit_cap: float,
    state: tuple[torch.Tensor, torch.Tensor] | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes softmax inside the window plus linear attention over everything older, in time linear in T.

    The feature map is applied outside, so that autograd gives its parameters their gradients. Its logits are stored, as
    in the form without kernels, but the weights between pairs of tokens never are.

    Args:
        query: (B, H, T, D), in fp32, bf16 or fp16; sums are in fp32.
        key, value: (B, K, S, D); at most window - 1 keys precede the queries' own.
        logits: (B, H, T, R), a_r(q).
        features: (B, K, S, R), b_r(k).
        scaling: Factor on the scores.
        window: Tokens in the window, including the query's own.
        logit_cap: Maximum of a_r minus the largest score inside the query's window.
        state: Sums (B, K, R, D) and norms (B, K, R) over the tokens before `key`, without gradient.
        valid: (B, S) bool, False for padding; a query always sees its own key.

    Returns:
        (B, H, T, D) in the dtype of `query`.
    """
    if state is not None:
        state = (state[0].float().contiguous(), state[1].float().contiguous())
    if valid is not None:
        valid = valid.contiguous()
    inputs = (x.contiguous() for x in (query, key, value, logits, features))
    return _LinearWindow.apply(*inputs, valid, state, scaling, window, logit_cap)


class _LinearWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        features: torch.Tensor,
        valid: torch.Tensor | None,
        state: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        window: int,
        logit_cap: float,
    ) -> torch.Tensor:
        with torch.cuda.device_of(query):
            output, peak, log_total = forward(
                query, key, value, logits, features, valid, state, scaling, window, logit_cap
            )
        sums, norms = (None, None) if state is None else state
        ctx.save_for_backward(output, peak, log_total, query, key, value, logits, features, valid, sums, norms)
        ctx.options = scaling, window, logit_cap
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, peak, log_total, query, key, value, logits, features, valid, sums, norms = ctx.saved_tensors
        state = None if sums is None else (sums, norms)
        scaling, window, logit_cap = ctx.options
        with torch.cuda.device_of(d_output):
            gradients = backward(
                d_output, output, peak, log_total, query, key, value, logits, features, valid, state,
                scaling, window, logit_cap,
            )  # fmt: skip
        return *gradients, None, None, None, None, None
