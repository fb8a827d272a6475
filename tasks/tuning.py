"""The search's trials as Ray Tune runs them: one trial for each plan that must be evaluated."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from ray import tune
from ray.tune.search import Searcher

from layerboost.plan import Plan
from layerboost.process import environment

from .cluster import WorkerResources
from .memory import SHRUNK
from .search import Evaluator, SearchState, check_values
from .units import Interrupt, UnitFailure, worker_info
from .watching import UnitEvent, Watch, ends_if_hung

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


class PlanTrial(tune.Trainable):
    """Evaluates the plan in its config, in one step. The process is reused for the next plan.

    The evaluator is made in the first step and not in `setup`: Tune gives a waiting trial to the first process that is
    free and ends the one that was starting for it, so processes must start faster than trials end, or only one would
    ever get to work.
    """

    def setup(  # type: ignore[override]
        self,
        config: dict,
        make_evaluator: Callable[[], Evaluator],
        max_attempts: int = 3,
        timeout_s: float | None = None,
    ) -> None:
        self._make_evaluator, self._max_attempts, self._timeout_s = make_evaluator, max_attempts, timeout_s
        self._evaluate: Evaluator | None = None

    def reset_config(self, new_config: dict) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        plan = Plan.from_dict(self.config)
        outcome: dict[str, Any] = {"values": None, "error": None, "worker": worker_info(), "n_attempts": 0}
        while outcome["values"] is None and outcome["n_attempts"] < self._max_attempts:
            outcome["n_attempts"] += 1
            try:
                if self._evaluate is None:
                    self._evaluate = self._make_evaluator()
                start = time.perf_counter()
                with ends_if_hung(self._timeout_s):
                    outcome["values"] = values = dict(self._evaluate(plan))
                outcome["worker"] |= {SHRUNK: values.pop(SHRUNK)} if SHRUNK in values else {}
                outcome["evaluation_s"] = time.perf_counter() - start
                outcome["error"] = check_values(values)
            except Exception as error:  # raised to Tune it would cost the process, and the model in it
                outcome["error"] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        if outcome["n_attempts"] > 1:
            outcome["worker"]["attempt"] = outcome["n_attempts"]
        return {"outcome": json.dumps(outcome), "done": True}  # as text, or Tune takes it apart item by item


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


class StateSearcher(UnitSearcher[Plan]):
    """The plans of a SearchState."""

    def __init__(
        self,
        state: SearchState,
        n_workers: int,
        interrupt: Interrupt,
        on_plan: Callable[[Plan, dict, float, dict], None],
        on_failure: Callable[[UnitFailure], None] | None,
        max_attempts: int,
        watch: Watch,
    ):
        super().__init__(n_workers, interrupt, max_attempts, watch)
        self._state, self._on_plan, self._on_failure = state, on_plan, on_failure
        self._ahead: Plan | None = None

    def peek(self) -> Plan | None:
        """The plan that comes next, None where there is nothing to evaluate (yet)."""
        self._ahead = self._ahead or self._state.next_plan()
        return self._ahead

    def _next(self) -> Plan | None:
        plan, self._ahead = self.peek(), None
        return plan

    def _exhausted(self) -> bool:
        return self._state.exhausted

    def _config(self, plan: Plan) -> dict[str, Any]:
        return plan.to_dict()

    def _take(self, plan: Plan, outcome: str) -> None:
        found = json.loads(outcome)
        if found["error"] is not None:
            self._fail(plan, found["error"], found["n_attempts"])
        else:
            self._state.finish(plan, found["values"])
            self._on_plan(plan, found["values"], found["evaluation_s"], found["worker"])

    def _fail(self, plan: Plan, error: str, n_attempts: int) -> None:
        self._state.finish(plan, None, error)
        if self._on_failure is not None:
            self._on_failure(UnitFailure(plan, error, n_attempts))


def run_trials(
    state: SearchState,
    make_evaluator: Callable[[], Evaluator],
    resources: WorkerResources,
    interrupt: Interrupt,
    on_plan: Callable[[Plan, dict, float, dict], None],
    on_failure: Callable[[UnitFailure], None] | None,
    max_attempts: int,
    storage_path: str | None,
    watch: Watch,
) -> None:
    """Runs Tune until the state is exhausted or an interrupt is requested; see `run_search` for the arguments."""
    searcher = StateSearcher(state, resources.n_workers, interrupt, on_plan, on_failure, max_attempts, watch)
    if searcher.peek() is None:
        return
    bundle = {"CPU": resources.cpus, "GPU": resources.gpus}
    trainable = tune.with_resources(
        tune.with_parameters(
            PlanTrial, make_evaluator=make_evaluator, max_attempts=max_attempts, timeout_s=watch.timeout_s
        ),
        tune.PlacementGroupFactory(
            [{name: amount for name, amount in bundle.items() if amount}],
            bundle_label_selector=[dict(resources.labels)] if resources.labels else None,
        ),
    )
    with quiet(max_pending=resources.n_workers), temporary_folder(storage_path) as folder:
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=len(state.points) + state.spec.trials,
                reuse_actors=True,
                trial_name_creator=lambda trial: f"plan_{trial.trial_id}",
                trial_dirname_creator=lambda trial: f"plan_{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=folder,
                verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(max_failures=max_attempts - 1),
            ),
        ).fit()
    if searcher.raised is not None:
        raise searcher.raised


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
