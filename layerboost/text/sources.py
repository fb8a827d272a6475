"""Mixes text sources by weight and packs them into the sequences, with documents and targets, used for healing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from .batches import PackedText
from .chat import check_chat_tokenizer, tokenized_chats
from .documents import (
    Document,
    TextSourceError,
    read_documents,
    read_records,
    text_identity,
    tokenized_texts,
    too_short,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["text", "chat", "tokens"]

TOKENS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TextSource:
    """Describes one source of the text that a model is healed on.

    Attributes:
        path: A local file or the hub name of a dataset, as in `read_documents`; for `tokens` a folder or fsspec URL
            of files that `write_token_rows` wrote, or one such file.
        weight: Share of the mixture's tokens, relative to the other sources' weights.
        split: The split of a hub dataset; local files have none.
        field: The field of a record that holds the text or the conversation; None means `text`, or `messages` for
            `chat`.
        format: `text`; `chat`, whose records hold a list of {role, content} and whose only targets are the
            assistant's tokens; or `tokens`, documents of token ids that include their special tokens.
    """

    path: str
    weight: float = 1.0
    split: str = "train"
    field: str | None = None
    format: Format = "text"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise TextSourceError(f"path: {self.path!r} names no text; give a file or the hub name of a dataset")
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise TextSourceError(
                f"weight: {self.weight} of {self.path} is no share; use a number above 0, or leave the source out"
            )
        if self.format not in get_args(Format):
            raise TextSourceError(
                f"format: {self.format!r} of {self.path} is unknown; use {', '.join(get_args(Format))}"
            )
        if self.format == "tokens" and self.field is not None:
            raise TextSourceError(f"field: {self.field!r} of {self.path}: tokens have no fields; leave it out")
        if self.format == "chat" and self.path.endswith(".txt"):
            raise TextSourceError(
                f"format: 'chat' of {self.path}: a .txt holds no conversations; use a .jsonl or .parquet file or a hub "
                "dataset, or format text"
            )

    @property
    def content_field(self) -> str | None:
        """The field that is read, or None if the records have no fields."""
        if self.format == "tokens":
            return None
        return self.field or ("messages" if self.format == "chat" else "text")


def pack_sources(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    n_sequences: int,
    *,
    apart: bool = False,
) -> PackedText:
    """Mixes the documents of several sources and packs them into sequences of equal length without padding.

    The next document always comes from the source that is furthest behind its share of the tokens so far. No source is
    therefore ever ahead of its share by more than one of its documents, and the result depends on the arguments alone.
    Sources are read only as far as needed, rounded up to the group of documents that is tokenised together. A source
    that ends starts again; a single source gives fewer sequences instead, as in `pack`.

    Args:
        sources: The sources to mix, in a fixed order.
        tokenizer: The model's tokenizer; it needs a chat template if a source is `chat`.
        sequence_tokens: Tokens in a sequence.
        n_sequences: Sequences to fill.
        apart: Whether attention stays inside documents. Positions then restart at 0 with each document and each row,
            and the tokens at position 0 are no targets.

    Returns:
        The packed rows. `targets` is None if every token but the row's first is a target, `position_ids` is None
        unless `apart`.

    Raises:
        TextSourceError: A source is missing, empty or not what its `format` says, or its conversations cannot be
            rendered with the tokenizer's template.
        TextTooShortError: A single source does not fill one sequence.
        ValueError: A number is below one, there are no sources, or the tokenizer lacks what a source needs.
    """
    for name, value in (("sequence_tokens", sequence_tokens), ("n_sequences", n_sequences)):
        if value < 1:
            raise ValueError(f"{name}: {value} is below 1; ask for at least one")
    if not sources:
        raise ValueError("sources: there are none; give at least one text")
    streams = [_documents_of(source, tokenizer) for source in sources]
    documents = streams[0]() if len(streams) == 1 else _mixed(sources, streams)

    wanted = n_sequences * sequence_tokens
    input_ids, targets = np.empty(wanted, dtype=np.int32), np.ones(wanted, dtype=bool)
    starts = np.zeros(wanted, dtype=bool)
    has_targets, filled = apart, 0
    for ids, are_targets in documents:
        stop = min(filled + len(ids), wanted)
        starts[filled] = True
        input_ids[filled:stop] = ids[: stop - filled]
        if are_targets is not None:
            targets[filled:stop] = are_targets[: stop - filled]
            has_targets = True
        filled = stop
        if filled == wanted:
            break
    n_filled = filled // sequence_tokens
    if n_filled == 0:
        raise too_short(filled, sequence_tokens)
    rows = (n_filled, sequence_tokens)
    ids_of_rows, targets_of_rows, starts_of_rows = (
        flat[: n_filled * sequence_tokens].reshape(rows) for flat in (input_ids, targets, starts)
    )
    if not apart:
        starts_of_rows[:] = False
    starts_of_rows[:, 0] = True
    return PackedText(
        torch.from_numpy(ids_of_rows),
        torch.from_numpy(_positions(starts_of_rows)) if apart else None,
        torch.from_numpy(targets_of_rows & ~starts_of_rows) if has_targets else None,
    )


def sources_identity(sources: Sequence[TextSource]) -> list[dict[str, Any]]:
    """Returns what identifies a mixture: for each source its content, how it is read, and its weight.

    The content is identified as in `text_identity`; `tokens` are identified by a hash of all their files, wherever
    these are stored.
    """
    return [
        {
            "text": _tokens_identity(source.path)
            if source.format == "tokens"
            else text_identity(source.path, split=source.split, field=source.content_field or ""),
            "weight": float(source.weight),
            "field": source.content_field,
            "format": source.format,
        }
        for source in sources
    ]


def write_token_rows(path: str | Path, documents: Sequence[Sequence[int]]) -> None:
    """Writes documents of token ids as one file of a `tokens` source; the file appears complete or not at all.

    Args:
        path: Path of the file, local or an fsspec URL, ending in `.safetensors`; the files of a source are read in
            the order of their names.
        documents: Token ids of each document, including special tokens.
    """
    import fsspec
    from safetensors.numpy import save

    if not str(path).endswith(TOKENS_SUFFIX):
        raise ValueError(f"path: {path} must end in {TOKENS_SUFFIX}, or it would not be read")
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int32, count=int(lengths.sum()))
    filesystem, target = fsspec.core.url_to_fs(str(path))
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    try:
        filesystem.pipe_file(f"{target}.part", save({"tokens": tokens, "lengths": lengths}))
        filesystem.mv(f"{target}.part", target)
    except BaseException:
        if filesystem.exists(f"{target}.part"):
            filesystem.rm_file(f"{target}.part")  # the disk may be full, so a partial file must not keep the space
        raise


def _positions(starts: np.ndarray) -> np.ndarray:
    """Returns (B, T) positions counted from the last True of `starts` (B, T), whose first column must be True."""
    places = np.arange(starts.shape[1], dtype=np.int32)
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def _mixed(sources: Sequence[TextSource], streams: Sequence[Callable[[], Iterator[Document]]]) -> Iterator[Document]:
    """Yields documents of all sources without end, each from the source that is furthest behind its share."""
    shares = [source.weight / sum(other.weight for other in sources) for source in sources]
    repeated = [_repeated(source, stream) for source, stream in zip(sources, streams, strict=True)]
    n_tokens = [0] * len(sources)
    while True:
        total = sum(n_tokens)
        behind = [share * total - n for share, n in zip(shares, n_tokens, strict=True)]
        chosen = behind.index(max(behind))
        document = next(repeated[chosen])
        n_tokens[chosen] += len(document[0])
        yield document


def _repeated(source: TextSource, stream: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    while True:
        n_tokens = 0
        for document in stream():
            n_tokens += len(document[0])
            yield document
        if n_tokens == 0:
            raise TextSourceError(f"text: {source.path} holds no token; give a text that does, or leave it out")


def _documents_of(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Callable[[], Iterator[Document]]:
    """Returns a function that reads a source's documents from the beginning."""
    if source.format == "tokens":
        return partial(_token_documents, source.path)
    field = source.content_field
    assert field is not None
    if source.format == "chat":
        check_chat_tokenizer(tokenizer)
        return lambda: tokenized_chats(
            read_records(source.path, split=source.split, streaming=True, field=field), field, tokenizer
        )
    return lambda: tokenized_texts(read_documents(source.path, split=source.split, field=field), tokenizer)


def _token_files(path: str) -> tuple[Any, list[str]]:
    """Returns the file system of a `tokens` source, and its files in the order of their names."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(path)
    found = [root] if root.endswith(TOKENS_SUFFIX) else []
    if not found and filesystem.isdir(root):
        found = sorted(name for name in filesystem.ls(root, detail=False) if name.endswith(TOKENS_SUFFIX))
    if not found or not filesystem.exists(found[0]):
        raise TextSourceError(f"text: no {TOKENS_SUFFIX} files of tokens in {path}; write them with write_token_rows")
    return filesystem, found


def _token_documents(path: str) -> Iterator[Document]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    filesystem, files = _token_files(path)
    for name in files:
        try:
            tensors = load(filesystem.cat_file(name))
            tokens, ends = tensors["tokens"], tensors["lengths"].cumsum()
        except (SafetensorError, KeyError) as error:
            raise TextSourceError(
                f"text: {name} holds no tokens and lengths ({error}); write it with write_token_rows"
            ) from error
        if len(tokens) != (ends[-1] if len(ends) else 0):
            raise TextSourceError(
                f"text: {name} holds {len(tokens)} tokens, which is not the sum of its lengths; write it with "
                "write_token_rows"
            )
        for ids in np.split(tokens, ends[:-1]):
            yield ids, None


def _tokens_identity(path: str) -> str:
    filesystem, files = _token_files(path)
    digest = hashlib.sha256()
    for name in files:
        with filesystem.open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
