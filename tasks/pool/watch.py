"""Units under the eye of the driver: what happens to each, and when one that gives no sign is taken for hung."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class UnitEvent:
    """Something that happened to a unit.

    Attributes:
        what: `started`; then `retried`, when an attempt failed and another follows, `done` or `failed`.
        unit: as it was handed in.
        attempt: counts from 1.
        worker: where it ran, as far as that is known.
        seconds: since the attempt was started.
        error: one line, then its traceback where there is one.
    """

    what: Literal["started", "retried", "done", "failed"]
    unit: Any
    attempt: int = 1
    worker: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Watch:
    """How units are watched.

    Attributes:
        timeout_s: a unit that gives no result for so long is taken for hung: its process is ended and it is tried
            again. None waits for ever.
        on_event: called in the driver.
    """

    timeout_s: float | None = None
    on_event: Callable[[UnitEvent], None] = lambda event: None


UNWATCHED = Watch()


class HungProcess:
    """Ends this process when nothing was heard of its work for `timeout_s`; None never does.

    It needs neither the interpreter's lock nor a signal, and writes where every thread hangs to stderr.
    """

    def __init__(self, timeout_s: float | None):
        self._timeout_s = timeout_s

    def alive(self) -> None:
        """The work goes on: the time begins anew."""
        if self._timeout_s is not None:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)

    def close(self) -> None:
        """The work is done."""
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def ends_if_hung(timeout_s: float | None) -> Iterator[HungProcess]:
    """Ends this process if the block takes longer than `timeout_s`, or so long since `alive` was called last."""
    hung = HungProcess(timeout_s)
    hung.alive()
    try:
        yield hung
    finally:
        hung.close()
