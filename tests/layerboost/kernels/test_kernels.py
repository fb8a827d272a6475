"""Compares the kernels with the naive definition on fresh random inputs, on a GPU if there is one, else interpreted.

Triton decides to interpret when it is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch

from layerboost import attention
from layerboost.attention import (
    FEATURE_LOGIT_CAP,
    LinearWindow,
    Sinks,
    add_to_state,
    linear_window_attention,
    naive_attention,
    sink_tokens,
)
from layerboost.plan import Treatment

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton (the dev extra)", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def in_kernel_process():
    """Returns a function that runs a function of this module in a process where Triton can be used."""
    variables = {"OMP_NUM_THREADS": "1"} | ({} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"})
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_kernel_process) as pool,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        pool.submit(os.getpid).result()  # the first task starts the process, which inherits the variables
        patch.undo()
        yield lambda function, *args: pool.submit(function, *args).result()


def _start_kernel_process() -> None:
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    # The interpreter keeps bf16 as bit patterns, which it would multiply, and it truncates where a GPU rounds.
    def widened_dot(self, a, b, *rest):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    def rounded_cast(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, x, dtype)
        return TensorHandle(torch.from_numpy(x.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = widened_dot, rounded_cast


@dataclass
class Case:
    """Describes inputs. Those of the first `n_past` tokens that precede the first query's window are in a state."""

    n_tokens: int
    window: int
    head_dim: int = 32
    group: int = 2
    n_kv_heads: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32
    padded: bool = False
    n_past: int = 0
    sinks: int = 0
    scale: float = 1.0
    feature_bias: float = 0.0
    tolerance: float | None = None
    seed: int = field(default_factory=torch.seed)

    def __str__(self) -> str:
        shape = f"{self.batch}x{self.n_kv_heads}x{self.group}x{self.n_tokens}x{self.head_dim}"
        extras = "-padded" * self.padded + f"-past{self.n_past}" * bool(self.n_past)
        extras += f"-sinks{self.sinks}" * bool(self.sinks)
        return f"{shape}-window{self.window}-{str(self.dtype).removeprefix('torch.')}{extras}"

    def inputs(self):
        """Returns an fp64 feature map, all tokens' query, key, value in the case's dtype, and which are no padding."""
        torch.manual_seed(self.seed)
        n_heads, n_tokens = self.n_kv_heads * self.group, self.n_past + self.n_tokens
        feature_map = LinearWindow(n_heads, self.n_kv_heads, self.head_dim, self.head_dim**-0.5).double()
        for parameter in feature_map.parameters():
            torch.nn.init.normal_(parameter, std=2 * self.head_dim**-0.5)
        with torch.no_grad():
            feature_map.query_bias += self.feature_bias
        query, key, value = (
            torch.randn(self.batch, heads, n_tokens, self.head_dim)
            for heads in (n_heads, self.n_kv_heads, self.n_kv_heads)
        )
        lengths = (
            torch.randint(n_tokens // 2, n_tokens + 1, (self.batch,))
            if self.padded
            else torch.full((self.batch,), n_tokens)
        )
        valid = torch.arange(n_tokens) >= n_tokens - lengths[:, None]
        tensors = [(self.scale * query), (self.scale * key), value]
        return feature_map.to(DEVICE), [x.to(self.dtype).to(DEVICE) for x in tensors], valid.to(DEVICE)

    def options(self, feature_map) -> dict:
        """Returns the options of the definition; its window holds the sinks."""
        options = {"scaling": self.head_dim**-0.5, "window": self.window, "feature_map": feature_map}
        return {**options, "sinks": self.sinks} if self.sinks else options

    def compare(self, actual, expected, names) -> None:
        tolerance = self.tolerance or TOLERANCES[self.dtype]
        for name, a, b in zip(names, actual, expected, strict=True):
            assert a.isfinite().all(), f"{name} is not finite (seed {self.seed})"
            error = (a.double() - b).norm() / b.norm().clamp(min=1e-30) if b.any() else a.double().norm()
            assert error < tolerance, f"{name} is off by {error:.1e} (seed {self.seed})"


def _prefill(case: Case) -> None:
    from layerboost.kernels import linear_window_prefill, supports

    feature_map, (query, key, value), valid = case.inputs()
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    reference = naive_attention(
        Treatment.LINEAR_WINDOW, *wide, valid=valid, **case.options(feature_map)
    )[:, :, case.n_past :]  # fmt: skip
    direction = torch.randn_like(reference)
    expected = torch.autograd.grad((reference * direction).sum(), [*wide, *feature_map.parameters()])

    newest = case.window - case.sinks
    first_key = max(case.n_past - (newest - 1), 0)
    feature_map = feature_map.float()
    state, more = None, {}
    is_sink = sink_tokens(case.sinks, valid.shape[1], valid, None, query)
    if first_key:
        with torch.no_grad():
            old = feature_map.key_features(key[:, :, :first_key])
            summed = valid[:, :first_key] & ~is_sink[:, :first_key]
            state = add_to_state(None, old, value[:, :, :first_key], summed)
    shown = (torch.arange(valid.shape[1], device=DEVICE) >= first_key) | is_sink
    first_used = first_key
    if case.sinks:  # all older keys are set apart, and the sinks among them are seen
        first_used, more = 0, {"sinks": is_sink, "n_sinks": case.sinks, "n_apart": first_key}
    used = [x.requires_grad_() for x in (query[:, :, case.n_past :], key[:, :, first_used:], value[:, :, first_used:])]
    logits, features = feature_map(*used[:2])
    assert supports(*used, state, None, None)
    output = linear_window_prefill(
        *used,
        logits,
        features,
        scaling=case.head_dim**-0.5,
        window=newest,
        logit_cap=FEATURE_LOGIT_CAP,
        state=state,
        valid=valid[:, first_used:] if case.padded else None,
        **more,
    )
    assert output.dtype == case.dtype
    gradients = list(torch.autograd.grad((output * direction).sum(), [*used, *feature_map.parameters()]))
    names = ["output", "d_query", "d_key", "d_value", "d_query_weight", "d_query_bias", "d_key_weight"]
    expected = [expected[0][:, :, case.n_past :], *(x[:, :, first_used:] for x in expected[1:3]), *expected[3:]]
    for of_keys in (1, 2):  # older keys that are no sinks are part of the state, which is a constant to the kernels
        kept = shown[:, None, first_used:, None]
        gradients[of_keys], expected[of_keys] = gradients[of_keys] * kept, expected[of_keys] * kept
    if state is not None:  # the state depends on the keys' weights but is a constant to the kernels
        names, gradients, expected = names[:-1], gradients[:-1], expected[:-1]
    case.compare([output, *gradients], [reference, *expected], names)


CASES = [
    Case(170, window=1, n_kv_heads=2, group=1),
    Case(190, window=20, padded=True, batch=2, group=1),
    Case(70, window=31, group=8, padded=True),
    Case(100, window=150),
    Case(40, window=17, head_dim=80, n_past=160, padded=True),
    Case(170, window=64, group=1, n_past=30),
    Case(20, window=5, head_dim=256, group=1, dtype=torch.bfloat16),
    Case(300, window=50, head_dim=64, dtype=torch.bfloat16, padded=True),
    Case(200, window=3, group=4, dtype=torch.bfloat16, n_past=150),
    Case(90, window=16, head_dim=128, group=3, dtype=torch.bfloat16),
    Case(140, window=9, head_dim=96, dtype=torch.float16, padded=True),
    Case(170, window=2, sinks=1, n_kv_heads=2, group=1),
    Case(190, window=20, sinks=4, padded=True, batch=2, group=2),
    Case(100, window=150, sinks=4),
    Case(40, window=17, sinks=3, head_dim=80, n_past=160, padded=True),
    Case(90, window=40, sinks=20, head_dim=64, dtype=torch.bfloat16, padded=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_equals_naive_in_value_and_gradient(case, in_kernel_process):
    in_kernel_process(_prefill, case)


def _capped(case: Case) -> None:
    from layerboost.kernels import linear_window_prefill

    feature_map, (query, key, value), _ = case.inputs()
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    # Both fast forms treat the peak as constant, which matters where the cap holds; there the naive form differs.
    reference, _ = linear_window_attention(*wide, **case.options(feature_map))
    direction = torch.randn_like(reference)
    parameters = [feature_map.query_weight, feature_map.query_bias, feature_map.key_weight]
    expected = torch.autograd.grad((reference * direction).sum(), [wide[2], *parameters])
    naive = naive_attention(Treatment.LINEAR_WINDOW, *wide, **case.options(feature_map))

    scores = (wide[0] * wide[1].repeat_interleave(case.group, dim=1)).sum(dim=-1) * case.head_dim**-0.5
    is_capped = feature_map.query_logits(wide[0]) - scores[..., None] > FEATURE_LOGIT_CAP  # the window is one token
    assert 0.003 < is_capped.double().mean() < 0.3

    feature_map = feature_map.float()
    used = [x.requires_grad_() for x in (query, key, value)]
    options = {"scaling": case.head_dim**-0.5, "window": case.window, "logit_cap": FEATURE_LOGIT_CAP}
    output = linear_window_prefill(*used, *feature_map(*used[:2]), **options)
    parameters = [feature_map.query_weight, feature_map.query_bias, feature_map.key_weight]
    gradients = torch.autograd.grad((output * direction).sum(), [used[2], *parameters])
    names = ["output", "d_value", "d_query_weight", "d_query_bias", "d_key_weight"]
    case.compare([output, *gradients], [naive, *expected], names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_features_are_capped_as_the_definition_says(dtype, in_kernel_process):
    in_kernel_process(_capped, Case(60, window=1, dtype=dtype, scale=3.0, feature_bias=10.0))


def _large_scores(case: Case) -> None:
    from layerboost.kernels import linear_window_prefill

    feature_map, (query, key, value), _ = case.inputs()
    reference = naive_attention(
        Treatment.LINEAR_WINDOW, *(x.double() for x in (query, key, value)), **case.options(feature_map)
    )
    used = [x.requires_grad_() for x in (query, key, value)]
    options = {"scaling": case.head_dim**-0.5, "window": case.window, "logit_cap": FEATURE_LOGIT_CAP}
    output = linear_window_prefill(*used, *feature_map.float()(*used[:2]), **options)
    case.compare([output], [reference], ["output"])
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.float().sum(), used))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_scores_neither_overflow_nor_drift(dtype, in_kernel_process):
    in_kernel_process(_large_scores, Case(100, window=16, scale=50.0, dtype=dtype, padded=True, tolerance=1e-2))


@torch.no_grad()
def _decode(case: Case) -> None:
    """Feeds tokens into the ring one by one; the last token's output must be the last row of the definition."""
    from layerboost.kernels import linear_window_evict, linear_window_step

    feature_map, (query, key, value), valid = case.inputs()
    reference = naive_attention(
        Treatment.LINEAR_WINDOW,
        *(x.double() for x in (query, key, value)),
        valid=valid,
        **case.options(feature_map),
    )[:, :, -1]
    feature_map = feature_map.float()
    ring_shape = (case.batch, case.n_kv_heads, case.window, case.head_dim)
    keys, values = (x.new_full(ring_shape, 1e4) for x in (key, value))  # empty slots may hold any value
    visible = torch.zeros(case.batch, case.window, dtype=torch.bool, device=DEVICE)
    n_features = feature_map.n_features
    sums = torch.zeros(case.batch, case.n_kv_heads, n_features, case.head_dim, device=DEVICE)
    norms = torch.zeros(case.batch, case.n_kv_heads, n_features, device=DEVICE)
    for token in range(case.n_tokens):
        slot = token % case.window
        if token >= case.window:
            leaving = feature_map.key_features(keys[:, :, slot : slot + 1])[:, :, 0]
            linear_window_evict(leaving, values[:, :, slot], sums, norms, visible[:, slot])
        keys[:, :, slot], values[:, :, slot] = key[:, :, token], value[:, :, token]
        visible[:, slot] = valid[:, token]
    output = linear_window_step(
        query[:, :, -1],
        keys,
        values,
        feature_map.query_logits(query[:, :, -1:])[:, :, 0],
        scaling=case.head_dim**-0.5,
        logit_cap=FEATURE_LOGIT_CAP,
        state=(sums, norms) if case.n_tokens > case.window else None,
        visible=visible,
    )
    assert output.dtype == case.dtype
    case.compare([output], [reference], ["output"])


@pytest.mark.parametrize(
    "case",
    [
        Case(60, window=40, group=8, padded=True, batch=3, n_kv_heads=2),
        Case(20, window=1, head_dim=80, group=1, batch=2),
        Case(9, window=20, head_dim=256, padded=True, batch=2),
        Case(40, window=16, head_dim=128, group=4, padded=True, batch=2, dtype=torch.bfloat16),
        Case(40, window=16, head_dim=96, group=3, dtype=torch.float16, scale=3.0, feature_bias=15.0),
    ],
    ids=str,
)
def test_decode_over_a_ring_equals_naive(case, in_kernel_process):
    in_kernel_process(_decode, case)


@torch.no_grad()
def _part_of_a_ring(case: Case) -> None:
    from layerboost.kernels import linear_window_evict, linear_window_step

    feature_map, (query, key, value), _ = case.inputs()
    logits = feature_map.float().query_logits(query[:, :, -1:])[:, :, 0]
    options = {"scaling": case.head_dim**-0.5, "logit_cap": FEATURE_LOGIT_CAP}
    part = linear_window_step(query[:, :, -1], key[:, :, :7], value[:, :, :7], logits, **options)
    copy = linear_window_step(
        query[:, :, -1], key[:, :, :7].contiguous(), value[:, :, :7].contiguous(), logits, **options
    )
    torch.testing.assert_close(part, copy)

    with pytest.raises(ValueError, match="value_ring: strides"):
        linear_window_step(query[:, :, -1], key, value.transpose(1, 2).contiguous().transpose(1, 2), logits, **options)
    sums, norms = torch.zeros(2, 2, 64, 32, device=DEVICE), torch.zeros(2, 2, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"norms: torch\.float16"):
        linear_window_evict(logits[:, :2], value[:, :, 0], sums, norms.half())


def test_a_step_takes_the_first_slots_of_a_ring_and_refuses_what_it_would_have_to_copy(in_kernel_process):
    in_kernel_process(_part_of_a_ring, Case(12, window=12, batch=2, n_kv_heads=2))


def _dispatch(case: Case) -> None:
    from layerboost import kernels

    feature_map, (query, key, value), valid = case.inputs()
    options = case.options(feature_map.float()) | {"valid": valid}
    if n_sinks := options.pop("sinks", 0):
        options["sinks"] = Sinks(n_sinks, sink_tokens(n_sinks, case.n_tokens, valid, None, query))
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return kernels.linear_window_prefill(*args, **kwargs)

    class Counted:
        supports, linear_window_prefill = staticmethod(kernels.supports), staticmethod(counted)

    def both(*inputs, **more):
        results = []
        for found in (None, Counted):
            attention._kernels = lambda _, found=found: found
            results.append(linear_window_attention(*inputs, **options, **more))
        (expected, expected_state), (actual, state) = results
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        if state is not None:
            torch.testing.assert_close(state, expected_state)
        return len(calls)

    assert both(query, key, value, return_state=True) == 1
    assert both(query, key, value, softcap=2.0) == 1
    assert both(query, key, value, segments=torch.zeros_like(valid, dtype=torch.long)) == 1
    state = tuple(torch.rand(shape, device=DEVICE) for shape in ((2, 1, 64, 32), (2, 1, 64)))
    assert both(query, key, value, state=state) == 2
    assert both(query, key, value, state=tuple(part.requires_grad_() for part in state)) == 2
    for refused in (query.double(), query[..., :8], query.repeat(1, 1, 1, 16)):
        assert not kernels.supports(refused, refused, refused, None, None, None)
    assert not kernels.supports(query, key, value.half(), None, None, None)


@pytest.mark.parametrize("sinks", [0, 2])
def test_attention_takes_the_kernels_where_they_can(sinks, in_kernel_process):
    in_kernel_process(_dispatch, Case(70, window=6, batch=2, padded=True, sinks=sinks))


def _dispatched_steps(padded: bool, sinks: int) -> None:
    """Decodes token by token with a converted model's cache, past the window, and records the kernels called."""
    from layerboost import Plan, convert, kernels
    from tests.models import tiny_model

    taken = []

    class Counted:
        supports, linear_window_prefill = staticmethod(kernels.supports), staticmethod(kernels.linear_window_prefill)

        @staticmethod
        def linear_window_step(*args, **kwargs):
            taken.append(kwargs)
            return kernels.linear_window_step(*args, **kwargs)

    shape = {"num_hidden_layers": 3, "head_dim": 16, "hidden_size": 32}
    model = convert(tiny_model("llama", **shape), Plan.parse("LSL", window=5, sinks=sinks)).to(DEVICE)
    tokens = torch.randint(3, 97, (2, 13), device=DEVICE)
    mask = torch.ones_like(tokens)
    mask[0, : 4 if padded else 0] = 0
    results = []
    for found in (None, Counted):
        attention._kernels = lambda _, found=found: found
        cache, logits = None, []
        with torch.no_grad():
            for end in range(6, 14):
                start = 0 if cache is None else end - 1
                output = model(
                    tokens[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=(mask[:, :end].cumsum(dim=1) - 1).clamp(min=0)[:, start:],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache = output.past_key_values
                logits.append(output.logits[:, -1])
        results.append(torch.stack(logits))
    assert len(taken) == 2 * 7
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_takes_the_fused_step(padded, sinks, in_kernel_process):
    in_kernel_process(_dispatched_steps, padded, sinks)


class _OnGpu:
    is_cuda = True


def test_a_checkpoint_without_the_kernels_takes_the_torch_form(monkeypatch):
    assert attention._kernels(torch.ones(1)) is None
    monkeypatch.setitem(__import__("sys").modules, "layerboost.kernels", None)
    assert attention._kernels(_OnGpu()) is None
