"""Lists the methods of search and what each needs; the code that proposes plans is in `proposers.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..registry import Registry


@dataclass(frozen=True)
class Method:
    """Describes one method of search.

    Attributes:
        name: Name in recipes.
        summary: One line for messages and help.
        maker: A function, or a reference to one (`module:name`). It makes a `Proposer` (`layerboost.search.loop`) from
            a `SearchSpec`, the costs and times of each treatment in each layer, and the rest of a decode step's time.
        costs: The treatments whose costs it reads: only `none`, or all treatments of the space.
        counts_repeats: Whether a plan that was proposed before counts as one of `search.trials`.
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
"""The methods that may propose plans; plug-ins add to them."""
