"""Tells vLLM what it must know of a plan before it builds the model, and refuses what cannot be served."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ..families import CONVERTED_PREFIX
from ..plan import Plan, Treatment
from .families import SERVED_FAMILIES, SERVED_TREATMENTS, keeps_state

logger = init_logger(__name__)

# These settings change attention scores or masks in a way that the treated layers do not implement.
_UNKNOWN_TO_TREATMENTS = ("attn_logit_softcapping", "dual_chunk_attention_config")


class ConvertedModelConfig(VerifyAndUpdateConfig):
    """Hooks into vLLM's configuration of a converted model."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Checks the checkpoint's configuration and adds what each layer keeps, in the form that vLLM reads.

        Raises:
            ValueError: The family or a setting cannot be served.
            PlanError: The plan does not fit the model.
        """
        config = model_config.hf_config
        plan = check_config(config)
        # vLLM reads from `layer_types` which models keep states beside, or instead of, keys and values.
        config.layerboost_windows = layer_windows(config, plan)
        config.layer_types = [
            "linear_attention" if keeps_state(treatment, plan) else "full_attention" for treatment in plan.treatments
        ]
        config.max_window_layers = len(plan)  # vLLM's Qwen would otherwise take mixed types for sliding layers

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Turns off, or refuses, features that do not work with constant states.

        Raises:
            ValueError: Speculative decoding is on, which would have to remove tokens from a state.
        """
        plan = Plan.from_dict(vllm_config.model_config.hf_config.layerboost)
        has_states = any(keeps_state(treatment, plan) for treatment in plan.treatments)
        if has_states and vllm_config.speculative_config is not None:
            raise ValueError(
                "speculative_config: the states of linear_window layers, and windows with sinks, cannot take back "
                "tokens; leave it out, or serve a plan without them"
            )
        keeps_nothing = set(plan.treatments) <= {Treatment.NONE, Treatment.AFFINE}
        if keeps_nothing:
            # Without a cache vLLM prefills a prompt in one piece and would wait forever if it exceeds a batch.
            scheduler = vllm_config.scheduler_config
            scheduler.max_num_batched_tokens = max(
                scheduler.max_num_batched_tokens, vllm_config.model_config.max_model_len
            )
        if vllm_config.cache_config.enable_prefix_caching and (has_states or keeps_nothing):
            reason = "layers keep one state for a whole request" if has_states else "no layer keeps anything"
            logger.warning("Prefix caching is turned off: in plan %s %s", plan, reason)
            vllm_config.cache_config.enable_prefix_caching = False


def check_config(config: Any) -> Plan:
    """Returns the plan of a converted model's configuration, if vLLM can serve it.

    Raises:
        ValueError: The family or a setting cannot be served.
        PlanError: The plan does not fit the model.
    """
    model_type = config.model_type
    if model_type.removeprefix(CONVERTED_PREFIX) not in SERVED_FAMILIES or not model_type.startswith(CONVERTED_PREFIX):
        served = ", ".join(CONVERTED_PREFIX + family for family in SERVED_FAMILIES)
        raise ValueError(f"model_type: '{model_type}' cannot be served by vLLM; use a converted model of {served}")
    if not config.layerboost:
        raise ValueError("layerboost: missing in config.json; write the checkpoint again with `layerboost convert`")
    for name in _UNKNOWN_TO_TREATMENTS:
        if getattr(config, name, None):
            raise ValueError(
                f"{name}: {getattr(config, name)} is unknown to treated layers in vLLM; serve it by transformers"
            )
    plan = Plan.from_dict(config.layerboost)
    plan.check_length(config.num_hidden_layers)
    if unserved := sorted(set(plan.treatments) - set(SERVED_TREATMENTS)):
        raise ValueError(
            f"plan: {plan} has {', '.join(unserved)} layers, which vLLM cannot serve; use transformers for it"
        )
    return plan


def layer_windows(config: Any, plan: Plan) -> list[int | None]:
    """Returns the window of each layer that attends by softmax in a window, None for the others.

    A window is in tokens and includes the query's own. Softmax layers have the window that the family gives them, which
    can differ between layers.
    """
    if hasattr(config, "layerboost_windows"):
        return config.layerboost_windows
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * len(plan)
    if config.model_type == CONVERTED_PREFIX + "mistral":
        layer_types = ["sliding_attention"] * len(plan)
    own = [config.sliding_window if layer_type == "sliding_attention" else None for layer_type in layer_types]
    windows = {} if plan.sinks else {Treatment.WINDOW: plan.window}
    return [
        own[layer] if treatment is Treatment.SOFTMAX else windows.get(treatment)
        for layer, treatment in enumerate(plan.treatments)
    ]
