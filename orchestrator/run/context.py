"""Gives the stages of a run what they share: its inputs, its folder, its records, the cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from layerboost.checkpoint import ModelSource
from layerboost.evaluation.scores import QualitySpec
from layerboost.storage.errors import DiskFullError, is_disk_full
from orchestrator.recipe.errors import InputError
from orchestrator.run.entries import Failure
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import PARTS_OF_STAGES, SCORES, Kind, kind_made_by
from orchestrator.run.placement import Placement, placed
from orchestrator.run.progress import Progress
from orchestrator.run.records import find_record, find_records, time_and_worker
from orchestrator.run.state import RUN_FILE, RunState
from orchestrator.run.units import Identity, Look, StageUnits, Unit, recorded_seconds
from tasks.cluster import connection
from tasks.cluster.resources import WorkerResources
from tasks.evaluation import EvaluationUnit, evaluate_units
from tasks.pool.finished import Finished
from tasks.pool.watch import Watch

Watched = TypeVar("Watched")

MAPS_FOLDER = "maps"
"""Folder inside the run folder that holds the maps of affine layers."""

_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR = 600.0, 20.0


class RunContext:
    """Represents one run of a recipe on a folder.

    Args:
        inputs: Everything that changes its results.
        folder: Folder of its records.
        state: Lists of the records that belong to it, filled by the stages so far.
        progress: Receives its progress.
        address: Address of the cluster; None for this machine.
        is_ahead: Whether stages are only asked for their units, before a run or for `--dry-run`. They then start and
            record nothing, and the results on which their units depend may be missing.

    Attributes:
        listings: The units that each stage has listed so far, by the names of `PARTS_OF_STAGES`.
    """

    def __init__(
        self,
        inputs: RunInputs,
        folder: RunFolder,
        state: RunState,
        progress: Progress,
        address: str | None = None,
        *,
        is_ahead: bool = False,
    ):
        self.inputs, self.folder, self.state, self.progress, self.address = inputs, folder, state, progress, address
        self.is_ahead = is_ahead
        self.listings: dict[str, StageUnits] = {}

    @cached_property
    def source(self) -> ModelSource:
        """The source from which workers load the parent, with the maps that its affine layers get."""
        source = self.inputs.source
        return source if self.inputs.maps_spec is None else replace(source, maps=self.maps_file)

    @property
    def maps_file(self) -> str:
        """The path or URL of the maps of affine layers, which stage `evaluate` fits."""
        return self.folder.place(self.maps_name)

    @property
    def maps_name(self) -> str:
        """The name of that file in the run folder."""
        return f"{MAPS_FOLDER}/{unit_key(self.inputs.maps())}.safetensors"

    # Records

    def record(self, stage: str, identity: Identity, result: dict[str, Any]) -> None:
        """Writes the record of a finished unit that a stage made, filed by the kind that the stage makes."""
        self.record_all(stage, [(identity, result)])

    def record_all(self, stage: str, results: Sequence[tuple[Identity, dict[str, Any]]]) -> None:
        """Writes several records in parallel, from the identity and result of each."""
        self.folder.write_records(kind_made_by(stage).folder, results)
        for identity, result in results:
            self.progress.recorded(stage, unit_key(identity), identity, result)

    def recorded(self, identity: Identity, kind: Kind = SCORES) -> dict[str, Any] | None:
        """Returns the recorded result of a unit, whichever stage made it; None if it is not recorded."""
        return find_record(self.folder, unit_key(identity), kind)

    def all_recorded(self, identities: Sequence[Identity], kind: Kind = SCORES) -> list[dict[str, Any] | None]:
        """Returns the recorded results of several units, read in parallel; None for each that is not recorded."""
        return find_records(self.folder, [unit_key(identity) for identity in identities], kind)

    def failed(self, stage: str, name: dict[str, Any], error: str) -> None:
        """Remembers and reports a unit that failed for good.

        Raises:
            DiskFullError: It failed because a disk is full, and so would the units that follow.
        """
        if is_disk_full(RuntimeError(error)):
            raise DiskFullError(error.splitlines()[0])
        self.progress.finish_unit(0.0, status="failed", **name, error=error.splitlines()[0])
        self.state.failures.append(Failure(stage, name, error))

    def save(self) -> None:
        """Writes the state of the run, with its records and failures, to `run.json`."""
        self.folder.write_text(RUN_FILE, json.dumps(self.state.to_dict(), indent=1))

    # Units

    def list_units(
        self,
        stage: str,
        units: Sequence[Unit],
        *,
        n_open: int = 0,
        beside: Sequence[Unit] = (),
        look: Look | None = None,
        adds: bool = False,
    ) -> StageUnits:
        """Lists the units of a stage, for the stage itself and for everything that counts units.

        A unit belongs to the first stage that lists it. It is left out here if an earlier stage has done it or, ahead
        of the run, if an earlier stage will do it.

        Args:
            stage: One of `PARTS_OF_STAGES`, or the name of a part of one in progress; only the former are kept.
            units: The units that can be named, each once.
            n_open: Number of units that are expected and cannot be named yet.
            beside: Additional work that makes records and is not counted.
            look: Returns which units are recorded; None looks for their records.
            adds: Whether units that the stage listed earlier stay in its list.
        """
        look = look or (lambda units: recorded_seconds(self.folder, units))
        before = self._keys_listed_before(stage)
        looked = dict(zip(units, look(units), strict=True))
        kept = [
            unit
            for unit, took in looked.items()
            if (unit.kind.folder, unit.key) not in before
            or (took is None and not self.is_ahead)  # the earlier stage failed with this unit, so it is tried again
        ]
        also = tuple(unit for unit in beside if (unit.kind.folder, unit.key) not in before)
        seconds = {unit.key: took for unit in kept if (took := looked[unit]) is not None}
        listing = StageUnits(stage, tuple(kept), seconds, look, n_open, also)
        if stage in PARTS_OF_STAGES:
            listed = listing.keys()
            if adds:
                listed = [*(keys for keys in self.state.units.get(stage, ()) if keys not in listed), *listed]
            else:
                self.listings[stage] = listing
            self.state.units[stage] = listed
        return listing

    def _keys_listed_before(self, stage: str) -> set[tuple[str, str]]:
        if stage not in PARTS_OF_STAGES:
            return set()
        earlier = PARTS_OF_STAGES[: PARTS_OF_STAGES.index(stage)]
        return {(unit.kind, key) for name in earlier for unit in self.state.units.get(name, ()) for key in unit.keys}

    def list_scores(
        self,
        stage: str,
        spec: QualitySpec,
        units: Mapping[EvaluationUnit, dict[str, Any]],
        healed_keys: Mapping[EvaluationUnit, str] | None = None,
        *,
        n_open: int = 0,
        adds: bool = False,
    ) -> StageUnits:
        """Lists the units of a stage that judges; see `evaluate` and `list_units`."""
        healed_keys = healed_keys or {}
        named = [
            Unit(SCORES, (self.inputs.scores(unit, spec, healed_keys.get(unit)),), name, unit)
            for unit, name in units.items()
        ]
        return self.list_units(stage, named, n_open=n_open, adds=adds)

    def is_settled(self, *stages: str) -> bool:
        """Returns whether all units of some stages are recorded, so that the units of later stages are known.

        During a run this always holds when the next stage begins, because a unit that is missing then has failed.
        """
        return not self.is_ahead or all(self.listings[stage].is_complete for stage in stages if stage in self.listings)

    def begin(self, listing: StageUnits, *, name: str | None = None, workers: int = 1) -> None:
        """Tells progress that a stage begins with these units.

        Args:
            listing: The units.
            name: Name of the stage in progress; None takes the listing's.
            workers: Number of units that run at the same time.
        """
        self.progress.start_stage(
            name or listing.stage,
            listing.n_expected,
            recorded=listing.n_recorded,
            workers=workers,
            n_open=listing.n_open,
        )

    def evaluate(
        self,
        stage: str,
        spec: QualitySpec,
        units: dict[EvaluationUnit, dict[str, Any]],
        healed_keys: dict[EvaluationUnit, str] | None = None,
        *,
        adds: bool = False,
    ) -> bool:
        """Judges the units that are not recorded.

        Args:
            stage: The stage that makes the records.
            spec: The quality by which they are judged.
            units: The units, each with its name.
            healed_keys: Key of the healing, for units that judge a healed checkpoint.
            adds: As in `list_units`.

        Returns:
            Whether all units are recorded now.
        """
        listing = self.list_scores(stage, spec, units, healed_keys, adds=adds)
        identities = {unit.work: unit.identity for unit in listing.units}
        todo = [unit.work for unit in listing.todo]
        workers = self.workers() if todo else None
        self.begin(listing, workers=workers.n_workers if workers else 1)

        def on_result(done: Finished[EvaluationUnit, dict[str, Any]]) -> None:
            self.record(stage, identities[done.unit], {**done.result, **time_and_worker(done)})
            self.progress.finish_unit(done.seconds, **units[done.unit])

        failures = []
        if workers:
            watch = self.watch(stage, units.__getitem__, n_workers=workers.n_workers)
            # Stage `evaluate` judges nothing but the parent, and fits the maps that other stages load.
            source = self.inputs.source if stage == "evaluate" else self.source
            failures = evaluate_units(todo, source, spec, workers, on_result=on_result, watch=watch)
        for failure in failures:
            self.failed(stage, units[failure.unit], failure.error)
        self.progress.end_stage()
        return not failures

    # Watching

    def watch(
        self, stage: str, name: Callable[[Watched], dict[str, Any]], *, n_workers: int = 1, of_each: int = 1
    ) -> Watch[Watched]:
        """Returns the watch of a stage's units, which reports their events and ends units that hang.

        Args:
            stage: Name of the stage in progress.
            name: Returns the name of a unit.
            n_workers, of_each: As in `unit_timeout_s`.
        """
        return Watch(
            self.unit_timeout_s(stage, n_workers=n_workers, of_each=of_each),
            lambda event: self.progress.unit_event(event, name(event.unit)),
        )

    def unit_timeout_s(self, stage: str, *, n_workers: int = 1, of_each: float = 1) -> float | None:
        """Returns the seconds after which a unit counts as hung.

        The value comes from the recipe. With `auto` it is twenty times the expected time and at least ten minutes; None
        if there is no estimate.

        Args:
            stage: Name of the stage in progress.
            n_workers: Number of workers that share the stage's expected time.
            of_each: Size of a unit, in units of the estimate.
        """
        asked = self.inputs.recipe.placement.unit_timeout_s
        if isinstance(asked, float):
            return asked
        for entry in self.state.estimates:
            n_left = entry.units - entry.recorded
            if entry.stage == stage.split()[0] and n_left > 0:  # a rung is a part of `halving`
                expected_s = entry.seconds * n_workers / n_left * of_each
                return max(_LEAST_TIMEOUT_S, _TIMEOUT_FACTOR * expected_s)
        return None

    # The cluster; it is started or joined only when there is something to do

    def connect(self) -> None:
        connection.connect(self.address)

    def placement(self) -> Placement:
        """Returns the recipe's placement on the cluster's nodes of this moment."""
        self.connect()
        return Placement(self.inputs.recipe, connection.resources(), connection.addable())

    def workers(self) -> WorkerResources:
        """Returns the workers for units of evaluation.

        Raises:
            InputError: The cluster can never hold them.
        """
        return placed(lambda: self.placement().evaluating())

    def healing_workers(self, n_jobs: int = 1) -> WorkerResources:
        """Returns the workers of one healing while `n_jobs` run side by side.

        Raises:
            InputError: The cluster can never hold them.
        """
        return placed(lambda: self.placement().healing(n_jobs))

    def n_workers(self) -> int:
        """Returns the number of workers that fit now; with `auto` it grows with the cluster. It raises no error."""
        try:
            return self.workers().n_workers
        except InputError:
            return 1  # nodes have left, but lost workers are still replaced as far as there is room
