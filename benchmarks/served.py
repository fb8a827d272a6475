"""Measures served throughput: vLLM serves a model and plans of it, one after the other, to vLLM's own client.

    python benchmarks/served.py --environment VENV --shape kv-bound --concurrency 50 100 200
    python benchmarks/served.py --environment VENV --shape llama-3.1-8b --dtype bfloat16 --prompt-tokens 512

VENV is made by layerboost/serving/make_environment.sh. Weights are random, because a shape is served at its real speed
whatever they are. The table also explains each speed: bytes of weights, of the live KV cache and of states that one
decode step reads at this concurrency, and how many whole sequences the engine's cache holds. The base is served first
and once more at the end; `base_again` shows how much the machine drifted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from decode import SHAPES, build, plans
from results_csv import write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerboost import Plan, convert
from layerboost.checkpoint import save_checkpoint
from layerboost.speed.byte_model import ByteModel
from layerboost.speed.hardware import MIB
from layerboost.speed.vllm_bench import ServingCondition, ServingMeasurement, measure_served
from layerboost.speed.vllm_environment import ServingError, find_environment

CHOSEN = ("none 50 %", "none 75 %", "none 50 %, linear_window 25 %")


def tokenizer_of(n_words: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with as many words as a random model's vocabulary, for the client's random prompts."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, n_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def writer_of(base: Any, plan: Plan | None) -> Callable[[Path], None]:
    """Returns a function that writes the checkpoint of the base or of a plan of it."""
    tokenizer = tokenizer_of(base.config.vocab_size)
    return lambda folder: save_checkpoint(base if plan is None else convert(base, plan), tokenizer, folder)


def row_of(name: str, plan: Plan | None, measured: ServingMeasurement, bytes_of: ByteModel, n: int) -> dict[str, Any]:
    """Returns the row of one model under one condition, with the bytes of a step half-way through a request."""
    at = {"concurrency": measured.concurrency, "dtype_bytes": getattr(torch, measured.dtype).itemsize}
    context = measured.prompt_tokens + measured.new_tokens // 2
    cache = bytes_of.cache_bytes(plan, context_tokens=context, **at)
    weights = bytes_of.weight_bytes(plan, **at)
    base_step = bytes_of.decode_bytes(None, context_tokens=context, **at)
    return {
        "name": name,
        "plan": "S" * n if plan is None else str(plan),
        "window": None if plan is None else plan.window,
        "concurrency": measured.concurrency,
        "prompt_tokens": measured.prompt_tokens,
        "new_tokens": measured.new_tokens,
        "tok_per_s": measured.output_throughput_tok_per_s,
        "tok_per_s_stderr": measured.output_throughput_stderr,
        "ttft_ms_p50": measured.ttft_ms_p50,
        "tpot_ms_p50": measured.tpot_ms_p50,
        "tpot_ms_p99": measured.tpot_ms_p99,
        "weights_mib": weights / MIB,
        "cache_mib": cache / MIB,
        "bytes_limit": base_step / (weights + cache),
        "kv_bytes_per_token": measured.kv_bytes_per_token,
        "kv_blocks": measured.kv_blocks,
        "kv_cache_tokens": measured.kv_cache_tokens,
        "n_requests": measured.n_requests,
        "engine_version": measured.engine_version,
        "hardware": measured.hardware,
        "dtype": measured.dtype,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", required=True)
    parser.add_argument("--shape", choices=SHAPES, default="kv-bound")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--plans", nargs="+", default=CHOSEN, metavar="NAME", help="as `plans` of decode.py names them")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    environment = find_environment(args.environment)
    base = build(args.shape, getattr(torch, args.dtype), "cpu", 2 * (args.prompt_tokens + args.new_tokens) + 32)
    n_layers, bytes_of = base.config.num_hidden_layers, ByteModel(base.config)
    named = {name: plan for name, plan in plans(n_layers, args.window).items() if name in args.plans}
    conditions = [
        ServingCondition(n, args.prompt_tokens, args.new_tokens, repeats=args.repeats) for n in args.concurrency
    ]
    rows: list[dict[str, Any]] = []
    for name, plan in [("base", None), *named.items(), ("base_again", None)]:

        def on_result(
            condition: ServingCondition,
            found: ServingMeasurement | ServingError,
            name: str = name,
            plan: Plan | None = plan,
        ) -> None:
            if isinstance(found, ServingError):
                print(f"{name} concurrency {condition.concurrency}: {found}", file=sys.stderr)
                return
            row = row_of(name, plan, found, bytes_of, n_layers)
            first = next((r for r in rows if r["concurrency"] == row["concurrency"]), row)
            rows.append(row | {"speedup": row["tok_per_s"] / first["tok_per_s"]})
            shown = ("concurrency", "tok_per_s", "speedup", "bytes_limit", "tpot_ms_p50", "kv_blocks")
            print(f"{name}: " + "  ".join(f"{k}={rows[-1][k]:,.4g}" for k in shown if rows[-1][k] is not None))

        last = conditions if name != "base_again" else conditions[-1:]
        measure_served(environment, writer_of(base, plan), last, dtype=args.dtype, on_result=on_result)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
