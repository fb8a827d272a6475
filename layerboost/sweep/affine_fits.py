"""Fits the maps of affine layers on a text, layer by layer, in one walk through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..affine import FittedMap, MapsSpec, Moments, Rank, fit_map
from ..convert import convert
from ..families import decoder_layers, family_of
from ..plan import Plan, Treatment
from ..text.documents import TextTooShortError
from ..text.sources import pack_sources
from .layer_sweep import in_eval_mode, layer_inputs


def read_sequences(spec: MapsSpec, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Returns the sequences (n, T) that maps are fitted on.

    Raises:
        TextTooShortError: The text does not fill two sequences.
    """
    found = pack_sources([spec.source], tokenizer, spec.sequence_tokens, spec.n_sequences).input_ids
    if len(found) < 2:
        raise TextTooShortError(
            f"text: {spec.source.path} gives one sequence of {spec.sequence_tokens} tokens; maps are fitted to some "
            "and judged by others, so give more text"
        )
    return found


HELD_OUT = 4
"""Every fourth sequence judges the maps that are fitted to the others."""


@torch.inference_mode()
def fit_maps(
    model: PreTrainedModel, sequences: torch.Tensor, *, rank: Rank = "full", batch_size: int = 4
) -> dict[int, FittedMap]:
    """Fits the map of each layer on its own, as if it were the only affine one.

    All sequences go through a layer before any goes through the next, so that the sums of only one layer are kept at a
    time; besides them the states of all sequences are in memory.

    Args:
        model: An untouched causal language model of a supported family.
        sequences: (n, T) token ids, n at least 2; the maps are fitted to three quarters of them.
        rank: As in `fit_map`.
        batch_size: Sequences in a call.

    Returns:
        The map of each layer.

    Raises:
        ValueError: There are fewer than two sequences.
    """
    found = {}
    with in_eval_mode(model):
        walk = _Walk(model, sequences, batch_size)
        for layer in range(len(decoder_layers(model))):
            moments = walk.new_moments()
            for batch, states in enumerate(walk.states):
                seen = walk.step(model, layer, batch, states)
                walk.states[batch] = seen.after
                walk.add(moments, batch, seen.x, seen.added)
            found[layer] = fit_map(*moments, rank)
    return found


@torch.inference_mode()
def fit_maps_of_plan(
    model: PreTrainedModel,
    plan: Plan,
    sequences: torch.Tensor,
    *,
    rank: Rank | Mapping[int, Rank] = "full",
    batch_size: int = 4,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[int, FittedMap]:
    """Fits the maps of a plan one after another, each to what the layers before it have made of the text.

    A map sees the treated model's own input, and aims at the residual stream of the untouched one, so that it mends
    what the treated layers before it have changed instead of adding to it.

    Args:
        model: An untouched causal language model of a supported family.
        plan: The plan; its other treatments are as they are before healing.
        sequences, batch_size: As in `fit_maps`.
        rank: As in `fit_maps`, or the rank of each affine layer.
        on_layer: Called behind each layer.

    Returns:
        The map of each affine layer of the plan.

    Raises:
        ValueError: There are fewer than two sequences.
    """
    plan.check_length(len(decoder_layers(model)))
    layers = plan.layers(Treatment.AFFINE)
    if not layers:
        return {}
    found: dict[int, FittedMap] = {}
    with in_eval_mode(model):
        student = convert(model, plan)
        walk = _Walk(model, sequences, batch_size)
        treated = list(walk.states)
        for layer in range(layers[-1] + 1):
            moments = walk.new_moments() if layer in layers else None
            for batch, states in enumerate(walk.states):
                seen = walk.step(model, layer, batch, states)
                walk.states[batch] = seen.after
                if moments is not None:
                    x = walk.step(student, layer, batch, treated[batch]).x
                    off_course = (states.float() - treated[batch].float()) / seen.multiplier
                    walk.add(moments, batch, x, seen.added + off_course)
            if moments is not None:
                found[layer] = fit_map(*moments, rank[layer] if isinstance(rank, Mapping) else rank)
                student = convert(model, plan, maps=found)
            for batch, states in enumerate(treated):
                treated[batch] = walk.step(student, layer, batch, states).after
            on_layer()
    return found


@dataclass
class _Seen:
    """Holds what one layer did to a batch.

    Attributes:
        x: (B, T, d), the input of attention, or of what stands in its place.
        added: (B, T, d) fp32, what attention and the norm behind it gave, before the layer's multiplier.
        multiplier: The factor by which the layer adds that to the residual stream (Granite).
        after: (B, T, d), the states behind the layer.
    """

    x: torch.Tensor
    added: torch.Tensor
    multiplier: float
    after: torch.Tensor


class _Walk:
    """Holds the states of all sequences before the same layer, and takes batches of them through single layers."""

    def __init__(self, model: PreTrainedModel, sequences: torch.Tensor, batch_size: int):
        if len(sequences) < 2:
            raise ValueError("sequences: one alone cannot both be fitted to and judge the fit; give at least two")
        inputs = [layer_inputs(model, part.to(model.device)) for part in sequences.split(batch_size)]
        self.states = [embedded for embedded, _ in inputs]
        self._calls = [calls for _, calls in inputs]
        number = torch.arange(len(sequences))
        judges = (number % HELD_OUT == HELD_OUT - 1) | ((number == len(sequences) - 1) & (len(sequences) < HELD_OUT))
        self._judges = judges.to(model.device).split(batch_size)

    def new_moments(self) -> tuple[Moments, Moments]:
        """Returns empty sums for the tokens to fit to and for those that judge."""
        width, device = self.states[0].shape[-1], self.states[0].device
        return Moments(width, device), Moments(width, device)

    def add(self, moments: tuple[Moments, Moments], batch: int, x: torch.Tensor, y: torch.Tensor) -> None:
        judges = self._judges[batch]
        for part, rows in zip(moments, (~judges, judges), strict=True):
            if rows.any():
                part.add(x[rows], y[rows])

    def step(self, model: PreTrainedModel, layer: int, batch: int, states: torch.Tensor) -> _Seen:
        """Runs one layer of a model, converted or not, on a batch's states (B, T, d)."""
        module, family = decoder_layers(model)[layer], family_of(model.config)
        attention = getattr(module, family.attention)
        behind = family.norms_behind(model.config)
        found: dict[str, torch.Tensor] = {}

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found["x"] = args[0] if args else kwargs["hidden_states"]

        def write(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found["added"] = (output[0] if isinstance(output, tuple) else output).float()

        handles = (
            attention.register_forward_pre_hook(read, with_kwargs=True),
            (getattr(module, behind[0]) if behind else attention).register_forward_hook(write),
        )
        try:
            output = module(states, **self._calls[batch][layer])
        finally:
            for handle in handles:
                handle.remove()
        after = output[0] if isinstance(output, tuple) else output
        return _Seen(found["x"], found["added"], getattr(module, "residual_multiplier", 1.0), after)
