"""Lets one run at a time use a run folder: a lock file names the holder and loses its force when the holder dies.

On a local disk every access to the lock file happens under `flock`, so that exactly one wins of two processes that find
it free or find a dead holder. On an object store the lock is created with the store's own create-only put.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import fsspec
import psutil

from layerboost.storage.errors import is_passing, retried

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 10.0
STALE_AFTER_S = 60.0
# A foreign process may get the same id later, so the start times must agree too, up to rounding to clock ticks.
_SAME_START_S = 1.0
_LOCK_BYTES = 512


class RunFolderLockedError(RuntimeError):
    """Reports that another run holds the folder; the message names the holder and the remedy."""


@dataclass(frozen=True)
class LockHolder:
    """Describes who holds a lock, as written in the lock file."""

    token: str
    host: str
    process_space: str
    pid: int
    process_started_at: float
    heartbeat_at: float

    @classmethod
    def this_process(cls) -> LockHolder:
        """Describes the calling process, with a new token."""
        pid = os.getpid()
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            process_space=_process_space(),
            pid=pid,
            process_started_at=psutil.Process(pid).create_time(),
            heartbeat_at=time.time(),
        )

    @classmethod
    def from_json(cls, data: bytes) -> LockHolder | None:
        """Reads a lock file; returns None if it is empty or damaged, because no living holder leaves it so."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def to_json(self) -> bytes:
        """Returns the content of the lock file, padded to one length: a heartbeat must need no room on a full disk."""
        return json.dumps(asdict(self)).encode().ljust(_LOCK_BYTES)

    def is_alive(self) -> bool:
        """Says whether the holder lives: on this host its process must run, on another its heartbeat must be recent."""
        if (self.host, self.process_space) != (socket.gethostname(), _process_space()):
            return time.time() - self.heartbeat_at < STALE_AFTER_S
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.process_started_at) < _SAME_START_S
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.process_started_at))
        return f"process {self.pid} on host {self.host}, started {started}"


def _process_space() -> str:
    """Identifies the process namespace: containers may share a host name, but their process ids are independent."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class RunFolderLock:
    """Holds the lock of one run folder; a daemon thread keeps its heartbeat fresh.

    Args:
        fs: the folder's filesystem.
        path: the lock file on it.
        is_local: whether `path` is a local path.
        folder: the name of the folder in messages.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, *, is_local: bool, folder: str) -> None:
        self._file: _LocalLockFile | _RemoteLockFile = _LocalLockFile(path) if is_local else _RemoteLockFile(fs, path)
        self._folder = folder
        self._me = LockHolder.this_process()
        self._stop = threading.Event()
        self._lost_to: LockHolder | None = None
        self._is_lost = False
        self._thread = threading.Thread(target=self._beat, name="run-folder-heartbeat", daemon=True)

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            RunFolderLockedError: a living run holds it.
        """
        won, previous = retried(self._file.claim)(self._me)
        if not won:
            holder = previous or "another run"
            raise RunFolderLockedError(
                f"{self._folder} is in use by {holder}; wait for that run, stop it, or give another folder"
            )
        if previous is not None:
            logger.warning("taking over %s from %s, which is gone", self._folder, previous)
        self._thread.start()

    def check_held(self) -> None:
        """Raises RunFolderLockedError if another run has taken the lock over since."""
        if self._is_lost:
            raise RunFolderLockedError(
                f"{self._folder} was taken over by {self._lost_to or 'another run'} while this run was suspended; "
                "let that run finish"
            )

    def release(self) -> None:
        """Releases the lock if this run still holds it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        retried(self._file.remove)(self._me)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_INTERVAL_S):
            beat = LockHolder(**{**asdict(self._me), "heartbeat_at": time.time()})
            try:
                holder = self._file.refresh(beat)
            except Exception as error:
                if not (isinstance(error, OSError) or is_passing(error)):
                    raise
                logger.warning("cannot refresh the lock of %s (%s); trying again", self._folder, error)
                continue
            if holder is None or holder.token != self._me.token:
                self._lost_to, self._is_lost = holder, True
                return


class _LocalLockFile:
    """Keeps a lock file on a disk that has `flock`."""

    def __init__(self, path: str) -> None:
        self._path = path

    @contextlib.contextmanager
    def _exclusive(self, flags: int) -> Iterator[int]:
        while True:
            descriptor = os.open(self._path, flags | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                # A holder that released meanwhile has unlinked the file opened here, so a lock on it guards nothing.
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
                        yield descriptor
                        return
            finally:
                os.close(descriptor)

    @staticmethod
    def _read(descriptor: int) -> LockHolder | None:
        return LockHolder.from_json(os.pread(descriptor, 65536, 0))

    @staticmethod
    def _write(descriptor: int, holder: LockHolder) -> None:
        data = holder.to_json()
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
        os.fsync(descriptor)

    def claim(self, me: LockHolder) -> tuple[bool, LockHolder | None]:
        """Takes the lock unless its holder is alive; returns whether it was taken and who held it before."""
        with self._exclusive(os.O_CREAT) as descriptor:
            previous = self._read(descriptor)
            if previous is not None and previous.is_alive():
                return False, previous
            self._write(descriptor, me)
            return True, previous

    def refresh(self, me: LockHolder) -> LockHolder | None:
        """Renews the heartbeat if this run still holds the lock; returns the holder."""
        try:
            with self._exclusive(0) as descriptor:
                holder = self._read(descriptor)
                if holder is not None and holder.token == me.token:
                    self._write(descriptor, me)
                return holder
        except FileNotFoundError:
            return None

    def remove(self, me: LockHolder) -> None:
        """Removes the lock file if this run holds it."""
        with contextlib.suppress(FileNotFoundError), self._exclusive(0) as descriptor:
            holder = self._read(descriptor)
            if holder is not None and holder.token == me.token:
                os.unlink(self._path)


class _RemoteLockFile:
    """Keeps a lock object on a store. It is created only where absent, and taken over by rewriting and reading back."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        self._fs = fs
        self._path = path

    def _read(self) -> LockHolder | None:
        self._fs.invalidate_cache(self._path)
        try:
            return LockHolder.from_json(self._fs.cat_file(self._path))
        except FileNotFoundError:
            return None

    def _create(self, me: LockHolder) -> bool:
        try:
            self._fs.pipe_file(self._path, me.to_json(), mode="create")
            return True
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError, ValueError):
            # This store has no create-only put. Reading back in `claim` narrows the race but cannot close it.
            if self._fs.exists(self._path):
                return False
            self._fs.pipe_file(self._path, me.to_json())
            return True

    def claim(self, me: LockHolder) -> tuple[bool, LockHolder | None]:
        """Takes the lock unless its holder is alive; returns whether it was taken and who held it before."""
        previous: LockHolder | None = None
        if not self._create(me):
            previous = self._read()
            if previous is not None and previous.token == me.token:
                return True, None  # an earlier attempt succeeded, but its answer was lost
            if previous is not None and previous.is_alive():
                return False, previous
            self._fs.pipe_file(self._path, me.to_json())
        holder = self._read()
        won = holder is not None and holder.token == me.token
        return won, previous if won else holder

    def refresh(self, me: LockHolder) -> LockHolder | None:
        """Renews the heartbeat if this run still holds the lock; returns the holder."""
        holder = self._read()
        if holder is not None and holder.token == me.token:
            self._fs.pipe_file(self._path, me.to_json())
        return holder

    def remove(self, me: LockHolder) -> None:
        """Removes the lock object if this run holds it."""
        holder = self._read()
        if holder is not None and holder.token == me.token:
            self._fs.rm_file(self._path)
