"""Measures what quantized weights and a quantized KV cache cost a plan, compared with what they cost its parent.

    python benchmarks/quantization.py PARENT HEALED [HEALED ...] --text val.txt     # needs torchao and optimum-quanto

The first half of each sequence is read into the cache, the second half is judged (negative log-likelihood per token).
`cost` is what quantizing adds to a model's NLL, `interaction` how much more it adds to the plan than to the parent,
both paired over the sequences. Weights are quantized by torchao, weight only: int8 by channel, int4 by groups of 32. In
the KV cache the keys and values of softmax layers are quantized, as float8 (e4m3, unscaled) or in 4 and 2 bits by
quanto; windows and states stay as they are.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchao
from results_csv import write_rows
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers.cache_utils import DynamicLayer, QuantoQuantizedLayer

from layerboost.cache import preallocated_cache
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import plan_of
from layerboost.text.documents import pack, read_documents

WEIGHTS: dict[str, Callable[[], Any]] = {
    "int8 weights": Int8WeightOnlyConfig,
    "int4 weights": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


class Float8Layer(DynamicLayer):
    """Rounds keys and values to float8 (e4m3)."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        rounded = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key_states, value_states))
        return super().update(*rounded)


def quanto(bits: int) -> Callable[[], DynamicLayer]:
    return lambda: QuantoQuantizedLayer(nbits=bits, axis_key=0, axis_value=0, q_group_size=32, residual_length=1)


CACHES: dict[str, Callable[[], DynamicLayer]] = {
    "float8 KV": Float8Layer,
    "int4 KV": quanto(4),
    "int2 KV": quanto(2),
}


@torch.inference_mode()
def second_half_nll(model: Any, sequences: torch.Tensor, layer: Callable[[], DynamicLayer] | None) -> torch.Tensor:
    """Returns the nats per token of each sequence's second half, given the first half in the cache, (n,)."""
    half, found = sequences.shape[1] // 2, []
    for batch in sequences.split(8):
        cache = preallocated_cache(model.config, sequences.shape[1])
        if layer is not None:
            cache.layers = [layer() if isinstance(kept, DynamicLayer) else kept for kept in cache.layers]
        model(batch[:, :half], past_key_values=cache, logits_to_keep=1)
        logits = model(batch[:, half:-1], past_key_values=cache).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), batch[:, half + 1 :].flatten(), reduction="none")
        found.append(losses.view(len(batch), -1).mean(dim=1))
    return torch.cat(found)


def judged(model: Any, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the NLL of a model as it is and under each way of quantizing."""
    found = {"as it is": second_half_nll(model, sequences, None)}
    for name, layer in CACHES.items():
        found[name] = second_half_nll(model, sequences, layer)
    for name, config in WEIGHTS.items():
        quantized = copy.deepcopy(model)
        quantize_(quantized, config())
        found[name] = second_half_nll(quantized, sequences, None)
        if name == "int8 weights":
            found["int8 weights, float8 KV"] = second_half_nll(quantized, sequences, Float8Layer)
    return found


def mean_and_stderr(x: torch.Tensor) -> tuple[float, float]:
    return x.mean().item(), x.std().item() / math.sqrt(len(x))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    sequences = pack(
        read_documents(args.text), load_tokenizer(args.parent), args.sequence_tokens, limit_sequences=args.sequences
    )
    rows, of_parent = [], {}
    for path in [args.parent, *args.converted]:
        model = load_model(path).eval()
        found = judged(model, sequences)
        of_parent = of_parent or found
        for name, nll in found.items():
            cost = nll - found["as it is"]
            interaction, error = mean_and_stderr(cost - (of_parent[name] - of_parent["as it is"]))
            row = {
                "plan": str(plan_of(model) or ""),
                "quantized": name,
                "nll": nll.mean().item(),
                "cost": cost.mean().item(),
                "cost_stderr": mean_and_stderr(cost)[1],
                "interaction": interaction,
                "interaction_stderr": error,
                "n_sequences": len(nll),
                "torch": torch.__version__,
                "torchao": torchao.__version__,
            }
            rows.append(row)
            print("  ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
