"""Applies a plan to the embedded model by hand, saves the checkpoint, and loads it like any other.

python examples/convert.py NSSLLNSSLNNS converted
"""

import sys

from transformers import AutoModelForCausalLM

from layerboost import Plan, convert, plan_of
from layerboost.checkpoint import load_model, load_tokenizer, save_checkpoint
from layerboost.smallworld import MODEL
from layerboost.speed.decoding import kv_bytes_per_token


def main(letters: str, folder: str) -> None:
    parent, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    # The converted model shares its parameters with the parent, which stays unchanged.
    converted = convert(parent, Plan.parse(letters, window=16))
    save_checkpoint(converted, tokenizer, folder)

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The lamp of Luke Holt is in the", return_tensors="pt", return_token_type_ids=False)
    for model in (parent, loaded):
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        print(plan_of(model) or "parent", f"{kv_bytes_per_token(model):,.0f} KV bytes per token", sep=": ")
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
