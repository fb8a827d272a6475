"""`layerboost generate`: continues a prompt."""

from __future__ import annotations

import argparse
import sys

from orchestrator.commands.single_model import checked_model, checked_tokenizer, choose_device, load_checked
from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.errors import InputError


def generate(arguments: argparse.Namespace) -> int:
    """`layerboost generate`: prints the continuation that the model writes."""
    if arguments.max_new_tokens < 1:
        raise InputError("--max-new-tokens", arguments.max_new_tokens, "must be at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        raise InputError("--temperature", arguments.temperature, "must be 0 or more")
    device = choose_device(arguments.device)
    facts = checked_model(arguments.model, arguments)
    tokenizer = checked_tokenizer(facts, arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    n_prompt = inputs["input_ids"].shape[1]
    if n_prompt == 0:
        raise InputError("PROMPT", prompt, "holds no tokens; write something to continue")
    if facts.context_tokens is not None and n_prompt + arguments.max_new_tokens > facts.context_tokens:
        raise InputError(
            "--max-new-tokens",
            arguments.max_new_tokens,
            f"with a prompt of {n_prompt} tokens is more than the model's context of {facts.context_tokens}; "
            "give fewer or a shorter prompt",
        )
    import torch

    model = load_checked(facts, arguments, device)
    torch.manual_seed(arguments.seed)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        tokens = model.generate(
            **inputs.to(device), max_new_tokens=arguments.max_new_tokens, pad_token_id=pad, **sampling
        )
    print(tokenizer.decode(tokens[0, n_prompt:], skip_special_tokens=True))
    return EXIT_DONE
