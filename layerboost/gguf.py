"""Reads a model that comes as a GGUF file: it is dequantized once, into a folder as transformers has them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SUFFIX = ".gguf"

_KEPT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of tensors that are no quantization, and the types that they keep."""


class GgufError(ValueError):
    """A GGUF file cannot be used; the message says what to do."""


def is_gguf(path: str | Path) -> bool:
    """Returns whether a path names a GGUF file."""
    return str(path).endswith(SUFFIX)


def check_package() -> None:
    """Raises GgufError if the package that reads GGUF files is missing."""
    try:
        import gguf  # noqa: F401 - transformers needs it
    except ImportError:
        raise GgufError("reading a GGUF file needs the package gguf: pip install 'layerboost[gguf]'") from None


def check_whole(file: Path) -> None:
    """Raises GgufError if a GGUF file is one of the parts into which a large model is split."""
    if re.search(r"-\d{5}-of-\d{5}$", file.stem):
        raise GgufError("is one part of a split model; join the parts with `llama-gguf-split --merge`")


def read_config(file: Path) -> PreTrainedConfig:
    """Reads the configuration of a GGUF file, without its weights.

    Raises:
        GgufError: The package `gguf` is missing, the file is damaged, or transformers does not know its architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if not config.architectures:
            mapping: Any = AutoModelForCausalLM._model_mapping
            config.architectures = [mapping[type(config)].__name__]
        return config


def read_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a GGUF file, with its chat template.

    Raises:
        GgufError: It cannot be read.
    """
    from transformers import AutoTokenizer

    with _readable():
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def content_of(file: Path) -> str:
    """Returns the SHA-256 of a GGUF file, which identifies the model that it holds."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_for(file: Path, cache: Path, content: str) -> Path:
    """Returns the folder of a cache that the model of a GGUF file is unpacked into, given the file's `content_of`."""
    return cache / f"{file.stem}-{content[:16]}"


def unpack(file: Path, folder: Path) -> None:
    """Dequantizes the model of a GGUF file into a folder, with its tokenizer and chat template.

    The weights are saved as safetensors: in bfloat16 if most are quantized, and else in the type that most of them
    have. The folder appears complete or not at all, and several processes may make it at once.

    Raises:
        GgufError: The file cannot be read, or it lacks tensors of the model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        _write(file, part)
        part.rename(folder)
    except Exception:
        # Another process may have been faster; if it holds the run folder by now, it has swept this part away.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(file: Path, folder: Path) -> None:
    """Writes the dequantized model and the tokenizer of a GGUF file into a new folder."""
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    with _readable(), _without_bar():
        dtype = _dtype(file)
        loaded, found = load(file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True)
    lacking = sorted(set(found["missing_keys"]) - set(getattr(loaded, "_tied_weights_keys", None) or ()))
    if lacking:
        raise GgufError(f"lacks {lacking[0]} and {len(lacking) - 1} more tensors of the model; convert it again")
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are dequantized
    # The loaded model refuses to be saved, because it still counts as quantized.
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    read_tokenizer(file).save_pretrained(folder)


def _dtype(file: Path) -> str:
    """Returns the type in which the weights of a GGUF file are kept: that of most weights, if it is no quantization."""
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    for tensor in GGUFReader(file).tensors:
        name = tensor.tensor_type.name
        sizes[name] = sizes.get(name, 0) + int(tensor.n_elements)
    return _KEPT_TYPES.get(max(sizes, key=lambda name: sizes[name]), "bfloat16")


_BAR = threading.Lock()


@contextlib.contextmanager
def _without_bar() -> Iterator[None]:
    """Hides the bar that transformers always draws while it dequantizes."""
    from transformers import modeling_gguf_pytorch_utils as reader

    with _BAR:  # two threads would restore each other's stand-in
        bar: Any = reader.tqdm
        reader.tqdm = lambda tensors, **_: tensors
        try:
            yield
        finally:
            reader.tqdm = bar


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Turns whatever goes wrong with a GGUF file into one kind of error."""
    check_package()
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise GgufError(f"cannot be read ({reason}); download or convert it again") from error
