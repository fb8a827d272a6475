from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import layerboost.data
from layerboost.convert import convert
from layerboost.data import (
    TextSource,
    TextSourceError,
    TextTooShortError,
    pack,
    pack_sources,
    read_documents,
    sources_identity,
    text_identity,
    write_token_rows,
)
from layerboost.plan import Plan
from tests.models import tiny_model

WORDS = ["<s>", "</s>", "a", "b", "c", "d"]


def _tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", template: str = "$A") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, WORDS.index(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def test_text_file_is_split_at_separator_lines_where_there_are_any(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("a b\n\nc\n<|endoftext|>\nd\n<|endoftext|>\n<|endoftext|>\nlast <|endoftext|> one")
    assert list(read_documents(str(path))) == ["a b\n\nc", "d", "last <|endoftext|> one"]


def test_text_file_without_separators_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("\n a b\nc\n \n\nd\n")
    assert list(read_documents(path)) == [" a b\nc", "d"]


def test_json_lines_and_parquet_give_the_named_field(tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": "a", "story": "b"}\n\n{"text": "c", "story": "d"}\n')
    table = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "c"], "story": ["b", "d"]}), table)
    for path in (lines, table):
        assert list(read_documents(path)) == ["a", "c"]
        assert list(read_documents(path, field="story")) == ["b", "d"]


def test_missing_and_unreadable_sources_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for source in ("missing.txt", "./missing", "folder", "picture.png", "not a name"):
        with pytest.raises(TextSourceError, match=r"\.txt, \.jsonl, \.parquet") as error:
            read_documents(source)
        assert source in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', "line 2 has no text in the field 'text' .it has body"),
        ('{"text": "a"}\n{"text": null}\n', "line 2 has no text"),
        ('{"text": "a"}\n["b"]\n', "line 2 has no text"),
        ('{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
    ],
)
def test_bad_record_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(TextSourceError, match=message):
        list(read_documents(path))


def test_parquet_without_the_field_names_its_columns(tmp_path):
    path = tmp_path / "texts.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"story": ["b"], "year": [1]}), path)
    with pytest.raises(TextSourceError, match="story, year"):
        list(read_documents(path))


def test_hub_name_goes_to_datasets_without_remote_code(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(read_documents("owner/name:config", split="test")) == ["a", "b"]
    assert asked == [(("owner/name", "config"), {"split": "test", "streaming": True})]


def test_hub_dataset_that_cannot_be_read_is_a_text_source_error(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(TextSourceError, match=r"owner/name \(no network\)"):
        list(read_documents("owner/name"))


def test_text_identity_follows_the_content(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("a")
    second.write_text("a")
    assert text_identity(first) == text_identity(second)
    second.write_text("b")
    assert text_identity(first) != text_identity(second)
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"text": "a", "story": "b"}))
    assert text_identity(lines) != text_identity(lines, field="story")
    assert text_identity("owner/name", split="test") != text_identity("owner/name", split="train")


def test_pack_sets_each_document_between_bos_and_eos_and_drops_the_rest():
    assert pack(["a b", "c", "d d d"], _tokenizer(), 4).tolist() == [[0, 2, 3, 1], [0, 4, 1, 0], [5, 5, 5, 1]]
    assert pack(["a b", "c", "d d"], _tokenizer(), 4).tolist() == [[0, 2, 3, 1], [0, 4, 1, 0]]


@pytest.mark.parametrize("bos", [None, "</s>"])
def test_pack_without_a_bos_of_its_own_puts_eos_between(bos):
    assert pack(["a b", "c d"], _tokenizer(bos=bos), 3).tolist() == [[2, 3, 1], [4, 5, 1]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [("<s> $A", [0, 2, 3, 0, 4, 5]), ("<s> $A </s>", [0, 2, 3, 1, 0, 4]), ("$A </s>", [2, 3, 1, 4, 5, 1])],
)
def test_pack_takes_the_tokenizers_own_marks_where_it_has_any(template, expected):
    assert pack(["a b", "c d"], _tokenizer(template=template), 6).tolist() == [expected]


def test_pack_does_not_depend_on_how_many_documents_are_tokenised_at_once(monkeypatch):
    documents = [" ".join("abcd"[i % 4] for i in range(n)) for n in range(1, 40)]
    expected = pack(documents, _tokenizer(), 8)
    monkeypatch.setattr("layerboost.data._TOKENIZE_DOCUMENTS", 3)
    assert torch.equal(pack(documents, _tokenizer(), 8), expected)
    assert torch.equal(pack(documents, _tokenizer(), 8, limit_sequences=5), expected[:5])


def test_pack_stops_reading_when_it_has_enough():
    read = 0

    def documents():
        nonlocal read
        while True:
            read += 1
            yield "a b c d"

    assert pack(documents(), _tokenizer(), 6, limit_sequences=40).shape == (40, 6)
    assert read == 64


def test_short_text_names_tokens_found_and_needed():
    with pytest.raises(TextTooShortError, match="5 tokens found, 6 needed"):
        pack(["a b c"], _tokenizer(), 6)
    with pytest.raises(TextTooShortError, match="0 tokens found"):
        pack([], _tokenizer(), 6)


def test_pack_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="sequence_tokens: 0"):
        pack(["a"], _tokenizer(), 0)
    with pytest.raises(ValueError, match="limit_sequences: 0"):
        pack(["a"], _tokenizer(), 2, limit_sequences=0)
    with pytest.raises(ValueError, match="no EOS"):
        pack(["a"], _tokenizer(eos=None), 2)


def test_real_llama_tokenizer_sets_bos_alone_before_each_document(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    documents = list(read_documents(shared_dir / "data" / "tinystories_val.txt"))
    assert len(documents) == 289
    stream = pack(documents, tokenizer, 256, limit_sequences=16).flatten().tolist()
    first = tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    assert stream[: len(first) + 2] == [1, *first, 1]
    assert 2 not in stream


def _write_texts(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def _write_chats(path: Path, conversations: list[list[dict]]) -> str:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


def _token_source(path: Path, documents: list[list[int]], weight: float = 1.0) -> TextSource:
    write_token_rows(path / "0.safetensors", documents)
    return TextSource(str(path), weight=weight, format="tokens")


def _random_documents(draw: random.Random, n: int, longest: int = 12) -> list[str]:
    return [" ".join(draw.choices("abcd", k=draw.randint(1, longest))) for _ in range(n)]


def test_one_source_is_packed_as_ever_and_gives_fewer_rows_when_it_ends(tmp_path):
    draw = random.Random(1)
    source = TextSource(_write_texts(tmp_path / "a.jsonl", _random_documents(draw, 50)))
    for template in ("$A", "<s> $A"):
        tokenizer = _tokenizer(template=template)
        for sequence_tokens, n_sequences in ((7, 5), (16, 3), (11, 1000)):
            expected = pack(read_documents(source.path), tokenizer, sequence_tokens, limit_sequences=n_sequences)
            packed = pack_sources([source], tokenizer, sequence_tokens, n_sequences)
            assert torch.equal(packed.tensors()["input_ids"], expected)
            assert packed.position_ids is None and packed.targets is None
    with pytest.raises(TextTooShortError, match="needed for one sequence"):
        pack_sources([source], _tokenizer(), 10_000, 1)


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_tokens_follow_the_weights(tmp_path, seed):
    draw = random.Random(seed)
    n_sources = draw.choice([2, 2, 3, 5])
    weights = [draw.choice([0.2, 1.0, 3.0, draw.random() + 0.01]) for _ in range(n_sources)]
    lengths = [draw.randint(1, 40) for _ in range(n_sources)]
    sources = [  # source i is written in the token i alone
        _token_source(
            tmp_path / str(i), [[i] * draw.randint(1, lengths[i]) for _ in range(draw.randint(1, 30))], weights[i]
        )
        for i in range(n_sources)
    ]
    packed = pack_sources(sources, _tokenizer(), 16, 60)
    assert packed.input_ids.shape == (60, 16)
    stream = packed.input_ids.flatten()
    # Whoever is behind waits at most for the others one after the other (the bound of greedy cup emptying).
    most_behind = max(lengths) * sum(1 / k for k in range(1, n_sources))
    for end in range(1, len(stream) + 1, 7):
        counts = torch.bincount(stream[:end], minlength=n_sources)
        for i, weight in enumerate(weights):
            ahead = float(counts[i]) - end * weight / sum(weights)
            assert -most_behind - max(lengths) <= ahead <= lengths[i]
    whole = torch.bincount(stream, minlength=n_sources) / len(stream)
    assert whole.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=2 * most_behind / len(stream))


def test_mixed_documents_stay_whole_and_in_their_order(tmp_path):
    draw = random.Random(2)
    texts = [_random_documents(draw, n) for n in (9, 4)]
    sources = [TextSource(_write_texts(tmp_path / f"{i}.jsonl", texts[i]), weight=1 + i) for i in range(2)]
    packed = pack_sources(sources, _tokenizer(), 10, 40)
    words = " ".join(WORDS[i] for i in packed.input_ids.flatten().tolist())
    documents = [document.strip() for document in words.split("<s>")[1:-1]]
    waiting = [itertools.cycle([f"{document} </s>" for document in of_source]) for of_source in texts]
    n_tokens, heads = [0, 0], [next(waiting[0]), next(waiting[1])]
    for document in documents:
        behind = max((0, 1), key=lambda i: ((1 + i) / 3 * sum(n_tokens) - n_tokens[i], -i))
        assert document == heads[behind]
        n_tokens[behind] += len(document.split()) + 1
        heads[behind] = next(waiting[behind])


@pytest.mark.parametrize("apart", [False, True])
def test_rows_depend_on_the_arguments_alone(tmp_path, monkeypatch, apart):
    draw = random.Random(3)
    sources = [
        TextSource(_write_texts(tmp_path / "a.jsonl", _random_documents(draw, 40)), weight=2.0),
        TextSource(_write_chats(tmp_path / "b.jsonl", _random_chats(draw, 7)), format="chat"),
        _token_source(tmp_path / "c", [[2, 3, 1], [4]], weight=0.5),
    ]
    tokenizer = _chat_tokenizer()
    expected = pack_sources(sources, tokenizer, 13, 30, apart=apart).tensors()
    fewer = pack_sources(sources, tokenizer, 13, 12, apart=apart).tensors()
    monkeypatch.setattr(layerboost.data, "_TOKENIZE_DOCUMENTS", 3)
    again = pack_sources(sources, tokenizer, 13, 30, apart=apart).tensors()
    assert set(expected) == {"input_ids", "targets", *(["position_ids"] if apart else [])}
    for name, value in expected.items():
        assert value.dtype == (torch.bool if name == "targets" else torch.int64)
        assert torch.equal(again[name], value)
        assert torch.equal(fewer[name], value[:12])


def test_a_dataset_is_read_no_further_than_needed(monkeypatch):
    read = {"owner/a": 0, "owner/b": 0}

    def load_dataset(name, config, *, split, streaming):
        assert streaming
        while True:
            read[name] += 1
            yield {"text": "a b c d"}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sources = [TextSource("owner/a", weight=3.0), TextSource("owner/b")]
    assert pack_sources(sources, _tokenizer(), 6, 40).input_ids.shape == (40, 6)
    assert read == {"owner/a": 32, "owner/b": 32}
    read.update(dict.fromkeys(read, 0))
    monkeypatch.setattr(layerboost.data, "_TOKENIZE_DOCUMENTS", 1)
    pack_sources(sources, _tokenizer(), 6, 40)
    assert read == {"owner/a": 30, "owner/b": 10}


def test_sources_that_end_begin_again_and_empty_ones_are_refused(tmp_path):
    short = TextSource(_write_texts(tmp_path / "short.jsonl", ["a"]))
    long = TextSource(_write_texts(tmp_path / "long.jsonl", ["b b b"] * 100))
    stream = pack_sources([short, long], _tokenizer(), 10, 20).input_ids.flatten().tolist()
    assert 95 <= sum(token == 2 for token in stream) * 3 <= 105
    empty = TextSource(_write_texts(tmp_path / "empty.jsonl", []))
    with pytest.raises(TextSourceError, match=r"empty\.jsonl holds no token"):
        pack_sources([long, empty], _tokenizer(), 10, 20)
    with pytest.raises(TextSourceError, match="blank holds no token"):
        pack_sources([long, _token_source(tmp_path / "blank", [[], []])], _tokenizer(), 10, 20)
    with pytest.raises(TextTooShortError, match="0 tokens found"):
        pack_sources([empty], _tokenizer(), 10, 20)


def test_documents_apart_start_anew_in_position_and_are_no_targets_there(tmp_path):
    source = _token_source(tmp_path / "t", [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1]])
    packed = pack_sources([source], _tokenizer(), 5, 9, apart=True)
    assert packed.tensors()["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]]
    assert packed.tensors()["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert packed.tensors()["targets"].tolist() == [[False, True, True, False, False], [False, True, True, True, False]]
    assert packed.n_targets == 5


@pytest.mark.parametrize("plan", [None, Plan.parse("LNSW", 5)])
def test_a_packed_row_gives_each_document_what_it_gets_alone(tmp_path, plan):
    draw = random.Random(4)
    documents = [[draw.randrange(97) for _ in range(draw.randint(1, 25))] for _ in range(12)]
    packed = pack_sources([_token_source(tmp_path / "t", documents)], _tokenizer(), 40, 3, apart=True)
    model = tiny_model("llama", seed=7)
    if plan is not None:
        model = convert(model, plan).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "linear_window" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = {name: value for name, value in packed.tensors().items() if name != "targets"}
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
        n_pieces = 0
        for row, positions, logits in zip(inputs["input_ids"], inputs["position_ids"], together, strict=True):
            starts = (positions == 0).nonzero()[:, 0].tolist()
            for start, stop in itertools.pairwise([*starts, len(row)]):
                alone = model(input_ids=row[None, start:stop], use_cache=False).logits[0]
                torch.testing.assert_close(logits[start:stop], alone, atol=1e-4, rtol=1e-4)
                n_pieces += 1
    assert n_pieces > 8


CHAT_WORDS = [*WORDS, "<|turn|>", "<|end|>", "user", "assistant", "system", "think"]
TURN = "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
PROMPT = "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
PLAIN = TURN + "{{ m['content'] }}<|end|>\n{% endfor %}" + PROMPT
MARKED = (
    TURN + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}" + PROMPT
)
# An answer that is the last message gets a thought that it loses when more follow.
THINKING = (
    TURN
    + "{% if loop.last and m['role'] == 'assistant' %}think\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    + PROMPT
)
COUNTING = "{{ messages | length }}" + PLAIN
REFUSING = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + PLAIN


def _chat_tokenizer(template: str | None = PLAIN) -> PreTrainedTokenizerFast:
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


def _chat(*contents: str, system: str | None = None) -> list[dict]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _random_chats(draw: random.Random, n: int) -> list[list[dict]]:
    return [
        _chat(*_random_documents(draw, draw.randint(2, 5), longest=4), system=draw.choice([None, "a b"]))
        for _ in range(n)
    ]


def _target_words(packed) -> list[str]:
    return [CHAT_WORDS[i] for i in packed.input_ids[packed.targets].tolist()]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_tokens_are_targets(tmp_path, template):
    # The tokenizer drops line breaks, where transformers' own mask would run on to the end of the conversation.
    draw = random.Random(5)
    conversations = _random_chats(draw, 20)
    source = TextSource(_write_chats(tmp_path / "chats.jsonl", conversations), format="chat")
    words, targets = [], []
    for message in (message for messages in conversations for message in messages):
        body = [*message["content"].split(), "<|end|>"]
        words += ["<|turn|>", message["role"], *body]
        targets += [False, False, *([message["role"] == "assistant"] * len(body))]
    packed = pack_sources([source], _chat_tokenizer(template), 10, 1000)
    n_tokens = packed.input_ids.numel()
    assert len(words) - 10 < n_tokens <= len(words)
    assert [CHAT_WORDS[i] for i in packed.input_ids.flatten().tolist()] == words[:n_tokens]
    expected = torch.tensor(targets[:n_tokens]).view_as(packed.input_ids)
    expected[:, 0] = False
    assert torch.equal(packed.targets, expected)


@pytest.mark.parametrize("is_marked", [True, False])
def test_the_assistants_tokens_are_those_of_transformers_where_every_character_has_one(tmp_path, is_marked):
    tokenizer = AutoTokenizer.from_pretrained(Path(layerboost.data.__file__).parent / "smallworld" / "model")
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}Anna: {% generation %}{{ m['content'] }}"
        "<|endoftext|>{% endgeneration %}{{ '\\n' }}{% else %}Ben: {{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Anna: {% endif %}"
    )
    conversations = [_chat("Who is in the house?", "Bob \u00e9 is.", "And now?", "Nobody"), _chat("Hi", " there ")]
    source = TextSource(_write_chats(tmp_path / "chats.jsonl", conversations), format="chat")
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
    source = TextSource(_write_chats(tmp_path / "c.jsonl", [_chat("a", "b c", "a", "d")]), format="chat")
    packed = pack_sources([source], _chat_tokenizer(THINKING), 18, 1)
    assert _target_words(packed) == ["b", "c", "<|end|>", "think", "d", "<|end|>"]


def test_text_and_chat_mix_and_all_of_a_text_is_a_target(tmp_path):
    sources = [
        TextSource(_write_texts(tmp_path / "t.jsonl", ["a b"])),
        TextSource(_write_chats(tmp_path / "c.jsonl", [_chat("a", "d")]), format="chat"),
    ]
    packed = pack_sources(sources, _chat_tokenizer(), 12, 1)
    assert packed.input_ids.tolist() == [[0, 2, 3, 1, 6, 8, 2, 7, 6, 9, 5, 7]]
    assert packed.targets.tolist() == [[False, True, True, True, *[False] * 6, True, True]]
    apart = pack_sources([sources[1], sources[0]], _chat_tokenizer(), 12, 1, apart=True)
    assert apart.position_ids.tolist() == [[*range(8), *range(4)]]
    assert apart.targets.tolist() == [[*[False] * 6, True, True, False, True, True, True]]


def test_conversations_come_from_parquet_and_the_hub_alike(tmp_path, monkeypatch):
    conversations = _random_chats(random.Random(6), 5)
    path = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"talk": conversations}), path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{"talk": c} for c in conversations]))
    lines = TextSource(_write_chats(tmp_path / "chats.jsonl", conversations), format="chat")
    expected = pack_sources([lines], _chat_tokenizer(), 8, 4)
    for source in (str(path), "owner/chats"):
        packed = pack_sources([TextSource(source, field="talk", format="chat")], _chat_tokenizer(), 8, 4)
        assert torch.equal(packed.input_ids, expected.input_ids) and torch.equal(packed.targets, expected.targets)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (COUNTING, _chat("a", "b", "a", "b"), r"line 1: .* first 2 messages otherwise when more follow"),
        (REFUSING, _chat("a", "b", system="c"), r"line 1 does not fit .*\(begin with the user\)"),
        (PLAIN, _chat("a"), "line 1 has no message by the role 'assistant' .only user"),
        (PLAIN, [], "line 1 has no message by the role 'assistant' .only none"),
        (PLAIN, "a", "line 1 has no list of {role, content} in the field 'messages'"),
        (PLAIN, [{"from": "gpt", "value": "a"}], "line 1 has no list of {role, content}"),
    ],
)
def test_conversations_that_cannot_be_used_are_named(tmp_path, template, messages, message):
    source = TextSource(_write_chats(tmp_path / "c.jsonl", [messages]), format="chat")
    with pytest.raises(TextSourceError, match=message):
        pack_sources([source], _chat_tokenizer(template), 4, 1)


def test_chat_needs_a_chat_template(tmp_path):
    source = TextSource(_write_chats(tmp_path / "c.jsonl", [_chat("a", "b")]), format="chat")
    with pytest.raises(ValueError, match="no chat template"):
        pack_sources([source], _chat_tokenizer(None), 4, 1)


def test_token_files_are_read_in_name_order_from_folders_files_and_urls(tmp_path):
    first, second = [[5, 6, 7], [], [8]], [[9, 10], [11]]
    for root in (str(tmp_path / "tokens"), "memory://layerboost-tokens"):
        write_token_rows(f"{root}/00001.safetensors", second)
        write_token_rows(f"{root}/00000.safetensors", [[1]])
        write_token_rows(f"{root}/00000.safetensors", first)  # replaced whole
        packed = pack_sources([TextSource(root, format="tokens")], _tokenizer(), 7, 1)
        assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]] and packed.targets is None
        one = TextSource(f"{root}/00001.safetensors", format="tokens")
        assert pack_sources([one], _tokenizer(), 3, 5).input_ids.tolist() == [[9, 10, 11]]
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["00000.safetensors", "00001.safetensors"]


def test_folders_without_tokens_say_so(tmp_path):
    def read(path: Path):
        pack_sources([TextSource(str(path), format="tokens")], _tokenizer(), 2, 1)

    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):
        with pytest.raises(TextSourceError, match="write them with write_token_rows"):
            read(path)
    (tmp_path / "a.safetensors").write_bytes(b"none")
    with pytest.raises(TextSourceError, match="holds no tokens and lengths"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        write_token_rows(tmp_path / "a.bin", [[1]])


def test_sources_that_make_no_sense_are_refused():
    for changes, message in [
        ({"path": ""}, "path: '' names no text"),
        ({"weight": 0.0}, "weight: 0.0 of a.txt is no share"),
        ({"weight": float("nan")}, "weight: nan"),
        ({"weight": float("inf")}, "weight: inf"),
        ({"format": "csv"}, "format: 'csv' of a.txt is unknown; use text, chat, tokens"),
        ({"format": "chat"}, "a .txt holds no conversations"),
        ({"format": "tokens", "field": "x"}, "field: 'x' of a.txt: tokens have no fields"),
    ]:
        with pytest.raises(TextSourceError, match=message):
            dataclasses.replace(TextSource("a.txt"), **changes)
    for arguments, message in [(([], 4, 1), "sources: there are none"), (([TextSource("a/b")], 0, 1), "tokens: 0"),
                               (([TextSource("a/b")], 4, 0), "n_sequences: 0")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pack_sources(arguments[0], _tokenizer(), *arguments[1:])


def test_the_identity_of_sources_is_their_content_and_how_it_is_read(tmp_path):
    texts = TextSource(_write_texts(tmp_path / "a.jsonl", ["a"]))
    chats = TextSource(_write_chats(tmp_path / "c.jsonl", [_chat("a", "b")]), weight=2, format="chat")
    tokens = _token_source(tmp_path / "t", [[1, 2], [3]])
    hub = TextSource("owner/name", split="test")
    base = sources_identity([texts, chats, tokens, hub])
    assert base == json.loads(json.dumps(base))
    assert [entry["field"] for entry in base] == ["text", "messages", None, "text"]
    assert base[0]["text"] == text_identity(texts.path) and base[3]["text"] == "hub:owner/name:test:text"
    (tmp_path / "elsewhere").mkdir()
    moved = TextSource(str(Path(tokens.path).rename(tmp_path / "elsewhere" / "u")), format="tokens")
    assert sources_identity([texts, chats, moved, hub]) == base
    assert sources_identity([chats, texts, moved, hub]) != base
    write_token_rows(f"{moved.path}/0.safetensors", [[1, 2], [4]])
    assert sources_identity([moved]) != [base[2]]
    for change in ({"weight": 3.0}, {"field": "talk"}, {"format": "text"}):
        assert sources_identity([dataclasses.replace(chats, **change)]) != [base[1]]


def test_real_stories_and_novels_mix_by_weight(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "tinystories-12l")
    paths = [shared_dir / "data" / name for name in ("tinystories_val.txt", "novels_val.txt")]
    sources = [TextSource(str(path), weight=weight) for path, weight in zip(paths, (3.0, 1.0), strict=True)]
    packed = pack_sources(sources, tokenizer, 256, 40, apart=True)
    assert len(packed) == 40 and packed.n_targets < 40 * 255
    alone = pack_sources(sources[:1], tokenizer, 256, 40)
    assert torch.equal(alone.tensors()["input_ids"], pack(read_documents(paths[0]), tokenizer, 256, limit_sequences=40))
