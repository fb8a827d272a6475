"""Provides a small local cluster, and a tiny checkpoint with a tokenizer and a text that it can read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_model


@pytest.fixture(scope="module")
def ray_local():
    """Starts a local cluster of two CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Writes a folder with `model/` (a tiny random Llama of 4 layers, vocabulary 97) and `text.txt` (40 documents)."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<s>", "</s>", *(f"w{n}" for n in range(94))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    tiny_model("llama", seed=0).save_pretrained(folder / "model")
    draw = random.Random(0)
    documents = (" ".join(draw.choices(words[3:], k=30)) for _ in range(40))
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    return folder
