"""Holds what the checks learn about a model without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """Holds what is known about a model before its weights are read.

    Attributes:
        path: the local folder or hub name; for a GGUF file the folder into which it was unpacked.
        commit: the commit that the revision means on the hub now, or the cached commit if the hub cannot be reached;
            None for a local folder.
        local_files_only: whether the model comes from the cache because the hub cannot be reached.
        config: the transformers config.
        n_layers: the number of decoder layers.
        context_tokens: the longest sequence of the model; None if its config sets no limit.
        gguf_content: the SHA-256 of the GGUF file that the model comes from; None if it comes otherwise.
        teacher: the facts of the larger model that healing learns from, if there is one.
    """

    path: str
    commit: str | None
    local_files_only: bool
    config: Any
    n_layers: int
    context_tokens: int | None
    gguf_content: str | None = None
    teacher: ModelFacts | None = None


def is_converted_type(model_type: str) -> bool:
    from layerboost.families import CONVERTED_PREFIX

    return model_type.startswith(CONVERTED_PREFIX)
