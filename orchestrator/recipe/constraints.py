"""Defines the recipe's `constraints`: the limits that the served plan must hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from layerboost.plan import TREATMENTS, Plan
from orchestrator.recipe.fields import CountOrZero, Number, OneOf, Section

if TYPE_CHECKING:
    import pandas as pd

AtLeast = Literal["quality", "quality_retained", "speedup", "output_throughput_tok_per_s"]


def _counted() -> list[str]:
    """Returns the columns that count a plan's layers by treatment.

    Removed layers are left out, because nobody needs an upper bound on them.
    """
    return [f"n_{entry.name}" for entry in TREATMENTS if entry.depth < 1]


AtMost = Annotated[str, OneOf("kv_bytes_per_token", _counted, "peak_memory_mib", "ttft_ms_p50", "tpot_ms_p50")]


class ConstraintsSection(Section):
    """Sets the limits that the served plan must hold.

    Pins, numbers of layers and KV bytes are known before a plan is tried, so the search proposes no plan that violates
    them. The report names the best measured plan under all constraints, or which of them to loosen.

    Attributes:
        at_least: lower bounds on columns of pareto.csv.
        at_most: upper bounds on columns of pareto.csv.
        pin: treatments by the index of their layer, counted from 0; every plan of the search gives them to those
            layers.
        confidence: probability with which a measured value must hold its bound, given its standard error; 0.5 asks
            that the value itself does.
    """

    at_least: dict[AtLeast, Number] = Field(default_factory=dict)
    at_most: dict[AtMost, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    pin: dict[CountOrZero, Annotated[str, OneOf(TREATMENTS.names)]] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}}
    )
    confidence: Annotated[Number, Field(ge=0.5, lt=1)] = 0.5

    def bounds(self) -> list[Bound]:
        """Returns each constraint as a separate bound."""
        return [
            *(Bound(f"at_least.{name}", name, bound, 1, self.confidence) for name, bound in self.at_least.items()),
            *(Bound(f"at_most.{name}", name, bound, -1, self.confidence) for name, bound in self.at_most.items()),
            *(Bound(f"pin.{layer}", layer, treatment, 0) for layer, treatment in self.pin.items()),
        ]


@dataclass(frozen=True)
class Bound:
    """Describes one constraint.

    Attributes:
        name: its name in the recipe, such as `at_most.n_softmax`.
        of: a column of pareto.csv, or a layer.
        value: the bound, or the treatment of the layer.
        sign: 1 for at least, -1 for at most, 0 for a pin.
        confidence: the probability with which a measured value must hold it.
    """

    name: str
    of: str | int
    value: float | str
    sign: int
    confidence: float = 0.5

    def holds(self, row: pd.Series) -> bool:
        """Says whether a row of pareto.csv holds the constraint; a value that was not measured does not."""
        if self.sign == 0:
            return Plan.parse(row["plan"], 1).treatments[int(self.of)] == self.value
        return self.sign * self.reached(row) >= self.sign * float(self.value)  # a comparison with NaN is False

    def reached(self, row: pd.Series) -> float:
        """Returns the strictest bound that a row holds with the confidence: its value less a part of its error."""
        return float(row[self.of]) - self.sign * NormalDist().inv_cdf(self.confidence) * self._stderr(row)

    def probability(self, row: pd.Series) -> float | None:
        """Returns the probability that a row's true value holds the bound; None where the value has no error.

        The error is taken as normal, so this is the one-sided confidence.
        """
        if self.sign == 0 or not (stderr := self._stderr(row)):
            return None
        return NormalDist().cdf(self.sign * (float(row[self.of]) - float(self.value)) / stderr)

    def _stderr(self, row: pd.Series) -> float:
        """Returns the standard error of the value; 0 where none was measured."""
        stderr = float(row.get(f"{self.of}_stderr", math.nan))
        return 0.0 if math.isnan(stderr) else stderr

    def shortfall(self, row: pd.Series) -> float:
        """Returns the share of the bound by which a row misses it.

        It is 0 where the bound holds, 1 for a broken pin and infinite where the value is unknown.
        """
        if self.holds(row):
            return 0.0
        if self.sign == 0:
            return 1.0
        missing = self.sign * (float(self.value) - self.reached(row))
        return math.inf if math.isnan(missing) else missing / max(abs(float(self.value)), 1e-12)

    def __str__(self) -> str:
        return f"{self.name}: {self.value:g}" if isinstance(self.value, float) else f"{self.name}: {self.value}"
