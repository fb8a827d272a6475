"""Runs independent units of work on a pool of Ray actors that may die, and hands back their results.

An actor has two methods: `run(unit) -> result` and `info() -> WorkerInfo` (where it runs). A third, `shrink()`, is
called if Ray ended the previous actor because its node ran out of memory. An actor is made once for each worker, so
that what it holds, above all a model, is loaded once. Unlike `ray.util.ActorPool`, which keeps dead actors, this pool
replaces them wherever the cluster has room.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from tasks.pool.actors import UnitActor, end_actor
from tasks.pool.finished import SHRUNK, Finished, WorkerInfo
from tasks.pool.out_of_memory import was_ended_for_memory
from tasks.pool.watch import UNWATCHED, UnitEvent, Watch

if TYPE_CHECKING:
    from ray import ObjectRef

logger = logging.getLogger(__name__)

Unit = TypeVar("Unit")
Result = TypeVar("Result")

_POLL_S = 0.5
_STARVING_WARNING_S = 60.0
_GROWTH_POLL_S = 3.0


@dataclass(frozen=True)
class UnitFailure(Generic[Unit]):
    """Describes a unit that was tried as often as allowed and never gave a result.

    Attributes:
        unit: the unit as it was handed in.
        error: the last error: one line, then its traceback if there is one.
        n_attempts: the number of attempts; 0 if no worker could be started for it.
    """

    unit: Unit
    error: str
    n_attempts: int


@dataclass
class _Worker(Generic[Unit, Result]):
    """Holds an actor and its state: it starts up while `info` is None, then is idle or works on unit number `unit`."""

    actor: UnitActor[Unit, Result]
    ready: ObjectRef[WorkerInfo]
    info: WorkerInfo | None = None
    unit: int | None = None
    result: ObjectRef[Result] | None = None
    started_s: float = 0.0
    created_s: float = field(default_factory=time.monotonic)


def run_units(
    units: Sequence[Unit],
    make_actor: Callable[[], UnitActor[Unit, Result]],
    *,
    n_workers: int | Callable[[], int],
    on_result: Callable[[Finished[Unit, Result]], None],
    on_results_end: Callable[[], None] | None = None,
    on_failure: Callable[[UnitFailure[Unit]], None] | None = None,
    more_units: Callable[[], Sequence[Unit]] | None = None,
    max_attempts: int = 3,
    watch: Watch[Unit] = UNWATCHED,
) -> list[UnitFailure[Unit]]:
    """Runs every unit on one of `n_workers` actors and hands over each result as soon as it exists.

    Each actor has one unit in flight, and gets its next one before the last result is handed over. An actor that dies
    is replaced and its unit is tried again. A unit that raises is tried again on the same actor. An actor whose unit
    gives no result within `watch.timeout_s` is killed and then treated like a dead one. Nodes may leave and join: a
    replacement waits for room while the others work on, and an actor that never finds room is given up when the units
    are done.

    The first Ctrl-C lets the units in flight finish and hands their results over, then raises KeyboardInterrupt; the
    second one raises at once.

    Args:
        units: picklable values, each independent of the others.
        make_actor: makes one actor (a handle with `run` and `info`).
        n_workers: the most actors; there are never more actors than units. A function is asked again every few
            seconds, so that actors are added when a cluster grows under a running job.
        on_result: called in this process with each unit that gave its result. An error that it raises ends the run.
        on_results_end: called when `on_result` has received all results that exist by then, at least once after each
            result. A caller that writes results in batches can so keep up with many workers.
        on_failure: called in this process with each failure as it happens.
        more_units: called when all units are done and returns the units that follow from their results; the actors are
            kept. The run ends when it returns none.
        max_attempts: the number of attempts for each unit, and the number of consecutive failures to start an actor.
        watch: what is reported about each unit, and when a unit counts as hung.

    Returns:
        The failures that `on_failure` received, in the order in which they happened.
    """
    units = list(units) or (list(more_units()) if more_units else [])
    if not units:
        return []
    loop = _Loop(units, make_actor, n_workers, on_result, on_results_end, on_failure, more_units, max_attempts, watch)
    with finish_on_interrupt() as interrupt:
        try:
            loop.run(interrupt)
        finally:
            loop.close()
    return loop.failures


class _Loop(Generic[Unit, Result]):
    def __init__(
        self,
        units: list[Unit],
        make_actor: Callable[[], UnitActor[Unit, Result]],
        n_workers: int | Callable[[], int],
        on_result: Callable[[Finished[Unit, Result]], None],
        on_results_end: Callable[[], None] | None,
        on_failure: Callable[[UnitFailure[Unit]], None] | None,
        more_units: Callable[[], Sequence[Unit]] | None,
        max_attempts: int,
        watch: Watch[Unit],
    ):
        self.units, self.make_actor, self.max_attempts, self.watch = units, make_actor, max_attempts, watch
        self.on_result, self.on_results_end = on_result, on_results_end
        self.on_failure, self.more_units = on_failure, more_units
        self.ask_n_workers = n_workers if callable(n_workers) else None
        self.n_workers = n_workers() if callable(n_workers) else n_workers
        self.asked_s = time.monotonic()
        self.waiting = deque(range(len(units)))
        self.attempts = [0] * len(units)
        self.workers: list[_Worker[Unit, Result]] = []
        self.failures: list[UnitFailure[Unit]] = []
        self.n_ended_for_memory = 0
        self.start_failures = 0
        self.start_error = ""
        self.warned_s = time.monotonic()

    def run(self, interrupt: Interrupt) -> None:
        import ray

        while True:
            in_flight = [worker for worker in self.workers if worker.unit is not None]
            if interrupt.requested and not in_flight:
                raise KeyboardInterrupt
            if not self.waiting and not in_flight and not self._add_units():
                return
            if not interrupt.requested:
                self._fill()
            if not self.workers:
                self._give_up_waiting()
                continue
            pending = {
                reference: worker for worker in self.workers if (reference := self._reference(worker)) is not None
            }
            ray.wait(list(pending), num_returns=1, timeout=_POLL_S)
            done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            collected = [self._collect(pending[reference]) for reference in done]
            # This must precede the hand-over, which may take long: units that finish during it would count as hung.
            self._end_hung_units()
            if not interrupt.requested:
                self._fill()
            self._hand_over([result for result in collected if result is not None])
            self._warn_if_starving()

    def close(self) -> None:
        for worker in self.workers:
            end_actor(worker.actor)
        self.workers.clear()

    @staticmethod
    def _reference(worker: _Worker[Unit, Result]) -> ObjectRef[WorkerInfo] | ObjectRef[Result] | None:
        return worker.ready if worker.info is None else worker.result

    def _add_units(self) -> bool:
        """Adds the units that follow from the results; returns whether there are any."""
        units = [] if self.more_units is None else list(self.more_units())
        self.waiting += range(len(self.units), len(self.units) + len(units))
        self.units += units
        self.attempts += [0] * len(units)
        return bool(units)

    def _fill(self) -> None:
        """Starts the actors that are missing and gives each idle actor a unit."""
        if self.ask_n_workers is not None and time.monotonic() - self.asked_s > _GROWTH_POLL_S:
            self.n_workers, self.asked_s = max(self.n_workers, self.ask_n_workers()), time.monotonic()
        busy = sum(worker.unit is not None for worker in self.workers)
        wanted = min(self.n_workers, busy + len(self.waiting))
        while len(self.workers) < wanted and self.start_failures < self.max_attempts:
            actor = self.make_actor()
            if hasattr(actor, "shrink"):
                for _ in range(self.n_ended_for_memory):
                    actor.shrink.remote()
            self.workers.append(_Worker(actor, actor.info.remote()))
        for worker in self.workers:
            if worker.info is not None and worker.unit is None and self.waiting:
                worker.unit = self.waiting.popleft()
                worker.started_s = time.monotonic()
                self.attempts[worker.unit] += 1
                worker.result = worker.actor.run.remote(self.units[worker.unit])
                self._tell("started", worker)

    def _collect(self, worker: _Worker[Unit, Result]) -> Finished[Unit, Result] | None:
        """Returns the arguments for `on_result` if the worker has a result, else None."""
        import ray

        try:
            if worker.info is None:
                worker.info, self.start_failures = ray.get(worker.ready), 0
                return None
            assert worker.unit is not None and worker.result is not None
            result = ray.get(worker.result)
        except ray.exceptions.RayTaskError as error:
            if worker.info is None:
                self._lose(worker, _describe(error))
            else:
                self._retry(worker, _describe(error))
            return None
        except ray.exceptions.RayError as error:
            self._lose(worker, _describe(error))
            return None
        self._tell("done", worker)
        info = replace(worker.info, attempt=self.attempts[worker.unit])
        if isinstance(result, dict) and SHRUNK in result:
            info = replace(info, shrunk=result.pop(SHRUNK))
        unit, worker.unit, worker.result = self.units[worker.unit], None, None
        return Finished(unit, result, time.monotonic() - worker.started_s, info)

    def _hand_over(self, results: Sequence[Finished[Unit, Result]]) -> None:
        for result in results:
            self.on_result(result)
        if results and self.on_results_end is not None:
            self.on_results_end()

    def _end_hung_units(self) -> None:
        """Ends the workers whose units take longer than `watch.timeout_s`."""
        timeout_s = self.watch.timeout_s
        for worker in [worker for worker in self.workers if worker.unit is not None]:
            if timeout_s is not None and time.monotonic() - worker.started_s > timeout_s:
                self._lose(worker, f"TimeoutError: no result within {timeout_s:g} s; its worker was ended")

    def _tell(
        self,
        what: Literal["started", "retried", "done", "failed"],
        worker: _Worker[Unit, Result],
        error: str | None = None,
    ) -> None:
        assert worker.unit is not None
        seconds, attempt = time.monotonic() - worker.started_s, self.attempts[worker.unit]
        self.watch.on_event(UnitEvent(what, self.units[worker.unit], attempt, worker.info, seconds, error))

    def _lose(self, worker: _Worker[Unit, Result], error: str) -> None:
        """Drops an actor that is gone or out of reach; it is never used again."""
        self.workers.remove(worker)
        end_actor(worker.actor)
        self.n_ended_for_memory += was_ended_for_memory(error)
        if worker.info is None:
            self.start_failures, self.start_error = self.start_failures + 1, error
            logger.warning("a worker did not start (%d in a row): %s", self.start_failures, error.splitlines()[0])
            return
        logger.warning("a worker died on %s: %s", worker.info.node, error.splitlines()[0])
        if worker.unit is not None:
            self._retry(worker, error)

    def _retry(self, worker: _Worker[Unit, Result], error: str) -> None:
        index = worker.unit
        assert index is not None
        again = self.attempts[index] < self.max_attempts
        self._tell("retried" if again else "failed", worker, error)
        worker.unit = worker.result = None
        if again:
            self.waiting.append(index)
        else:
            self._fail(index, error)

    def _fail(self, index: int, error: str) -> None:
        failure = UnitFailure(self.units[index], error, self.attempts[index])
        self.failures.append(failure)
        if self.on_failure is not None:
            self.on_failure(failure)

    def _give_up_waiting(self) -> None:
        """Fails all waiting units, because no actor is left and none will start."""
        while self.waiting:
            self._fail(self.waiting.popleft(), f"no worker could be started: {self.start_error}")

    def _warn_if_starving(self) -> None:
        now = time.monotonic()
        starving = [w for w in self.workers if w.info is None and now - w.created_s > _STARVING_WARNING_S]
        if starving and len(starving) == len(self.workers) and now - self.warned_s > _STARVING_WARNING_S:
            self.warned_s = now
            logger.warning("%d workers wait for room on the cluster; see ray status", len(starving))


class Interrupt:
    """Records whether Ctrl-C was pressed inside `finish_on_interrupt`."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def finish_on_interrupt() -> Iterator[Interrupt]:
    """Turns the first Ctrl-C into a request to stop; the second one has its usual meaning."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    usual = signal.getsignal(signal.SIGINT)

    def request(signum: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        signal.signal(signal.SIGINT, usual)
        logger.warning("stopping when the units in flight are done; press Ctrl-C again to stop now")

    signal.signal(signal.SIGINT, request)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, usual)


def _describe(error: Exception) -> str:
    """Returns one line on the cause, then everything that Ray knows about it."""
    cause = getattr(error, "cause", None) or error
    first = "".join(traceback.format_exception_only(cause)).strip().splitlines()[0]
    return f"{first}\n{error}"
