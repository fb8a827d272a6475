"""Small texts and conversations, and tokenizers that know their words."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["<s>", "</s>", "a", "b", "c", "d"]


def word_tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", template: str = "$A") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, WORDS.index(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def write_texts(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def random_documents(draw: random.Random, n: int, longest: int = 12) -> list[str]:
    return [" ".join(draw.choices("abcd", k=draw.randint(1, longest))) for _ in range(n)]


def write_chats(path: Path, conversations: list[list[dict]]) -> str:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


CHAT_WORDS = [*WORDS, "<|turn|>", "<|end|>", "user", "assistant", "system", "think"]


TURN = "{% for m in messages %}<|turn|>{{ m['role'] }}\n"


PROMPT = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"


PLAIN = TURN + "{{ m['content'] }}<|end|>\n{% endfor %}" + PROMPT


def chat_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(CHAT_WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|turn|>", "<|end|>"],
    )
    fast.chat_template = template
    return fast


def chat_of(*contents: str, system: str | None = None) -> list[dict]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def random_chats(draw: random.Random, n: int) -> list[list[dict]]:
    return [
        chat_of(*random_documents(draw, draw.randint(2, 5), longest=4), system=draw.choice([None, "a b"]))
        for _ in range(n)
    ]
