"""The plans that a search may propose: treatments that were measured, layers pinned by hand, limits on the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..plan import Plan, PlanError, Treatment


@dataclass(frozen=True)
class Limit:
    """What all layers of a plan together may cost at most.

    Attributes:
        name: what is limited, such as `n_softmax` or `kv_bytes_per_token`.
        costs: of each treatment in each layer, first layer first.
        at_most: the bound, in the costs' unit.
    """

    name: str
    costs: Mapping[Treatment, tuple[float, ...]]
    at_most: float

    def value(self, plan: Plan) -> float:
        """What the plan costs."""
        return sum(self.costs[treatment][layer] for layer, treatment in enumerate(plan.treatments))

    def holds(self, plan: Plan) -> bool:
        # Sums of floats in another order may differ in their last digits.
        return self.value(plan) <= self.at_most + 1e-9 * max(1.0, abs(self.at_most))


@dataclass(frozen=True)
class PlanSpace:
    """All plans of a model that a search may propose.

    Attributes:
        n_layers: of the model.
        treatments: what a layer may get, softmax first.
        window: of the windowed treatments, in tokens.
        pinned: treatment of the layers that are decided by hand.
        limits: what every plan must hold.

    Raises:
        PlanError: a pinned layer is none of the model's, or a limit does not know a treatment or layer.
    """

    n_layers: int
    treatments: tuple[Treatment, ...]
    window: int | None = None
    pinned: Mapping[int, Treatment] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        for layer in self.pinned:
            if not 0 <= layer < self.n_layers:
                raise PlanError(f"pin: layer {layer} is none of the model's; use 0 to {self.n_layers - 1}")
        for limit in self.limits:
            for treatment in {*self.treatments, *self.pinned.values()}:
                if len(limit.costs.get(treatment, ())) != self.n_layers:
                    raise PlanError(f"{limit.name}: gives no cost of {treatment} for each of {self.n_layers} layers")

    def choices(self, layer: int) -> tuple[Treatment, ...]:
        """What a layer may get."""
        return (self.pinned[layer],) if layer in self.pinned else self.treatments

    def plan(self, treatments: Sequence[Treatment]) -> Plan:
        """A plan of this space's window; pinned layers get what they are pinned to, whatever is given for them."""
        chosen = (self.pinned.get(layer, treatment) for layer, treatment in enumerate(treatments))
        return Plan(tuple(chosen), self.window)

    def holds(self, plan: Plan) -> bool:
        """Whether the plan honours pins and limits (it may have treatments of its own, as plans by hand have)."""
        pinned = all(plan.treatments[layer] is treatment for layer, treatment in self.pinned.items())
        return pinned and all(limit.holds(plan) for limit in self.limits)

    def contains(self, plan: Plan) -> bool:
        """Whether the search could propose the plan."""
        allowed = all(treatment in self.choices(layer) for layer, treatment in enumerate(plan.treatments))
        return allowed and self.holds(plan)
