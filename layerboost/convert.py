"""Converts a model by a plan, and back; the parent and the converted model share the parameters that both have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .affine import FittedMap
from .families import CONVERTED_PREFIX, attention_module, check_family
from .modeling import config_class, model_class, parent_class
from .plan import Plan, Treatment


class ConversionError(ValueError):
    """A model cannot be converted, or not back; the message says what to do."""


def plan_of(model: PreTrainedModel) -> Plan | None:
    """Returns the plan of a converted model, None for any other model."""
    record = getattr(model.config, "layerboost", None)
    return None if record is None else Plan.from_dict(record)


def convert(
    model: PreTrainedModel,
    plan: Plan,
    *,
    maps: Mapping[int, FittedMap] | None = None,
    parent: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Returns a new model in which the layers of `model` are treated according to `plan`.

    The two share every parameter that both have: nothing is copied, and `model` stays as it was. Only the feature maps
    of `linear_window` layers and the maps of `affine` layers are new.

    Args:
        model: A causal language model of a supported family, not converted yet.
        plan: One treatment for each of its layers.
        maps: The fitted maps of its `affine` layers, by layer; by default those that `attach_maps` gave the model. A
            layer without one adds nothing, as after `none`.
        parent: Name or path by which others find the parent; by default the one that it was loaded from.
        revision: The parent's revision.

    Raises:
        UnsupportedFamilyError: The model's family cannot be converted.
        PlanError: The plan does not have one treatment for each layer.
        ConversionError: The model is converted already, or is not its family's causal language model.
    """
    if plan_of(model) is not None:
        raise ConversionError("model: is converted already; restore it first, or convert its parent")
    check_family(model.config)
    plan.check_length(model.config.num_hidden_layers)
    model_type = model.config.model_type
    if type(model) is not parent_class(model_type):
        raise ConversionError(f"model: is a {type(model).__name__}; load it with AutoModelForCausalLM")
    config_type, model_type_class = config_class(model_type), model_class(model_type)
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map"):
        values.pop(key, None)
    config = config_type.from_dict(values)
    maps = getattr(model, _MAPS, None) if maps is None else maps
    used = {layer: maps[layer] for layer in plan.layers(Treatment.AFFINE) if maps and layer in maps}
    # JSON knows no other keys than strings.
    ranks = {str(layer): fitted.rank for layer, fitted in used.items() if fitted.rank is not None}
    config.layerboost = {
        **plan.to_dict(),
        "plan_id": plan.plan_id,
        **({"plugins": plan.plugins} if plan.plugins else {}),
        **({"affine_ranks": ranks} if ranks else {}),
        "parent": parent or model.config._name_or_path or None,
        "parent_revision": revision or getattr(model.config, "_commit_hash", None),
        "parent_architecture": type(model).__name__,
    }
    config.architectures = [model_type_class.__name__]
    config.auto_map = {
        "AutoConfig": f"modeling.{config_type.__name__}",
        "AutoModelForCausalLM": f"modeling.{model_type_class.__name__}",
    }
    converted = sharing_parameters(model_type_class, config, model, [])
    for layer, fitted in used.items():
        set_map(converted, layer, fitted)
    return converted


_MAPS = "layerboost_maps"


def attach_maps(model: PreTrainedModel, maps: Mapping[int, FittedMap]) -> None:
    """Gives an unconverted model the maps that `convert` puts into affine layers from now on."""
    setattr(model, _MAPS, dict(maps))


@torch.no_grad()
def set_map(converted: PreTrainedModel, layer: int, fitted: FittedMap) -> None:
    """Writes a fitted map into an `affine` layer of a converted model, in place.

    Raises:
        ValueError: The map has another rank than the layer.
    """
    affine = attention_module(converted, layer).get_submodule(Treatment.AFFINE.value)
    parameters = dict(affine.named_parameters())
    tensors = fitted.tensors()
    if {name: tensor.shape for name, tensor in tensors.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(f"maps: the one of layer {layer} has rank {fitted.rank}, which is not the layer's")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def restore(model: PreTrainedModel, parent_model: PreTrainedModel | None = None) -> PreTrainedModel:
    """Returns the family's own model, with softmax attention in every layer; it shares the parameters of `model`.

    Args:
        model: A converted model.
        parent_model: The parent, which provides the weights that `none` layers no longer have.

    Raises:
        ConversionError: The model is not converted, or its plan removed attention and `parent_model` is not given.
    """
    plan = plan_of(model)
    if plan is None:
        raise ConversionError("model: is not a converted one; there is nothing to restore")
    parent_type = parent_class(model.config.model_type.removeprefix(CONVERTED_PREFIX))
    config = parent_config(model.config)
    return sharing_parameters(parent_type, config, model, [] if parent_model is None else [parent_model])


def parent_config(config: Any) -> Any:
    """Returns the configuration of the untouched parent, given that of a converted model or of the parent itself."""
    if not getattr(config, "layerboost", None):
        return config
    values = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "layerboost"):
        values.pop(key, None)
    return parent_class(config.model_type.removeprefix(CONVERTED_PREFIX)).config_class.from_dict(values)


def sharing_parameters(
    model_type: Any, config: Any, source: PreTrainedModel, more: list[PreTrainedModel]
) -> PreTrainedModel:
    """Builds a `model_type` from the parameters and buffers of `source`, and from `more` for those it lacks."""
    config._attn_implementation = source.config._attn_implementation
    config.dtype = source.dtype
    with torch.device("meta"):
        model = model_type(config)
    tensors: dict[str, torch.Tensor] = {}
    for owner in (*reversed(more), source):
        tensors |= dict(owner.named_parameters(remove_duplicate=False))
        tensors |= dict(owner.named_buffers(remove_duplicate=False))
    missing = []
    for module_name, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                full_name = f"{module_name}.{name}" if module_name else name
                if full_name in tensors:
                    slots[name] = tensors[full_name]
                elif tensor is not None:
                    missing.append((full_name, module))
    fresh = {module for _, module in missing if getattr(module, "is_of_treatment", False)}
    lost = [name for name, module in missing if module not in fresh]
    if lost:
        raise ConversionError(f"parent_model: needed, as the plan removed {lost[0]} and {len(lost) - 1} more; give it")
    for module in fresh:
        module.to_empty(device=source.device).to(source.dtype)
        module.reset_parameters()
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
