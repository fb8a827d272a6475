"""Lists the model families and the treatments that vLLM can serve."""

from __future__ import annotations

SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the parents whose converted models vLLM can serve."""

SERVED_TREATMENTS = ("softmax", "linear_window", "window", "none")
"""Names of the treatments that vLLM can serve."""
