"""Measures a converted model as a draft of its own parent: how much of what it proposes the parent accepts.

    python benchmarks/draft.py PARENT CONVERTED [CONVERTED ...] --text val.txt

In greedy speculative decoding the draft proposes k tokens, and the parent reads them in one pass, keeps those that it
would have written itself, and adds one token of its own. The text is the parent's whatever the draft is. If
transformers can remove tokens from the draft's cache (plans of softmax and none), its assisted generation is run and
compared with the parent's own. `tokens_per_pass` is the number of tokens that one pass of the parent yields; `limit` is
the speed-up over the parent alone if a step costs what its bytes cost and k + 1 tokens are read in the time of one
step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from results_csv import write_rows

from layerboost import Treatment
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import plan_of
from layerboost.speed.byte_model import decode_bytes
from layerboost.text.documents import pack, read_documents

PROPOSED = (1, 2, 4, 8)


@torch.inference_mode()
def agreement(draft: Any, texts: torch.Tensor, n_prompt: int) -> torch.Tensor:
    """Returns (n, new tokens) bool: True if the draft, given the parent's text so far, predicts its next token."""
    logits = torch.cat([draft(batch[:, :-1], use_cache=False).logits[:, n_prompt - 1 :] for batch in texts.split(8)])
    return logits.argmax(dim=-1) == texts[:, n_prompt:]


def tokens_per_pass(agrees: torch.Tensor, k: int) -> float:
    """Returns the tokens per pass of the parent: the proposals before the first wrong one, and the parent's own."""
    n_passes = 0
    for row in agrees.tolist():
        position = 0
        while position < len(row):
            proposed = row[position : position + k]
            position += (proposed.index(False) if False in proposed else len(proposed)) + 1
            n_passes += 1
    return agrees.numel() / n_passes


def lossless(parent: Any, draft: Any, prompts: torch.Tensor, texts: torch.Tensor) -> bool | None:
    """Returns whether assisted generation writes the parent's text; None if the draft's cache cannot drop tokens."""
    plan = plan_of(draft)
    if plan is None or any(treatment.needs_window for treatment in plan.treatments):
        return None
    n_new = texts.shape[1] - prompts.shape[1]
    settings = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None, "assistant_model": draft}
    written = [parent.generate(p[None], attention_mask=torch.ones_like(p[None]), **settings)[0] for p in prompts[:8]]
    return all(torch.equal(row, text) for row, text in zip(written, texts))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args(argv)
    parent = load_model(args.parent).eval()
    parent.generation_config.pad_token_id = 0
    documents = read_documents(args.text)
    prompts = pack(documents, load_tokenizer(args.parent), args.prompt_tokens, limit_sequences=args.prompts)
    with torch.inference_mode():
        texts = parent.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=args.new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    at = {"concurrency": 1, "context_tokens": args.prompt_tokens + args.new_tokens // 2}
    at["dtype_bytes"] = parent.dtype.itemsize
    rows = []
    for path in args.converted:
        draft = load_model(path).eval()
        plan = plan_of(draft)
        assert plan is not None, f"{path} is not a converted model"
        agrees = agreement(draft, texts, args.prompt_tokens)
        cost = decode_bytes(parent.config, plan, **at) / decode_bytes(parent.config, None, **at)
        same = lossless(parent, draft, prompts, texts)
        for k in PROPOSED:
            found = tokens_per_pass(agrees, k)
            row = {
                "plan": str(plan),
                "n_softmax": plan.count(Treatment.SOFTMAX),
                "k": k,
                "acceptance": agrees.float().mean().item(),
                "acceptance_stderr": agrees.float().mean(dim=1).std().item() / len(agrees) ** 0.5,
                "tokens_per_pass": found,
                "draft_bytes": cost,
                "limit": found / (k * cost + 1),
                "lossless": same,
                "n_tokens": agrees.numel(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
            rows.append(row)
            print("  ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if args.out:
        write_rows(args.out, rows)


if __name__ == "__main__":
    main()
