"""Finds the records of a run by their keys, and says what they hold besides their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerboost.evaluation.scores import Scores
from orchestrator.run.folder import RunFolder
from orchestrator.run.kinds import SCORE_STAGES
from tasks.pool.finished import Finished


def time_and_worker(done: Finished[object, object], seconds: float | None = None) -> dict[str, Any]:
    """Returns what a record keeps of how its result was made.

    Args:
        done: the finished unit.
        seconds: the part of its time that the record stands for; None takes all of it.
    """
    return {"duration_s": done.seconds if seconds is None else seconds, "worker": done.worker.to_dict()}


def scores_of(folder: RunFolder, key: str | None) -> Scores | None:
    """The scores of a record; None where there is none."""
    record = None if key is None else find_record(folder, key)
    return None if record is None else Scores.from_dict(record["scores"])


def find_record(folder: RunFolder, key: str, stages: Sequence[str] = SCORE_STAGES) -> dict[str, Any] | None:
    """The result of a record, in whichever of the stages it stands."""
    return find_records(folder, [key], stages)[0]


def find_records(
    folder: RunFolder, keys: Sequence[str], stages: Sequence[str] = SCORE_STAGES
) -> list[dict[str, Any] | None]:
    """The results of several records, None for each that stands in none of the stages."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        missing = [key for key in keys if key not in found]
        records = folder.read_records(stage, missing)
        found |= {record.key: record.result for record in records if record is not None}
    return [found.get(key) for key in keys]
