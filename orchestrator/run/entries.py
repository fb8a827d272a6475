"""The entries of a run's state: what `run.json` says of each unit that belongs to the run, and of each that failed."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from layerboost.plan import Plan
from layerboost.speed.speed_model import SpeedModel


@dataclass(frozen=True)
class Entry:
    """An entry of a list in `run.json`, as an object with its fields as members.

    A plan or a finalist that an entry holds has its members beside those of the entry, because users read the file.
    """

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the entry, members in the order of its fields."""
        found: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            found |= value.to_dict() if each.name in _INLINED else {each.name: value}
        return found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what `to_dict` wrote; a member that is missing has its default.

        Raises:
            KeyError: a member without a default is missing.
        """
        values: dict[str, Any] = {}
        for each in fields(cls):
            if each.name in _INLINED:
                values[each.name] = _INLINED[each.name].from_dict(data)
            elif each.name in data or each.default is MISSING:
                values[each.name] = data[each.name]
        return cls(**values)


@dataclass(frozen=True)
class AblationEntry(Entry):
    """One treated layer over one source of items, or the cosine distances of all layers.

    Attributes:
        source: the quality's `tasks`, its `text`, or the name of another text.
        context_tokens: tokens of a sequence of the text; None for tasks.
        layer: the treated layer; None for the distances of all.
        treatment: of the layer.
        key: of the record with the scores or the distances.
        base_key: of the scores of the base over the same items; None for distances, which need none.
    """

    source: str
    context_tokens: int | None
    layer: int | None
    treatment: str
    key: str
    base_key: str | None


@dataclass(frozen=True)
class Failure(Entry):
    """A unit that failed for good.

    Attributes:
        stage: where it failed, as progress calls it.
        name: what the unit is called there.
        error: what it failed with; the first line says it.
    """

    stage: str
    name: dict[str, Any]
    error: str


@dataclass(frozen=True)
class Trial(Entry):
    """A point of the search.

    Attributes:
        plan: what was tried.
        origin: what proposed it: a fixed point's name, `given`, `search` or `refined`.
        remove_below, keep_above: thresholds that gave the plan; None for other methods.
        status: `ok` or `failed`.
        error: what it failed with; None for one that did not.
        quality, quality_stderr: by what the search judges by; None if that is not recorded.
        objective: what the search maximises beside speed; None as `quality` is.
        speedup: predicted throughput over the base's; None as `quality` is.
        key: of its scores.
    """

    plan: Plan
    origin: str
    remove_below: float | None = None
    keep_above: float | None = None
    status: str = "ok"
    error: str | None = None
    quality: float | None = None
    quality_stderr: float | None = None
    objective: float | None = None
    speedup: float | None = None
    key: str | None = None

    def proposal(self) -> dict[str, Any]:
        """Returns the members that the record of the trials holds, which say nothing about what the plan is worth."""
        return {name: value for name, value in self.to_dict().items() if name not in _JUDGED}


_JUDGED = ("quality", "quality_stderr", "objective", "speedup", "key")


@dataclass(frozen=True)
class BaselineEntry(Entry):
    """A plan that the candidates are compared with.

    Attributes:
        plan: what is healed.
        origin: name of the baseline.
        speedup: predicted throughput over the untouched model's.
        key: of the plan's scores before healing.
    """

    plan: Plan
    origin: str
    speedup: float
    key: str


@dataclass(frozen=True)
class CurvePoint(Entry):
    """A point of a healed plan's quality curve: a share of the budget, its tokens, and the key of the scores there."""

    share: float
    tokens: int
    key: str


@dataclass(frozen=True)
class HealedEntry(Entry):
    """A healed plan.

    Attributes:
        plan: what was healed.
        origin: of the plan.
        key: of the healing.
        quality_key: of the scores of its checkpoint.
        curve: points before that, the share 0 first; empty where the recipe asks for none.
    """

    plan: Plan
    origin: str
    key: str
    quality_key: str
    curve: tuple[CurvePoint, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the entry, with that of each point."""
        return super().to_dict() | {"curve": [point.to_dict() for point in self.curve]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what `to_dict` wrote."""
        points = tuple(CurvePoint.from_dict(point) for point in data.get("curve", ()))
        return super().from_dict({**data, "curve": points})


@dataclass(frozen=True)
class HalvingEntry(Entry):
    """A plan in a rung of halving.

    Attributes:
        plan: what was healed.
        origin: of the plan.
        rung: number of the rung, the first is 1.
        share: of the budget that the rung heals on.
        speedup: predicted throughput over the base's.
        key: of the healing.
        tokens: that it was healed on; None if it failed.
        quality_key: of its scores after that; None if it failed.
        objective: the search's objective after that; None if it failed.
        survived: whether the plan goes on to the next rung.
    """

    plan: Plan
    origin: str
    rung: int
    share: float
    speedup: float | None
    key: str
    tokens: int | None = None
    quality_key: str | None = None
    objective: float | None = None
    survived: bool = False


@dataclass(frozen=True)
class Finalist(Entry):
    """One model of pareto.csv: a plan on the parent's weights, or healed (then with the key of its healing)."""

    plan: Plan
    origin: str
    healed_key: str | None = None


@dataclass(frozen=True)
class FinalistEntry(Entry):
    """A finalist and the key of its scores."""

    finalist: Finalist
    quality_key: str


@dataclass(frozen=True)
class BranchesEntry(Entry):
    """A healed plan whose branches were checked, and the key of what that gave."""

    finalist: Finalist
    key: str


@dataclass(frozen=True)
class TimingEntry(Entry):
    """A finalist under a serving condition, and the key of its timing."""

    finalist: Finalist
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    key: str


@dataclass(frozen=True)
class UnitKeys(Entry):
    """The records of a unit of work that a stage lists.

    Attributes:
        kind: the folder of their kind.
        keys: of the unit's records.
        is_beside: whether it is work that the stage does beside its units, which is not counted.
    """

    kind: str
    keys: tuple[str, ...]
    is_beside: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Reads what `to_dict` wrote."""
        return cls(data["kind"], tuple(data["keys"]), data["is_beside"])


@dataclass(frozen=True)
class StageEstimate(Entry):
    """What a stage is expected to take.

    Attributes:
        stage: its name.
        units, recorded: units of work, and those of them that are recorded already.
        seconds: of wall clock, for the rest.
        tokens: that the rest is healed on.
        gpus: at work at the same time.
        memory_mib: of one worker.
        disk_mib: of what the rest leaves in the run folder, and of checkpoints while it is under way.
        n_open: units that are expected and cannot be named yet, since they follow from what others give.
    """

    stage: str
    units: int
    recorded: int
    seconds: float
    tokens: int = 0
    gpus: float = 0.0
    memory_mib: float = 0.0
    disk_mib: float = 0.0
    n_open: int = 0

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


@dataclass(frozen=True)
class FittedTiming(Entry):
    """A timing that a speed model was fitted to: its plan, its concurrency, and its key."""

    plan: Plan
    concurrency: int
    key: str


@dataclass(frozen=True)
class SpeedFit:
    """What the speed of all plans is predicted from.

    Attributes:
        measured: the timings.
        models: one for each concurrency whose timings a model could be fitted to.
    """

    measured: tuple[FittedTiming, ...] = ()
    models: tuple[SpeedModel, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of the fit."""
        return {
            "measured": [timing.to_dict() for timing in self.measured],
            "models": [model.to_dict() for model in self.models],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SpeedFit:
        """Reads what `to_dict` wrote."""
        measured = tuple(FittedTiming.from_dict(timing) for timing in data["measured"])
        return cls(measured, tuple(SpeedModel.from_dict(model) for model in data["models"]))


_INLINED: dict[str, Any] = {"plan": Plan, "finalist": Finalist}
"""Fields whose members stand among those of their entry."""
