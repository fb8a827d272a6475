"""Selects what is trained in a converted model: feature maps, LoRA adapters on every projection, or all parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..plan import Treatment


def own_weight_names() -> frozenset[str]:
    """Names of the submodules that hold the parameters of treatments, those of the treatments themselves."""
    return frozenset(treatment.value for treatment in Treatment if treatment.has_weights)


def _feature_map_names() -> frozenset[str]:
    """Names of those of them that attention transfer fits before healing."""
    return frozenset(treatment.value for treatment in Treatment if treatment.is_transferred)


def feature_map_layers(model: nn.Module) -> list[str]:
    """Names of the attention modules whose parameters attention transfer fits, first layer first."""
    owned = _feature_map_names()
    return [
        name
        for name, module in model.named_modules()
        if any(child in owned and getattr(part, "is_of_treatment", False) for child, part in module.named_children())
    ]


def feature_map_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of all treatments of `model` that attention transfer fits, such as feature maps."""
    owned = _feature_map_names()
    return ((name, p) for name, p in model.named_parameters() if not owned.isdisjoint(name.split(".")))


def freeze_all_but_feature_maps(model: nn.Module) -> None:
    """Makes only the feature maps trainable. Parameters shared with another model are frozen there, too."""
    model.requires_grad_(False)
    for _, parameter in feature_map_parameters(model):
        parameter.requires_grad_(True)


def unshare_parameters(model: nn.Module) -> None:
    """Replaces all parameters of `model` by copies, in place; parameters tied inside the model stay tied."""
    _replace_parameters(model, {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in model.parameters()})


def load_trained(model: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Replaces parameters of a model by trained ones, by name and in place.

    The model gets new parameters, so that another model that shared the old ones keeps its values.

    Raises:
        ValueError: The model has no parameter of a given name and shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in trained.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"trained: the model has no parameter {name} of shape {tuple(tensor.shape)}; "
                "take the parent, plan and method that it was trained with"
            )
    _replace_parameters(
        model, {id(p): nn.Parameter(trained[n].to(p.device, p.dtype)) for n, p in parameters.items() if n in trained}
    )


def _replace_parameters(model: nn.Module, by_id: Mapping[int, nn.Parameter]) -> None:
    """Replaces the parameters with the given ids wherever they occur in the model."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in by_id:
                module._parameters[name] = by_id[id(parameter)]


def projection_names(model: PreTrainedModel) -> list[str]:
    """Returns the names of the projections of attention and MLP: every `nn.Linear` except the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def add_lora(model: PreTrainedModel, rank: int, alpha: float | None = None, seed: int = 0) -> None:
    """Puts LoRA adapters (peft) on every projection of attention and MLP, in place.

    Afterwards only the adapters and the treatments' own parameters are trainable. The adapted model computes the same
    function until it is trained, because the second factor starts at zero.

    Args:
        model: A causal language model; its own weights are frozen, also in other models that share them.
        rank: Rank of each adapter.
        alpha: Numerator of the scale; the update is scaled by alpha / rank. None means the rank.
        seed: Seed of the first factor's random start; the global random state does not change.
    """
    from peft import LoraConfig, inject_adapter_in_model  # the import takes 4 s
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=projection_names(model),
        bias="none",
        init_lora_weights=False,
    )
    # The adapters keep the model's dtype; an engine holds fp32 master copies of narrower parameters.
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
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _shorten_forward(module)
    model.requires_grad_(False)
    owned = own_weight_names()
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_A." in name or ".lora_B." in name
        parameter.requires_grad_(is_adapter or not owned.isdisjoint(name.split(".")))


class _LoraProduct(torch.autograd.Function):
    """Computes x W^T + scaling x A^T B^T for x (N, in), A (r, in), B (out, r), without another pass over (N, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        scaled_b = b * scaling
        down = x @ a.T
        ctx.save_for_backward(x, weight, a, scaled_b, down)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(down, scaled_b.T)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, a, scaled_b, down = ctx.saved_tensors
        grad_down = grad @ scaled_b
        grad_x = (grad @ weight).addmm_(grad_down, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_down.T @ x, (grad.T @ down).mul_(ctx.scaling), None


def _shorten_forward(layer: Any) -> None:
    """Makes a peft LoRA layer on a frozen `nn.Linear` compute its output by `_LoraProduct`.

    peft scales and adds whole outputs, which for narrow models costs a tenth of a training step. Under ZeRO-3, sharded
    weights are gathered by the forward passes of their own modules, so peft's forward is kept for them.
    """
    original = layer.forward
    (adapter,) = layer.active_adapters
    base, a, b = layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if hasattr(base.weight, "ds_id") or torch.is_autocast_enabled(x.device.type):
            return original(x, *args, **kwargs)
        product = _LoraProduct.apply(
            x.flatten(0, -2), base.weight, base.bias, a.weight, b.weight, layer.scaling[adapter]
        )
        return product.unflatten(0, x.shape[:-1])

    layer.forward = forward


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds every adapter's update to its projection and removes the adapters, in place.

    The merged projections get new weights, so that a model that shared the old ones keeps its values.
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
