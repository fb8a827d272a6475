"""Stands a model of few layers in for a deep one, so that timing it takes a fraction of the deep one's time.

The layers of a model do about the same work, so a cost grows linearly with the number of layers: two depths give the
part that does not depend on it (embedding, head, scoring) and the part of each layer. Where layers differ, as sliding
and global attention do, the first ones stand for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..convert import sharing_parameters
from ..plan import Plan, Treatment

DEEPER = 10
"""Layers of the deeper twin: enough for a layer's cost to stand out from what all depths have in common."""


def first_layers(model: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """Returns a model of the first layers of `model` with its embedding and head; it shares their parameters.

    Args:
        model: An untouched causal language model of a supported family.
        n_layers: Layers to keep, at most as many as it has.
    """
    deep = model.config.num_hidden_layers
    values = model.config.to_dict()
    for name, value in values.items():
        if isinstance(value, list) and len(value) == deep:  # what the config says of each layer
            values[name] = value[:n_layers]
    values["num_hidden_layers"] = n_layers
    return sharing_parameters(type(model), type(model.config).from_dict(values), model, [])


@dataclass(frozen=True)
class LayerCosts:
    """Holds the seconds that do not depend on the number of layers, and those of a layer of each treatment."""

    fixed_s: float
    layer_s: dict[Treatment, float]

    def uniform_s(self, n_layers: int) -> dict[str, float]:
        """Returns the seconds of the plan that treats every layer alike, by the treatment's name."""
        return {treatment.value: self.fixed_s + n_layers * each_s for treatment, each_s in self.layer_s.items()}

    def scaled(self, factor: float) -> LayerCosts:
        """Returns the costs of `factor` times the work."""
        return LayerCosts(self.fixed_s * factor, {name: factor * each_s for name, each_s in self.layer_s.items()})


class Twins:
    """Holds a model's twins of one layer and of a few layers.

    Args:
        model: An untouched causal language model of a supported family, on the device and in the dtype to be timed.
        window, sinks: Window and sinks of windowed treatments, in tokens.

    Attributes:
        n_layers: Layers of the model itself.
        one, few: The twins; `few` has all layers of a model that has no more.
    """

    def __init__(self, model: PreTrainedModel, window: int, sinks: int = 0):
        self.model, self.window, self.sinks = model, window, sinks
        self.n_layers = model.config.num_hidden_layers
        self.one = first_layers(model, 1)
        self.few = model if self.n_layers <= DEEPER else first_layers(model, DEEPER)
        self.n_few = self.few.config.num_hidden_layers

    def plan(self, treatment: Treatment, n_layers: int) -> Plan:
        """Returns the plan of a twin that treats every layer alike."""
        return Plan.uniform(treatment, n_layers, self.window, self.sinks)

    def layer_costs(
        self, treatments: Sequence[Treatment], timed_s: Callable[[PreTrainedModel, Plan], float]
    ) -> LayerCosts:
        """Returns the costs of layers.

        Args:
            treatments: Treatments to time; softmax is always among them.
            timed_s: Returns the seconds of a twin under a plan that treats all of its layers alike.
        """
        softmax = self.plan(Treatment.SOFTMAX, self.n_few)
        few_s = timed_s(self.few, softmax)
        one_s = few_s if self.n_few == 1 else min(few_s, timed_s(self.one, self.plan(Treatment.SOFTMAX, 1)))
        # With a single layer nothing tells its cost from the rest, and nothing has to be scaled.
        each_s = (few_s - one_s) / max(1, self.n_few - 1)
        fixed_s = max(0.0, one_s - each_s)
        layer_s = {Treatment.SOFTMAX: (few_s - fixed_s) / self.n_few}
        for treatment in treatments:
            if treatment is not Treatment.SOFTMAX:
                took_s = timed_s(self.few, self.plan(treatment, self.n_few))
                layer_s[treatment] = max(0.0, took_s - fixed_s) / self.n_few
        return LayerCosts(fixed_s, {treatment: layer_s[treatment] for treatment in treatments})

    def deep_s(self, timed_s: Callable[[PreTrainedModel], float]) -> float:
        """Returns the seconds that the untouched model would take for what both twins are timed with."""
        costs = self.layer_costs([Treatment.SOFTMAX], lambda model, plan: timed_s(model))
        return costs.fixed_s + self.n_layers * costs.layer_s[Treatment.SOFTMAX]
