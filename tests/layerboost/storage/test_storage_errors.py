"""Tests storage that fails for a while, permanently, or because it is full."""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path
from typing import ClassVar

import pytest
import ray
import torch
from fsspec.implementations.memory import MemoryFileSystem
from safetensors import SafetensorError

from layerboost.storage import errors as storage_errors
from layerboost.storage.errors import RETRY_DELAYS_S, DiskFullError, is_disk_full, is_passing, retried
from layerboost.storage.publish import publish_folder, publish_tensors, read_tensors
from tests.conftest import mounted_disk


def failing_until(at: float, error: Exception):
    """Returns a function that fails until a moment, and the list of the moments at which it was called."""
    calls: list[float] = []

    def call() -> str:
        calls.append(time.monotonic())
        if time.monotonic() < at:
            raise error
        return "done"

    return call, calls


def test_the_waits_outlast_half_a_minute():
    assert sum(RETRY_DELAYS_S) >= 30


def test_a_storage_that_fails_for_two_seconds_loses_nothing(caplog):
    call, calls = failing_until(time.monotonic() + 2, TimeoutError("no answer"))
    with caplog.at_level(logging.WARNING):
        assert retried(call)() == "done"
    assert 3 <= len(calls) <= 5
    assert "trying again in 0.5 s" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        ValueError("not ours"),
    ],
)
def test_what_is_for_good_is_raised_at_once(error):
    call, calls = failing_until(time.monotonic() + 60, error)
    with pytest.raises(type(error)):
        retried(call)()
    assert len(calls) == 1


def test_it_gives_up_after_the_last_wait(monkeypatch):
    monkeypatch.setattr(storage_errors, "RETRY_DELAYS_S", (0.01, 0.01))
    call, calls = failing_until(time.monotonic() + 60, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output"):
        retried(call)()
    assert len(calls) == 3


def test_errors_of_the_network_pass():
    network = type("EndpointConnectionError", (Exception,), {"__module__": "botocore.exceptions"})
    assert is_passing(network("could not connect"))
    assert is_passing(ConnectionResetError(errno.ECONNRESET, "reset"))
    assert is_passing(OSError(errno.ESTALE, "Stale file handle"))
    assert is_passing(SafetensorError("Error while serializing: I/O error: Input/output error (os error 5) at path x"))
    assert not is_passing(SafetensorError("I/O error: Read-only file system (os error 30)"))
    assert not is_passing(SafetensorError("header too large"))


def test_a_full_disk_is_known_through_what_wraps_it():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = full
    assert is_disk_full(wrapped) and is_disk_full(DiskFullError("x"))
    assert is_disk_full(ray.exceptions.RayTaskError("f", f"Traceback ...\n{full}", full))
    assert not is_disk_full(OSError(errno.EIO, "Input/output error"))
    assert not is_disk_full(ValueError("280 sequences, errno 280"))


class FlakyFileSystem(MemoryFileSystem):
    """Fails until a moment, then works as a store in memory."""

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    works_from = 0.0

    def _open(self, *args, **kwargs):
        self._check()
        return super()._open(*args, **kwargs)

    def pipe_file(self, *args, **kwargs):
        self._check()
        return super().pipe_file(*args, **kwargs)

    def mv(self, *args, **kwargs):
        self._check()
        return super().mv(*args, **kwargs)

    def _check(self):
        if time.monotonic() < FlakyFileSystem.works_from:
            raise TimeoutError("the store does not answer")


@pytest.fixture
def flaky():
    import fsspec

    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.works_from = time.monotonic() + 1.2
    yield "flaky://runs"
    FlakyFileSystem.works_from = 0.0


def test_tensors_and_folders_are_published_on_a_store_that_fails_for_a_while(flaky):
    publish_tensors({"a": torch.ones(3)}, f"{flaky}/one.safetensors")
    FlakyFileSystem.works_from = time.monotonic() + 1.2
    assert read_tensors(f"{flaky}/one.safetensors")[0]["a"].tolist() == [1, 1, 1]
    FlakyFileSystem.works_from = time.monotonic() + 1.2
    publish_folder(lambda folder: Path(folder, "x").write_text("y"), f"{flaky}/folder")
    assert FlakyFileSystem().cat_file(f"{flaky}/folder/x") == b"y"


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a real file system of 4 MiB."""
    with mounted_disk(tmp_path / "disk", "4m") as folder:
        yield folder


def test_a_full_disk_leaves_nothing_half_written(small_disk):
    started_s = time.monotonic()
    for write in (
        lambda: publish_tensors({"a": torch.ones(2**21)}, str(small_disk / "tensors")),
        lambda: publish_folder(lambda folder: Path(folder, "x").write_bytes(b"0" * 2**23), str(small_disk / "folder")),
    ):
        with pytest.raises(Exception) as caught:
            write()
        assert is_disk_full(caught.value)
        assert list(small_disk.iterdir()) == []
    assert time.monotonic() - started_s < 5, "a full disk is not waited for"
