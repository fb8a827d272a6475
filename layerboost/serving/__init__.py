"""Registers converted models with vLLM, so that `vllm serve DIR` works where `make_environment.sh` installed it.

vLLM finds `register` through the entry point `vllm.general_plugins` and calls it in each of its processes.
"""

from __future__ import annotations

from ..families import supported_families
from .families import SERVED_FAMILIES

_OPERATOR = "vllm::layerboost_linear_window"


def register() -> None:
    """Tells vLLM which class serves each converted architecture; transformers knows the configurations already.

    Families that cannot be served are registered, too, because vLLM would otherwise try transformers' own code for
    them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config import ConvertedModelConfig

    for model_type in supported_families():
        architecture = f"LayerBoost{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}"
        served = architecture if model_type in SERVED_FAMILIES else "NotServed"
        ModelRegistry.register_model(architecture, f"{__name__}.models:{served}")
        MODELS_CONFIG_MAP[architecture] = ConvertedModelConfig
    # vLLM splits compiled graphs at these operators, because they read the metadata of each step.
    if _OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(_OPERATOR)
