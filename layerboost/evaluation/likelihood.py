"""Computes the likelihood of sequences and answers and the divergence from the base, without keeping the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..sweep.layer_sweep import LayerSweep
from ..sweep.request_tries import Forest, Request, pack_requests
from .calibration_error import N_BINS, bin_gaps

_LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are normalized at once, in numbers: few enough for a CPU's caches, enough to keep a GPU busy."""

_CHUNKS_A_PRODUCT = {"cpu": 8, "cuda": 1}
"""Number of such chunks whose logits one product computes, so that the head's weights are read once for all of them."""

_Reader = Callable[[torch.Tensor], tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]
"""Maps token ids (batch, tokens) to a row per position that predicts a token, and a function from rows to logits."""


@dataclass(frozen=True)
class SequenceScores:
    """Holds the scores of each sequence, averaged over its predicted tokens.

    Attributes:
        nll: Nats per predicted token.
        kl: KL(base || model) in nats per predicted token; None without a base.
        gaps: (n, 15), calibration of the most likely tokens (`calibration_error.bin_gaps`).
    """

    nll: list[float]
    kl: list[float] | None
    gaps: torch.Tensor


@torch.no_grad()
def score_sequences(
    model: nn.Module, sequences: torch.Tensor, *, base: nn.Module | None = None, batch_size: int = 8
) -> SequenceScores:
    """Scores each token of each sequence except the first, given those before it.

    Vocabulary-wide numbers are computed in float32 for a few positions at a time, and only a few numbers are kept for
    each position. This bounds the memory.

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
        read = reader(model, sequences[:1, :2])
        read_base = None if base is None else reader(base, sequences[:1, :2])
        scores = [_score_batch(model, batch, read, read_base) for batch in sequences.split(batch_size)]
    finally:
        for m, was_training in zip(models, training, strict=True):
            m.train(was_training)
    nll, kl, gaps = (torch.cat(parts) for parts in zip(*scores, strict=True))
    return SequenceScores(nll.tolist(), None if base is None else kl.tolist(), gaps)


def _score_batch(
    model: nn.Module, batch: torch.Tensor, read: _Reader, read_base: _Reader | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns mean NLL, mean KL and gaps of each sequence; logits are computed for a few positions at a time."""
    states, logits_of = read(batch)
    base_states, base_logits_of = (states, logits_of) if read_base is None else read_base(batch)
    targets = batch[:, 1:].reshape(-1).to(states.device)
    nll, confidence = (torch.empty(len(targets), dtype=torch.float64) for _ in range(2))
    kl = torch.zeros(len(targets), dtype=torch.float64)
    correct = torch.empty(len(targets), dtype=torch.bool)
    of_base = None if read_base is None else _log_p_chunks(model, base_states, base_logits_of)
    for here, log_p in _log_p_chunks(model, states, logits_of):
        nll[here] = -log_p.gather(-1, targets[here, None]).squeeze(-1).double().cpu()
        confidence[here], correct[here] = _likeliest(log_p, targets[here])
        if of_base is not None:
            base_log_p = next(of_base)[1].to(log_p.device)
            kl[here] = (base_log_p.exp() * (base_log_p - log_p)).sum(-1).double().cpu()
    by_sequence = (values.view(len(batch), -1) for values in (confidence, correct))
    return nll.view(len(batch), -1).mean(1), kl.view(len(batch), -1).mean(1), bin_gaps(*by_sequence)


def _log_p_chunks(
    model: nn.Module, states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the log-probabilities (rows, vocabulary) of a few rows of states at a time, in float32, and which rows."""
    for here, logits in _logit_chunks(model, states, logits_of):
        yield here, logits.log_softmax(-1)


def _logit_chunks(
    model: nn.Module, states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yields the logits (rows, vocabulary) of a few rows of states at a time, in float32, and which rows they are."""
    rows, rows_a_product = _rows_at_once(model)
    for first in range(0, len(states), rows_a_product):
        logits = logits_of(states[first : first + rows_a_product])
        for start in range(0, len(logits), rows):
            chunk = logits[start : start + rows].float()
            yield slice(first + start, first + start + len(chunk)), chunk


def _likeliest(log_p: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the probability of the most likely token and whether it is the target, given (rows, vocabulary)."""
    highest, token = log_p.max(-1)
    return highest.double().exp().cpu(), (token == targets).cpu()


def reader(model: nn.Module, sample: torch.Tensor) -> _Reader:
    """Returns how to read a model: its last hidden state if only the head follows it, its logits otherwise.

    Some families scale or cap the logits after the head. Instead of listing them, both ways are compared on `sample`.
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


@dataclass(frozen=True)
class Answers:
    """Holds what P plans answer to n requests.

    Attributes:
        log_p: (P, n) float64, log-probability of the scored tokens.
        greedy: (P, n) bool, whether every scored token is the most likely one.
    """

    log_p: torch.Tensor
    greedy: torch.Tensor


@torch.inference_mode()
def answer_requests(sweep: LayerSweep, requests: Sequence[Request], *, batch_rows: int = 8) -> Answers:
    """Answers requests with all plans of a sweep at once.

    Logits are computed only where a request reads them, in float32, for a few positions at a time.

    Args:
        sweep: The model and the plans.
        requests: The requests as lm-eval's harness would make them, cut to the model's context.
        batch_rows: Rows of the longest kind in one pass (see `pack_requests`); fewer if the budget requires it.
    """
    n_plans = len(sweep.paths)
    log_p = torch.zeros(n_plans, len(requests), dtype=torch.float64)
    greedy = torch.ones(n_plans, len(requests), dtype=torch.bool)
    longest = max((len(request.tokens) for request in requests), default=1)
    batch_rows = min(batch_rows, sweep.rows_at_once(longest))
    for forest in pack_requests(requests, batch_rows=batch_rows, hidden_size=sweep.model.config.hidden_size):

        def read(plans: list[int], states: list[torch.Tensor], forest: Forest = forest) -> None:
            nodes = forest.read_nodes.to(states[0].device)
            at_nodes = torch.cat([of_plan.flatten(0, 1)[nodes] for of_plan in states])
            log_p_edges, greedy_edges = _read_edges(sweep, at_nodes, forest.edge_node, forest.edge_token, len(nodes))
            for plan, p, g in zip(plans, log_p_edges, greedy_edges, strict=True):
                log_p[plan].index_add_(0, forest.edge_request, p)
                greedy[plan, forest.edge_request[~g]] = False

        sweep.run(forest.tokens, read, forest=forest)
    return Answers(log_p, greedy)


def _read_edges(
    sweep: LayerSweep, states: torch.Tensor, edge_node: torch.Tensor, edge_token: torch.Tensor, n_nodes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two (P, e): the log-probability of each edge by each plan, and whether it is the most likely token.

    Args:
        states: (P * n_nodes, d) hidden states after the last layer.
        edge_node, edge_token: (e,), sorted by node.
    """
    n_plans = len(states) // n_nodes
    of_plan = torch.arange(n_plans)[:, None] * n_nodes
    nodes, tokens = (of_plan + edge_node).flatten(), edge_token.repeat(n_plans)
    log_p, greedy = torch.empty(len(nodes), dtype=torch.float64), torch.empty(len(nodes), dtype=torch.bool)
    for rows, logits in _logit_chunks(sweep.model, states, sweep.logits):
        first, last = torch.searchsorted(nodes, torch.tensor([rows.start, rows.stop])).tolist()
        here = (nodes[first:last] - rows.start).to(logits.device)
        followed = tokens[first:last].to(logits.device)
        peak, likeliest = logits.max(dim=-1)
        normalizer = peak + (logits - peak[:, None]).exp_().sum(dim=-1).log()
        log_p[first:last] = (logits[here, followed] - normalizer[here]).double().cpu()
        greedy[first:last] = (likeliest[here] == followed).cpu()
    return log_p.view(n_plans, -1), greedy.view(n_plans, -1)


@dataclass(frozen=True)
class TextScores:
    """Holds the scores of P plans over n sequences, averaged over each sequence's predicted tokens.

    Attributes:
        nll: (P, n) float64, nats per predicted token.
        kl: (P, n) float64, KL(base || plan) in nats per predicted token; None if only the likelihood was measured.
        gaps: (P, n, 15) float64, calibration of the most likely tokens (`calibration_error.bin_gaps`); None as `kl`.
    """

    nll: torch.Tensor
    kl: torch.Tensor | None
    gaps: torch.Tensor | None

    def of_plan(self, plan: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns the NLL, KL and gaps of one plan's sequences."""
        kl, gaps = (None if values is None else values[plan] for values in (self.kl, self.gaps))
        return self.nll[plan], kl, gaps


@torch.inference_mode()
def text_likelihood(sweep: LayerSweep, sequences: torch.Tensor, *, batch_size: int = 8) -> TextScores:
    """Measures only the likelihood of sequences under all plans of a sweep, with the NLL of `score_text`.

    It takes half to two thirds of the time for a plan by itself, because no other plan has to run beside it.

    Args:
        sweep: The model and the plans.
        sequences: Token ids (n, tokens), at least two tokens long.
        batch_size: Sequences in a pass; fewer if the sweep's budget requires it.
    """
    nll = torch.empty(len(sweep.paths), len(sequences), dtype=torch.float64)
    batch_size = min(batch_size, sweep.rows_at_once(sequences.shape[1]))
    rows, rows_a_product = _rows_at_once(sweep.model)
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        here = slice(start, start + len(batch))

        def read(plans: list[int], states: list[torch.Tensor], batch: torch.Tensor = batch, here: slice = here) -> None:
            for plan, of_plan in zip(plans, states, strict=True):
                nll[plan, here] = _nll_of_states(sweep, batch, of_plan, rows, rows_a_product)

        sweep.run(batch, read)
    return TextScores(nll, None, None)


def _nll_of_states(
    sweep: LayerSweep, batch: torch.Tensor, states: torch.Tensor, rows: int, rows_a_product: int
) -> torch.Tensor:
    """Returns the mean NLL of each sequence, (B,) float64, from the final hidden states (B, T, d)."""
    targets = batch[:, 1:].reshape(-1).to(states.device)
    nll = torch.empty(len(targets), dtype=torch.float64)
    predicting = torch.arange(batch.numel(), device=states.device).view(batch.shape)[:, :-1].flatten()
    for first in range(0, len(targets), rows_a_product):
        logits = sweep.logits(states.flatten(0, 1)[predicting[first : first + rows_a_product]])
        for start in range(0, len(logits), rows):
            here = slice(first + start, min(first + start + rows, len(targets)))
            log_p = logits[start : start + rows].float().log_softmax(-1)
            nll[here] = -log_p.gather(-1, targets[here, None]).squeeze(-1).double().cpu()
    return nll.view(len(batch), -1).mean(1)


@torch.inference_mode()
def score_text(sweep: LayerSweep, sequences: torch.Tensor, *, base: int, batch_size: int = 8) -> TextScores:
    """Scores sequences with all plans of a sweep at once; the base's logits are computed once for all of them.

    Args:
        sweep: The model and the plans.
        sequences: Token ids (n, tokens), at least two tokens long.
        base: Index of the plan that the others' divergence is measured from.
        batch_size: Sequences in a pass; fewer if the sweep's budget requires it.
    """
    n_plans = len(sweep.paths)
    nll, kl = (torch.empty(n_plans, len(sequences), dtype=torch.float64) for _ in range(2))
    gaps = torch.empty(n_plans, len(sequences), N_BINS, dtype=torch.float64)
    batch_size = min(batch_size, sweep.rows_at_once(sequences.shape[1]))
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        here = slice(start, start + len(batch))
        base_states: list[torch.Tensor] = []

        def keep_base(plans: list[int], states: list[torch.Tensor], kept: list[torch.Tensor] = base_states) -> None:
            kept.append(states[0])

        def read(
            plans: list[int],
            states: list[torch.Tensor],
            batch: torch.Tensor = batch,
            here: slice = here,
            kept: list[torch.Tensor] = base_states,
        ) -> None:
            of_base = kept[0] if kept else states[plans.index(base)]
            nll[plans, here], kl[plans, here], gaps[plans, here] = _score_states(sweep, batch, states, of_base)

        # The base's states are needed with those of every plan; if not all fit together, the base runs first.
        if len(set(sweep.paths)) > sweep.room(*batch.shape):
            sweep.run(batch, keep_base, plans=[base])
        sweep.run(batch, read)
    return TextScores(nll, kl, gaps)


def _score_states(
    sweep: LayerSweep, batch: torch.Tensor, states: list[torch.Tensor], of_base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns mean NLL and KL of each sequence by each plan, both (P, B) float64, and the gaps (P, B, 15)."""
    targets = batch[:, 1:].reshape(-1).to(of_base.device)
    nll, kl, confidence = (torch.empty(len(states), len(targets), dtype=torch.float64) for _ in range(3))
    correct = torch.empty(len(states), len(targets), dtype=torch.bool)
    rows, rows_a_product = _rows_at_once(sweep.model)
    predicting = torch.arange(batch.numel(), device=of_base.device).view(batch.shape)[:, :-1].flatten()
    for first in range(0, len(targets), rows_a_product):
        positions = predicting[first : first + rows_a_product]
        base_log_p = sweep.logits(of_base.flatten(0, 1)[positions]).float().log_softmax(-1)  # (positions, vocabulary)
        base_p = base_log_p.exp()
        for plan, of_plan in enumerate(states):
            logits = None if of_plan is of_base else sweep.logits(of_plan.flatten(0, 1)[positions])
            for start in range(0, len(positions), rows):
                chunk = slice(start, min(start + rows, len(positions)))
                here = slice(first + chunk.start, first + chunk.stop)
                log_p = base_log_p[chunk] if logits is None else logits[chunk].float().log_softmax(-1)
                nll[plan, here] = -log_p.gather(-1, targets[here, None]).squeeze(-1).double().cpu()
                kl[plan, here] = (base_p[chunk] * (base_log_p[chunk] - log_p)).sum(-1).double().cpu()
                confidence[plan, here], correct[plan, here] = _likeliest(log_p, targets[here])
    shape = (len(states), len(batch))
    gaps = bin_gaps(*(values.view(len(states) * len(batch), -1) for values in (confidence, correct)))
    return nll.view(*shape, -1).mean(2), kl.view(*shape, -1).mean(2), gaps.view(*shape, N_BINS)


def _rows_at_once(model: nn.Module) -> tuple[int, int]:
    """Returns the number of positions whose logits are normalized together, and that of one product with the head."""
    device = next(model.parameters()).device.type
    kind = device if device in _LOGITS_AT_ONCE else "cuda"
    rows = max(1, _LOGITS_AT_ONCE[kind] // int(model.config.vocab_size))  # type: ignore[union-attr, arg-type]
    return rows, rows * _CHUNKS_A_PRODUCT[kind]
