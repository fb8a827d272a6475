"""Defines units of work: the work of a stage, which of it is recorded, and how `run.json` lists it.

Each stage lists its units (`RunContext.list_units`) and runs those that are not recorded. Progress, `--dry-run`, the
estimate, the disk check and the cost table count the units of these lists, and no other records in the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.run.entries import SpeedFit, UnitKeys
from orchestrator.run.folder import RunFolder, unit_key
from orchestrator.run.kinds import (
    CURVE,
    HALVING,
    HEALINGS,
    LENGTHS,
    RUNGS,
    SCORES,
    SENSITIVITY,
    SPEED,
    THROUGHPUT,
    TIMINGS,
    Kind,
)
from orchestrator.run.records import each_of_kind
from orchestrator.run.state import RunState

Identity = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Unit:
    """Describes a unit of work of a stage.

    Attributes:
        kind: Kind of its records.
        identities: Identity of each of its records. A unit has one record, except that a share of a sweep has one for
            each treatment.
        name: Name in progress and failures, field by field.
        work: Description of the work for the code that does it; the stage chooses its type.
    """

    kind: Kind
    identities: tuple[Identity, ...]
    name: Mapping[str, Any]
    work: Any = None

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of its records."""
        return tuple(unit_key(identity) for identity in self.identities)

    @property
    def identity(self) -> Identity:
        """The identity of its only record."""
        (identity,) = self.identities
        return identity

    @property
    def key(self) -> str:
        """The key of its first record, which distinguishes it from every other unit."""
        return self.keys[0]


Look = Callable[[Sequence[Unit]], list[float | None]]
"""Returns the seconds that each of some units took; None for a unit that has to run."""


@dataclass(frozen=True, eq=False)
class StageUnits:
    """Lists the units of a stage by what is known now.

    Attributes:
        stage: One of `PARTS_OF_STAGES`.
        units: The units that can be named, in the order of work.
        seconds: Seconds that each recorded unit took, by its key.
        look: Returns which units are recorded.
        n_open: Number of further expected units that cannot be named yet, because they depend on results of others.
        beside: Additional work that makes records and is not counted, such as joining the shares of a sweep to scores.
    """

    stage: str
    units: tuple[Unit, ...]
    seconds: Mapping[str, float]
    look: Look
    n_open: int = 0
    beside: tuple[Unit, ...] = ()

    @property
    def recorded(self) -> list[Unit]:
        return [unit for unit in self.units if unit.key in self.seconds]

    @property
    def todo(self) -> list[Unit]:
        """The named units that are not recorded."""
        return [unit for unit in self.units if unit.key not in self.seconds]

    @property
    def n_recorded(self) -> int:
        return len(self.recorded)

    @property
    def n_expected(self) -> int:
        """The number of all units, including open ones."""
        return len(self.units) + self.n_open

    @property
    def is_complete(self) -> bool:
        """Whether all units are known and recorded."""
        return not self.todo and not self.n_open

    def n_left_now(self) -> int:
        """Returns the number of units that are open or not recorded by now."""
        return self.look(self.units).count(None) + self.n_open

    def keys(self) -> list[UnitKeys]:
        """Returns the lists of keys that `run.json` holds for the stage."""
        named = [UnitKeys(unit.kind.folder, unit.keys) for unit in self.units]
        return named + [UnitKeys(unit.kind.folder, unit.keys, is_beside=True) for unit in self.beside]


def recorded_seconds(folder: RunFolder, units: Sequence[Unit]) -> list[float | None]:
    """Returns the seconds that each unit took by its records; None for a unit with missing records."""
    found: dict[tuple[Kind, str], float] = {}
    for kind in {unit.kind for unit in units}:
        keys = dict.fromkeys(key for unit in units if unit.kind == kind for key in unit.keys)
        for record in each_of_kind(folder, keys, kind):
            if record is not None:
                found[kind, record.key] = record.result.get("duration_s", 0.0)
    took = [[found.get((unit.kind, key)) for key in unit.keys] for unit in units]
    return [None if None in each else sum(seconds for seconds in each if seconds is not None) for each in took]


def listed_keys(state: RunState, stage: str) -> list[UnitKeys]:
    """Returns the records of the units that a run lists for a stage.

    The `run.json` of earlier versions does not list units. For such a file they are taken from its lists of results,
    which do not include the shares of sweeps and the sampled documents.
    """
    if state.units:
        return list(state.units.get(stage, ()))
    measured: list[str | None] = [entry.key for entry in (state.speed or SpeedFit()).measured]
    points = [point.key for healed in state.healed for point in healed.curve]
    found: dict[str, tuple[Kind, list[str | None]]] = {
        "evaluate": (SCORES, [state.base_key]),
        SENSITIVITY: (SCORES, [entry.key for entry in state.sensitivity]),
        SPEED: (TIMINGS, measured),
        "search": (SCORES, [trial.key for trial in state.trials]),
        HALVING: (RUNGS, [entry.key for entry in state.halving]),
        "heal": (HEALINGS, [entry.key for entry in state.healed]),
        CURVE: (SCORES, [*(entry.key for entry in state.baselines), *points]),
        "measure": (
            SCORES,
            [*(entry.quality_key for entry in state.finalists), *(entry.key for entry in state.branches)],
        ),
        THROUGHPUT: (TIMINGS, [entry.key for entry in state.throughput]),
        LENGTHS: (TIMINGS, [entry.key for entry in state.lengths]),
    }
    kind, keys = found.get(stage, (SCORES, []))
    listed = [UnitKeys(kind.folder, (key,)) for key in dict.fromkeys(keys) if key is not None]
    if stage == HALVING:
        judged = [entry.quality_key for entry in state.halving if entry.quality_key is not None]
        listed += [UnitKeys(SCORES.folder, (key,), is_beside=True) for key in judged]
    return listed
