"""Runs prefill of `linear_window` by kernels, forward and backward: `layerboost.attention` on whole sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .backward import backward
from .forward import SinkTensors, forward

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
    sinks: torch.Tensor | None = None,
    n_sinks: int = 0,
    n_apart: int = 0,
) -> torch.Tensor:
    """Computes softmax inside the window and over sinks plus linear attention over all others, in time linear in T.

    The feature map is applied outside, so that autograd gives its parameters their gradients. Its logits are stored, as
    in the form without kernels, but the weights between pairs of tokens never are.

    Args:
        query: (B, H, T, D), in fp32, bf16 or fp16; sums are in fp32.
        key, value: (B, K, S, D); at most window - 1 keys precede the queries' own, besides those set apart.
        logits: (B, H, T, R), a_r(q).
        features: (B, K, S, R), b_r(k).
        scaling: Factor on the scores.
        window: Tokens in the window, including the query's own.
        logit_cap: Maximum of a_r minus the largest score inside the query's window.
        state: Sums (B, K, R, D) and norms (B, K, R) over the tokens before `key`, without gradient.
        valid: (B, S) bool, False for padding; a query always sees its own key.
        sinks: (B, S) bool, the keys that later queries see besides their windows; None if there are none.
        n_sinks: Most sinks of a sequence.
        n_apart: Number of keys at the front that lie before every window; only the sinks among them are seen.

    Returns:
        (B, H, T, D) in the dtype of `query`.
    """
    if state is not None:
        state = (state[0].float().contiguous(), state[1].float().contiguous())
    found: tuple[torch.Tensor | None, ...] = (None, None, None)
    summed = valid
    if sinks is not None:
        shown = sinks if valid is None else sinks & valid
        exists, index = shown.int().topk(min(n_sinks, shown.shape[1]), dim=-1)  # (B, M)
        at = torch.where(exists.bool(), index - n_apart, 1 << 30).int()
        taken = index[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
        found = (key.gather(2, taken), value.gather(2, taken), at)
        summed = ~sinks if valid is None else valid & ~sinks
        key, value, features = key[:, :, n_apart:], value[:, :, n_apart:], features[:, :, n_apart:]
        valid, summed = None if valid is None else valid[:, n_apart:].contiguous(), summed[:, n_apart:].contiguous()
    elif valid is not None:
        valid = summed = valid.contiguous()
    inputs = (x.contiguous() for x in (query, key, value, logits, features))
    return _LinearWindow.apply(*inputs, *found, valid, summed, state, scaling, window, logit_cap)


class _LinearWindow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        logits: torch.Tensor,
        features: torch.Tensor,
        sink_key: torch.Tensor | None,
        sink_value: torch.Tensor | None,
        sink_positions: torch.Tensor | None,
        valid: torch.Tensor | None,
        summed: torch.Tensor | None,
        state: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float,
        window: int,
        logit_cap: float,
    ) -> torch.Tensor:
        sinks = _sinks(sink_key, sink_value, sink_positions)
        with torch.cuda.device_of(query):
            output, peak, log_total = forward(
                query, key, value, logits, features, valid, summed, sinks, state, scaling, window, logit_cap
            )
        sums, norms = (None, None) if state is None else state
        kept = (query, key, value, logits, features, sink_key, sink_value, sink_positions, valid, summed, sums, norms)
        ctx.save_for_backward(output, peak, log_total, *kept)
        ctx.options = scaling, window, logit_cap
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, peak, log_total, *kept = ctx.saved_tensors
        query, key, value, logits, features, sink_key, sink_value, sink_positions, valid, summed, sums, norms = kept
        state = None if sums is None else (sums, norms)
        scaling, window, logit_cap = ctx.options
        with torch.cuda.device_of(d_output):
            gradients = backward(
                d_output, output, peak, log_total, query, key, value, logits, features, valid, summed,
                _sinks(sink_key, sink_value, sink_positions), state, scaling, window, logit_cap,
            )  # fmt: skip
        return *gradients, None, None, None, None, None, None, None


def _sinks(key: torch.Tensor | None, value: torch.Tensor | None, positions: torch.Tensor | None) -> SinkTensors | None:
    return None if key is None or value is None or positions is None else (key, value, positions)
