"""What the plan that people will serve must hold: the recipe's `constraints`, and which measured plan is the best."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.recipe_fields import CountOrZero, Number, Section

AtLeast = Literal["quality", "quality_retained", "speedup", "output_throughput_tok_per_s"]
AtMost = Literal[
    "kv_bytes_per_token", "n_softmax", "n_linear_window", "n_window", "peak_memory_mib", "ttft_ms_p50", "tpot_ms_p50"
]


class ConstraintsSection(Section):
    """What the plan that people will serve must hold: columns of pareto.csv, and layers pinned to a treatment.

    Pins, numbers of layers and KV bytes are known of a plan before it is tried, so the search proposes no other plans.
    """

    at_least: dict[AtLeast, Number] = Field(default_factory=dict)
    at_most: dict[AtMost, Annotated[Number, Field(ge=0)]] = Field(default_factory=dict)
    pin: dict[CountOrZero, Literal["softmax", "linear_window", "window", "none"]] = Field(default_factory=dict)
