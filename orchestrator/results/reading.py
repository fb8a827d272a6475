"""Reads the records for a report, each of them once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerboost.evaluation.scores import QualityError, Scores
from orchestrator.run.entries import UnitKeys
from orchestrator.run.folder import Record, RunFolder
from orchestrator.run.kinds import HEALINGS, KINDS, RUNGS, SCORES, Kind
from orchestrator.run.records import folders_of

_HEALED = (HEALINGS, RUNGS)
"""The kinds of records that hold healings."""


@dataclass(frozen=True)
class Spent:
    """Holds the cost of a unit of work: seconds on its worker, and the tokens that it healed on, if any."""

    duration_s: float
    tokens: int


class RecordReader:
    """Reads the records of a run, and keeps what more than one table needs of them.

    Several tables ask for the scores of a few models, for timings and for healings, so these are kept. A run may have
    thousands of other records. They are read one at a time with `each_result` and `each_scores`, and only their cost is
    kept, because the cost table sums it over all of them.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._results: dict[tuple[Kind, str], dict[str, Any] | None] = {}
        self._scores: dict[str, Scores | None] = {}
        self._spent: dict[tuple[Kind, str], Spent | None] = {}
        self._folders: dict[Kind, list[str]] = {}

    def each_result(self, keys: Iterable[str], kind: Kind = SCORES) -> Iterator[dict[str, Any] | None]:
        """Reads results one at a time, in the order of their keys; None for a record that is not there."""
        for record in self._each_record(keys, kind):
            yield None if record is None else record.result

    def _each_record(self, keys: Iterable[str], kind: Kind) -> Iterator[Record | None]:
        if kind not in self._folders:
            self._folders[kind] = folders_of(self.folder, kind)
        for record in self.folder.each_record(keys, self._folders[kind]):
            if record is not None and "duration_s" in record.result:  # only the table of costs needs it
                self._spent[kind, record.key] = _spent_on(record, kind)
            yield record

    def each_scores(self, keys: Iterable[str]) -> Iterator[Scores | None]:
        """Reads the scores of models one at a time, in the order of their keys; None for what is not recorded."""
        return (None if found is None else Scores.from_dict(found["scores"]) for found in self.each_result(keys))

    def result(self, key: str, kind: Kind = SCORES) -> dict[str, Any] | None:
        """Returns the result of a record; None if it is not there."""
        if (kind, key) not in self._results:
            (self._results[kind, key],) = self.each_result([key], kind)
        return self._results[kind, key]

    def scores(self, key: str | None) -> Scores | None:
        """Returns the scores of a model; None without a key or a record."""
        if key is None:
            return None
        if key not in self._scores:
            (self._scores[key],) = self.each_scores([key])
        return self._scores[key]

    def healing(self, key: str) -> dict[str, Any]:
        """Returns the recorded result of a healing.

        Raises:
            QualityError: The healing is not recorded.
        """
        found = self.result(key, HEALINGS)
        if found is None:
            raise QualityError(f"healing {key}: is not recorded; run the recipe again")
        return found

    def spent(self, units: Sequence[UnitKeys]) -> Iterator[tuple[UnitKeys, list[Spent]]]:
        """Yields each unit with the costs of its existing records; reads no record again that was read before."""
        for name in {unit.kind for unit in units}:
            kind = KINDS[name]
            keys = dict.fromkeys(key for unit in units if unit.kind == name for key in unit.keys)
            unread = [key for key in keys if (kind, key) not in self._spent]
            for key, record in zip(unread, self._each_record(unread, kind), strict=True):
                if record is None:
                    self._spent[kind, key] = None
        for unit in units:
            found = (self._spent[KINDS[unit.kind], key] for key in unit.keys)
            yield unit, [spent for spent in found if spent is not None]


def _spent_on(record: Record, kind: Kind) -> Spent:
    return Spent(record.result["duration_s"], record.result["tokens"] if kind in _HEALED else 0)
