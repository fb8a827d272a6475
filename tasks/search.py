"""Searches for plans that keep the most quality and decode fastest; each plan is evaluated once.

The search's inputs and the values of the plans alone fix the order of everything that a proposer is asked and told. The
number of workers, the order in which they finish and earlier evaluations do not change it. The proposer is asked for
trial k when it has been told exactly the trials 0 .. k - lag, in order. If it has nothing to propose, it is told one
more trial and asked again, until it knows all of them. A search whose driver died therefore resumes by being run again
with the finished plans as `known`: it takes the same path and evaluates only what is new.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ray import tune

from layerboost.plan import Plan
from layerboost.search.loop import Evaluator, SearchState, TrialResult, check_values
from tasks.cluster.resources import WorkerResources
from tasks.pool.finished import SHRUNK, Finished, WorkerInfo, worker_info
from tasks.pool.pool import Interrupt, UnitFailure, finish_on_interrupt
from tasks.pool.watch import UNWATCHED, Watch, ends_if_hung
from tasks.tune import UnitSearcher, quiet, temporary_folder


def run_search(
    state: SearchState,
    make_evaluator: Callable[[], Evaluator],
    resources: WorkerResources,
    *,
    on_plan: Callable[[Finished[Plan, dict[str, Any]]], None],
    on_failure: Callable[[UnitFailure[Plan]], None] | None = None,
    max_attempts: int = 3,
    storage_path: str | None = None,
    watch: Watch[Plan] = UNWATCHED,
) -> list[TrialResult]:
    """Searches with Ray Tune; the trial processes keep their evaluator, and with it the model, loaded.

    A first Ctrl-C lets the running trials finish, hands their plans over and raises KeyboardInterrupt.

    Args:
        state: a search that has not begun.
        make_evaluator: picklable; called once in each trial process.
        resources: the resources of the trials; at most `n_workers` run together.
        on_plan: called in this process with each plan and its values as soon as they are there, so that they can be
            recorded at once. An error that it raises ends the search when the running trials are done.
        on_failure: called in this process with each plan that failed for good.
        max_attempts: the number of attempts of a plan whose process dies or whose evaluator raises.
        storage_path: the folder for Tune's own files; None takes a temporary folder and removes it.
        watch: what is reported about each plan, and when a trial's process that gives no result ends itself.

    Returns:
        All points: the fixed ones first, then the trials in their order.
    """
    from tasks.search import run_trials

    with finish_on_interrupt() as interrupt:
        run_trials(state, make_evaluator, resources, interrupt, on_plan, on_failure, max_attempts, storage_path, watch)
        if interrupt.requested:
            raise KeyboardInterrupt
    return state.results()


class PlanTrial(tune.Trainable):
    """Evaluates the plan in its config in one step. The process is reused for the next plan.

    The evaluator is made in the first step and not in `setup`. Tune gives a waiting trial to the first free process and
    ends the process that was starting for it, so processes must start faster than trials end; otherwise only one
    process would ever work.
    """

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        make_evaluator: Callable[[], Evaluator],
        max_attempts: int = 3,
        timeout_s: float | None = None,
    ) -> None:
        self._make_evaluator, self._max_attempts, self._timeout_s = make_evaluator, max_attempts, timeout_s
        self._evaluate: Evaluator | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        plan, worker = Plan.from_dict(self.config), worker_info()
        outcome: dict[str, Any] = {"values": None, "error": None, "n_attempts": 0}
        while outcome["values"] is None and outcome["n_attempts"] < self._max_attempts:
            outcome["n_attempts"] += 1
            try:
                if self._evaluate is None:
                    self._evaluate = self._make_evaluator()
                start = time.perf_counter()
                with ends_if_hung(self._timeout_s):
                    outcome["values"] = values = dict(self._evaluate(plan))
                worker = replace(worker, shrunk=values.pop(SHRUNK, None))
                outcome["evaluation_s"] = time.perf_counter() - start
                outcome["error"] = check_values(values)
            except Exception as error:  # if it reached Tune, the process with its model would end
                outcome["error"] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        outcome["worker"] = replace(worker, attempt=max(1, outcome["n_attempts"])).to_dict()
        return {"outcome": json.dumps(outcome), "done": True}  # as text, because Tune would flatten a dictionary


class StateSearcher(UnitSearcher[Plan, str]):
    """Hands out the plans of a SearchState."""

    def __init__(
        self,
        state: SearchState,
        n_workers: int,
        interrupt: Interrupt,
        on_plan: Callable[[Finished[Plan, dict[str, Any]]], None],
        on_failure: Callable[[UnitFailure[Plan]], None] | None,
        max_attempts: int,
        watch: Watch[Plan],
    ):
        super().__init__(n_workers, interrupt, max_attempts, watch)
        self._state, self._on_plan, self._on_failure = state, on_plan, on_failure
        self._ahead: Plan | None = None

    def peek(self) -> Plan | None:
        """Returns the next plan; None if there is nothing to evaluate now."""
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
            worker = WorkerInfo.from_dict(found["worker"])
            self._on_plan(Finished(plan, found["values"], found["evaluation_s"], worker))

    def _fail(self, plan: Plan, error: str, n_attempts: int) -> None:
        self._state.finish(plan, None, error)
        if self._on_failure is not None:
            self._on_failure(UnitFailure(plan, error, n_attempts))


def run_trials(
    state: SearchState,
    make_evaluator: Callable[[], Evaluator],
    resources: WorkerResources,
    interrupt: Interrupt,
    on_plan: Callable[[Finished[Plan, dict[str, Any]]], None],
    on_failure: Callable[[UnitFailure[Plan]], None] | None,
    max_attempts: int,
    storage_path: str | None,
    watch: Watch[Plan],
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
