"""Lists the model families whose converted models vLLM can serve."""

from __future__ import annotations

SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the parents whose converted models vLLM can serve."""
