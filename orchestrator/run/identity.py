"""Holds what changes the result of a unit of work, and nothing else; record keys are hashes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerboost.plan import Plan, Treatment

MEMORY_ONLY = ("micro_batch_sequences", "activation_checkpointing")
"""Fields of a `HealingSpec` that change only the memory that healing needs, not its result."""

LINEAR_WINDOW_ONLY = ("transfer_fraction", "transfer_learning_rate", "window_dropout")
"""Fields of a `HealingSpec` that matter only to plans with linear_window layers."""


def plan_identity(plan: Plan | None, maps: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Returns the identity of a plan's effect on a model; `maps` says what the maps of affine layers are fitted on."""
    if plan is None:
        return None
    fitted = {"maps": dict(maps)} if maps and plan.count(Treatment.AFFINE) else {}
    return {**plan.to_dict(), **plugin_identity(plan.plugins), **fitted}


def plugin_identity(plugins: Mapping[str, str]) -> dict[str, Any]:
    """Returns the part of an identity that names plug-ins, version by name; it is empty if there are none."""
    return {"plugins": dict(plugins)} if plugins else {}
