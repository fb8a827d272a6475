"""The search's trials as Ray Tune runs them: one trial for each plan that must be evaluated."""

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

_QUIET_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # prints tables even when told to be silent
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # records are ours
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # resuming is ours
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_WARN_THRESHOLD_S": "60",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a job are those of its working directory
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "600",
}


class UnitSearcher(Searcher, ABC, Generic[Unit]):
    """Gives Tune units of work, one for each trial, and takes their outcomes in, all in the driver's process.

    Attributes:
        n_at_once: units under way at the same time, at most.
        raised: what a callback raised; no unit is given out after it.
    """

    def __init__(self, n_at_once: int, interrupt: Interrupt, max_attempts: int, watch: Watch):
        super().__init__()
        self.n_at_once, self._watch = n_at_once, watch
        self.raised: Exception | None = None
        self._interrupt, self._max_attempts = interrupt, max_attempts
        self._running: dict[str, Unit] = {}
        self._started_s: dict[str, float] = {}

    @abstractmethod
    def _next(self) -> Unit | None:
        """The next unit; None where there is none (yet)."""

    @abstractmethod
    def _exhausted(self) -> bool:
        """Whether no unit will come any more."""

    @abstractmethod
    def _config(self, unit: Unit) -> dict[str, Any]:
        """What the trial is told."""

    def _told(self, unit: Unit) -> Any:
        """The unit as events name it."""
        return unit

    @abstractmethod
    def _take(self, unit: Unit, outcome: Any) -> None:
        """Takes in what the trial reported as `outcome`."""

    @abstractmethod
    def _fail(self, unit: Unit, error: str, n_attempts: int) -> None:
        """Takes in that there is no outcome."""

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
        self._watch.on_event(UnitEvent("started", self._told(unit)))
        return self._config(unit)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Each trial has one result, which comes with its completion."""

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        unit, seconds = self._running.pop(trial_id), time.monotonic() - self._started_s.pop(trial_id)
        self._watch.on_event(UnitEvent("failed" if error or not result else "done", self._told(unit), seconds=seconds))
        try:
            if error or not result:
                self._fail(unit, "the trial's process died or could not start", self._max_attempts)
            else:
                self._take(unit, result["outcome"])
        except Exception as raised:  # Tune would wrap it and lose the trials under way
            self.raised = self.raised or raised

    def __getstate__(self) -> dict:
        """Nothing: Tune pickles its searcher for a restoration that is never asked for; callbacks need not pickle."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is done is recorded, and is not given out again."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("restore: run what is not recorded again")


@contextlib.contextmanager
def temporary_folder(storage_path: str | None) -> Iterator[str]:
    """A folder for Tune's own files: the one that is given, or one that is removed again."""
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
