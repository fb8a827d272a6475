"""Computes the cosine distance between a block's input and output, a score that needs no ablation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..families import attention_module, decoder_layers, family_of


@torch.inference_mode()
def cosine_scores(model: PreTrainedModel, sequences: torch.Tensor, *, batch_size: int = 8) -> torch.Tensor:
    """Returns how far each layer's attention turns the residual stream: 1 - cosine(block's input, block's output).

    This is the score of LLM-Drop (arXiv 2406.15786): a layer with a small score can be removed. The input of the block
    is the layer's input. Its output is the same plus what attention adds, including the norm after attention if the
    family has one.

    Args:
        model: An untouched causal language model.
        sequences: Token ids (n, tokens), without padding.
        batch_size: Sequences in a forward pass.

    Returns:
        fp64 on the CPU, shape (n_layers, n): the mean over the tokens of each sequence.
    """
    layers = decoder_layers(model)
    blocks = [_AttentionBlock(model, index) for index in range(len(layers))]
    try:
        for batch in sequences.split(batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for block in blocks:
            block.remove()
    return torch.stack([torch.cat(block.distances) for block in blocks])


class _AttentionBlock:
    """Hooks one layer to compare the residual stream before and after its attention."""

    def __init__(self, model: PreTrainedModel, layer: int):
        self.distances: list[torch.Tensor] = []
        decoder_layer = decoder_layers(model)[layer]
        self._multiplier = getattr(decoder_layer, "residual_multiplier", 1.0)  # Granite
        self._added = attention_module(model, layer)
        # If a norm follows attention, its output is what is added to the stream.
        behind = family_of(model.config).norms_behind(model.config)
        last = getattr(decoder_layer, behind[0]) if behind else self._added
        self._handles = [
            decoder_layer.register_forward_pre_hook(self._before, with_kwargs=True),
            last.register_forward_hook(self._after),
        ]

    def _before(self, module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        self._stream = args[0] if args else kwargs["hidden_states"]

    def _after(
        self, module: nn.Module, args: tuple[object, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        added = output[0] if isinstance(output, tuple) else output
        before = self._stream.float()
        after = before + self._multiplier * added.float()
        self.distances.append((1 - F.cosine_similarity(before, after, dim=-1)).mean(dim=-1).double().cpu())

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
