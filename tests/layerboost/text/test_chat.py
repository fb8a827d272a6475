from __future__ import annotations

import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

import layerboost
import layerboost.text.documents
from layerboost.text.documents import TextSourceError
from layerboost.text.sources import TextSource, pack_sources
from tests.texts import (
    CHAT_WORDS,
    PLAIN,
    PROMPT,
    TURN,
    chat_of,
    chat_tokenizer,
    random_chats,
    write_chats,
    write_texts,
)

MARKED = (
    TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}" + PROMPT
)
# This template adds a thought to an answer only while it is the last message.
THINKING = (
    TURN
    + "{% if loop.last and m['role'] == 'assistant' %}think\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    + PROMPT
)
COUNTING = "{{ messages | length }}" + PLAIN
REFUSING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN


def _target_words(packed) -> list[str]:
    return [CHAT_WORDS[i] for i in packed.input_ids[packed.targets].tolist()]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_tokens_are_targets(tmp_path, template):
    # The tokenizer drops line breaks, after which transformers' own mask would run on to the end of the conversation.
    draw = random.Random(5)
    conversations = random_chats(draw, 20)
    source = TextSource(write_chats(tmp_path / "chats.jsonl", conversations), format="chat")
    words, targets = [], []
    for message in (message for messages in conversations for message in messages):
        body = [*message["content"].split(), "<|end|>"]
        words += ["<|turn|>", message["role"], *body]
        targets += [False, False, *([message["role"] == "assistant"] * len(body))]
    packed = pack_sources([source], chat_tokenizer(template), 10, 1000)
    n_tokens = packed.input_ids.numel()
    assert len(words) - 10 < n_tokens <= len(words)
    assert [CHAT_WORDS[i] for i in packed.input_ids.flatten().tolist()] == words[:n_tokens]
    expected = torch.tensor(targets[:n_tokens]).view_as(packed.input_ids)
    expected[:, 0] = False
    assert torch.equal(packed.targets, expected)


@pytest.mark.parametrize("is_marked", [True, False])
def test_the_assistants_tokens_are_those_of_transformers_where_every_character_has_one(tmp_path, is_marked):
    tokenizer = AutoTokenizer.from_pretrained(Path(layerboost.__file__).parent / "smallworld" / "model")
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}Anna: {% generation %}{{ m['content'] }}"
        "<|endoftext|>{% endgeneration %}{{ '\\n' }}{% else %}Ben: {{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Anna: {% endif %}"
    )
    conversations = [chat_of("Who is in the house?", "Bob \u00e9 is.", "And now?", "Nobody"), chat_of("Hi", " there ")]
    source = TextSource(write_chats(tmp_path / "chats.jsonl", conversations), format="chat")
    theirs = [
        tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        for messages in conversations
    ]
    ids = [i for encoded in theirs for i in encoded["input_ids"]]
    masks = [bool(i) for encoded in theirs for i in encoded["assistant_masks"]]
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = template if is_marked else unmarked
    packed = pack_sources([source], tokenizer, len(ids), 1)
    assert packed.input_ids.tolist() == [ids]
    assert packed.targets.tolist() == [masks]
    assert 0 < packed.n_targets < len(ids)


def test_an_answer_that_loses_its_thought_when_more_follow_is_still_found(tmp_path):
    source = TextSource(write_chats(tmp_path / "c.jsonl", [chat_of("a", "b c", "a", "d")]), format="chat")
    packed = pack_sources([source], chat_tokenizer(THINKING), 18, 1)
    assert _target_words(packed) == ["b", "c", "<|end|>", "think", "d", "<|end|>"]


def test_text_and_chat_mix_and_all_of_a_text_is_a_target(tmp_path):
    sources = [
        TextSource(write_texts(tmp_path / "t.jsonl", ["a b"])),
        TextSource(write_chats(tmp_path / "c.jsonl", [chat_of("a", "d")]), format="chat"),
    ]
    packed = pack_sources(sources, chat_tokenizer(), 12, 1)
    assert packed.input_ids.tolist() == [[0, 2, 3, 1, 6, 8, 2, 7, 6, 9, 5, 7]]
    assert packed.targets.tolist() == [[False, True, True, True, *[False] * 6, True, True]]
    apart = pack_sources([sources[1], sources[0]], chat_tokenizer(), 12, 1, apart=True)
    assert apart.position_ids.tolist() == [[*range(8), *range(4)]]
    assert apart.targets.tolist() == [[*[False] * 6, True, True, False, True, True, True]]


def test_conversations_come_from_parquet_and_the_hub_alike(tmp_path, monkeypatch):
    conversations = random_chats(random.Random(6), 5)
    path = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"talk": conversations}), path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{"talk": c} for c in conversations]))
    lines = TextSource(write_chats(tmp_path / "chats.jsonl", conversations), format="chat")
    expected = pack_sources([lines], chat_tokenizer(), 8, 4)
    for source in (str(path), "owner/chats"):
        packed = pack_sources([TextSource(source, field="talk", format="chat")], chat_tokenizer(), 8, 4)
        assert torch.equal(packed.input_ids, expected.input_ids) and torch.equal(packed.targets, expected.targets)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (COUNTING, chat_of("a", "b", "a", "b"), r"line 1: .* first 2 messages otherwise when more follow"),
        (REFUSING, chat_of("a", "b", system="c"), r"line 1 does not fit .*\(begin with the user\)"),
        (PLAIN, chat_of("a"), "line 1 has no message by the role 'assistant' .only user"),
        (PLAIN, [], "line 1 has no message by the role 'assistant' .only none"),
        (PLAIN, "a", "line 1 has no list of {role, content} in the field 'messages'"),
        (PLAIN, [{"from": "gpt", "value": "a"}], "line 1 has no list of {role, content}"),
    ],
)
def test_conversations_that_cannot_be_used_are_named(tmp_path, template, messages, message):
    source = TextSource(write_chats(tmp_path / "c.jsonl", [messages]), format="chat")
    with pytest.raises(TextSourceError, match=message):
        pack_sources([source], chat_tokenizer(template), 4, 1)


def test_chat_needs_a_chat_template(tmp_path):
    source = TextSource(write_chats(tmp_path / "c.jsonl", [chat_of("a", "b")]), format="chat")
    with pytest.raises(ValueError, match="no chat template"):
        pack_sources([source], chat_tokenizer(None), 4, 1)
