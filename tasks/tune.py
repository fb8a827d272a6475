"""Runs units of work as Ray Tune trials, one trial for each unit."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from ray.tune.search import Searcher

from layerboost.environ import environment
from tasks.pool.pool import Interrupt
from tasks.pool.watch import UnitEvent, Watch

Unit = TypeVar("Unit")
Outcome = TypeVar("Outcome")

_QUIET_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints tables even when told to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # LayerBoost keeps its own records
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # LayerBoost resumes from its records
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # LayerBoost handles Ctrl-C
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths must stay relative to the job's working directory
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "600",
}


class UnitSearcher(Searcher, ABC, Generic[Unit, Outcome]):
    """Gives Tune one unit of work for each trial and takes in the outcomes, all in the driver's process.

    Attributes:
        n_at_once: the most units that run at the same time.
        raised: the error that a callback raised; no unit is handed out after it.
    """

    def __init__(self, n_at_once: int, interrupt: Interrupt, max_attempts: int, watch: Watch[Unit]):
        super().__init__()
        self.n_at_once, self._watch = n_at_once, watch
        self.raised: Exception | None = None
        self._interrupt, self._max_attempts = interrupt, max_attempts
        self._running: dict[str, Unit] = {}
        self._started_s: dict[str, float] = {}

    @abstractmethod
    def _next(self) -> Unit | None:
        """Returns the next unit; None if there is none now."""

    @abstractmethod
    def _exhausted(self) -> bool:
        """Says whether no more units will come."""

    @abstractmethod
    def _config(self, unit: Unit) -> dict[str, Any]:
        """Returns the config of the unit's trial."""

    @abstractmethod
    def _take(self, unit: Unit, outcome: Outcome) -> None:
        """Takes in what the trial reported as `outcome`."""

    @abstractmethod
    def _fail(self, unit: Unit, error: str, n_attempts: int) -> None:
        """Takes in that the unit has no outcome."""

    def suggest(self, trial_id: str) -> Any:
        if self._interrupt.requested or self.raised is not None:
            return Searcher.FINISHED
        if len(self._running) >= self.n_at_once:
            return None
        unit = self._next()
        if unit is None:
            return Searcher.FINISHED if self._exhausted() else None
        self._running[trial_id] = unit
        self._started_s[trial_id] = time.monotonic()
        self._watch.on_event(UnitEvent("started", unit))
        return self._config(unit)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Ignores this call, because the single result of a trial also comes with its completion."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        unit, seconds = self._running.pop(trial_id), time.monotonic() - self._started_s.pop(trial_id)
        self._watch.on_event(UnitEvent("failed" if error or not result else "done", unit, seconds=seconds))
        try:
            if error or not result:
                self._fail(unit, "the trial's process died or could not start", self._max_attempts)
            else:
                self._take(unit, result["outcome"])
        except Exception as raised:  # Tune would wrap it and lose the running trials
            self.raised = self.raised or raised

    def __getstate__(self) -> dict[str, Any]:
        """Returns no state, because callbacks may not pickle.

        Tune pickles its searcher for a restoration that never happens.
        """
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing, because finished units are recorded and not handed out again."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("restore: Tune's state is not saved; run the units without a record again")


@contextlib.contextmanager
def temporary_folder(storage_path: str | None) -> Iterator[str]:
    """Gives a folder for Tune's own files: the given one, or a temporary one that is removed afterwards."""
    if storage_path is not None:
        yield storage_path
        return
    folder = tempfile.mkdtemp(prefix="layerboost-search-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def quiet(max_pending: int) -> Iterator[None]:
    """Silences Tune's own progress, keeps its bookkeeping off, and lets all trial processes start together."""
    settings = {**_QUIET_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(max_pending)}
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.air")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with environment(settings), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
