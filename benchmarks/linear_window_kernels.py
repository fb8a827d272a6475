"""Times the kernels of `linear_window` against its torch form, softmax attention and flash-linear-attention (CUDA).

    python benchmarks/linear_window_kernels.py --out kernels.csv
    python benchmarks/linear_window_kernels.py --tokens 2048 8192 --batch 16 64 --window 256

Prefill has one sequence, decode is one step of `batch` sequences; a form includes its feature map. `sdpa` is softmax
over all tokens, `fla` is linear attention with as many features and no window (if flash-linear-attention is installed).
`bandwidth_share` is the number of bytes that a form must read and write at least, divided by its time, relative to the
rate of a plain copy.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from layerboost import attention
from layerboost.attention import (
    FEATURE_LOGIT_CAP,
    LinearWindow,
    add_to_state,
    linear_window_attention,
    naive_attention,
)
from layerboost.plan import Treatment
from layerboost.speed.hardware import copy_bandwidth_bytes_per_s, hardware_name

COLUMNS = (
    *("phase", "form", "tokens", "batch", "heads", "kv_heads", "head_dim", "window", "dtype"),
    *("ms", "ms_low", "ms_high", "least_bytes", "bandwidth_share", "status"),
    *("relative_error", "copy_gb_per_s", "hardware", "python", "torch", "triton", "fla"),
)


class Shape:
    """Makes random tensors of one attention layer."""

    def __init__(self, args: argparse.Namespace):
        self.heads, self.kv_heads, self.head_dim, self.window = args.heads, args.kv_heads, args.head_dim, args.window
        self.dtype, self.scaling = getattr(torch, args.dtype), args.head_dim**-0.5
        self.feature_map = LinearWindow(self.heads, self.kv_heads, self.head_dim, self.scaling).cuda()

    def random(self, batch: int, heads: int, tokens: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, self.head_dim, dtype=self.dtype, device="cuda", requires_grad=grad)

    def qkv(self, tokens: int, grad: bool = False) -> list[torch.Tensor]:
        return [self.random(1, heads, tokens, grad) for heads in (self.heads, self.kv_heads, self.kv_heads)]

    def linear_window(self, query, key, value, form: str) -> torch.Tensor:
        options = {"scaling": self.scaling, "window": self.window, "feature_map": self.feature_map}
        if form == "kernels":
            return linear_window_attention(query, key, value, **options)[0]
        with mock.patch.object(attention, "_kernels", return_value=None):
            return linear_window_attention(query, key, value, **options)[0]


def prefill_forms(shape: Shape, tokens: int, backward: bool) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Yields name, least bytes and call of each form of one layer's prefill, with its gradients or without."""
    inputs = shape.qkv(tokens, grad=backward)
    query, value = inputs[0], inputs[2]
    direction = torch.randn_like(query)
    least_bytes = (1 + backward) * sum(x.nbytes for x in (*inputs, query))

    def call(form: Callable[..., torch.Tensor], *used: torch.Tensor) -> Callable[[], object]:
        if backward:
            wanted = [x for x in (*used, *shape.feature_map.parameters()) if x.requires_grad]
            return lambda: torch.autograd.grad(form(*used), wanted, direction, allow_unused=True)
        return torch.no_grad()(lambda: form(*used))

    for name in ("kernels", "torch"):
        yield name, least_bytes, call(lambda *used, name=name: shape.linear_window(*used, name), *inputs)
    sdpa = F.scaled_dot_product_attention
    yield "sdpa", least_bytes, call(lambda *used: sdpa(*used, is_causal=True, enable_gqa=True), *inputs)
    if importlib.util.find_spec("fla"):
        from fla.ops.linear_attn import chunk_linear_attn

        features = [torch.rand(1, tokens, shape.heads, 2 * shape.head_dim, device="cuda") for _ in range(2)]
        values = value.detach().repeat_interleave(shape.heads // shape.kv_heads, dim=1).transpose(1, 2).contiguous()
        used = [x.to(shape.dtype).requires_grad_(backward) for x in (*features, values)]
        fla_bytes = (1 + backward) * (sum(x.nbytes for x in used) + query.nbytes)
        yield "fla", fla_bytes, call(lambda *used: chunk_linear_attn(*used)[0].transpose(1, 2), *used)


def decode_forms(shape: Shape, tokens: int, batch: int) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Does the same for a step of `batch` sequences after `tokens` tokens; in each step a token enters the state."""
    from layerboost import kernels

    query = shape.random(batch, shape.heads, 1)
    keys, values = (shape.random(batch, shape.kv_heads, shape.window) for _ in range(2))
    n_features = shape.feature_map.n_features
    sums = torch.rand(batch, shape.kv_heads, n_features, shape.head_dim, device="cuda")
    norms = torch.rand(batch, shape.kv_heads, n_features, device="cuda")

    def by_kernels():
        logits = shape.feature_map.query_logits(query)[:, :, 0]
        options = {"scaling": shape.scaling, "logit_cap": FEATURE_LOGIT_CAP, "state": (sums, norms)}
        kernels.linear_window_step(query[:, :, 0], keys, values, logits, **options)
        features = shape.feature_map.key_features(keys[:, :, :1])[:, :, 0]
        kernels.linear_window_evict(features, values[:, :, 0], sums, norms)

    def by_torch():
        options = {"scaling": shape.scaling, "feature_map": shape.feature_map, "state": (sums, norms)}
        attention.linear_window_step(query, keys, values, **options)
        add_to_state((sums, norms), shape.feature_map.key_features(keys[:, :, :1]), values[:, :, :1], None)

    least_bytes = 2 * query.nbytes + keys.nbytes + values.nbytes + 2 * (sums.nbytes + norms.nbytes)
    yield "kernels", least_bytes, torch.no_grad()(by_kernels)
    yield "torch", least_bytes, torch.no_grad()(by_torch)
    key, value = (shape.random(batch, shape.kv_heads, tokens) for _ in range(2))
    sdpa_bytes = 2 * query.nbytes + key.nbytes + value.nbytes
    yield "sdpa", sdpa_bytes, lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


def relative_error(shape: Shape, tokens: int = 1024) -> float:
    """Returns the relative error of the kernels' prefill to the definition in fp64."""
    inputs = shape.qkv(tokens)
    with torch.no_grad():
        actual = shape.linear_window(*inputs, "kernels").double()
        options = {"scaling": shape.scaling, "window": shape.window, "feature_map": shape.feature_map.double()}
        expected = naive_attention(Treatment.LINEAR_WINDOW, *(x.double() for x in inputs), **options)
    shape.feature_map.float()
    return float((actual - expected).norm() / expected.norm())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32_768, 65_536])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="sequences of a decode step")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("device: there is no CUDA GPU, and the kernels can only be timed on one", file=sys.stderr)
        return 2
    import triton
    from triton.testing import do_bench, do_bench_cudagraph

    shape = Shape(args)
    inputs = shape.qkv(2)
    kernels = attention._kernels(inputs[0])
    if kernels is None or not kernels.supports(*inputs, None, None, None):
        print("device: the kernels do not run here at this --head-dim and --dtype (kernels.supports)", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth_bytes_per_s("cuda")
    has_fla = importlib.util.find_spec("fla")
    about = {
        **{name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "window", "dtype")},
        "relative_error": relative_error(shape),
        "copy_gb_per_s": bandwidth / 1e9,
        "hardware": hardware_name("cuda"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fla": importlib.import_module("fla").__version__ if has_fla else None,
    }
    settings = [
        (phase, tokens, 1, prefill_forms(shape, tokens, backward), do_bench)
        for phase, backward in (("prefill", False), ("prefill_backward", True))
        for tokens in args.tokens
    ]
    # A CUDA graph is timed, because launching would dominate a step of microseconds.
    settings += [
        ("decode", tokens, batch, decode_forms(shape, tokens, batch), do_bench_cudagraph)
        for batch in args.batch
        for tokens in args.tokens
    ]
    rows = []
    for phase, tokens, batch, forms, bench in settings:
        torch.cuda.empty_cache()
        try:
            for form, least_bytes, call in forms:
                row = {"phase": phase, "form": form, "tokens": tokens, "batch": batch, **about, "status": "ok"}
                try:
                    row["ms"], row["ms_low"], row["ms_high"] = bench(call, quantiles=[0.5, 0.1, 0.9])
                    row["least_bytes"] = least_bytes
                    row["bandwidth_share"] = least_bytes / (row["ms"] / 1e3) / bandwidth
                    result = f"{row['ms']:9.3f} ms, {row['bandwidth_share']:6.1%} of the copy's bandwidth"
                except torch.OutOfMemoryError:
                    row["status"] = result = "out of memory"
                rows.append(row)
                print(f"{phase:16} {form:8} {tokens:6} tokens, batch {batch:3}: {result}", flush=True)
        except torch.OutOfMemoryError:
            print(f"{phase:16} {tokens:6} tokens, batch {batch:3}: out of memory for its inputs", flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
