"""Trains the tokenizer and the small Llama model that LayerBoost ships.

The committed `model/` folder is the result of

    python -m layerboost.smallworld.train

with its default arguments. The run is reproducible on one kind of CPU, because it uses one thread, fixed seeds and a
fixed number of steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .benchmarks import N_ITEMS, TASKS, items
from .world import SEPARATOR, document, documents

MODEL_DIR = Path(__file__).parent / "model"
TOKENIZER_DOCUMENTS = 4000
VALIDATION_DOCUMENTS = 160


def train_tokenizer(vocab_size: int, max_tokens: int = 512) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE on the generated text; `<|endoftext|>` (id 0) begins, ends, separates and pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents("pretrain"), TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=max_tokens,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocab_size: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """Returns a freshly initialised Llama.

    Its matrices start larger than usual: at this width the usual 0.02 leaves attention flat for thousands of steps.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=args.init_std,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # these write into the residual stream
                parameter.mul_((2 * args.layers) ** -0.5)
    return model


def rows(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], row_tokens: int) -> Iterator[list[int]]:
    """Packs documents into rows of `row_tokens` + 1 tokens; each row begins with the separator and a new document."""
    encode = tokenizer.backend_tokenizer.encode
    while True:
        row: list[int] = []
        while len(row) <= row_tokens:
            row += [0, *encode(next(texts)).ids]
        yield row[: row_tokens + 1]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Returns the rate: linear warm-up, a constant stretch, and a linear decay to 2 % of the peak in `decay_steps`."""
    rise = min(1.0, (step + 1) / args.warmup)
    fall = min(1.0, (args.steps - step) / args.decay_steps)
    return args.lr * min(rise, 0.02 + 0.98 * fall)


def validation_nll(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, n_documents: int) -> float:
    """Returns the mean negative log-likelihood in nats per token over single validation documents, in fp32."""
    total, n_tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for index in range(n_documents):
            ids = torch.tensor([[0, *tokenizer(document("validation", index))["input_ids"], 0]])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            n_tokens += ids.shape[1] - 1
    model.train()
    return total / n_tokens


def choice_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: str, n_items: int = N_ITEMS
) -> float:
    """Returns the share of a task's items whose right choice, a single token, is the most likely of the choices."""
    n_right = 0
    model.eval()
    with torch.no_grad():
        for item in items(task, n_items):
            ids = torch.tensor([tokenizer(item["context"])["input_ids"]])
            choice_ids = [tokenizer(choice)["input_ids"][0] for choice in item["choices"]]
            scores = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1, choice_ids]
            n_right += int(scores.argmax()) == item["gold"]
    model.train()
    return n_right / n_items


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> int:
    """Trains in place and returns the number of tokens seen; prints a line every `log_every` steps."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9, foreach=True)
    stream = rows(tokenizer, documents("pretrain", start=args.seed * 10_000_000), args.row_tokens)
    started, running, n_tokens = time.monotonic(), 0.0, 0
    model.train()
    for step in range(args.steps):
        batch = torch.tensor(list(islice(stream, args.rows)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        n_tokens += batch[:, 1:].numel()
        running += loss.item()
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            elapsed_s = time.monotonic() - started
            left_s = elapsed_s / (step + 1) * (args.steps - step - 1)
            scores = ", ".join(f"{choice_accuracy(model, tokenizer, task, 50):.2f}" for task in TASKS)
            print(
                f"step {step + 1}/{args.steps}  loss {running / (step % args.log_every + 1):.4f}  accuracy {scores}  "
                f"{n_tokens / elapsed_s:.0f} tok/s  {left_s:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            running = 0.0
    return n_tokens


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; the defaults are those of the committed model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: the package's model/)")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--ffn", type=int, default=352)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--init-std", type=float, default=0.08)
    parser.add_argument("--rows", type=int, default=8, help="rows in a batch")
    parser.add_argument("--row-tokens", type=int, default=256, help="tokens in a row")
    parser.add_argument("--decay-steps", type=int, default=800, help="last steps, with a falling rate")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bf16 autocast")
    parser.add_argument("--log-every", type=int, default=100)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains the model and writes it with the tokenizer and `training.json`."""
    args = parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.monotonic()
    tokenizer = train_tokenizer(args.vocab_size)
    model = build_model(len(tokenizer), args)
    n_tokens = train(model, tokenizer, args)
    nll = validation_nll(model, tokenizer, VALIDATION_DOCUMENTS)
    model.eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "command": "python -m layerboost.smallworld.train",
        "arguments": {key: value for key, value in vars(args).items() if key != "out"},
        "tokens": n_tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_nll_nats_per_token": nll,
        "accuracy": {task: choice_accuracy(model, tokenizer, task) for task in TASKS},
        "wall_s": round(time.monotonic() - started, 1),
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"validation {nll:.4f} nats per token; wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
