"""Compares every fast form of a treatment with the naive one, on fresh random inputs."""

from __future__ import annotations

import pytest
import torch

from layerboost.attention import (
    LinearWindow,
    Sinks,
    linear_window_attention,
    naive_attention,
    sink_tokens,
    window_attention,
)
from layerboost.plan import Treatment

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALING = HEAD_DIM**-0.5
LENGTHS_AND_WINDOWS = [(1, 1), (3, 8), (8, 8), (9, 8), (70, 1), (130, 5), (200, 64), (161, 80), (64, 100)]

LENGTHS_WINDOWS_AND_SINKS = [
    (n, window, sinks) for n, window in LENGTHS_AND_WINDOWS for sinks in (0, 1, 3) if sinks < window
]


@pytest.fixture
def feature_map() -> LinearWindow:
    module = LinearWindow(HEADS, KV_HEADS, HEAD_DIM, SCALING).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def random_qkv(n_tokens: int, batch: int = 3, scale: float = 1.0) -> list[torch.Tensor]:
    shapes = [(batch, heads, n_tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [(scale * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def left_padding(batch: int, n_tokens: int) -> torch.Tensor:
    lengths = torch.randint(1, n_tokens + 1, (batch,))
    return torch.arange(n_tokens) >= n_tokens - lengths[:, None]


def fast(treatment, query, key, value, window, feature_map, sinks=0, **kwargs):
    if sinks:
        keys = sink_tokens(sinks, key.shape[2], kwargs.get("valid"), kwargs.get("segments"), key)
        kwargs["sinks"] = Sinks(sinks, keys)
    kwargs |= {"scaling": SCALING, "window": window - sinks}
    if treatment is Treatment.WINDOW:
        return window_attention(query, key, value, **kwargs)
    return linear_window_attention(query, key, value, feature_map=feature_map, **kwargs)[0]


def naive(treatment, query, key, value, window, feature_map, **kwargs):
    return naive_attention(
        treatment, query, key, value, scaling=SCALING, window=window, feature_map=feature_map, **kwargs
    )


@pytest.mark.parametrize("treatment", [Treatment.WINDOW, Treatment.LINEAR_WINDOW])
@pytest.mark.parametrize("n_tokens, window, sinks", LENGTHS_WINDOWS_AND_SINKS)
@pytest.mark.parametrize("case", ["plain", "padded", "holes", "packed", "packed_padded", "softcap"])
def test_full_form_equals_naive_in_value_and_gradient(treatment, n_tokens, window, sinks, case, feature_map):
    query, key, value = random_qkv(n_tokens)
    kwargs = {"sinks": sinks}
    if "padded" in case:
        kwargs["valid"] = left_padding(3, n_tokens)
    if case == "holes":
        kwargs["valid"] = torch.rand(3, n_tokens) < 0.7
    if "packed" in case:
        kwargs["segments"] = (torch.rand(3, n_tokens) < 0.05).long().cumsum(dim=1)
    if case == "softcap":
        kwargs["softcap"] = 2.0
    inputs = [query, key, value, *feature_map.parameters()]
    results = []
    direction = torch.randn_like(query)
    for form in (fast, naive):
        output = form(treatment, query, key, value, window, feature_map, **kwargs)
        gradients = torch.autograd.grad((output * direction).sum(), inputs, allow_unused=True)
        results.append([output, *gradients])
    for actual, expected in zip(*results, strict=True):
        if expected is None or actual is None:  # window attention has no feature map
            assert not (treatment is Treatment.LINEAR_WINDOW and expected is not None and expected.any())
            continue
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("n_tokens, window, sinks", [(5, 4, 2), (70, 9, 4), (130, 2, 1), (200, 64, 4), (64, 100, 4)])
def test_sinks_are_seen_by_all_later_queries_of_their_document_inside_the_budget(n_tokens, window, sinks):
    _, key, _ = random_qkv(n_tokens, batch=1)
    value = torch.eye(n_tokens, dtype=torch.float64).expand(1, KV_HEADS, -1, -1)  # the output tells what is seen
    query = torch.zeros(1, HEADS, n_tokens, HEAD_DIM, dtype=torch.float64)
    seen = fast(Treatment.WINDOW, query, key, value, window, None, sinks=sinks)[0, 0] > 0
    for token in range(n_tokens):
        newest = range(max(token - (window - sinks) + 1, 0), token + 1)
        assert set(seen[token].nonzero().flatten().tolist()) == {*range(min(sinks, token + 1)), *newest}
    assert seen.sum(dim=1).max() == min(window, n_tokens)


@pytest.mark.parametrize("treatment", [Treatment.WINDOW, Treatment.LINEAR_WINDOW])
def test_a_window_as_long_as_the_text_needs_no_sinks(treatment, feature_map):
    query, key, value = random_qkv(50)
    softmax = naive(Treatment.SOFTMAX, query, key, value, None, None)
    with_sinks = fast(treatment, query, key, value, 50, feature_map, sinks=4)
    torch.testing.assert_close(with_sinks, softmax, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("n_tokens, window", LENGTHS_AND_WINDOWS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_pieces_with_a_state_equal_one_pass(n_tokens, window, padded, chunk_tokens, feature_map):
    query, key, value = (x.detach() for x in random_qkv(n_tokens))
    valid = left_padding(3, n_tokens) if padded else None
    expected = naive(Treatment.LINEAR_WINDOW, query, key, value, window, feature_map, valid=valid)
    state, outputs = None, []
    for start in range(0, n_tokens, chunk_tokens):
        stop = min(start + chunk_tokens, n_tokens)
        first_key = max(start - (window - 1), 0)
        output, state = linear_window_attention(
            query[:, :, start:stop],
            key[:, :, first_key:stop],
            value[:, :, first_key:stop],
            scaling=SCALING,
            window=window,
            feature_map=feature_map,
            state=state,
            valid=None if valid is None else valid[:, first_key:stop],
            return_state=True,
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, atol=1e-9, rtol=1e-7)


def test_a_window_as_long_as_the_text_is_softmax(feature_map):
    query, key, value = random_qkv(50)
    softmax = naive(Treatment.SOFTMAX, query, key, value, None, None)
    reference = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALING, enable_gqa=True
    )
    torch.testing.assert_close(softmax, reference, atol=1e-9, rtol=1e-7)
    for treatment in (Treatment.WINDOW, Treatment.LINEAR_WINDOW):
        torch.testing.assert_close(fast(treatment, query, key, value, 50, feature_map), softmax, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_low_precision_neither_overflows_nor_drifts(dtype, tolerance, scale, feature_map):
    query, key, value = ((x.detach()).to(dtype) for x in random_qkv(300, scale=scale))
    value = value / scale
    expected = naive(Treatment.LINEAR_WINDOW, *(x.double() for x in (query, key, value)), 16, feature_map)
    output = fast(Treatment.LINEAR_WINDOW, query, key, value, 16, feature_map.float())
    assert output.dtype == dtype and output.isfinite().all()
    assert (output.double() - expected).norm() / expected.norm() < tolerance


def test_the_state_is_as_large_after_a_thousand_tokens_as_after_ten(feature_map):
    sizes = set()
    for n_tokens in (10, 1000):
        query, key, value = (x.detach() for x in random_qkv(n_tokens))
        _, state = linear_window_attention(
            query, key, value, scaling=SCALING, window=4, feature_map=feature_map, return_state=True
        )
        sizes.add(tuple(part.shape for part in state))
        assert all(part.dtype == torch.float64 for part in state)
    assert sizes == {((3, KV_HEADS, 2 * HEAD_DIM, HEAD_DIM), (3, KV_HEADS, 2 * HEAD_DIM))}


def test_keys_past_the_window_without_their_state_are_refused(feature_map):
    query, key, value = random_qkv(20)
    with pytest.raises(ValueError, match="give the older ones as state"):
        linear_window_attention(query[:, :, -1:], key, value, scaling=SCALING, window=4, feature_map=feature_map)
