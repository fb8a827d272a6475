"""What the stages of a run share: its inputs, its folder, its records, the cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from layerboost.evaluation.scores import QualitySpec
from layerboost.storage.errors import DiskFullError, is_disk_full
from orchestrator.recipe.errors import InputError
from orchestrator.run.entries import Failure
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import SCORE_STAGES
from orchestrator.run.placement import Placement, placed
from orchestrator.run.progress import Progress
from orchestrator.run.records import find_record, find_records, time_and_worker
from orchestrator.run.state import RUN_FILE, RunState
from tasks.cluster import connection
from tasks.cluster.resources import WorkerResources
from tasks.evaluation import EvaluationUnit, evaluate_units
from tasks.pool.finished import Finished
from tasks.pool.watch import Watch

Identity = dict[str, Any]
Unit = TypeVar("Unit")

_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR = 600.0, 20.0


class RunContext:
    """One run of a recipe on a folder."""

    def __init__(
        self, inputs: RunInputs, folder: RunFolder, state: RunState, progress: Progress, address: str | None = None
    ):
        self.inputs, self.folder, self.state, self.progress, self.address = inputs, folder, state, progress, address

    # Records

    def record(self, stage: str, identity: Identity, result: dict[str, Any]) -> None:
        """Writes the record of a finished unit."""
        self.record_all(stage, [(identity, result)])

    def record_all(self, stage: str, results: Sequence[tuple[Identity, dict[str, Any]]]) -> None:
        """Writes several records side by side: identity and result of each."""
        self.folder.write_records(stage, results)
        for identity, result in results:
            self.progress.recorded(stage, unit_key(identity), identity, result)

    def recorded(self, identity: Identity, stages: Sequence[str] = SCORE_STAGES) -> dict[str, Any] | None:
        """The result of a unit, whichever of the stages made it."""
        return find_record(self.folder, unit_key(identity), stages)

    def all_recorded(
        self, identities: Sequence[Identity], stages: Sequence[str] = SCORE_STAGES
    ) -> list[dict[str, Any] | None]:
        """The results of several units, None for each that is not recorded, read side by side."""
        return find_records(self.folder, [unit_key(identity) for identity in identities], stages)

    def failed(self, stage: str, name: dict[str, Any], error: str) -> None:
        """Remembers a unit that failed for good, and says so.

        Raises:
            DiskFullError: if it failed since a disk is full, as would those that follow.
        """
        if is_disk_full(RuntimeError(error)):
            raise DiskFullError(error.splitlines()[0])
        self.progress.finish_unit(0.0, status="failed", **name, error=error.splitlines()[0])
        self.state.failures.append(Failure(stage, name, error))

    def save(self) -> None:
        """Writes which records belong to this run, and what failed."""
        self.folder.write_text(RUN_FILE, json.dumps(self.state.to_dict(), indent=1))

    # Units

    def evaluate(
        self,
        stage: str,
        spec: QualitySpec,
        units: dict[EvaluationUnit, dict[str, Any]],
        healed_keys: dict[EvaluationUnit, str] | None = None,
    ) -> bool:
        """Judges the units that are not recorded.

        Args:
            stage: whose records they become.
            spec: what they are judged by.
            units: what each is called.
            healed_keys: of units that judge a healed checkpoint, the key of its healing.

        Returns:
            Whether all are recorded now.
        """
        healed_keys = healed_keys or {}
        identities = {unit: self.inputs.scores(unit, spec, healed_keys.get(unit)) for unit in units}
        todo = [unit for unit, found in zip(units, self.all_recorded(list(identities.values()))) if found is None]
        workers = self.workers() if todo else None
        self.progress.start_stage(
            stage, len(units), recorded=len(units) - len(todo), workers=workers.n_workers if workers else 1
        )

        def on_result(done: Finished[EvaluationUnit, dict[str, Any]]) -> None:
            self.record(stage, identities[done.unit], {**done.result, **time_and_worker(done)})
            self.progress.finish_unit(done.seconds, **units[done.unit])

        failures = []
        if workers:
            watch = self.watch(stage, units.__getitem__, n_workers=workers.n_workers)
            failures = evaluate_units(todo, self.inputs.source, spec, workers, on_result=on_result, watch=watch)
        for failure in failures:
            self.failed(stage, units[failure.unit], failure.error)
        self.progress.end_stage()
        return not failures

    # Watching

    def watch(
        self, stage: str, name: Callable[[Unit], dict[str, Any]], *, n_workers: int = 1, of_each: int = 1
    ) -> Watch[Unit]:
        """How the units of a stage are watched: told to progress, and ended where they hang.

        Args:
            stage: as the run's estimate calls it.
            name: what each unit is called.
            n_workers, of_each: as in `unit_timeout_s`.
        """
        return Watch(
            self.unit_timeout_s(stage, n_workers=n_workers, of_each=of_each),
            lambda event: self.progress.unit_event(event, name(event.unit)),
        )

    def unit_timeout_s(self, stage: str, *, n_workers: int = 1, of_each: float = 1) -> float | None:
        """When a unit is taken for hung: as the recipe says, else far beyond what is expected; None without estimate.

        Args:
            n_workers: that share the stage's expected time.
            of_each: how many of the estimate's units a unit holds, or which part of one.
        """
        asked = self.inputs.recipe.placement.unit_timeout_s
        if isinstance(asked, float):
            return asked
        for entry in self.state.estimates:
            n_left = entry["units"] - entry["recorded"]
            if entry["stage"] == stage and n_left > 0:
                expected_s = entry["seconds"] * n_workers / n_left * of_each
                return max(_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR * expected_s)
        return None

    # The cluster, which starts or is joined only when there is something to do

    def connect(self) -> None:
        connection.connect(self.address)

    def placement(self) -> Placement:
        """Returns the recipe's placement on the cluster's nodes of this moment."""
        self.connect()
        return Placement(self.inputs.recipe, connection.resources(), connection.addable())

    def workers(self) -> WorkerResources:
        """Returns the workers for units of evaluation.

        Raises:
            InputError: the cluster can never hold them.
        """
        return placed(lambda: self.placement().evaluating())

    def healing_workers(self, n_jobs: int = 1) -> WorkerResources:
        """Returns the workers of one healing while `n_jobs` run side by side.

        Raises:
            InputError: the cluster can never hold them.
        """
        return placed(lambda: self.placement().healing(n_jobs))

    def n_workers(self) -> int:
        """How many workers there may be by now: with `auto`, more when the cluster has grown. Never an error."""
        try:
            return self.workers().n_workers
        except InputError:
            return 1  # nodes have left; those that are at work are replaced as far as there is room
