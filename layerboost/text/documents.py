"""Reads text as documents and packs them into token sequences."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENT_SEPARATOR = "<|endoftext|>"
_LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
TOKENIZE_DOCUMENTS = 32

Document = tuple[np.ndarray, np.ndarray | None]
"""Token ids, shape (T,), and (T,) bool that is True for targets, or None if all tokens are targets."""


class TextSourceError(ValueError):
    """A text source does not exist or cannot be read as text."""


class TextTooShortError(ValueError):
    """A text does not fill the sequences that were asked for."""


def read_documents(
    source: str | Path, *, split: str = "train", streaming: bool = True, field: str = "text"
) -> Iterator[str]:
    """Reads the documents of a text source lazily and in a fixed order.

    Args:
        source: A local `.txt` file (its documents end at lines `<|endoftext|>`, or at blank lines if it has no such
            line), a `.jsonl` or `.parquet` file, or the hub name of a dataset (`name:config` if it has several
            configurations).
        split: The split of a hub dataset; local files have none.
        streaming: Whether a hub dataset is read while it arrives instead of being downloaded completely first.
        field: The field of a record that holds the text.

    Raises:
        TextSourceError: The source is missing or of an unknown kind, or a record that is read lacks `field`.
    """
    path = _local_path(source)
    if path is not None and path.suffix == ".txt":
        return _txt_documents(path)
    records = read_records(source, split=split, streaming=streaming, field=field)
    return (_text_of(record, field, where) for where, record in records)


def text_identity(source: str | Path, *, split: str = "train", field: str = "text") -> str:
    """Returns what identifies a text's content: a hash for a local file, name and split for a hub dataset.

    A local file keeps its identity when it moves. A hub dataset is identified by its name alone, because hashing its
    content would mean downloading it.
    """
    path = _local_path(source)
    if path is None:
        return f"hub:{source}:{split}:{field}"
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return f"sha256:{content}" + ("" if path.suffix == ".txt" else f":{field}")


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    *,
    limit_sequences: int | None = None,
) -> torch.LongTensor:
    """Packs documents into sequences of equal length without padding.

    Documents are separated by the special tokens that the model's tokenizer puts around a text, since the model knows
    these. If the tokenizer adds none, EOS is put after each document, and BOS before it if BOS differs from EOS.
    (EOS is not added otherwise: an EOS that a model has never seen costs much. stories260K reads TinyStories at 1.43
    nats per token with BOS alone between documents, and at 1.74 with EOS as well.) The stream is cut every
    `sequence_tokens` tokens, across documents, and the remainder is dropped. Documents are tokenised only until
    `limit_sequences` sequences are full.

    Args:
        documents: Texts, in the order in which they are packed.
        tokenizer: The model's tokenizer.
        sequence_tokens: Tokens in a sequence.
        limit_sequences: Maximum number of sequences; None packs all documents. A short text gives fewer.

    Returns:
        Token ids, shape (sequences, sequence_tokens).

    Raises:
        TextTooShortError: The documents do not fill one sequence.
        ValueError: `sequence_tokens` or `limit_sequences` is below one, or the tokenizer has no special token to
            separate documents with.
    """
    if sequence_tokens < 1:
        raise ValueError(f"sequence_tokens: {sequence_tokens} is below 1; ask for at least one token")
    if limit_sequences is not None and limit_sequences < 1:
        raise ValueError(
            f"limit_sequences: {limit_sequences} is below 1; ask for at least one sequence, or None for all"
        )
    wanted_tokens = None if limit_sequences is None else limit_sequences * sequence_tokens

    chunks: list[np.ndarray] = []
    n_tokens = 0
    for ids, _ in tokenized_texts(documents, tokenizer):
        chunks.append(ids.astype(np.int64))
        n_tokens += len(ids)
        if wanted_tokens is not None and n_tokens >= wanted_tokens:
            break
    n_sequences = n_tokens // sequence_tokens
    if n_sequences == 0:
        raise too_short(n_tokens, sequence_tokens)
    if limit_sequences is not None:
        n_sequences = min(n_sequences, limit_sequences)
    stream = np.concatenate(chunks)[: n_sequences * sequence_tokens]
    return torch.from_numpy(stream).view(n_sequences, sequence_tokens)  # type: ignore[return-value]


def too_short(n_tokens: int, sequence_tokens: int) -> TextTooShortError:
    return TextTooShortError(
        f"text: {n_tokens} tokens found, {sequence_tokens} needed for one sequence; "
        "give a longer text or a smaller sequence_tokens"
    )


def tokenized_texts(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    marks_documents = len(tokenizer("")["input_ids"]) > 0
    head, tail = ([], []) if marks_documents else _separators(tokenizer)
    remaining = iter(documents)
    while texts := list(islice(remaining, TOKENIZE_DOCUMENTS)):
        # verbose=False silences the warning about documents longer than the model's context: they are cut afterwards.
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            yield np.array([*head, *ids, *tail], dtype=np.int32), None


def _separators(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no EOS token to end a document with; set tokenizer.eos_token")
    has_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id
    return [tokenizer.bos_token_id] if has_bos else [], [tokenizer.eos_token_id]


def _local_path(source: str | Path) -> Path | None:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in _LOCAL_SUFFIXES:
            raise TextSourceError(
                f"text: {source} is no known kind of text file; use one of {', '.join(_LOCAL_SUFFIXES)}"
            )
        return path
    looks_local = isinstance(source, Path) or path.suffix in _LOCAL_SUFFIXES or path.is_dir()
    if looks_local or not _HUB_NAME.fullmatch(str(source)) or str(source).startswith("."):
        raise TextSourceError(
            f"text: no file {source}; give the path of a {', '.join(_LOCAL_SUFFIXES)} file or the hub name of a dataset"
        )
    return None


def _txt_documents(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        has_separator = any(line.strip() == DOCUMENT_SEPARATOR for line in file)
    ends = DOCUMENT_SEPARATOR if has_separator else ""
    lines: list[str] = []
    with path.open(encoding="utf-8") as file:
        for line in chain(file, [ends]):
            if line.strip() != ends:
                lines.append(line)
                continue
            if document := "".join(lines).strip("\n"):
                yield document
            lines = []


def read_records(source: str | Path, *, split: str, streaming: bool, field: str) -> Iterator[tuple[str, Any]]:
    """Yields for each record a description of its place, for error messages, and the record itself."""
    path = _local_path(source)
    if path is None:
        return _hub_records(str(source), split=split, streaming=streaming)
    return _jsonl_records(path) if path.suffix == ".jsonl" else _parquet_records(path, field)


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextSourceError(
                    f"text: {path} line {number} is not JSON ({error}); write one object a line"
                ) from error
            yield f"{path} line {number}", record


def _parquet_records(path: Path, field: str) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        if field not in file.schema_arrow.names:
            raise TextSourceError(
                f"text: {path} has no column {field!r}; its columns are {', '.join(file.schema_arrow.names)}"
            )
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield f"{path} row {number}", {field: value}


def _hub_records(name: str, *, split: str, streaming: bool) -> Iterator[tuple[str, Any]]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, config or None, split=split, streaming=streaming)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise TextSourceError(
            f"text: cannot read split {split!r} of {name} ({reason}); check the name (NAME:CONFIG where a dataset "
            "has several), the split and the connection, or give a local file"
        ) from error
    for number, record in enumerate(dataset, start=1):
        yield f"{name} record {number}", record


def _text_of(record: Any, field: str, where: str) -> str:
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise TextSourceError(
            f"text: {where} has no text in the field {field!r} (it has {fields}); name the field that has"
        )
    return text
