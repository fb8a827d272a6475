"""What comes back from a unit of work: its result, how long it took, and the worker that did it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Unit_co = TypeVar("Unit_co", covariant=True)
Result_co = TypeVar("Result_co", covariant=True)

SHRUNK = "shrunk"
"""Key under which a worker's result says with how much less at a time it came; its record has it with the worker."""


@dataclass(frozen=True)
class WorkerInfo:
    """The process that works on a unit.

    Attributes:
        node: host name.
        node_id: Ray's name of the node.
        pid: process id there.
        gpus: ids of the GPUs that Ray gave the process.
        attempt: which attempt at the unit it is, from 1.
        shrunk: how much the worker held at a time since its memory ran out; None where it never did.
    """

    node: str
    node_id: str
    pid: int
    gpus: tuple[str, ...] = ()
    attempt: int = 1
    shrunk: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a record keeps of it; a first attempt and a worker with enough memory go without saying."""
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
    """A unit that gave its result.

    Attributes:
        unit: as it was handed in.
        result: what its worker returned.
        seconds: from the hand-over of the unit to its result.
        worker: the process that did it.
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
