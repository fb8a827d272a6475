"""Defines the entries of a run's state: `run.json` has one for each unit of the run, and one for each failure."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from layerboost.plan import Plan
from layerboost.speed.speed_model import SpeedModel


@dataclass(frozen=True)
class Entry:
    """Represents an entry of a list in `run.json`: a JSON object whose members are the fields.

    The members of a plan or a finalist stand directly among those of the entry, because users read the file.
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
        """Reads what `to_dict` wrote; a missing member gets its default.

        Raises:
            KeyError: A member without a default is missing.
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
    """Lists one treated layer over one source of items, or the cosine distances of all layers.

    Attributes:
        source: The quality's `tasks`, its `text`, or the name of another text.
        context_tokens: Tokens of a sequence of the text; None for tasks.
        layer: The treated layer; None for the distances of all layers.
        treatment: Treatment of the layer.
        key: Key of the record with the scores or the distances.
        base_key: Key of the base's scores over the same items; None for distances, which need no base.
    """

    source: str
    context_tokens: int | None
    layer: int | None
    treatment: str
    key: str
    base_key: str | None


@dataclass(frozen=True)
class Failure(Entry):
    """Describes a unit that failed for good.

    Attributes:
        stage: Name in progress of the stage in which it failed.
        name: Name of the unit in that stage.
        error: The error; its first line is the message.
    """

    stage: str
    name: dict[str, Any]
    error: str


@dataclass(frozen=True)
class Trial(Entry):
    """Describes a point of the search.

    Attributes:
        plan: The plan that was tried.
        origin: The source of the plan: a fixed point's name, `given`, `search` or `refined`.
        remove_below, keep_above: Thresholds that gave the plan; None for other methods.
        status: `ok`, `failed`, or `open` if it is not evaluated yet.
        error: The error of a failed point; else None.
        quality, quality_stderr: Quality as the search measures it; None if it is not recorded.
        objective: What the search maximises besides speed; None if `quality` is None.
        speedup: Predicted throughput divided by the base's; None if `quality` is None.
        key: Key of its scores on all items.
        share: Share of the items that it was judged on; below 1 if it did not lead the race.
        beaten_by: `plan_id` of a plan that is as fast and better with the race's confidence; None if it is not beaten.
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
    share: float = 1.0
    beaten_by: str | None = None

    def proposal(self) -> dict[str, Any]:
        """Returns the members for the record of the trials, which leave out everything measured of the plan."""
        return {name: value for name, value in self.to_dict().items() if name not in _JUDGED}


_JUDGED = ("quality", "quality_stderr", "objective", "speedup", "key", "share", "beaten_by")


@dataclass(frozen=True)
class BaselineEntry(Entry):
    """Describes a plan that the candidates are compared with.

    Attributes:
        plan: The plan that is healed.
        origin: Name of the baseline.
        speedup: Predicted throughput divided by the untouched model's.
        key: Key of the plan's scores before healing.
    """

    plan: Plan
    origin: str
    speedup: float
    key: str


@dataclass(frozen=True)
class CurvePoint(Entry):
    """Describes a point of a healed plan's quality curve: a share of the budget, its tokens, and its scores' key."""

    share: float
    tokens: int
    key: str


@dataclass(frozen=True)
class HealedEntry(Entry):
    """Describes a healed plan.

    Attributes:
        plan: The plan.
        origin: Origin of the plan.
        key: Key of the healing.
        quality_key: Key of the scores of its checkpoint.
        curve: Earlier points of its quality curve, share 0 first; empty if the recipe asks for no curve.
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
    """Describes a plan in a rung of halving.

    Attributes:
        plan: The plan.
        origin: Origin of the plan.
        rung: Number of the rung; the first is 1.
        share: Share of the budget that the rung heals on.
        speedup: Predicted throughput divided by the base's.
        key: Key of the healing.
        tokens: Number of tokens that it was healed on; None if healing failed.
        quality_key: Key of its scores after healing; None if it has none.
        objective: The search's objective after healing; None if it has no scores.
        survived: Whether the plan goes on to the next rung.
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
    """Describes one model of pareto.csv: a plan on the parent's weights, or a healed plan with the healing's key."""

    plan: Plan
    origin: str
    healed_key: str | None = None


@dataclass(frozen=True)
class FinalistEntry(Entry):
    """Lists a finalist and the key of its scores."""

    finalist: Finalist
    quality_key: str


@dataclass(frozen=True)
class BranchesEntry(Entry):
    """Lists a healed plan whose branches were measured, and the key of that record."""

    finalist: Finalist
    key: str


@dataclass(frozen=True)
class TimingEntry(Entry):
    """Lists a finalist under a serving condition, and the key of its timing."""

    finalist: Finalist
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    key: str


@dataclass(frozen=True)
class UnitKeys(Entry):
    """Lists the records of a unit of work of a stage.

    Attributes:
        kind: Folder of their kind.
        keys: Keys of the unit's records.
        is_beside: Whether it is additional work of the stage that is not counted as a unit.
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
    """Holds the expected cost of a stage.

    Attributes:
        stage: Name of the stage.
        units, recorded: Number of units, and of those that are already recorded.
        seconds: Wall-clock seconds of the remaining units.
        tokens: Tokens on which the remaining units are healed.
        gpus: Number of GPUs in use at the same time.
        memory_mib: Memory of one worker.
        disk_mib: Size of the files that the remaining units leave in the run folder, and of checkpoints meanwhile.
        n_open: Number of units that cannot be named yet, because they depend on the results of others.
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
    """Lists a timing that a speed model was fitted to: its plan, its concurrency, and its key."""

    plan: Plan
    concurrency: int
    key: str


@dataclass(frozen=True)
class SpeedFit:
    """Holds the fitted models that predict the speed of all plans.

    Attributes:
        measured: The timings that the models were fitted to.
        models: One model for each concurrency whose timings allowed a fit.
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
"""Fields of an entry whose members are written directly into the entry."""
