"""Measures decode speed and memory of plans against the untouched model, together with the limits set by bytes.

    python benchmarks/decode.py gain --shape wide-12 --concurrency 4 --context 512 2048 8192
    python benchmarks/decode.py gain --shape smallworld --concurrency 32 --context 512 2048 8192
    python benchmarks/decode.py constant --shape wide-12 --context 1024 32768
    python benchmarks/decode.py memory --shape wide-12 --concurrency 4 --context 2048
    python benchmarks/decode.py sinks --shape wide-12 --concurrency 4 --context 2048
    python benchmarks/decode.py gain --shape qwen3-4b --dtype bfloat16 --concurrency 16 50 100 200 --context 512 8192

`gain` times base and plans side by side in rounds. `limit` is the ratio of the bytes that one step must read, `share`
the measured gain over the gain that the limit allows; the bytes of both sides are compared with the machine's copy
bandwidth. `constant` times one step at each length, in turn, for a plan whose layers all have a constant state.
`memory` measures the peak while prompts are read and continued, against the weights and the cache by the formula.
`sinks` times plans of windows with and without sinks side by side, `affine` plans of maps and of nothing in their
place; `speedup` and `prefill_speedup` are over those without.

Weights are random, because a shape decodes at its real speed whatever they are. Contexts are random numbers in the
cache, except for `memory`, `sinks` and `affine`, which read their prompts.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from results_csv import write_rows
from transformers import AutoConfig, AutoModelForCausalLM

import layerboost
from layerboost import Plan, Treatment, convert
from layerboost.speed.byte_model import decode_bytes, held_bytes, predicted_speedup
from layerboost.speed.decoding import measure_decode, measure_together
from layerboost.speed.hardware import MIB, copy_bandwidth_bytes_per_s, hardware_name

SMALLWORLD = Path(layerboost.__file__).parent / "smallworld" / "model"
SHAPES = {
    # Entries are layers, hidden size, heads, key/value heads, head dimension, MLP, vocabulary; some are published.
    "qwen3-4b": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151_936),
    "llama-3.1-8b": ("llama", 32, 4096, 32, 8, 128, 14_336, 128_256),
    "small": ("llama", 12, 256, 8, 2, 32, 704, 2048),
    "small-llm": ("llama", 12, 256, 4, 2, 64, 704, 32_768),  # the head has a share as in models of 0.1 to 0.6 B
    "wide": ("llama", 6, 1024, 16, 4, 64, 2816, 32_768),
    "kv-bound": ("llama", 8, 512, 8, 8, 64, 512, 2048),  # at 200 served requests its steps read almost only KV cache
    "wide-12": ("llama", 12, 1024, 16, 16, 64, 2816, 8192),  # memory-bound even on a CPU
}


def build(shape: str, dtype: torch.dtype, device: str, n_positions: int):
    """Builds a model of a shape above, or of the embedded default's, with random weights."""
    if shape == "smallworld":
        config = AutoConfig.from_pretrained(SMALLWORLD, max_position_embeddings=n_positions)
    else:
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
    """Returns plans without attention in a quarter, half and three quarters of the layers, and half with windows."""

    def spread(removed: int, of: int, middle: Treatment = Treatment.SOFTMAX) -> Plan:
        kept = {i: middle if i % of == of - 1 else Treatment.SOFTMAX for i in range(n_layers)}
        return Plan(tuple(Treatment.NONE if i % of < removed else kept[i] for i in range(n_layers)), window)

    return {
        "none 25 %": spread(1, 4),
        "none 50 %": spread(2, 4),
        "none 75 %": spread(3, 4),
        "none 50 %, window 25 %": spread(2, 4, Treatment.WINDOW),
        "none 50 %, linear_window 25 %": spread(2, 4, Treatment.LINEAR_WINDOW),
    }


def gain(args: argparse.Namespace, base: Any) -> Iterator[dict[str, Any]]:
    """Yields a row for each plan under each condition."""
    named = plans(base.config.num_hidden_layers, args.window)
    models = [base, *(convert(base, plan) for plan in named.values())]
    bandwidth = copy_bandwidth_bytes_per_s(args.device)
    for concurrency in args.concurrency:
        for context in args.context:
            setting = {"concurrency": concurrency, "prompt_tokens": context, "new_tokens": args.new_tokens}
            timed = measure_together(models, **setting, repeats=args.repeats, read_prompts=False)
            at = {
                "concurrency": concurrency,
                "context_tokens": context + args.new_tokens // 2,
                "dtype_bytes": base.dtype.itemsize,
            }
            for name, plan, measured in zip(["base", *named], [None, *named.values()], timed, strict=True):
                speed = measured.output_throughput_tok_per_s
                speedup = speed / timed[0].output_throughput_tok_per_s
                limit = 1.0 if plan is None else predicted_speedup(base.config, plan, **at)
                n_bytes = decode_bytes(base.config, plan, **at)
                yield {
                    "plan": "" if plan is None else str(plan),
                    "name": name,
                    "concurrency": concurrency,
                    "context": context,
                    "tok_per_s": speed,
                    "tok_per_s_stderr": measured.output_throughput_stderr,
                    "tpot_ms_p50": measured.tpot_ms_p50,
                    "speedup": speedup,
                    "limit": limit,
                    "share": (speedup - 1) / (limit - 1) if limit > 1 else None,
                    "step_mib": n_bytes / MIB,
                    "share_of_bandwidth": n_bytes * speed / concurrency / bandwidth,
                    "copy_bandwidth_gib_per_s": bandwidth / 2**30,
                }


def constant(args: argparse.Namespace, base: Any) -> Iterator[dict[str, Any]]:
    """Yields the milliseconds of a step at each length, with all layers `linear_window`, over the first length's."""
    n_layers = base.config.num_hidden_layers
    model = convert(base, Plan.uniform(Treatment.LINEAR_WINDOW, n_layers, args.window))
    for concurrency in args.concurrency:
        times: dict[int, list[float]] = {context: [] for context in args.context}
        for _ in range(args.repeats):
            for context in args.context:
                timed = measure_decode(
                    model,
                    concurrency=concurrency,
                    prompt_tokens=context,
                    new_tokens=args.new_tokens,
                    read_prompts=False,
                )
                times[context].append(timed.tpot_ms_p50)
        first = times[args.context[0]]
        for context, steps_ms in times.items():
            yield {
                "name": "all linear_window",
                "plan": "L" * n_layers,
                "concurrency": concurrency,
                "context": context,
                "tpot_ms_p50": statistics.median(steps_ms),
                "over_first": statistics.median(ms / at_first for ms, at_first in zip(steps_ms, first)),
            }


def memory(args: argparse.Namespace, base: Any) -> Iterator[dict[str, Any]]:
    """Yields the peak memory of base and plans, measured while prompts are read and continued, over the formula's."""
    named = plans(base.config.num_hidden_layers, args.window)
    for concurrency in args.concurrency:
        for context in args.context:
            for name, plan in {"base": None, **named}.items():
                model = base if plan is None else convert(base, plan)
                measured = measure_decode(
                    model, concurrency=concurrency, prompt_tokens=context, new_tokens=args.new_tokens
                )
                expected = held_bytes(
                    base.config,
                    plan,
                    concurrency=concurrency,
                    context_tokens=context + args.new_tokens,
                    dtype_bytes=base.dtype.itemsize,
                )
                yield {
                    "name": name,
                    "plan": "" if plan is None else str(plan),
                    "concurrency": concurrency,
                    "context": context,
                    "peak_mib": measured.peak_memory_mib,
                    "formula_mib": expected / MIB,
                    "over_formula": measured.peak_memory_mib * MIB / expected,
                }


def sinks(args: argparse.Namespace, base: Any) -> Iterator[dict[str, Any]]:
    """Yields the speed of windows with sinks in every layer over that of the same windows without."""
    n_layers = base.config.num_hidden_layers
    for treatment in (Treatment.WINDOW, Treatment.LINEAR_WINDOW):
        without, with_sinks = (Plan.uniform(treatment, n_layers, args.window, n) for n in (0, args.sinks))
        yield from _side_by_side(args, base, f"{treatment} with {args.sinks} sinks", without, with_sinks)


def affine(args: argparse.Namespace, base: Any) -> Iterator[dict[str, Any]]:
    """Yields the speed with whole affine maps in every layer over that with nothing in their place."""
    none, maps = (Plan.uniform(t, base.config.num_hidden_layers) for t in (Treatment.NONE, Treatment.AFFINE))
    yield from _side_by_side(args, base, "affine over none", none, maps)


def _side_by_side(args: argparse.Namespace, base: Any, name: str, one: Plan, other: Plan) -> Iterator[dict[str, Any]]:
    models = [convert(base, plan) for plan in (one, other)]
    for concurrency in args.concurrency:
        for context in args.context:
            setting = {"concurrency": concurrency, "prompt_tokens": context, "new_tokens": args.new_tokens}
            first, second = measure_together(models, **setting, repeats=args.repeats)
            yield {
                "name": name,
                "concurrency": concurrency,
                "context": context,
                "tpot_ms_p50": second.tpot_ms_p50,
                "speedup": first.tpot_ms_p50 / second.tpot_ms_p50,
                "ttft_ms_p50": second.ttft_ms_p50,
                "prefill_speedup": first.ttft_ms_p50 / second.ttft_ms_p50,
            }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gain", "constant", "memory", "sinks", "affine"])
    parser.add_argument("--shape", choices=[*SHAPES, "smallworld"], default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4, help="sinks of `sinks`, in tokens")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[4])
    parser.add_argument("--context", type=int, nargs="+", default=[512], help="tokens in the cache")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all models")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    base = build(args.shape, getattr(torch, args.dtype), args.device, max(args.context) + args.new_tokens)
    about = {
        "window": args.window,
        "shape": args.shape,
        "hardware": hardware_name(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows = []
    for row in {"gain": gain, "constant": constant, "memory": memory, "sinks": sinks, "affine": affine}[args.what](
        args, base
    ):
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        rows.append(row | about)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
