"""Lists the model families and the treatments that vLLM can serve."""

from __future__ import annotations

from ..plan import Plan, Treatment

SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the parents whose converted models vLLM can serve."""

SERVED_TREATMENTS = ("softmax", "linear_window", "window", "none", "affine")
"""Names of the treatments that vLLM can serve."""


def keeps_state(treatment: Treatment, plan: Plan) -> bool:
    """Returns whether a layer of a plan keeps a state of constant size in vLLM, instead of blocks of tokens."""
    return treatment is Treatment.LINEAR_WINDOW or (treatment is Treatment.WINDOW and plan.sinks > 0)
