"""Builds the families' vLLM models with the layers of a plan treated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import is_pp_missing_parameter

from ..families import head_dim, kv_heads
from ..plan import Plan, Treatment
from ..treatments import AffineMap
from .config import check_config, layer_windows
from .families import keeps_state
from .window_state import WindowState, state_dtypes, state_shapes


class NoInputNorm(nn.Module):
    """Replaces the input norm beside `NoAttention`: passes the previous layer's output on to the norm of the MLP."""

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:  # in the first layer the input becomes the residual, so nothing may be added to it
            return torch.zeros_like(hidden_states)
        return hidden_states, residual


class NoAttention(nn.Module):
    """Replaces a layer's attention. It is no vLLM attention layer, so vLLM keeps no blocks for it."""

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class AffineAttention(nn.Module):
    """Replaces a layer's attention by an affine map of its input; every rank has the whole map."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.affine = AffineMap(width, rank)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.affine(hidden_states)


def install_plan(model: Any, plan: Plan, vllm_config: Any) -> None:
    """Treats the layers of a family's vLLM model in place, those of this pipeline rank.

    Only the part from the heads' queries, keys and values to their outputs is exchanged, so projections, norms and
    rotary embedding remain the family's own.
    """
    layers_by_name = vllm_config.compilation_config.static_forward_context
    windows = layer_windows(vllm_config.model_config.hf_config, plan)
    for index in range(model.model.start_layer, model.model.end_layer):
        treatment, layer = plan.treatments[index], model.model.layers[index]
        module = layer.self_attn
        if treatment is Treatment.SOFTMAX and windows[index] is None:
            continue
        name = module.attn.layer_name
        del layers_by_name[name]
        if treatment is Treatment.NONE:
            layer.self_attn, layer.input_layernorm = NoAttention(), NoInputNorm()
        elif treatment is Treatment.AFFINE:
            config = vllm_config.model_config.hf_config
            rank = (config.layerboost.get("affine_ranks") or {}).get(str(index))
            layer.self_attn = AffineAttention(config.hidden_size, rank)
        elif keeps_state(treatment, plan):
            module.attn = WindowState(
                *(module.num_heads, module.num_kv_heads, module.head_dim, module.scaling),
                *(plan, treatment, vllm_config, name),
            )
        else:
            module.attn = Attention(
                module.num_heads,
                module.head_dim,
                module.scaling,
                num_kv_heads=module.num_kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                per_layer_sliding_window=windows[index],
                prefix=name,
            )


def checkpoint_names(model: Any) -> set[str]:
    """Returns the names of the tensors that a checkpoint must hold for the parameters of this rank."""
    names = set()
    for name, _ in model.named_parameters():
        *path, module, last = name.split(".")
        for part in model.packed_modules_mapping.get(module, [module]):
            names.add(".".join([*path, part, last]))
    return names


if TYPE_CHECKING:
    _AnyModel = Any
else:
    _AnyModel = object  # at run time this class is mixed into each family's own class


class ConvertedModel(_AnyModel):
    """Extends a family's vLLM model: installs the plan, reports its states and checks that all weights load."""

    is_hybrid = True
    """vLLM asks the class, not an instance; `layer_types` says whether a plan has constant states."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        install_plan(self, check_config(vllm_config.model_config.hf_config), vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        config, n_ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
        plan = Plan.from_dict(config.layerboost)
        return state_shapes(max(1, kv_heads(config) // n_ranks), head_dim(config), plan)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        plan = Plan.from_dict(vllm_config.model_config.hf_config.layerboost)
        return state_dtypes(vllm_config.model_config.dtype, plan)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fills every parameter from the checkpoint.

        Raises:
            ValueError: No parameter takes a tensor, or no tensor fills a parameter.
        """
        expected = checkpoint_names(self)
        missing = set(expected)
        remedy = "weights and plan do not fit, write the checkpoint again with `layerboost convert`"

        def checked() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                own_name = name.replace(".self_attn.linear_window.", ".self_attn.attn.feature_map.")
                if own_name not in expected and not is_pp_missing_parameter(own_name, self):
                    raise ValueError(f"checkpoint: no parameter takes {name}; {remedy}")
                missing.discard(own_name)
                yield own_name, tensor

        loaded = super().load_weights(checked())
        if missing:
            raise ValueError(f"checkpoint: {sorted(missing)[0]} and {len(missing) - 1} more are missing; {remedy}")
        return loaded


class LayerBoostLlamaForCausalLM(ConvertedModel, LlamaForCausalLM):
    pass


class LayerBoostMistralForCausalLM(ConvertedModel, MistralForCausalLM):
    pass


class LayerBoostQwen2ForCausalLM(ConvertedModel, Qwen2ForCausalLM):
    pass


class LayerBoostQwen3ForCausalLM(ConvertedModel, Qwen3ForCausalLM):
    pass


class NotServed(LlamaForCausalLM):
    """Stands for converted models of other families; their configuration is refused before one is built."""
