"""Text for measuring and for healing: read it, mix it, and pack it to token sequences."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from .batches import PackedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["text", "chat", "tokens"]

DOCUMENT_SEPARATOR = "<|endoftext|>"
TOKENS_SUFFIX = ".safetensors"
ASSISTANT = "assistant"
_LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TOKENIZE_DOCUMENTS = 32

_Document = tuple[np.ndarray, np.ndarray | None]
"""Token ids (T,), and (T,) bool which of them are targets; None for all."""
_Message = dict[str, Any]


class TextSourceError(ValueError):
    """A text source that is not there or cannot be read as text."""


class TextTooShortError(ValueError):
    """A text that does not fill the sequences asked of it."""


@dataclass(frozen=True)
class TextSource:
    """One source of the text that a model is healed on.

    Attributes:
        path: a local file or the hub name of a dataset, as `read_documents` takes it; for `tokens` a folder or fsspec
            URL of files that `write_token_rows` wrote, or one such file.
        weight: its share of the mixture's tokens, relative to the other sources' weights.
        split: of a hub dataset; local files have none.
        field: of a record that holds the text or the conversation; None means `text`, or `messages` for `chat`.
        format: `text`; `chat`, where a record holds a list of {role, content} and the assistant's tokens alone are
            targets; or `tokens`, documents that hold their special tokens already.
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
        """The field that is read; None where records have none."""
        if self.format == "tokens":
            return None
        return self.field or ("messages" if self.format == "chat" else "text")


def read_documents(
    source: str | Path, *, split: str = "train", streaming: bool = True, field: str = "text"
) -> Iterator[str]:
    """Reads the documents of a text source lazily and in a fixed order.

    Args:
        source: A local `.txt` (documents end at a line `<|endoftext|>` where the file has one, at blank lines where it
            has none), `.jsonl` or `.parquet`, or the hub name of a dataset (`name:config` where it has several).
        split: The split of a hub dataset; local files have none.
        streaming: Whether a hub dataset is read as it arrives instead of being downloaded whole first.
        field: The field of a record that holds the text.

    Raises:
        TextSourceError: If the source is missing or of an unknown kind, or, while reading, a record lacks `field`.
    """
    path = _local_path(source)
    if path is not None and path.suffix == ".txt":
        return _txt_documents(path)
    records = _records(source, split=split, streaming=streaming, field=field)
    return (_text_of(record, field, where) for where, record in records)


def text_identity(source: str | Path, *, split: str = "train", field: str = "text") -> str:
    """Returns what identifies a text's content: a hash of a local file, the name and split of a hub dataset.

    A local file keeps its identity when it moves. A hub name is taken at its word: its content is not downloaded.
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

    Documents are set apart the way the model knows: by the special tokens that its tokenizer puts around a text. A
    tokenizer that puts none is helped out with EOS behind each document, and with BOS before it where BOS is not EOS.
    (An EOS that a model has never seen costs dearly: stories260K reads TinyStories at 1.43 nats per token between BOS
    alone, and at 1.74 with EOS as well.) The stream is cut every `sequence_tokens` tokens, across documents; what is
    left over is dropped. Documents are tokenised only until `limit_sequences` sequences are full.

    Args:
        documents: Texts, in the order in which they are packed.
        tokenizer: The model's tokenizer.
        sequence_tokens: Tokens in a sequence.
        limit_sequences: Sequences to stop at; all that the documents fill if None. Fewer come back from a short text.

    Returns:
        Token ids, shape (sequences, sequence_tokens).

    Raises:
        TextTooShortError: If the documents do not fill one sequence.
        ValueError: If `sequence_tokens` or `limit_sequences` is below one, or the tokenizer has no
            special token to set documents apart with.
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
    for ids, _ in _tokenized_texts(documents, tokenizer):
        chunks.append(ids.astype(np.int64))
        n_tokens += len(ids)
        if wanted_tokens is not None and n_tokens >= wanted_tokens:
            break
    n_sequences = n_tokens // sequence_tokens
    if n_sequences == 0:
        raise _too_short(n_tokens, sequence_tokens)
    if limit_sequences is not None:
        n_sequences = min(n_sequences, limit_sequences)
    stream = np.concatenate(chunks)[: n_sequences * sequence_tokens]
    return torch.from_numpy(stream).view(n_sequences, sequence_tokens)  # type: ignore[return-value]


def pack_sources(
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    sequence_tokens: int,
    n_sequences: int,
    *,
    apart: bool = False,
) -> PackedText:
    """Mixes the documents of several sources and packs them into sequences of equal length without padding.

    The next document always comes from the source that is furthest behind its share of the tokens so far, so that no
    source is ever ahead of its share by more than one of its documents, and the arguments alone decide the result.
    Sources are read only as far as they are needed, but for the documents that are tokenised together. One that ends
    begins again; a source that stands alone gives fewer sequences instead, as in `pack`.

    Args:
        sources: what to mix, in a fixed order.
        tokenizer: the model's tokenizer; with a chat template where a source is `chat`.
        sequence_tokens: tokens in a sequence.
        n_sequences: sequences to fill.
        apart: whether attention keeps documents apart: positions then start anew with each document and each row, and
            what stands there is no target.

    Returns:
        Targets are None where every token but the row's first is one, positions are None unless `apart`.

    Raises:
        TextSourceError: a source is missing, empty or not what its `format` says, or its conversations cannot be
            rendered with the tokenizer's template.
        TextTooShortError: a source that stands alone does not fill one sequence.
        ValueError: a number is below one, there are no sources, or the tokenizer lacks what a source needs.
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
        raise _too_short(filled, sequence_tokens)
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
    """Returns what identifies a mixture: the content of each source in turn, and how it is read and weighed.

    The content is as in `text_identity`; tokens are known by a hash of all their files, wherever they lie.
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
    """Writes documents of token ids as one file of a `tokens` source; it is there whole or not at all.

    Args:
        path: of the file, local or an fsspec URL, ending in `.safetensors`; a source's files are read in the order of
            their names.
        documents: token ids, special tokens included.
    """
    import fsspec
    from safetensors.numpy import save

    if not str(path).endswith(TOKENS_SUFFIX):
        raise ValueError(f"path: {path} must end in {TOKENS_SUFFIX}, or it would not be read")
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    tokens = np.fromiter(chain.from_iterable(documents), dtype=np.int32, count=int(lengths.sum()))
    filesystem, target = fsspec.core.url_to_fs(str(path))
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.pipe_file(f"{target}.part", save({"tokens": tokens, "lengths": lengths}))
    filesystem.mv(f"{target}.part", target)


def _too_short(n_tokens: int, sequence_tokens: int) -> TextTooShortError:
    return TextTooShortError(
        f"text: {n_tokens} tokens found, {sequence_tokens} needed for one sequence; "
        "give a longer text or a smaller sequence_tokens"
    )


def _positions(starts: np.ndarray) -> np.ndarray:
    """(B, T) positions that count from the last True of (B, T) `starts`, each row's first being one."""
    places = np.arange(starts.shape[1], dtype=np.int32)
    return places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)


def _mixed(sources: Sequence[TextSource], streams: Sequence[Callable[[], Iterator[_Document]]]) -> Iterator[_Document]:
    """Documents of all sources for ever, each the next of the source that is furthest behind its share."""
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


def _repeated(source: TextSource, stream: Callable[[], Iterator[_Document]]) -> Iterator[_Document]:
    while True:
        n_tokens = 0
        for document in stream():
            n_tokens += len(document[0])
            yield document
        if n_tokens == 0:
            raise TextSourceError(f"text: {source.path} holds no token; give a text that does, or leave it out")


def _documents_of(source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Callable[[], Iterator[_Document]]:
    """What reads a source's documents from the beginning."""
    if source.format == "tokens":
        return partial(_token_documents, source.path)
    field = source.content_field
    assert field is not None
    if source.format == "chat":
        _check_chat_tokenizer(tokenizer)
        return lambda: _tokenized_chats(
            _records(source.path, split=source.split, streaming=True, field=field), field, tokenizer
        )
    return lambda: _tokenized_texts(read_documents(source.path, split=source.split, field=field), tokenizer)


def _tokenized_texts(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Document]:
    marks_documents = len(tokenizer("")["input_ids"]) > 0
    head, tail = ([], []) if marks_documents else _separators(tokenizer)
    remaining = iter(documents)
    while texts := list(islice(remaining, _TOKENIZE_DOCUMENTS)):
        # verbose=False: a document may be longer than the model's context, since it is cut only afterwards.
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            yield np.array([*head, *ids, *tail], dtype=np.int32), None


def _token_files(path: str) -> tuple[Any, list[str]]:
    """The file system of a `tokens` source, and its files in the order of their names."""
    import fsspec

    filesystem, root = fsspec.core.url_to_fs(path)
    found = [root] if root.endswith(TOKENS_SUFFIX) else []
    if not found and filesystem.isdir(root):
        found = sorted(name for name in filesystem.ls(root, detail=False) if name.endswith(TOKENS_SUFFIX))
    if not found or not filesystem.exists(found[0]):
        raise TextSourceError(f"text: no {TOKENS_SUFFIX} files of tokens in {path}; write them with write_token_rows")
    return filesystem, found


def _token_documents(path: str) -> Iterator[_Document]:
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
                f"text: {name} holds {len(tokens)} tokens and lengths of other documents; write it with "
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
                f"text: {source} is no text file that is known; use one of {', '.join(_LOCAL_SUFFIXES)}"
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


def _records(source: str | Path, *, split: str, streaming: bool, field: str) -> Iterator[tuple[str, Any]]:
    """Where each record stands, for messages, and the record."""
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


def _check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer: it has no chat template to write conversations with; set tokenizer.chat_template, or give the "
            "conversations as format text"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            "tokenizer: it does not say where in the text its tokens stand, as chat needs; use a fast tokenizer"
        )


def _tokenized_chats(
    records: Iterable[tuple[str, Any]], field: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[_Document]:
    remaining = iter(records)
    while group := list(islice(remaining, _TOKENIZE_DOCUMENTS)):
        rendered = [_render_chat(_messages_of(record, field, where), tokenizer, where) for where, record in group]
        texts = [text for text, _ in rendered]
        # The template writes the special tokens itself.
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True):
            yield np.array(ids, dtype=np.int32), _tokens_in(spans, offsets)


def _tokens_in(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """(T,) bool, the tokens with a character inside one of the spans of characters.

    transformers' own mask (`return_assistant_tokens_mask`) runs on to the end of the conversation where a span ends in
    a character that belongs to no token, such as a line break that the tokenizer drops.
    """
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(begins), dtype=bool)
    for start, stop in spans:
        inside |= (begins < stop) & (ends > start) & (begins < ends)
    return inside


def _render_chat(
    messages: list[_Message], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as the tokenizer's template writes it, and the spans of characters that are the assistant's."""
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
    """The same for a template that does not mark what the assistant generates."""

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
            # Some templates (Qwen3's) write the last answer with an empty thought that earlier ones do not get.
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
    """Where a text that a turn ends really ends: a line break behind a special token is the template's."""
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(tuple(tokenizer.get_added_vocab())) else len(text)
