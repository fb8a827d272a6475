"""Holds the state of a run, which lists the records that belong to it; `run.json` stores it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from orchestrator.recipe.errors import InputError
from orchestrator.run.entries import (
    AblationEntry,
    BaselineEntry,
    BranchesEntry,
    Entry,
    Failure,
    FinalistEntry,
    HalvingEntry,
    HealedEntry,
    SpeedFit,
    StageEstimate,
    TimingEntry,
    Trial,
    UnitKeys,
)
from orchestrator.run.folder import RunFolder

RUN_FILE, RECIPE_FILE = "run.json", "recipe.yaml"


REFINED = "refined"
"""The origin of plans that refinement found."""


CANDIDATE_ORIGINS = ("search", "given", REFINED)
"""The origins of plans from which candidates for healing are chosen; every other healed plan is a baseline."""


@dataclass
class RunState:
    """Lists everything that belongs to a run, by the keys of its records; it is the content of `run.json`.

    Attributes:
        sensitivity: The ablations; those on the source of the chosen score come first.
        adaptive: `spent`, `tiers` and `error` of an adaptive sweep; else None.
        stable: `sequences` read `of` all, and `reliability` by treatment, of a sweep that may end early; else None.
        trials: Points of the search.
        baselines: Plans that the candidates are compared with.
        healed: The healed plans.
        finalists: Rows of pareto.csv.
        branches: Healed plans whose branches were measured.
        throughput: Timings of the finalists under the serving conditions.
        speed: The fitted speed models; None if speed is predicted from the bytes of a step.
        lengths: Timings of the finalists over prompt lengths.
        halving: Plans in each rung.
        units: The units that each stage has listed, by the names of `PARTS_OF_STAGES`. Later stages do not list a unit
            again.
        estimates: The expected cost of each stage before the run.
        stage_s: Seconds that each stage took, summed over all calls of the command.
        failures: The units that failed for good.
    """

    model: str
    n_layers: int
    score: str
    environment: dict[str, Any]
    base_key: str | None = None
    sensitivity: list[AblationEntry] = field(default_factory=list)
    adaptive: dict[str, Any] | None = None
    stable: dict[str, Any] | None = None
    trials: list[Trial] = field(default_factory=list)
    baselines: list[BaselineEntry] = field(default_factory=list)
    healed: list[HealedEntry] = field(default_factory=list)
    finalists: list[FinalistEntry] = field(default_factory=list)
    branches: list[BranchesEntry] = field(default_factory=list)
    throughput: list[TimingEntry] = field(default_factory=list)
    speed: SpeedFit | None = None
    lengths: list[TimingEntry] = field(default_factory=list)
    halving: list[HalvingEntry] = field(default_factory=list)
    units: dict[str, list[UnitKeys]] = field(default_factory=dict)
    estimates: list[StageEstimate] = field(default_factory=list)
    stage_s: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `run.json`."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found["units"] = {stage: [unit.to_dict() for unit in units] for stage, units in self.units.items()}
        found |= {name: [entry.to_dict() for entry in found[name]] for name in _ENTRIES}
        return found | {"speed": self.speed and self.speed.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunState:
        """Reads what `to_dict` wrote; lists that an earlier version did not know are empty."""
        entries = {name: [kind.from_dict(entry) for entry in data.get(name, [])] for name, kind in _ENTRIES.items()}
        units = {
            stage: [UnitKeys.from_dict(unit) for unit in listed] for stage, listed in data.get("units", {}).items()
        }
        speed = None if data.get("speed") is None else SpeedFit.from_dict(data["speed"])
        return cls(**{**data, **entries, "units": units, "speed": speed})


_ENTRIES: dict[str, type[Entry]] = {
    "sensitivity": AblationEntry,
    "trials": Trial,
    "baselines": BaselineEntry,
    "healed": HealedEntry,
    "finalists": FinalistEntry,
    "branches": BranchesEntry,
    "throughput": TimingEntry,
    "lengths": TimingEntry,
    "halving": HalvingEntry,
    "estimates": StageEstimate,
    "failures": Failure,
}
"""The type of the entries in each list of the state."""


def load_state(folder: RunFolder) -> RunState:
    """Reads the state of the run in a folder.

    Raises:
        InputError: The folder holds no run.
    """
    try:
        return RunState.from_dict(json.loads(folder.read_bytes(RUN_FILE)))
    except FileNotFoundError:
        raise InputError("DIR", folder, f"has no {RUN_FILE}; give the --out of an earlier run") from None
