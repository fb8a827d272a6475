"""Finds the records of a run by their keys, and says what they hold besides their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from layerboost.evaluation.scores import Scores
from orchestrator.run.folder import RECORDS, Record, RunFolder
from orchestrator.run.kinds import SCORES, Kind
from tasks.pool.finished import Finished


def time_and_worker(done: Finished[object, object], seconds: float | None = None) -> dict[str, Any]:
    """Returns what a record keeps of how its result was made.

    Args:
        done: the finished unit.
        seconds: the part of its time that the record stands for; None takes all of it.
    """
    return {"duration_s": done.seconds if seconds is None else seconds, "worker": done.worker.to_dict()}


def scores_of(folder: RunFolder, key: str | None) -> Scores | None:
    """Returns the scores of a record; None without a key or a record."""
    record = None if key is None else find_record(folder, key)
    return None if record is None else Scores.from_dict(record["scores"])


def find_record(folder: RunFolder, key: str, kind: Kind = SCORES) -> dict[str, Any] | None:
    """Returns the result of a record of a kind; None if it is missing. See `find_records`."""
    return find_records(folder, [key], kind)[0]


def find_records(folder: RunFolder, keys: Sequence[str], kind: Kind = SCORES) -> list[dict[str, Any] | None]:
    """Returns the results of several records of a kind; None for each that is missing.

    Each record is looked up once, in the kind's folder. Run folders of earlier versions have scores in one folder for
    each stage that made them (`Kind.earlier`). Only missing records are looked up there, and only in folders that
    exist. Such records are read in place and never moved.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in (kind.folder, *kind.earlier):
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if not missing:
            break
        if name == kind.folder or name in folder.names(RECORDS):
            found |= {record.key: record.result for record in folder.read_records(name, missing) if record is not None}
    return [found.get(key) for key in keys]


def each_of_kind(folder: RunFolder, keys: Iterable[str], kind: Kind) -> Iterator[Record | None]:
    """Reads many records of a kind one after the other; None for each that is missing."""
    return folder.each_record(keys, folders_of(folder, kind))


def all_records(folder: RunFolder, kind: Kind) -> Iterator[Record]:
    """Reads all sound records of a kind, each once, whichever run and version of the folder's layout wrote them."""
    names = folders_of(folder, kind)
    keys = dict.fromkeys(key for name in names for key in folder.record_keys(name))
    return (record for record in folder.each_record(keys, names) if record is not None)


def folders_of(folder: RunFolder, kind: Kind) -> list[str]:
    """Returns the folders under `records/` with records of a kind: its own, and existing ones of earlier versions."""
    there = folder.names(RECORDS) if kind.earlier else []
    return [kind.folder, *(name for name in kind.earlier if name in there)]
