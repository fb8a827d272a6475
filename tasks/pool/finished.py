"""Describes what comes back from a unit of work: its result, its time, and the worker that did it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Unit_co = TypeVar("Unit_co", covariant=True)
Result_co = TypeVar("Result_co", covariant=True)

SHRUNK = "shrunk"
"""The key of a result under which a worker reports its reduced sizes.

The record keeps it with the facts of the worker.
"""


@dataclass(frozen=True)
class WorkerInfo:
    """Describes the process that works on a unit.

    Attributes:
        node: the host name.
        node_id: Ray's id of the node.
        pid: the process id.
        gpus: the ids of the GPUs that Ray gave the process.
        attempt: the number of the attempt at the unit, from 1.
        shrunk: the sizes that the worker went on with after its memory ran out; None if it never did.
    """

    node: str
    node_id: str
    pid: int
    gpus: tuple[str, ...] = ()
    attempt: int = 1
    shrunk: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns what a record keeps; a first attempt and full sizes are left out."""
        about: dict[str, Any] = {"node": self.node, "node_id": self.node_id, "pid": self.pid, "gpus": list(self.gpus)}
        if self.attempt > 1:
            about["attempt"] = self.attempt
        if self.shrunk is not None:
            about[SHRUNK] = dict(self.shrunk)
        return about

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> WorkerInfo:
        return cls(**{**about, "gpus": tuple(about["gpus"])})


@dataclass(frozen=True)
class Finished(Generic[Unit_co, Result_co]):
    """Describes a unit that gave its result.

    Attributes:
        unit: the unit as it was handed in.
        result: the value that its worker returned.
        seconds: the time from the hand-over of the unit to its result.
        worker: the process that did the unit.
    """

    unit: Unit_co
    result: Result_co
    seconds: float
    worker: WorkerInfo


def worker_info() -> WorkerInfo:
    """Describes the calling actor or task."""
    import ray

    context = ray.get_runtime_context()
    gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
    return WorkerInfo(platform.node(), context.get_node_id(), os.getpid(), gpus)
