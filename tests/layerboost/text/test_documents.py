from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from layerboost.text.documents import TextSourceError, TextTooShortError, pack, read_documents, text_identity
from tests.texts import (
    word_tokenizer,
)


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
    assert pack(["a b", "c", "d d d"], word_tokenizer(), 4).tolist() == [[0, 2, 3, 1], [0, 4, 1, 0], [5, 5, 5, 1]]
    assert pack(["a b", "c", "d d"], word_tokenizer(), 4).tolist() == [[0, 2, 3, 1], [0, 4, 1, 0]]


@pytest.mark.parametrize("bos", [None, "</s>"])
def test_pack_without_a_bos_of_its_own_puts_eos_between(bos):
    assert pack(["a b", "c d"], word_tokenizer(bos=bos), 3).tolist() == [[2, 3, 1], [4, 5, 1]]


@pytest.mark.parametrize(
    ("template", "expected"),
    [("<s> $A", [0, 2, 3, 0, 4, 5]), ("<s> $A </s>", [0, 2, 3, 1, 0, 4]), ("$A </s>", [2, 3, 1, 4, 5, 1])],
)
def test_pack_takes_the_tokenizers_own_marks_where_it_has_any(template, expected):
    assert pack(["a b", "c d"], word_tokenizer(template=template), 6).tolist() == [expected]


def test_pack_does_not_depend_on_how_many_documents_are_tokenised_at_once(monkeypatch):
    documents = [" ".join("abcd"[i % 4] for i in range(n)) for n in range(1, 40)]
    expected = pack(documents, word_tokenizer(), 8)
    monkeypatch.setattr("layerboost.text.documents.TOKENIZE_DOCUMENTS", 3)
    assert torch.equal(pack(documents, word_tokenizer(), 8), expected)
    assert torch.equal(pack(documents, word_tokenizer(), 8, limit_sequences=5), expected[:5])


def test_pack_stops_reading_when_it_has_enough():
    read = 0

    def documents():
        nonlocal read
        while True:
            read += 1
            yield "a b c d"

    assert pack(documents(), word_tokenizer(), 6, limit_sequences=40).shape == (40, 6)
    assert read == 64


def test_short_text_names_tokens_found_and_needed():
    with pytest.raises(TextTooShortError, match="5 tokens found, 6 needed"):
        pack(["a b c"], word_tokenizer(), 6)
    with pytest.raises(TextTooShortError, match="0 tokens found"):
        pack([], word_tokenizer(), 6)


def test_pack_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="sequence_tokens: 0"):
        pack(["a"], word_tokenizer(), 0)
    with pytest.raises(ValueError, match="limit_sequences: 0"):
        pack(["a"], word_tokenizer(), 2, limit_sequences=0)
    with pytest.raises(ValueError, match="no EOS"):
        pack(["a"], word_tokenizer(eos=None), 2)


def test_real_llama_tokenizer_sets_bos_alone_before_each_document(shared_dir):
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    documents = list(read_documents(shared_dir / "data" / "tinystories_val.txt"))
    assert len(documents) == 289
    stream = pack(documents, tokenizer, 256, limit_sequences=16).flatten().tolist()
    first = tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    assert stream[: len(first) + 2] == [1, *first, 1]
    assert 2 not in stream
