"""Writes files and folders to local paths and fsspec URLs, completely or not at all, and reads them back."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import retried


@retried
def publish_folder(write: Callable[[str], Any], output: str) -> None:
    """Writes a folder that appears at `output`, a path or an fsspec URL, completely or not at all.

    Args:
        write: Writes the files into the local folder that it is given.
        output: Where to put the folder; an existing one is replaced.
    """
    filesystem, path = fsspec.core.url_to_fs(output)
    path = path.rstrip("/")
    part = f"{path}.writing"
    if filesystem.exists(part):
        filesystem.rm(part, recursive=True)
    if isinstance(filesystem, LocalFileSystem):
        try:
            Path(part).mkdir(parents=True)
            write(part)
            if Path(path).exists():
                filesystem.rm(path, recursive=True)
            os.rename(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)  # the disk may be full, so a partial folder must not keep the space
        return
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        filesystem.put(f"{folder}/", f"{part}/", recursive=True)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)
    filesystem.mv(f"{part}/", f"{path}/", recursive=True)


@retried
def publish_tensors(tensors: Mapping[str, torch.Tensor], url: str, metadata: Mapping[str, str] | None = None) -> None:
    """Writes CPU tensors as one safetensors file, which replaces what is at `url`, a path or an fsspec URL.

    Several processes may write the same file. What a kill leaves on a disk has a name that the run folder clears away.
    """
    filesystem, path = fsspec.core.url_to_fs(url)
    parent, _, name = path.rpartition("/")
    part = f"{parent}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if isinstance(filesystem, LocalFileSystem):
        try:
            Path(part).parent.mkdir(parents=True, exist_ok=True)
            save_file(whole, part, metadata=dict(metadata or {}))
            os.replace(part, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "tensors")
        save_file(whole, file, metadata=dict(metadata or {}))
        try:
            filesystem.put_file(file, part)
            filesystem.mv(part, path)
        finally:
            with suppress(FileNotFoundError):
                filesystem.rm_file(part)


@retried
def read_tensors(url: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of a safetensors file at a path or an fsspec URL.

    Raises:
        FileNotFoundError: There is no file.
        safetensors.SafetensorError: The file is damaged.
    """
    with _local_file(url) as file, safe_open(file, "pt") as tensors:
        # The tensors are cloned because they are mapped to the file, which may change or be deleted.
        read = {name: tensors.get_tensor(name).clone() for name in tensors.keys()}  # noqa: SIM118
        return read, tensors.metadata() or {}


@contextmanager
def local_folder(url: str) -> Iterator[str]:
    """Provides a folder at a path or an fsspec URL as a local one, fetching it if necessary; hub names stay as is."""
    if "://" not in url:
        yield url
        return
    filesystem, path = fsspec.core.url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        retried(filesystem.get)(f"{path.rstrip('/')}/", f"{folder}/model/", recursive=True)
        yield f"{folder}/model"


@contextmanager
def _local_file(url: str) -> Iterator[str]:
    filesystem, path = fsspec.core.url_to_fs(url)
    if isinstance(filesystem, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "tensors")
        filesystem.get_file(path, file)
        yield file
