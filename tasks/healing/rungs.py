"""Runs many healings at once: each is a Ray Tune trial that runs its own Ray Train job.

A trial holds no resources because it only waits; the workers of its job hold them. The number of trials at once is the
number of such jobs that fit on the cluster, so that no job waits for room that another one keeps. An interrupted rung
resumes by being run again without the recorded healings; unfinished healings continue from their own checkpoints.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from tasks.cluster import connection
from tasks.cluster.resources import jobs_at_once
from tasks.healing.job import HealingJob, located
from tasks.healing.orphaned_groups import freeing_groups_of_the_dead
from tasks.healing.run import HealingResult, heal
from tasks.pool.finished import Finished, WorkerInfo, worker_info
from tasks.pool.pool import Interrupt, UnitFailure, finish_on_interrupt
from tasks.pool.watch import UNWATCHED, Watch
from tasks.tune import UnitSearcher, quiet, temporary_folder

_NEXT_TO_NOTHING: dict[str, int | float] = {"memory": 1}
"""Placeholder resource of one byte: Tune rejects an empty request, and the trial only waits."""


def heal_all(
    jobs: Sequence[HealingJob],
    *,
    on_result: Callable[[Finished[HealingJob, HealingResult]], None],
    on_failure: Callable[[UnitFailure[HealingJob]], None] | None = None,
    max_attempts: int = 3,
    watch: Watch[HealingJob] = UNWATCHED,
) -> list[UnitFailure[HealingJob]]:
    """Heals on the connected cluster; as many jobs run at once as it has room for.

    A first Ctrl-C lets the running trials finish, hands their results over and raises KeyboardInterrupt.

    Args:
        jobs: the jobs, which share one placement and have distinct names.
        on_result: called in this process with each job as soon as it is done, so that it can be recorded at once. The
            worker that it names is the trial that waited for the job's own workers. An error that it raises ends the
            rung when the running trials are done.
        on_failure: called in this process with each job that failed for good; the others go on.
        max_attempts: the number of attempts of a job whose trial's process dies; each continues from its last
            checkpoint.
        watch: receives the events of each job. Its time limit is not used: the workers notice a hung job themselves
            (`Survival.step_timeout_s`).

    Returns:
        The failures, in the order in which they happened.
    """
    if not jobs:
        return []
    jobs = [located(job) for job in jobs]
    n_at_once = jobs_at_once(jobs[0].workers, connection.resources())
    with finish_on_interrupt() as interrupt:
        searcher = _JobSearcher(jobs, n_at_once, interrupt, on_result, on_failure, max_attempts, watch)
        with quiet(max_pending=searcher.n_at_once), temporary_folder(None) as folder, freeing_groups_of_the_dead():
            _tuner(jobs, searcher, folder, max_attempts).fit()
        if searcher.raised is not None:
            raise searcher.raised
        if interrupt.requested:
            raise KeyboardInterrupt
    return searcher.failures


@dataclass(frozen=True)
class _Outcome:
    """Holds what a trial gave: a result, or why there is none."""

    result: HealingResult | None
    error: str | None
    duration_s: float
    worker: WorkerInfo


class HealingTrial(tune.Trainable):
    """Heals the job of its config in one step. The process is reused for the next job."""

    def setup(self, config: dict[str, Any], jobs: Sequence[HealingJob]) -> None:  # type: ignore[override]
        self._jobs = jobs

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        result, error = None, None
        try:
            result = heal(self._jobs[self.config["job"]])
        except Exception as raised:  # Tune would repeat the trial, but `heal` has used all attempts
            error = f"{type(raised).__name__}: {raised}\n{traceback.format_exc()}"
        return {"outcome": _Outcome(result, error, time.monotonic() - start, worker_info()), "done": True}


class _JobSearcher(UnitSearcher[HealingJob, _Outcome]):
    """Hands out the jobs by their numbers."""

    def __init__(
        self,
        jobs: Sequence[HealingJob],
        n_at_once: int,
        interrupt: Interrupt,
        on_result: Callable[[Finished[HealingJob, HealingResult]], None],
        on_failure: Callable[[UnitFailure[HealingJob]], None] | None,
        max_attempts: int,
        watch: Watch[HealingJob],
    ):
        super().__init__(min(n_at_once, len(jobs)), interrupt, max_attempts, watch)
        self.failures: list[UnitFailure[HealingJob]] = []
        self._on_result, self._on_failure = on_result, on_failure
        self._numbers = {job.name: number for number, job in enumerate(jobs)}
        self._waiting = deque(jobs)

    def _next(self) -> HealingJob | None:
        return self._waiting.popleft() if self._waiting else None

    def _exhausted(self) -> bool:
        return not self._waiting

    def _config(self, job: HealingJob) -> dict[str, Any]:
        return {"job": self._numbers[job.name]}

    def _take(self, job: HealingJob, outcome: _Outcome) -> None:
        if outcome.result is None:
            self._fail(job, outcome.error or "no result", 1)
        else:
            self._on_result(Finished(job, outcome.result, outcome.duration_s, outcome.worker))

    def _fail(self, job: HealingJob, error: str, n_attempts: int) -> None:
        self.failures.append(UnitFailure(job, error, n_attempts))
        if self._on_failure is not None:
            self._on_failure(self.failures[-1])


def _tuner(jobs: Sequence[HealingJob], searcher: _JobSearcher, folder: str, max_attempts: int) -> tune.Tuner:
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(HealingTrial, jobs=jobs), tune.PlacementGroupFactory([_NEXT_TO_NOTHING])
        ),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=len(jobs),
            reuse_actors=True,
            trial_name_creator=lambda trial: f"heal_{trial.trial_id}",
            trial_dirname_creator=lambda trial: f"heal_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="healing",
            storage_path=folder,
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=max_attempts - 1),
        ),
    )
