"""Decode speed of plans against the untouched model, beside the limit that the bytes of a step set.

    python benchmarks/decode.py --shape qwen3-4b --concurrency 16 50 100 200 --context 512 2048 8192
    python benchmarks/decode.py --shape small --concurrency 1 8 --context 256        # seconds, on a CPU

Weights are random: a shape decodes at its real speed whatever they are. Base and plan are timed in turn and each ratio
is the median of the pairs, since machines drift. `limit` is the ratio of bytes that one step must read.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from layerboost import Plan, Treatment, convert
from layerboost.byte_model import predicted_speedup
from layerboost.decoding import measure_decode
from layerboost.hardware import hardware_name

SHAPES = {
    # Published shapes: layers, hidden size, heads, key/value heads, head dimension, MLP, vocabulary.
    "qwen3-4b": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151_936),
    "llama-3.1-8b": ("llama", 32, 4096, 32, 8, 128, 14_336, 128_256),
    "small": ("llama", 12, 256, 8, 2, 32, 704, 2048),
    "small-llm": ("llama", 12, 256, 4, 2, 64, 704, 32_768),  # a head's share as in models of 0.1 to 0.6 B
    "wide": ("llama", 6, 1024, 16, 4, 64, 2816, 32_768),
}
COLUMNS = (
    *("shape", "plan", "window", "concurrency", "context", "tok_per_s", "base_tok_per_s", "speedup", "speedup_low"),
    *("speedup_high", "limit", "tpot_ms_p50", "peak_memory_mib", "base_peak_memory_mib", "pairs"),
    *("hardware", "dtype", "python", "torch", "transformers"),
)


def build(shape: str, dtype: torch.dtype, device: str, n_positions: int):
    """A model of a published shape with random weights."""
    model_type, layers, hidden, heads, kv_heads, head_dim, mlp, vocabulary = SHAPES[shape]
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=vocabulary,
        max_position_embeddings=n_positions,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def plans(n_layers: int, window: int) -> dict[str, Plan]:
    """Removing every fourth and every second layer's attention, without and with windows in a further quarter."""
    quarter = [Treatment.NONE if i % 4 == 1 else Treatment.SOFTMAX for i in range(n_layers)]
    half = [Treatment.NONE if i % 2 else Treatment.SOFTMAX for i in range(n_layers)]
    half_windows = [Treatment.WINDOW if i % 4 == 2 else treatment for i, treatment in enumerate(half)]
    half_linear = [Treatment.LINEAR_WINDOW if i % 4 == 2 else treatment for i, treatment in enumerate(half)]
    chosen = {"none 25 %": quarter, "none 50 %": half, "+ window 25 %": half_windows, "+ linear 25 %": half_linear}
    return {name: Plan(tuple(treatments), window) for name, treatments in chosen.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[256], help="prompt tokens")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs of base and plan")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)

    dtype = getattr(torch, args.dtype)
    base = build(args.shape, dtype, args.device, max(args.context) + args.new_tokens)
    about = {
        "hardware": hardware_name(args.device),
        "dtype": args.dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = []
    for name, plan in plans(base.config.num_hidden_layers, args.window).items():
        model = convert(base, plan)
        for concurrency in args.concurrency:
            for context in args.context:
                setting = {"concurrency": concurrency, "prompt_tokens": context, "new_tokens": args.new_tokens}
                timed = [(measure_decode(base, **setting), measure_decode(model, **setting)) for _ in range(args.pairs)]
                ratios = sorted(b.output_throughput_tok_per_s / a.output_throughput_tok_per_s for a, b in timed)
                middle = statistics.median(ratios)
                limit = predicted_speedup(
                    base.config,
                    plan,
                    concurrency=concurrency,
                    context_tokens=context + args.new_tokens // 2,
                    dtype_bytes=dtype.itemsize,
                )
                rows.append(
                    {
                        "shape": args.shape,
                        "plan": str(plan),
                        "window": plan.window,
                        "concurrency": concurrency,
                        "context": context,
                        "tok_per_s": statistics.median(b.output_throughput_tok_per_s for _, b in timed),
                        "base_tok_per_s": statistics.median(a.output_throughput_tok_per_s for a, _ in timed),
                        "speedup": middle,
                        "speedup_low": ratios[0],
                        "speedup_high": ratios[-1],
                        "limit": limit,
                        "tpot_ms_p50": statistics.median(b.tpot_ms_p50 for _, b in timed),
                        "peak_memory_mib": statistics.median(b.peak_memory_mib for _, b in timed),
                        "base_peak_memory_mib": statistics.median(a.peak_memory_mib for a, _ in timed),
                        "pairs": args.pairs,
                        **about,
                    }
                )
                gain = (middle - 1) / (limit - 1) if limit > 1 else float("nan")
                print(
                    f"{name:14} concurrency {concurrency:4} context {context:6}: {middle:.2f}x "
                    f"[{ratios[0]:.2f}, {ratios[-1]:.2f}], limit {limit:.2f}x, {gain:.0%} of the possible gain",
                    flush=True,
                )
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
