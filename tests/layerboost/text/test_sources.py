from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import layerboost.text.documents
from layerboost.convert import convert
from layerboost.plan import Plan
from layerboost.text.documents import TextSourceError, TextTooShortError, pack, read_documents, text_identity
from layerboost.text.sources import TextSource, pack_sources, sources_identity, write_token_rows
from tests.models import tiny_model
from tests.texts import (
    WORDS,
    chat_of,
    chat_tokenizer,
    random_chats,
    random_documents,
    word_tokenizer,
    write_chats,
    write_texts,
)


def _token_source(path: Path, documents: list[list[int]], weight: float = 1.0) -> TextSource:
    write_token_rows(path / "0.safetensors", documents)
    return TextSource(str(path), weight=weight, format="tokens")


def test_one_source_is_packed_as_ever_and_gives_fewer_rows_when_it_ends(tmp_path):
    draw = random.Random(1)
    source = TextSource(write_texts(tmp_path / "a.jsonl", random_documents(draw, 50)))
    for template in ("$A", "<s> $A"):
        tokenizer = word_tokenizer(template=template)
        for sequence_tokens, n_sequences in ((7, 5), (16, 3), (11, 1000)):
            expected = pack(read_documents(source.path), tokenizer, sequence_tokens, limit_sequences=n_sequences)
            packed = pack_sources([source], tokenizer, sequence_tokens, n_sequences)
            assert torch.equal(packed.tensors()["input_ids"], expected)
            assert packed.position_ids is None and packed.targets is None
    with pytest.raises(TextTooShortError, match="needed for one sequence"):
        pack_sources([source], word_tokenizer(), 10_000, 1)


@pytest.mark.parametrize("seed", range(5))
def test_shares_of_tokens_follow_the_weights(tmp_path, seed):
    draw = random.Random(seed)
    n_sources = draw.choice([2, 2, 3, 5])
    weights = [draw.choice([0.2, 1.0, 3.0, draw.random() + 0.01]) for _ in range(n_sources)]
    lengths = [draw.randint(1, 40) for _ in range(n_sources)]
    sources = [  # source i contains only the token i
        _token_source(
            tmp_path / str(i), [[i] * draw.randint(1, lengths[i]) for _ in range(draw.randint(1, 30))], weights[i]
        )
        for i in range(n_sources)
    ]
    packed = pack_sources(sources, word_tokenizer(), 16, 60)
    assert packed.input_ids.shape == (60, 16)
    stream = packed.input_ids.flatten()
    # The bound is that of greedy cup emptying: a source that is behind waits for the others in turn.
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
    texts = [random_documents(draw, n) for n in (9, 4)]
    sources = [TextSource(write_texts(tmp_path / f"{i}.jsonl", texts[i]), weight=1 + i) for i in range(2)]
    packed = pack_sources(sources, word_tokenizer(), 10, 40)
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
        TextSource(write_texts(tmp_path / "a.jsonl", random_documents(draw, 40)), weight=2.0),
        TextSource(write_chats(tmp_path / "b.jsonl", random_chats(draw, 7)), format="chat"),
        _token_source(tmp_path / "c", [[2, 3, 1], [4]], weight=0.5),
    ]
    tokenizer = chat_tokenizer()
    expected = pack_sources(sources, tokenizer, 13, 30, apart=apart).tensors()
    fewer = pack_sources(sources, tokenizer, 13, 12, apart=apart).tensors()
    monkeypatch.setattr(layerboost.text.documents, "TOKENIZE_DOCUMENTS", 3)
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
    assert pack_sources(sources, word_tokenizer(), 6, 40).input_ids.shape == (40, 6)
    assert read == {"owner/a": 32, "owner/b": 32}
    read.update(dict.fromkeys(read, 0))
    monkeypatch.setattr(layerboost.text.documents, "TOKENIZE_DOCUMENTS", 1)
    pack_sources(sources, word_tokenizer(), 6, 40)
    assert read == {"owner/a": 30, "owner/b": 10}


def test_sources_that_end_begin_again_and_empty_ones_are_refused(tmp_path):
    short = TextSource(write_texts(tmp_path / "short.jsonl", ["a"]))
    long = TextSource(write_texts(tmp_path / "long.jsonl", ["b b b"] * 100))
    stream = pack_sources([short, long], word_tokenizer(), 10, 20).input_ids.flatten().tolist()
    assert 95 <= sum(token == 2 for token in stream) * 3 <= 105
    empty = TextSource(write_texts(tmp_path / "empty.jsonl", []))
    with pytest.raises(TextSourceError, match=r"empty\.jsonl holds no token"):
        pack_sources([long, empty], word_tokenizer(), 10, 20)
    with pytest.raises(TextSourceError, match="blank holds no token"):
        pack_sources([long, _token_source(tmp_path / "blank", [[], []])], word_tokenizer(), 10, 20)
    with pytest.raises(TextTooShortError, match="0 tokens found"):
        pack_sources([empty], word_tokenizer(), 10, 20)


def test_documents_apart_start_anew_in_position_and_are_no_targets_there(tmp_path):
    source = _token_source(tmp_path / "t", [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1]])
    packed = pack_sources([source], word_tokenizer(), 5, 9, apart=True)
    assert packed.tensors()["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]]
    assert packed.tensors()["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 0]]
    assert packed.tensors()["targets"].tolist() == [[False, True, True, False, False], [False, True, True, True, False]]
    assert packed.n_targets == 5


@pytest.mark.parametrize("plan", [None, Plan.parse("LNSW", 5)])
def test_a_packed_row_gives_each_document_what_it_gets_alone(tmp_path, plan):
    draw = random.Random(4)
    documents = [[draw.randrange(97) for _ in range(draw.randint(1, 25))] for _ in range(12)]
    packed = pack_sources([_token_source(tmp_path / "t", documents)], word_tokenizer(), 40, 3, apart=True)
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


def test_token_files_are_read_in_name_order_from_folders_files_and_urls(tmp_path):
    first, second = [[5, 6, 7], [], [8]], [[9, 10], [11]]
    for root in (str(tmp_path / "tokens"), "memory://layerboost-tokens"):
        write_token_rows(f"{root}/00001.safetensors", second)
        write_token_rows(f"{root}/00000.safetensors", [[1]])
        write_token_rows(f"{root}/00000.safetensors", first)  # replaces the file above
        packed = pack_sources([TextSource(root, format="tokens")], word_tokenizer(), 7, 1)
        assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]] and packed.targets is None
        one = TextSource(f"{root}/00001.safetensors", format="tokens")
        assert pack_sources([one], word_tokenizer(), 3, 5).input_ids.tolist() == [[9, 10, 11]]
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == ["00000.safetensors", "00001.safetensors"]


def test_folders_without_tokens_say_so(tmp_path):
    def read(path: Path):
        pack_sources([TextSource(str(path), format="tokens")], word_tokenizer(), 2, 1)

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
            pack_sources(arguments[0], word_tokenizer(), *arguments[1:])


def test_the_identity_of_sources_is_their_content_and_how_it_is_read(tmp_path):
    texts = TextSource(write_texts(tmp_path / "a.jsonl", ["a"]))
    chats = TextSource(write_chats(tmp_path / "c.jsonl", [chat_of("a", "b")]), weight=2, format="chat")
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
