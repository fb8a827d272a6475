"""Implements the search method `alternating`: its plans lack attention in every second, third, ... layer."""

from __future__ import annotations

from layerboost.plan import Treatment
from layerboost.search.loop import SearchSpec
from layerboost.search.proposers import Costs, ListedPlans


def alternating(spec: SearchSpec, costs: Costs, times: Costs, rest_time: float) -> ListedPlans:
    n_layers = spec.space.n_layers
    return ListedPlans(
        [
            spec.space.plan([Treatment.NONE if layer % every == 0 else Treatment.SOFTMAX for layer in range(n_layers)])
            for every in range(2, 2 + spec.trials)
        ]
    )
