"""Likelihood of token sequences: negative log-likelihood, and divergence from the base, without keeping the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

_LOGITS_AT_ONCE = 2**24

_Reader = Callable[[torch.Tensor], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]
"""Token ids (batch, tokens) to a row for each position that predicts a token, and the function from rows to logits."""


@dataclass(frozen=True)
class SequenceScores:
    """Scores of each sequence, averaged over its predicted tokens.

    Attributes:
        nll: Nats per predicted token.
        kl: KL(base || model) in nats per predicted token; None without a base.
    """

    nll: list[float]
    kl: list[float] | None


@torch.no_grad()
def score_sequences(
    model: nn.Module, sequences: torch.Tensor, *, base: nn.Module | None = None, batch_size: int = 8
) -> SequenceScores:
    """Scores each token of each sequence but the first, given those before it.

    The vocabulary-wide numbers are worked out in float32 for a few positions at a time; what is kept of each position
    is one float64.

    Args:
        model: A causal language model.
        sequences: Token ids, shape (sequences, tokens), at least two tokens long.
        base: The untouched parent to measure the divergence from.
        batch_size: Sequences in a forward pass.
    """
    models = [model] if base is None else [model, base]
    training = [m.training for m in models]
    for m in models:
        m.eval()
    try:
        read = _reader(model, sequences[:1, :2])
        read_base = None if base is None else _reader(base, sequences[:1, :2])
        rows = max(1, _LOGITS_AT_ONCE // int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
        scores = [_score_batch(batch, read, read_base, rows) for batch in sequences.split(batch_size)]
    finally:
        for m, was_training in zip(models, training, strict=True):
            m.train(was_training)
    nll = torch.cat([nll for nll, _ in scores]).tolist()
    return SequenceScores(nll, None if base is None else torch.cat([kl for _, kl in scores]).tolist())


def _score_batch(
    batch: torch.Tensor, read: _Reader, read_base: _Reader | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean NLL and KL of each sequence, float64; `rows` positions have their logits worked out at once."""
    states, logits_of = read(batch)
    base_states, base_logits_of = (states, logits_of) if read_base is None else read_base(batch)
    targets = batch[:, 1:].reshape(-1).to(states.device)
    nll = torch.empty(len(targets), dtype=torch.float64)
    kl = torch.zeros(len(targets), dtype=torch.float64)
    for start in range(0, len(targets), rows):
        here = slice(start, start + rows)
        log_p = logits_of(states[here]).float().log_softmax(-1)  # (rows, vocabulary)
        nll[here] = -log_p.gather(-1, targets[here, None]).squeeze(-1).double().cpu()
        if read_base is not None:
            base_log_p = base_logits_of(base_states[here]).float().log_softmax(-1).to(log_p.device)
            kl[here] = (base_log_p.exp() * (base_log_p - log_p)).sum(-1).double().cpu()
    return nll.view(len(batch), -1).mean(1), kl.view(len(batch), -1).mean(1)


def _reader(model: nn.Module, sample: torch.Tensor) -> _Reader:
    """Returns how to read a model: to the last hidden state where its head is all that follows, else to the logits.

    Some families scale or cap the logits after the head. Instead of listing them, both ways are tried on `sample`.
    """
    device = next(model.parameters()).device

    def full_logits(batch: torch.Tensor) -> torch.Tensor:
        return model(input_ids=batch.to(device), use_cache=False).logits

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if isinstance(model, PreTrainedModel) and head is not None and model.base_model is not model:
        decoder = model.base_model

        def hidden_states(batch: torch.Tensor) -> torch.Tensor:
            return decoder(input_ids=batch.to(device), use_cache=False).last_hidden_state

        if torch.equal(head(hidden_states(sample)), full_logits(sample)):
            return lambda batch: (hidden_states(batch)[:, :-1].flatten(0, 1), head)
    return lambda batch: (full_logits(batch)[:, :-1].flatten(0, 1), nn.Identity())
