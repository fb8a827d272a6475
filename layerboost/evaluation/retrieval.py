"""Measures retrieval at a distance: whether a model can repeat what it has read before other text.

A sequence holds a segment of one document, text of other documents, and the segment once more. The first tokens of the
repetition are the cue that tells which segment it is. Of the other tokens those are scored that occur once in the
segment and not in the text between. A model can know them only from the segment, so one that cannot reach back scores
low. A sequence's score is the share of the scored tokens that greedy prediction gets right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..sweep.layer_sweep import LayerSweep
from ..text.documents import TOKENIZE_DOCUMENTS, read_documents
from .likelihood import reader
from .scores import MetricScore, QualityError, QualitySpec, mean_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEGMENT_TOKENS = 16
CUE_TOKENS = 4
MAX_ITEMS = 32


@dataclass(frozen=True)
class RetrievalItems:
    """Holds the sequences for one distance.

    Attributes:
        distance: Tokens between the segment and its repetition.
        tokens: (n, tokens) token ids, with the repeated segment at the end.
        scored: (n, 16) bool, which tokens of the repetition are scored; at least one in each row.
    """

    distance: int
    tokens: torch.Tensor
    scored: torch.Tensor


def retrieval_tokens(distance: int) -> int:
    """Returns the context that a distance needs, in tokens: BOS, the segment twice, and the text between."""
    return 1 + 2 * SEGMENT_TOKENS + distance


def check_retrieval_context(spec: QualitySpec, context_tokens: int | None) -> None:
    """Refuses distances that do not fit into a context of `context_tokens` tokens.

    Raises:
        QualityError: For the first distance that is too long.
    """
    for distance in spec.retrieval:
        if context_tokens is not None and retrieval_tokens(distance) > context_tokens:
            raise QualityError(
                f"quality.retrieval: a distance of {distance} needs {retrieval_tokens(distance)} tokens, more than the "
                f"model's context of {context_tokens}; give at most {context_tokens - retrieval_tokens(0)}"
            )


def retrieval_items(tokenizer: PreTrainedTokenizerBase, spec: QualitySpec) -> list[RetrievalItems]:
    """Builds the sequences of each of the spec's distances from its text.

    The segment is the middle of a document. The text between consists of the first `distance` tokens of the documents
    that follow it, starting again with the first document after the last. Documents are not separated by special
    tokens, because these tell models to forget; BOS comes first if the tokenizer has one. There are 32 sequences, or
    as many as `n_sequences` or the text allow.

    Raises:
        QualityError: If the spec has no text or a distance finds too little in it.
    """
    if not spec.retrieval:
        return []
    if spec.text is None:
        raise QualityError("quality.retrieval: it is measured on quality.text, which is missing; give a text")
    n_items = MAX_ITEMS if spec.n_sequences is None else min(MAX_ITEMS, spec.n_sequences)
    documents = _documents(tokenizer, spec.text, n_items, max(spec.retrieval))
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [_items(documents, distance, n_items, head) for distance in spec.retrieval]


def _items(documents: list[np.ndarray], distance: int, n_items: int, head: list[int]) -> RetrievalItems:
    rows: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    for index, own in enumerate(documents):
        start = (len(own) - SEGMENT_TOKENS) // 2
        segment = own[start : start + SEGMENT_TOKENS]
        between = _first_tokens([*documents[index + 1 :], *documents[:index]], distance)
        here = ~np.isin(segment, between)
        here &= np.array([token not in segment[:i] for i, token in enumerate(segment)])
        here[:CUE_TOKENS] = False
        if len(between) == distance and here.any() and len(rows) < n_items:
            rows.append(np.concatenate([head, segment, between, segment]).astype(np.int64))
            scored.append(here)
    if len(rows) < 2:
        raise QualityError(
            f"quality.retrieval: at a distance of {distance} the text gives {len(rows)} sequences, from "
            f"{len(documents)} documents of at least {SEGMENT_TOKENS} tokens; at least 2 are needed: give a longer "
            "quality.text or a smaller distance"
        )
    return RetrievalItems(distance, torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(scored)))


def _first_tokens(documents: list[np.ndarray], n_tokens: int) -> np.ndarray:
    parts, found = [np.empty(0, np.int64)], 0
    for document in documents:
        if found >= n_tokens:
            break
        parts.append(document[: n_tokens - found])
        found += len(parts[-1])
    return np.concatenate(parts)


def _documents(tokenizer: PreTrainedTokenizerBase, text: str, n_items: int, distance: int) -> list[np.ndarray]:
    """Returns documents that hold a segment: two per item, as some cannot be scored, and enough for the distance."""
    found: list[np.ndarray] = []
    remaining = read_documents(text)
    while texts := list(islice(remaining, TOKENIZE_DOCUMENTS)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            if len(ids) >= SEGMENT_TOKENS:
                found.append(np.array(ids, dtype=np.int64))
        lengths = [len(document) for document in found]
        if len(found) >= 2 * n_items and sum(lengths) - max(lengths) >= distance:
            break
    return found


@torch.no_grad()
def retrieval_scores(model: PreTrainedModel, asked: list[RetrievalItems], *, batch_tokens: int) -> list[MetricScore]:
    """Scores a model: `retrieval@<distance>` of the task `text`, higher is better.

    Args:
        model: A causal language model.
        asked: Sequences from `retrieval_items`.
        batch_tokens: Tokens in a pass, at least one sequence.
    """
    training = model.training
    model.eval()
    try:
        read = reader(model, asked[0].tokens[:1, :2]) if asked else None
        found = []
        for items in asked:
            assert read is not None
            hits = []
            for batch in items.tokens.split(max(1, batch_tokens // items.tokens.shape[1])):
                states, logits_of = read(batch)
                last = states.unflatten(0, (len(batch), -1))[:, -SEGMENT_TOKENS:].flatten(0, 1)
                hits.append(logits_of(last).argmax(-1).cpu().view(-1, SEGMENT_TOKENS) == batch[:, -SEGMENT_TOKENS:])
            found.append(_score(items, torch.cat(hits)))
        return found
    finally:
        model.train(training)


@torch.inference_mode()
def plans_retrieval_scores(
    sweep: LayerSweep, asked: list[RetrievalItems], *, batch_tokens: int
) -> list[list[MetricScore]]:
    """Scores each plan of a sweep as `retrieval_scores` scores a model."""
    found: list[list[MetricScore]] = [[] for _ in sweep.paths]
    for items in asked:
        n_tokens = items.tokens.shape[1]
        hits = torch.empty(len(sweep.paths), *items.scored.shape, dtype=torch.bool)
        n_rows = max(1, min(batch_tokens // n_tokens, sweep.rows_at_once(n_tokens)))
        for start in range(0, len(items.tokens), n_rows):
            batch = items.tokens[start : start + n_rows]

            def read(
                plans: list[int],
                states: list[torch.Tensor],
                batch: torch.Tensor = batch,
                start: int = start,
                hits: torch.Tensor = hits,
            ) -> None:
                for plan, of_plan in zip(plans, states, strict=True):
                    last = of_plan[:, -SEGMENT_TOKENS - 1 : -1].flatten(0, 1)
                    predicted = sweep.logits(last).argmax(-1).cpu().view(-1, SEGMENT_TOKENS)
                    hits[plan, start : start + len(batch)] = predicted == batch[:, -SEGMENT_TOKENS:]

            sweep.run(batch, read)
        for of_plan, plan_hits in zip(found, hits, strict=True):
            of_plan.append(_score(items, plan_hits))
    return found


def _score(items: RetrievalItems, hits: torch.Tensor) -> MetricScore:
    shares = (hits & items.scored).sum(1).double() / items.scored.sum(1)
    return mean_score("text", f"retrieval@{items.distance}", shares.tolist(), True)
