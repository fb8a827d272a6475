"""The methods of search: which there are and what each needs. The code that proposes plans is in `proposers.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..registry import Registry


@dataclass(frozen=True)
class Method:
    """One method of search.

    Attributes:
        name: as recipes have it.
        summary: one line for messages and help.
        maker: a function, or where it is (`module:name`). From a `SearchSpec`, the costs and times of each treatment in
            each layer, and the rest of a decode step's time it makes a `Proposer` (`layerboost.search.loop`).
        costs: which treatments' costs it reads: those of `none` alone, or of all treatments of the space.
        counts_repeats: whether a plan that was met before counts as one of `search.trials`.
    """

    name: str
    summary: str
    maker: Any
    costs: Literal["none", "all"] = "all"
    counts_repeats: bool = False


METHODS: Registry[Method] = Registry(
    "search.method",
    (
        Method(
            "thresholds", "moves the paper's two thresholds", ".proposers:by_thresholds", "none", counts_repeats=True
        ),
        Method("knapsack", "the exact optimum of the single layers' costs at each speed", ".proposers:by_knapsack"),
        Method("evolution", "goes on from these over whole plans", ".proposers:by_evolution"),
        Method("swaps", "improves their front by exchanging layers", ".proposers:by_swaps"),
    ),
)
"""What may propose plans; plug-ins add theirs."""
