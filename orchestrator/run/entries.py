"""The entries of a run's state: what `run.json` says of each unit that belongs to the run, and of each that failed."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from layerboost.plan import Plan


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
class Finalist(Entry):
    """One model of pareto.csv: a plan on the parent's weights, or healed (then with the key of its healing)."""

    plan: Plan
    origin: str
    healed_key: str | None = None


_INLINED: dict[str, Any] = {"plan": Plan, "finalist": Finalist}
"""Fields whose members stand among those of their entry."""
