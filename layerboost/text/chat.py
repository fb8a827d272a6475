"""Turns conversations into token ids and marks the assistant's tokens, because only these are targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import TOKENIZE_DOCUMENTS, Document, TextSourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

_Message = dict[str, Any]


def _messages_of(record: Any, field: str, where: str) -> list[_Message]:
    messages = record.get(field) if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in messages
    ):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise TextSourceError(
            f"text: {where} has no list of {{role, content}} in the field {field!r} (it has {fields}); "
            "name the field that has"
        )
    roles = {message["role"] for message in messages}
    if ASSISTANT not in roles:
        raise TextSourceError(
            f"text: {where} has no message by the role {ASSISTANT!r} (only {', '.join(sorted(roles)) or 'none'}), so "
            "nothing to learn; rename its roles or leave the record out"
        )
    return messages


def check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: it has no chat template to write conversations with; set tokenizer.chat_template, or give the "
            "conversations as format text"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            "tokenizer: it does not say where in the text its tokens stand, as chat needs; use a fast tokenizer"
        )


def tokenized_chats(
    records: Iterable[tuple[str, Any]], field: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    remaining = iter(records)
    while group := list(islice(remaining, TOKENIZE_DOCUMENTS)):
        rendered = [_render_chat(_messages_of(record, field, where), tokenizer, where) for where, record in group]
        texts = [text for text, _ in rendered]
        # The template already writes the special tokens, so the tokenizer must not add them again.
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            yield np.array(ids, dtype=np.int32), _tokens_in(spans, offsets)


def _tokens_in(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns (T,) bool: True for tokens with at least one character inside one of the character spans.

    transformers' own mask (`return_assistant_tokens_mask`) is not used: it runs on to the end of the conversation if a
    span ends in a character that belongs to no token, such as a line break that the tokenizer drops.
    """
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(begins), dtype=bool)
    for start, stop in spans:
        inside |= (begins < stop) & (ends > start) & (begins < ends)
    return inside


def _render_chat(
    messages: list[_Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Returns a conversation as the tokenizer's template writes it, and the character spans of the assistant."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    template = tokenizer.get_chat_template()
    try:
        if not _GENERATION_BLOCK.search(template):
            return _spans_by_prefixes(messages, tokenizer, where)
        special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        texts, spans = render_jinja_template(
            conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
        )  # type: ignore[str-unpack]
        return texts[0], spans[0]  # type: ignore[return-value]
    except TemplateError as error:
        raise TextSourceError(
            f"text: {where} does not fit the tokenizer's chat template ({error}); leave the record out or change it"
        ) from error


def _spans_by_prefixes(
    messages: list[_Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """Does the same as `_render_chat` for a template that does not mark what the assistant generates."""

    def render(n_messages: int, *, prompting: bool = False) -> str:
        if n_messages == 0:
            return ""
        return str(
            tokenizer.apply_chat_template(messages[:n_messages], tokenize=False, add_generation_prompt=prompting)
        )

    whole = render(len(messages))
    spans: list[tuple[int, int]] = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        prompt, answered = render(number, prompting=True), render(number + 1)
        if not whole.startswith(answered):
            # Some templates (Qwen3's) add an empty thought to the last answer but not to earlier ones.
            content = message["content"].strip()
            answered = prompt + content + answered.rpartition(content)[2]
        if not (whole.startswith(answered) and answered.startswith(prompt)):
            raise TextSourceError(
                f"text: {where}: the tokenizer's chat template writes the conversation's first {number + 1} messages "
                "otherwise when more follow, so that the assistant's part cannot be found; put {% generation %} and "
                "{% endgeneration %} around it in tokenizer.chat_template"
            )
        spans.append((len(prompt), _end_of_turn(answered, tokenizer)))
    return whole, spans


def _end_of_turn(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns where the turn ends in `text`: a line break after a special token belongs to the template."""
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(tuple(tokenizer.get_added_vocab())) else len(text)
