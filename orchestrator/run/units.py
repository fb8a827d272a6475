"""Units of work: what a stage has to do, which of it is recorded, and what `run.json` lists of it.

Each stage lists its units (`RunContext.list_units`) and does those that are not recorded. Progress, `--dry-run`, the
estimate, the disk check and the cost table count the units of these lists, and nothing else that lies in the folder.
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
    """A unit of work of a stage.

    Attributes:
        kind: of its records.
        identities: what changes its result, of each of its records: one, but for a share of a sweep, which has one for
            each treatment.
        name: what progress and failures call it, field by field.
        work: what is handed to who does it, as the stage likes.
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
        """What changes its result, where it has one record."""
        (identity,) = self.identities
        return identity

    @property
    def key(self) -> str:
        """The key of its first record, which tells it from every other unit."""
        return self.keys[0]


Look = Callable[[Sequence[Unit]], list[float | None]]
"""The seconds that each of some units took, None for each that is to do."""


@dataclass(frozen=True, eq=False)
class StageUnits:
    """The units of a stage by what is known now.

    Attributes:
        stage: one of `PARTS_OF_STAGES`.
        units: those that can be named, in the order of work.
        seconds: by key, what each of them that is recorded took.
        n_open: how many more are expected that cannot be named yet, since they follow from what others give.
        beside: work that makes records and that no progress counts, such as joining the shares of a sweep to scores.
        look: says which units are recorded.
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
        """The units that can be done now."""
        return [unit for unit in self.units if unit.key not in self.seconds]

    @property
    def n_recorded(self) -> int:
        return len(self.recorded)

    @property
    def n_expected(self) -> int:
        """All units, with those that are open."""
        return len(self.units) + self.n_open

    @property
    def is_complete(self) -> bool:
        """Whether everything is known and recorded."""
        return not self.todo and not self.n_open

    def n_left_now(self) -> int:
        """Units that are to do or open by what is recorded by now."""
        return self.look(self.units).count(None) + self.n_open

    def keys(self) -> list[UnitKeys]:
        """What `run.json` lists of the stage."""
        named = [UnitKeys(unit.kind.folder, unit.keys) for unit in self.units]
        return named + [UnitKeys(unit.kind.folder, unit.keys, is_beside=True) for unit in self.beside]


def recorded_seconds(folder: RunFolder, units: Sequence[Unit]) -> list[float | None]:
    """The seconds that each unit took by its records; None for each that has not all of them."""
    found: dict[tuple[Kind, str], float] = {}
    for kind in {unit.kind for unit in units}:
        keys = dict.fromkeys(key for unit in units if unit.kind == kind for key in unit.keys)
        for record in each_of_kind(folder, keys, kind):
            if record is not None:
                found[kind, record.key] = record.result.get("duration_s", 0.0)
    took = [[found.get((unit.kind, key)) for key in unit.keys] for unit in units]
    return [None if None in each else sum(seconds for seconds in each if seconds is not None) for each in took]


def listed_keys(state: RunState, stage: str) -> list[UnitKeys]:
    """The records of the units that a run lists for a stage.

    The `run.json` of earlier versions does not list units; there they are taken from what it lists of their results,
    which leaves out the shares of sweeps and the sampled documents.
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
