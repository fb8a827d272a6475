"""Measures the peak memory of healing: one copy of the weights against two, and the loss over vocabulary sizes.

    python benchmarks/healing_memory.py weights                                     # a shape whose weights dominate
    python benchmarks/healing_memory.py weights --shape qwen3-4b --dtype bfloat16   # on a GPU; also gives tokens/s
    python benchmarks/healing_memory.py vocabulary

`weights` takes optimizer steps with LoRA where teacher and student share their parameters, and the same steps with a
second copy as teacher; the losses must be identical. `vocabulary` computes the distillation loss and its gradient, in
chunks and in the form that holds whole logits. Each measurement has a process of its own. Memory is counted above what
the process held before; on a CPU it is the peak resident set.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from decode import SHAPES, build

from layerboost import Plan, Treatment, convert
from layerboost.healing.distillation import make_trainee
from layerboost.healing.losses import distillation_loss, positions_at_once
from layerboost.healing.spec import HEAL, HealingSpec, Phase
from layerboost.healing.training import TorchEngine, run_phase
from layerboost.speed.hardware import hardware_name
from layerboost.text.batches import GlobalBatches, PackedText

VOCABULARIES = (2_048, 8_192, 32_768, 131_072)
STEPS = 4
LOSS_SEQUENCES, LOSS_TOKENS, LOSS_WIDTH = 4, 512, 64


def peak_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def probe_weights(args: argparse.Namespace) -> dict[str, Any]:
    """Measures LoRA steps on a plan that removes every other layer's attention."""

    def make(shape: str):
        torch.manual_seed(0)
        return build(shape, getattr(torch, args.dtype), args.device, args.sequence_tokens)

    _steps(make("small"), None, args)  # so that memory which libraries allocate once does not count
    before = peak_mib(args.device)
    model = make(args.shape)
    found = _steps(model, make(args.shape) if args.side == "two copies" else None, args)
    weights_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"weights_mib": weights_mib, "peak_mib": peak_mib(args.device) - before, **found}


def _steps(model, teacher, args: argparse.Namespace) -> dict[str, Any]:
    n_layers = model.config.num_hidden_layers
    plan = Plan(tuple(Treatment.NONE if layer % 2 else Treatment.SOFTMAX for layer in range(n_layers)))
    spec = HealingSpec(
        tokens=args.sequence_tokens * args.batch_sequences,
        sequence_tokens=args.sequence_tokens,
        batch_sequences=args.batch_sequences,
        rank=args.rank,
    )
    shape = (STEPS * args.batch_sequences, args.sequence_tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    trainee = make_trainee(HEAL, teacher or model, convert(model, plan), spec)
    engine = TorchEngine(trainee, spec, gradient_clip=spec.gradient_clip)
    phase, losses, ends = Phase(HEAL, 0, STEPS, 1e-4, spec.gradient_clip), [], [time.perf_counter()]

    def on_step(row) -> None:
        losses.append(row.loss)
        ends.append(time.perf_counter())

    batches = GlobalBatches(PackedText(ids), args.batch_sequences)
    run_phase(engine, phase, batches, spec, device=args.device, on_step=on_step)
    step_s = statistics.median(after - before for before, after in itertools.pairwise(ends[1:]))
    return {"losses": losses, "tok_per_s": args.sequence_tokens * args.batch_sequences / step_s}


def probe_vocabulary(args: argparse.Namespace) -> dict[str, Any]:
    """Measures one loss with its gradient with respect to the student's states."""
    states = torch.randn(2, LOSS_SEQUENCES, LOSS_TOKENS, LOSS_WIDTH, device=args.device)
    head = torch.randn(args.vocabulary, LOSS_WIDTH, device=args.device)
    input_ids = torch.randint(args.vocabulary, (LOSS_SEQUENCES, LOSS_TOKENS), device=args.device)
    student = states[0].clone().requires_grad_()
    to_logits: Callable[[torch.Tensor], torch.Tensor] = lambda x: F.linear(x, head)  # noqa: E731

    def loss(n_tokens: int) -> torch.Tensor:
        of_student, of_teacher = student[:, :n_tokens], states[1][:, :n_tokens]
        if args.side == "chunks":
            chunk, block = positions_at_once(args.vocabulary, student.device)
            arguments = (of_student, of_teacher, to_logits, to_logits, input_ids[:, :n_tokens])
            return distillation_loss(*arguments, chunk_tokens=chunk, block_tokens=block)
        logs = [to_logits(x[:, :-1]).log_softmax(-1).flatten(0, 1) for x in (of_student, of_teacher)]
        return F.kl_div(logs[0], logs[1].detach(), log_target=True, reduction="batchmean")

    loss(2).backward()  # so that memory which libraries allocate once does not count
    before = peak_mib(args.device)
    value = loss(LOSS_TOKENS)
    value.backward()
    return {"vocabulary": args.vocabulary, "peak_mib": peak_mib(args.device) - before, "loss": value.item()}


def measure(args: argparse.Namespace, side: str, *more: str) -> dict[str, Any]:
    """Runs a probe in a process of its own."""
    command = [sys.executable, __file__, args.command, "--side", side, *more]
    for name in ("shape", "dtype", "device", "sequence_tokens", "batch_sequences", "rank"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"side": side, **json.loads(printed.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["weights", "vocabulary"])
    parser.add_argument("--shape", choices=SHAPES, default="wide")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequence-tokens", type=int, default=64)
    parser.add_argument("--batch-sequences", type=int, default=1)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()
    if args.side:
        print(json.dumps((probe_weights if args.command == "weights" else probe_vocabulary)(args)))
        return
    if args.command == "weights":
        rows = [{"shape": args.shape, **measure(args, side)} for side in ("one copy", "two copies")]
        if rows[0]["losses"] != rows[1]["losses"]:
            sys.exit(f"the losses differ: {rows[0]['losses']} and {rows[1]['losses']}")
        print(f"one copy takes {rows[0]['peak_mib'] / rows[1]['peak_mib']:.2f} of two, losses identical")
    else:
        sides = ("chunks", "whole logits")
        rows = [measure(args, side, "--vocabulary", str(size)) for side in sides for size in VOCABULARIES]
    about = {"dtype": args.dtype, "sequence_tokens": args.sequence_tokens, "batch_sequences": args.batch_sequences}
    about |= {"rank": args.rank, "hardware": hardware_name(args.device), "python": platform.python_version()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for row in rows:
        print(json.dumps(row))
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)


if __name__ == "__main__":
    main()
