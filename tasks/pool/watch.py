"""Reports what happens to each unit of work, and ends units and processes that count as hung."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from tasks.pool.finished import WorkerInfo

Unit = TypeVar("Unit")
Unit_co = TypeVar("Unit_co", covariant=True)


@dataclass(frozen=True)
class UnitEvent(Generic[Unit_co]):
    """Describes something that happened to a unit.

    Attributes:
        what: `started`; then `retried` (an attempt failed and another follows), `done` or `failed`.
        unit: the unit as it was handed in.
        attempt: the number of the attempt, from 1.
        worker: the process that the unit ran in; None if that is not known.
        seconds: the time since the attempt started.
        error: one line, then its traceback if there is one.
    """

    what: Literal["started", "retried", "done", "failed"]
    unit: Unit_co
    attempt: int = 1
    worker: WorkerInfo | None = None
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Watch(Generic[Unit]):
    """Says how units are watched.

    Attributes:
        timeout_s: a unit that gives no result for this time counts as hung: its process is ended and the unit is tried
            again. None waits for ever.
        on_event: called in the driver with each event.
    """

    timeout_s: float | None = None
    on_event: Callable[[UnitEvent[Unit]], None] = lambda event: None


UNWATCHED: Watch[Any] = Watch()


class HungProcess:
    """Ends this process when its work gave no sign for `timeout_s`; with None it never does.

    The timer needs neither the interpreter's lock nor a signal, so it works even if every thread hangs. It writes the
    stack of each thread to stderr.
    """

    def __init__(self, timeout_s: float | None):
        self._timeout_s = timeout_s

    def alive(self) -> None:
        """Notes that the work goes on, so that the time starts again."""
        if self._timeout_s is not None:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)

    def close(self) -> None:
        """Stops the timer, because the work is done."""
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def ends_if_hung(timeout_s: float | None) -> Iterator[HungProcess]:
    """Ends this process if the block runs for `timeout_s` without a call of `alive`."""
    hung = HungProcess(timeout_s)
    hung.alive()
    try:
        yield hung
    finally:
        hung.close()
