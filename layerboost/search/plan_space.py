"""Defines the plans that a search may propose: measured treatments, pinned layers, and limits on the whole plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..plan import Plan, PlanError, Treatment


@dataclass(frozen=True)
class Limit:
    """Bounds the sum of a cost over all layers of a plan.

    Attributes:
        name: Name of the cost, such as `n_softmax` or `kv_bytes_per_token`.
        costs: Cost of each treatment in each layer, first layer first.
        at_most: The bound, in the unit of the costs.
    """

    name: str
    costs: Mapping[Treatment, tuple[float, ...]]
    at_most: float

    def value(self, plan: Plan) -> float:
        """Returns the plan's cost, the sum over its layers."""
        return sum(self.costs[treatment][layer] for layer, treatment in enumerate(plan.treatments))

    def holds(self, plan: Plan) -> bool:
        # The tolerance allows for rounding, because sums of floats depend on the order.
        return self.value(plan) <= self.at_most + 1e-9 * max(1.0, abs(self.at_most))


@dataclass(frozen=True)
class PlanSpace:
    """Denotes all plans of a model that a search may propose.

    Attributes:
        n_layers: Layers of the model.
        treatments: Treatments that a layer may get, softmax first.
        window: Window of the windowed treatments, in tokens.
        pinned: Treatment of the layers that the user has fixed.
        limits: Limits that every plan must satisfy.
        sinks: Sinks of the windowed treatments, in tokens; the window holds them.

    Raises:
        PlanError: A pinned layer does not exist in the model, or a limit lacks the costs of a treatment or layer.
    """

    n_layers: int
    treatments: tuple[Treatment, ...]
    window: int | None = None
    pinned: Mapping[int, Treatment] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    sinks: int = 0

    def __post_init__(self) -> None:
        for layer in self.pinned:
            if not 0 <= layer < self.n_layers:
                raise PlanError(f"pin: layer {layer} is none of the model's; use 0 to {self.n_layers - 1}")
        for limit in self.limits:
            for treatment in {*self.treatments, *self.pinned.values()}:
                if len(limit.costs.get(treatment, ())) != self.n_layers:
                    raise PlanError(f"{limit.name}: gives no cost of {treatment} for each of {self.n_layers} layers")

    def choices(self, layer: int) -> tuple[Treatment, ...]:
        """Returns the treatments that a layer may get."""
        return (self.pinned[layer],) if layer in self.pinned else self.treatments

    def plan(self, treatments: Sequence[Treatment]) -> Plan:
        """Returns a plan with this space's window and sinks; pinned layers get their treatment, whatever is given."""
        chosen = (self.pinned.get(layer, treatment) for layer, treatment in enumerate(treatments))
        return Plan(tuple(chosen), self.window, self.sinks)

    def uniform(self, treatment: Treatment) -> Plan:
        """Returns the plan that treats every layer alike, pinned ones too, with this space's window and sinks."""
        return Plan.uniform(treatment, self.n_layers, self.window, self.sinks)

    def holds(self, plan: Plan) -> bool:
        """Returns whether the plan satisfies pins and limits; other treatments are allowed, as in plans by hand."""
        pinned = all(plan.treatments[layer] is treatment for layer, treatment in self.pinned.items())
        return pinned and all(limit.holds(plan) for limit in self.limits)

    def contains(self, plan: Plan) -> bool:
        """Returns whether the search could propose the plan."""
        allowed = all(treatment in self.choices(layer) for layer, treatment in enumerate(plan.treatments))
        return allowed and self.holds(plan)
