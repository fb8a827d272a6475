"""Reads the records that a report is made of, each of them once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerboost.evaluation.scores import QualityError, Scores
from orchestrator.run.folder import Record, RunFolder
from orchestrator.run.kinds import HALVING, SCORE_STAGES

_HEALINGS = ("heal", HALVING)
"""Stages of the records that hold healings."""


@dataclass(frozen=True)
class Spent:
    """What a unit of work took: seconds on its worker, and the tokens that it healed on, if any."""

    duration_s: float
    tokens: int


class RecordReader:
    """Reads the records of a run, and keeps what more than one table needs of them.

    The scores of a few models, timings and healings are asked for by several tables and are kept. Records that there
    may be thousands of are read one at a time with `each_result` and `each_scores`; of those only what they took is
    kept, because the table of costs sums it over all of them.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._results: dict[tuple[str, tuple[str, ...]], dict[str, Any] | None] = {}
        self._scores: dict[str, Scores | None] = {}
        self._spent: dict[tuple[str, str], Spent] = {}

    def each_result(self, keys: Iterable[str], stages: Sequence[str] = SCORE_STAGES) -> Iterator[dict[str, Any] | None]:
        """Reads results one at a time, in the order of their keys; None for a record that is not there."""
        for record in self.folder.each_record(keys, stages):
            if record is None:
                yield None
            else:
                self._note(record)
                yield record.result

    def each_scores(self, keys: Iterable[str]) -> Iterator[Scores | None]:
        """Reads the scores of models one at a time, in the order of their keys; None for what is not recorded."""
        return (None if found is None else Scores.from_dict(found["scores"]) for found in self.each_result(keys))

    def result(self, key: str, stages: Sequence[str] = SCORE_STAGES) -> dict[str, Any] | None:
        """Returns the result of a record, in whichever of the stages it stands; None if it is in none of them."""
        asked = key, tuple(stages)
        if asked not in self._results:
            (self._results[asked],) = self.each_result([key], stages)
        return self._results[asked]

    def scores(self, key: str | None) -> Scores | None:
        """Returns the scores of a model; None without a key or a record."""
        if key is None:
            return None
        if key not in self._scores:
            (self._scores[key],) = self.each_scores([key])
        return self._scores[key]

    def healing(self, key: str) -> dict[str, Any]:
        """Returns what is recorded of a healing.

        Raises:
            QualityError: nothing is.
        """
        found = self.result(key, ("heal",))
        if found is None:
            raise QualityError(f"healing {key}: is not recorded; run the recipe again")
        return found

    def spent(self, stage: str, keys: Iterable[str] | None = None) -> Iterator[Spent]:
        """Yields what each recorded unit of a stage took, and reads no record that was read before.

        Args:
            stage: whose records count; one that stands in another stage does not.
            keys: of the units; all units of the stage if None.
        """
        there = self.folder.record_keys(stage)
        if keys is not None:
            wanted = set(keys)
            there = [key for key in there if key in wanted]
        unread = [key for key in there if (stage, key) not in self._spent]
        damaged = set()
        for key, record in zip(unread, self.folder.each_record(unread, [stage]), strict=True):
            if record is None:
                damaged.add(key)
            else:
                self._spent[stage, key] = _spent_on(record)
        yield from (self._spent[stage, key] for key in there if key not in damaged)

    def _note(self, record: Record) -> None:
        if "duration_s" in record.result:  # only the table of costs needs it
            self._spent[record.stage, record.key] = _spent_on(record)


def _spent_on(record: Record) -> Spent:
    tokens = record.result["tokens"] if record.stage in _HEALINGS else 0
    return Spent(record.result["duration_s"], tokens)
