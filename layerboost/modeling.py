"""Makes the classes of converted models: a configuration and a model class for each family, from the family's own.

A checkpoint carries a copy of this file and of those it imports, so that it loads without this package too.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .cache import PlanCache
from .families import CONVERTED_PREFIX, decoder_layers, family_of, supported_families
from .plan import Plan, PlanError, Treatment
from .treatments import AttentionCall, Mechanism

CODE_FILES = ("attention.py", "cache.py", "families.py", "modeling.py", "plan.py", "registry.py", "treatments.py")
_CLASS_PREFIX = "LayerBoost"


@dataclass
class _Call:
    """Tells all treated layers about one forward pass, because the family's own arguments do not reach them all."""

    valid: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    cache: PlanCache | None = None


@dataclass
class _Treated:
    """Holds the treatment of a treated attention module.

    Attributes:
        treatment: The treatment.
        mechanism: The mechanism by which it computes.
        window: The number of newest tokens that it sees now; healing shortens it at times.
        full_window: The number that it sees by its plan, which is the plan's window without the sinks.
        sinks: The number of first tokens of each document that it sees too.
        call: Information about the current forward pass.
        zeroed: Branch of linear_window that is left out to measure its effect, `linear` or `window`.
    """

    treatment: Treatment
    mechanism: Mechanism
    window: int | None
    full_window: int | None
    sinks: int
    call: _Call = field(repr=False)
    zeroed: str | None = None


def _treated_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Runs the treatment's mechanism; transformers calls it as the attention function of every treated module."""
    treated = module.layerboost
    cache = treated.call.cache
    output = treated.mechanism(
        AttentionCall(
            query,
            key,
            value,
            scaling,
            window=treated.window,
            n_sinks=treated.sinks,
            weights=module._modules.get(treated.treatment.value),
            cache=None if cache is None else cache.layers[module.layer_idx],
            valid=treated.call.valid,
            segments=treated.call.segments,
            softcap=softcap,
            dropout=dropout,
            zeroed=treated.zeroed,
        )
    )
    return output.transpose(1, 2), None


_ATTENTION_NAME = "layerboost"
ALL_ATTENTION_FUNCTIONS.register(_ATTENTION_NAME, _treated_forward)


def _before_decoder(decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Makes the cache if one is wanted, and tells the treated layers about padding and packed documents."""
    config, call = decoder.config, decoder.layerboost_call
    if args:
        kwargs = (
            dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args, strict=False)) | kwargs
        )
    use_cache = kwargs.get("use_cache")
    use_cache = config.use_cache if use_cache is None else use_cache
    if getattr(decoder, "gradient_checkpointing", False) and decoder.training:
        use_cache = False
    cache = kwargs.get("past_key_values")
    if cache is None and use_cache:
        cache = kwargs["past_key_values"] = PlanCache(config)
    if cache is not None and not isinstance(cache, PlanCache):
        raise TypeError(
            f"past_key_values: {type(cache).__name__} does not fit a converted model; "
            "pass None or layerboost.PlanCache(model.config)"
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        if any(treatment.mechanism.attends for treatment in Plan.from_dict(config.layerboost).treatments):
            raise ValueError("attention_mask: treated layers need the 2-dimensional padding mask (batch, tokens)")
        mask = None
    call.cache = cache
    call.valid = None if mask is None else mask.bool()
    if cache is not None:
        cache.begin(call.valid)
    call.segments = None
    position_ids = kwargs.get("position_ids")
    if position_ids is not None and mask is None and cache is None:
        starts = _document_starts(position_ids)
        if starts.any():
            call.segments = starts.long().cumsum(dim=1).expand(_inputs(kwargs).shape[0], -1)
    return (), kwargs


def _inputs(kwargs: dict) -> torch.Tensor:
    """Returns the (B, T) token ids or (B, T, d) embeddings, whichever was given."""
    return kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]


def _document_starts(position_ids: torch.Tensor) -> torch.Tensor:
    """Returns where a new document starts inside a packed row, (B, T) bool: where positions are not consecutive."""
    jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return nn.functional.pad(jumps, (1, 0))


def _after_decoder(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    call = decoder.layerboost_call
    if call.cache is not None:
        call.cache.seen_tokens += _inputs(kwargs).shape[1]
        call.cache = None  # only the caller decides how long the cache lives
    return output


def install_plan(model: Any, plan: Plan) -> None:
    """Treats the layers of a family's model in place; removed parts are gone afterwards, added parts are untrained."""
    config = model.config
    family = family_of(config)
    layers = decoder_layers(model)
    plan.check_length(len(layers))
    call = _Call()
    for layer, treatment in zip(layers, plan.treatments, strict=True):
        attention, mechanism = getattr(layer, family.attention), treatment.mechanism
        if plan.sinks and treatment.needs_window and not mechanism.may_have_sinks:
            raise PlanError(f"sinks: layers of {treatment.value} cannot keep any; give 0")
        weight = next(attention.parameters())
        with torch.device(weight.device):
            if mechanism.replace is not None:
                replacement = mechanism.replace(attention, config).to(weight.dtype)
                setattr(layer, family.attention, replacement)
                for norm in family.norms_behind(config) if mechanism.keeps_norms else family.attention_norms(config):
                    setattr(layer, norm, nn.Identity())
            elif mechanism.attends:
                attention.config = copy.copy(attention.config)
                attention.config._attn_implementation_internal = _ATTENTION_NAME
                window = plan.newest_tokens if treatment.needs_window else None
                sinks = plan.sinks if treatment.needs_window else 0
                attention.layerboost = _Treated(treatment, mechanism, window, window, sinks, call)
                if mechanism.weights is not None:
                    setattr(attention, treatment.value, mechanism.weights(attention, config).to(weight.dtype))
        if treatment.has_weights:
            # The mark makes `_init_weights` use the module's own rule, and training fit the module before the rest.
            getattr(layer, family.attention).get_submodule(treatment.value).is_of_treatment = True
    decoder = model.base_model
    decoder.layerboost_call = call
    decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
    decoder.register_forward_hook(_after_decoder, with_kwargs=True)


if TYPE_CHECKING:
    from transformers import PreTrainedConfig as _AnyConfig
    from transformers import PreTrainedModel

    class _AnyModel(PreTrainedModel):
        def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _AnyConfig = _AnyModel = object  # the family's own classes, with which the classes below are mixed, add the bases


class ConvertedConfig(_AnyConfig):
    """Extends a family's configuration by the plan and the origin of the model.

    `layerboost` holds `plan`, `window`, `sinks` if there are any, `plan_id`, `parent`, `parent_revision`,
    `parent_architecture`, and `affine_ranks` of the layers whose maps have a low rank.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        _register_model(cls)
        return super().from_dict(config_dict, **kwargs)


class ConvertedModel(_AnyModel):
    """Extends a family's causal language model: it installs the plan, uses its own cache and saves its own code."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        install_plan(self, Plan.from_dict(config.layerboost))

    def _init_weights(self, module: Any) -> None:
        if getattr(module, "is_of_treatment", False):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: '{generation_config.cache_implementation}' does not fit a converted model; "
                "leave it unset"
            )
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = PlanCache(self.config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves the model and its code, so that `trust_remote_code=True` loads it without this package."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name in CODE_FILES:
            source, target = Path(__file__).parent / name, folder / name
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, *args, **kwargs)


@functools.cache
def config_class(model_type: str) -> Any:
    """Returns the configuration class of a family's converted models, from the parent's `model_type`."""
    parent = CONFIG_MAPPING[model_type]
    name = f"{_CLASS_PREFIX}{parent.__name__}"
    namespace = {
        "__module__": __name__,
        "__doc__": f"{parent.__name__} of a model whose layers were treated by a plan.",
        "__annotations__": {"layerboost": "dict | None"},
        "layerboost": None,
        "model_type": CONVERTED_PREFIX + model_type,
    }
    return type(name, (ConvertedConfig, parent), namespace)


@functools.cache
def model_class(model_type: str) -> Any:
    """Returns the class of a family's converted models, from the parent's `model_type`."""
    parent = parent_class(model_type)
    name = f"{_CLASS_PREFIX}{parent.__name__}"
    namespace = {
        "__module__": __name__,
        "__doc__": f"{parent.__name__} whose layers were treated by the plan in its configuration.",
        "__annotations__": {"config": config_class(model_type)},
        "config_class": config_class(model_type),
    }
    return type(name, (ConvertedModel, parent), namespace)


def parent_class(model_type: str) -> Any:
    """Returns the family's own causal language model class."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def _register_model(config: Any) -> None:
    """Registers a model class when its configuration is first read, since the class imports its family's modules."""
    model = model_class(config.model_type.removeprefix(CONVERTED_PREFIX))
    AutoModelForCausalLM.register(config, model, exist_ok=True)


def register() -> None:
    """Lets the auto classes of transformers load converted checkpoints."""
    for model_type in supported_families():
        AutoConfig.register(CONVERTED_PREFIX + model_type, config_class(model_type), exist_ok=True)


def __getattr__(name: str) -> Any:
    """Returns a class by its name, such as `LayerBoostLlamaConfig`, which pickles and remote code ask for."""
    if name.startswith(_CLASS_PREFIX):
        for model_type in supported_families():
            if name == f"{_CLASS_PREFIX}{CONFIG_MAPPING[model_type].__name__}":
                return config_class(model_type)
            if name.endswith("ForCausalLM") and name == f"{_CLASS_PREFIX}{parent_class(model_type).__name__}":
                return model_class(model_type)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
