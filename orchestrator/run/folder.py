"""Reads and writes the run folder, which holds records and results on a local disk or behind any fsspec URL.

    records/<kind>/<key>.json     one record for each finished unit of work (`orchestrator.run.kinds`)
    everything else               artefacts: CSVs, pictures, healed checkpoints, the resolved recipe

A record holds its unit's identity, its result and a checksum. It is written whole or not at all: on a local disk under
another name that is then renamed, on an object store in a single put. A lock file makes sure that one run at a time
holds the folder. Operations that a network or a file server fails are repeated for half a minute
(`layerboost.storage.errors`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from layerboost.storage.errors import DiskFullError, is_disk_full, retried
from orchestrator.recipe.errors import InputError
from orchestrator.run.lock import RunFolderLock

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RECORDS = "records"
LOCK_NAME = "run.lock"

SIDE_BY_SIDE = 16
"""The number of requests in flight at once; an object store answers many as fast as one."""

Given = TypeVar("Given")
Got = TypeVar("Got")


def canonical_json(value: Any, *, allow_nan: bool = False) -> str:
    """Writes JSON with sorted keys and without spaces, so that equal content gives equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=allow_nan)


def unit_key(identity: dict[str, Any]) -> str:
    """Returns the name of a unit of work: the first 16 hex digits of the SHA-256 of what changes its result.

    Args:
        identity: plain JSON values only. It must not say where the unit runs.

    Raises:
        TypeError, ValueError: the identity is not plain JSON; NaN is not allowed.
    """
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """Holds a finished unit of work as it was read back."""

    stage: str
    key: str
    identity: dict[str, Any]
    result: dict[str, Any]


class _DamagedRecordError(ValueError):
    """Says why a record cannot be trusted."""


class RunFolder:
    """Represents a folder of records and artefacts. Creating the object touches no storage.

    Args:
        url: a local path, or any URL that fsspec knows (`file://`, `s3://`, `memory://`).

    Raises:
        InputError: no filesystem is known for the URL.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        try:
            self.fs, path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise InputError("--out", self.url, f"{error}; give a local folder or a URL that fsspec can open") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.path = os.path.abspath(path) if self.is_local else path.rstrip("/")
        self._lock: RunFolderLock | None = None

    def __repr__(self) -> str:
        return f"RunFolder({self.url!r})"

    def __str__(self) -> str:
        return self.path if self.is_local else self.url

    # Records

    def write_record(self, stage: str, identity: dict[str, Any], result: dict[str, Any]) -> None:
        """Writes one record, whole or not at all, under the key of its identity.

        Args:
            stage: the stage's name, a folder under `records/`.
            identity: what changes the result, plain JSON.
            result: the result of the unit as JSON; NaN and infinities are allowed.

        Raises:
            RunFolderLockedError: this run held the lock and another has taken it over since.
        """
        self.check_held()
        key = unit_key(identity)
        payload: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "stage": stage,
            "key": key,
            "identity": identity,
            "result": result,
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        lines = _members(payload)
        lines.append(f'"sha256":"{_sha256(lines)}"')
        self.write_text(_record_name(stage, key), "{" + ",\n".join(lines) + "}\n")

    def write_records(self, stage: str, results: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Writes several records side by side, each whole or not at all.

        Args:
            stage: as in `write_record`.
            results: identity and result of each record.

        Raises:
            The first error of `write_record`, after all other records have been written.
        """
        _side_by_side(lambda each: self.write_record(stage, *each), results)

    def read_record(self, stage: str, key: str) -> Record | None:
        """Reads one record. An absent record gives None; a damaged one gives None and a warning."""
        try:
            data = self.read_bytes(_record_name(stage, key))
        except FileNotFoundError:
            return None
        return self._sound_record(stage, key, data)

    def read_records(self, stage: str, keys: Sequence[str]) -> list[Record | None]:
        """Reads several records side by side, each as `read_record` does."""
        return _side_by_side(lambda key: self.read_record(stage, key), keys)

    def each_record(self, keys: Iterable[str], stages: Sequence[str]) -> Iterator[Record | None]:
        """Reads many records one after the other, ahead of the consumer.

        Memory does not grow with their number: a few records are being read at once, only as bytes, and a record that
        was taken is not kept.

        Args:
            keys: the keys of the records, in the order in which they are yielded.
            stages: the stages that may hold each record; the first with an intact one gives it.

        Yields:
            The record of each key; None if no stage holds it.
        """

        def stored(key: str) -> tuple[str, str, bytes | None]:
            for stage in stages:
                with contextlib.suppress(FileNotFoundError):
                    return key, stage, self.read_bytes(_record_name(stage, key))
            return key, "", None

        for key, stage, data in _ahead(stored, keys):
            if data is None:
                yield None
                continue
            record = self._sound_record(stage, key, data)
            for other in stages[stages.index(stage) + 1 :] if record is None else ():
                record = record or self.read_record(other, key)
            yield record

    def record_keys(self, stage: str) -> list[str]:
        """Returns the sorted keys of all records of a stage, intact or damaged."""
        folder = self._join(_record_name(stage, "0" * 16)).rpartition("/")[0]
        try:
            names = [PurePosixPath(str(path)).name for path in self._list(folder)]
        except FileNotFoundError:
            return []
        return sorted(name.removesuffix(".json") for name in names if re.fullmatch(r"[0-9a-f]{16}\.json", name))

    def records(self, stage: str) -> list[Record]:
        """Returns all intact records of a stage, ordered by key."""
        return [record for record in self.each_record(self.record_keys(stage), [stage]) if record is not None]

    def _sound_record(self, stage: str, key: str, data: bytes) -> Record | None:
        """Returns the record that these bytes hold; a damaged one gives None and a warning."""
        try:
            return _parsed_record(stage, key, data)
        except _DamagedRecordError as error:
            self._put_damaged_aside(_record_name(stage, key), str(error))
            return None

    def _put_damaged_aside(self, name: str, reason: str) -> None:
        remark = ""
        # Only the run that holds the lock may clean up, so a reader without it leaves the folder as it is.
        if self._lock is not None:
            aside = f"{name}.damaged"
            retried(self.fs.mv)(self._join(name), self._join(aside))
            remark = f" (kept as {aside})"
        logger.warning(
            "record %s is damaged: %s; its unit counts as not done and will be redone%s", name, reason, remark
        )

    # Artefacts

    @retried
    def exists(self, name: str = "") -> bool:
        """Returns True if the artefact exists or, without a name, the folder itself."""
        return self.fs.exists(self._join(name))

    @retried
    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes an artefact, whole or not at all.

        Raises:
            DiskFullError: the disk has no room for it.
        """
        self.write_once(name, data)

    def write_once(self, name: str, data: bytes) -> None:
        """Writes an artefact, whole or not at all, without trying again when the storage fails."""
        path = self._join(name)
        if not self.is_local:
            self.fs.pipe_file(path, data)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        hidden = _hidden_beside(path)
        try:
            with open(hidden, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden)
            if is_disk_full(error):
                raise DiskFullError(f"{path} of {len(data) / 2**20:,.2f} MiB cannot be written: {error}") from error
            raise

    def write_text(self, name: str, text: str) -> None:
        """Writes a UTF-8 artefact, whole or not at all."""
        self.write_bytes(name, text.encode())

    @retried
    def read_bytes(self, name: str) -> bytes:
        """Reads an artefact. Raises FileNotFoundError if it is absent."""
        return self.fs.cat_file(self._join(name))

    def read_text(self, name: str) -> str:
        """Reads a UTF-8 artefact. Raises FileNotFoundError if it is absent."""
        return self.read_bytes(name).decode()

    def names(self, name: str = "") -> list[str]:
        """Returns the sorted names of the direct entries of a subfolder; an absent subfolder has none."""
        try:
            return sorted(PurePosixPath(str(path)).name for path in self._list(self._join(name)))
        except FileNotFoundError:
            return []

    @retried
    def remove(self, name: str) -> None:
        """Removes an artefact or a subfolder if it exists."""
        if not name:
            raise ValueError("refusing to remove the whole run folder")
        if self.exists(name):
            self.fs.rm(self._join(name), recursive=True)

    def place(self, name: str) -> str:
        """Returns the path or URL of an artefact, for code that reads and writes it without this class."""
        return self._join(name) if self.is_local else f"{self.url}/{name}"

    # The folder as a whole

    def lock(self) -> contextlib.AbstractContextManager[RunFolder]:
        """Holds the folder for one run, and creates it if it is absent.

        Raises:
            RunFolderLockedError: another run holds it; the message names the holder.
        """
        return self._locked()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[RunFolder]:
        retried(self.fs.makedirs)(self.path, exist_ok=True)
        lock = RunFolderLock(self.fs, self._join(LOCK_NAME), is_local=self.is_local, folder=str(self))
        lock.acquire()
        self._lock = lock
        try:
            self._sweep()
            yield self
        finally:
            self._lock = None
            lock.release()

    def check_held(self) -> None:
        """Raises RunFolderLockedError if this run held the lock and another has taken it over since."""
        if self._lock is not None:
            self._lock.check_held()

    def _sweep(self) -> None:
        """Removes half-written files of a killed run; only the holder of the lock may do so."""
        if not self.is_local:
            return
        for leftover in Path(self.path).rglob(".*.tmp"):
            if _HIDDEN.fullmatch(leftover.name):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()

    def preflight_writable(self) -> None:
        """Checks that the folder can be created and written, and leaves nothing behind.

        Raises:
            InputError: the folder cannot be written; the message names it, the reason and the remedy.
        """
        if self.is_local:
            self._preflight_local()
            return
        probe = f"{self.path}/.probe-{uuid.uuid4().hex[:8]}"
        try:
            self.fs.pipe_file(probe, b"")
            self.fs.rm_file(probe)
        except Exception as error:
            raise InputError("--out", self.url, f"cannot be written ({error}); check the URL and the rights") from None

    def _preflight_local(self) -> None:
        ancestor = Path(self.path)
        # A broken link does not "exist", but no folder can be created under it, so the walk stops there.
        while not os.path.lexists(ancestor):
            ancestor = ancestor.parent
        if not ancestor.is_dir():
            raise InputError("--out", self.path, f"{ancestor} is not a folder; give a folder")
        try:
            # Only writing tells: root ignores permission bits, and a full or read-only disk fails only when written to.
            with tempfile.TemporaryFile(dir=ancestor) as file:
                file.write(b"x" * 4096)
                file.flush()
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                "--out", self.path, f"{ancestor} cannot be written ({reason}); give a folder you can write to"
            ) from None

    def _join(self, name: str) -> str:
        parts = PurePosixPath(name).parts
        if os.path.isabs(name) or ".." in parts:
            raise ValueError(f"{name} does not lie in the run folder")
        return "/".join((self.path, *parts))

    @retried
    def _list(self, path: str) -> list[str]:
        self.fs.invalidate_cache(path)
        return self.fs.ls(path, detail=False)


def _side_by_side(do: Callable[[Given], Got], each: Sequence[Given]) -> list[Got]:
    """Returns what `do` gives for each, in order; if some fail, it raises the first error after all have ended."""
    if len(each) < 2:
        return [do(one) for one in each]
    with ThreadPoolExecutor(min(len(each), SIDE_BY_SIDE), "records") as pool:
        return [future.result() for future in [pool.submit(do, one) for one in each]]


def _ahead(do: Callable[[Given], Got], each: Iterable[Given]) -> Iterator[Got]:
    """Yields what `do` gives for each, in order; up to `SIDE_BY_SIDE` calls run ahead of the consumer."""
    left = iter(each)
    with ThreadPoolExecutor(SIDE_BY_SIDE, "records") as pool:
        begun = deque(pool.submit(do, one) for one in itertools.islice(left, SIDE_BY_SIDE))
        try:
            while begun:
                got = begun.popleft().result()
                begun.extend(pool.submit(do, one) for one in itertools.islice(left, 1))
                yield got
        finally:
            for future in begun:
                future.cancel()


_HIDDEN = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


def _hidden_beside(path: str) -> str:
    """Returns a temporary name for `path`.

    It lies on the same disk, so that renaming it to `path` is atomic, and no listing takes it for a result.
    """
    parent, base = os.path.split(path)
    return f"{parent}/.{base}.{uuid.uuid4().hex[:8]}.tmp"


def _record_name(stage: str, key: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", stage):
        raise ValueError(f"stage {stage!r} must be lower-case letters, digits, _ and -")
    if not re.fullmatch(r"[0-9a-f]{16}", key):
        raise ValueError(f"key {key!r} must be 16 hex digits, as unit_key gives")
    return f"{RECORDS}/{stage}/{key}.json"


def _parsed_record(stage: str, key: str, data: bytes) -> Record:
    """Returns the record that these bytes hold.

    Raises:
        _DamagedRecordError: the record cannot be trusted.
    """
    try:
        payload = json.loads(data)
    except ValueError:
        raise _DamagedRecordError("it is not valid JSON") from None
    if not isinstance(payload, dict):
        raise _DamagedRecordError("it is not a JSON object")
    if payload.get("schema") != SCHEMA_VERSION:
        raise _DamagedRecordError(f"its schema is {payload.get('schema')}, this version writes {SCHEMA_VERSION}")
    if not _has_checksum_of_its_bytes(data):
        # A tool may have rewritten the file with another layout, so compare the checksum of the canonical text.
        members = _members({name: payload[name] for name in payload if name != "sha256"})
        if payload.get("sha256") != _sha256(members):
            raise _DamagedRecordError("its checksum does not fit its content")
    if (payload.get("stage"), payload.get("key")) != (stage, key) or unit_key(payload["identity"]) != key:
        raise _DamagedRecordError("it belongs to another unit")
    return Record(stage, key, payload["identity"], payload["result"])


def _has_checksum_of_its_bytes(data: bytes) -> bool:
    """Says whether a record still has the layout in which it was written, so that its checksum fits these bytes.

    This spares serializing its content again, which takes longer than reading it.
    """
    *members, checksum = data.removeprefix(b"{").removesuffix(b"}\n").split(b",\n")
    return checksum == f'"sha256":"{_sha256_of_bytes(members)}"'.encode()


def _members(payload: dict[str, Any]) -> list[str]:
    """Returns the members of a JSON object as canonical text, in order; a record has one on each line."""
    return [f"{json.dumps(name)}:{canonical_json(payload[name], allow_nan=True)}" for name in sorted(payload)]


def _sha256(members: Sequence[str]) -> str:
    """Returns the SHA-256 of the canonical text of the object that has these members."""
    return _sha256_of_bytes([member.encode() for member in members])


def _sha256_of_bytes(members: Sequence[bytes]) -> str:
    return hashlib.sha256(b"{" + b",".join(members) + b"}").hexdigest()
