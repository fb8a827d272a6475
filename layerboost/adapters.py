"""What is trained in a converted model: feature maps, LoRA adapters on every projection, or all parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

FEATURE_MAP = "linear_window"
"""Name of the submodule that a linear_window layer's attention owns."""


def feature_map_layers(model: nn.Module) -> list[str]:
    """Names of the attention modules that own a learned feature map, first layer first."""
    return [name for name, module in model.named_modules() if isinstance(getattr(module, FEATURE_MAP, None), nn.Module)]


def feature_map_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of all feature maps of `model`."""
    return ((name, p) for name, p in model.named_parameters() if FEATURE_MAP in name.split("."))


def freeze_all_but_feature_maps(model: nn.Module) -> None:
    """Leaves only the feature maps trainable. Parameters shared with another model are frozen there too."""
    model.requires_grad_(False)
    for _, parameter in feature_map_parameters(model):
        parameter.requires_grad_(True)


def unshare_parameters(model: nn.Module) -> None:
    """Gives `model` copies of all its parameters, in place; parameters tied inside the model stay tied."""
    copies: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = copies[id(parameter)]


def projection_names(model: PreTrainedModel) -> list[str]:
    """Names of the projections of attention and MLP: every `nn.Linear` but the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def add_lora(model: PreTrainedModel, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Puts LoRA adapters (peft) on every projection of attention and MLP, in place.

    Afterwards only the adapters and the feature maps are trainable. The adapted model computes the same function
    until it is trained, since the second factor starts at zero.

    Args:
        model: a causal language model; its own weights are frozen, also where another model shares them.
        rank: rank of each adapter.
        alpha: scale numerator; the update is scaled by alpha / rank. None means 2 * rank.
        seed: of the first factor's random start; the global random state is left as it was.
    """
    from peft import LoraConfig, inject_adapter_in_model  # costs 4 s

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=projection_names(model),
        bias="none",
        init_lora_weights=False,
    )
    # The adapters keep the model's dtype; an engine keeps float32 masters of whatever is narrower.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            parameter.data.copy_(values)
        elif ".lora_B." in name:
            parameter.data.zero_()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name or FEATURE_MAP in name.split("."))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds every adapter's update to its projection and removes the adapters, in place.

    The merged projections get weights of their own, so that a model that shared them keeps its values.
    """
    from peft.tuners.lora import LoraLayer

    adapted: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, module in adapted:
        projection = module.get_base_layer()
        update = sum(module.get_delta_weight(adapter).float() for adapter in module.active_adapters)
        projection.weight = nn.Parameter((projection.weight.float() + update).to(projection.weight.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, projection)
    if hasattr(model, "peft_config"):
        del model.peft_config
