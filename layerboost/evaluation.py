"""Judging a model: benchmarks, likelihood of a text, divergence from the base, and the quality in one number."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from layerboost.data import pack, read_documents, text_identity
from layerboost.harness import benchmark_scores
from layerboost.likelihood import score_sequences
from layerboost.scores import MetricScore, QualityError, QualitySpec, Scores, mean_score, quality, retained
from layerboost.task_files import TaskFileError, UnknownTaskError, check_tasks, task_identity

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "MetricScore",
    "QualityError",
    "QualitySpec",
    "Scores",
    "TaskFileError",
    "UnknownTaskError",
    "check_tasks",
    "evaluate",
    "quality",
    "retained",
    "spec_fingerprint",
    "text_sequences",
]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: QualitySpec,
    *,
    base: PreTrainedModel | None = None,
) -> Scores:
    """Judges a model.

    Benchmarks are lm-eval's own: values and standard errors equal `lm_eval.simple_evaluate` on `HFLM(pretrained=model)`
    with the same batch size. A multiple-choice task also gets `margin`, the log-probability of the best right answer
    minus that of the best wrong one, which tells models apart with far fewer items than accuracy does. Code that a task
    would run or download is never allowed. The model, the tokenizer and the random generators stay as they were.

    Args:
        model: The model to judge, on the device that it is to be judged on.
        tokenizer: Its tokenizer.
        spec: What to judge it by.
        base: The untouched parent; with a text, adds KL(base || model).

    Raises:
        QualityError: If a task cannot be loaded, or the sequences are longer than the model's context.
        TextTooShortError: If the text fills no sequence.
    """
    scores = Scores()
    if spec.tasks:
        scores.metrics += benchmark_scores(model, tokenizer, spec)
    if spec.text is not None:
        context_tokens = getattr(model.config, "max_position_embeddings", None)
        if context_tokens is not None and spec.sequence_tokens > context_tokens:
            raise QualityError(
                f"quality.sequence_tokens: {spec.sequence_tokens} is more than the model's context; "
                f"give at most {context_tokens}"
            )
        sequences = text_sequences(tokenizer, spec)
        measured = score_sequences(model, sequences, base=base, batch_size=spec.batch_size)
        scores.metrics.append(mean_score("text", "nll", measured.nll, False, primary=not spec.tasks))
        if measured.kl is not None:
            scores.metrics.append(mean_score("text", "kl", measured.kl, False))
    return scores


def text_sequences(tokenizer: PreTrainedTokenizerBase, spec: QualitySpec) -> torch.Tensor:
    """Returns the token ids that the likelihood is measured over, shape (sequences, sequence_tokens).

    Raises:
        QualityError: If the spec names no text.
        TextTooShortError: If the text fills no sequence.
    """
    if spec.text is None:
        raise QualityError("quality.text: none given; name a text file or a dataset")
    return pack(read_documents(spec.text), tokenizer, spec.sequence_tokens, limit_sequences=spec.n_sequences)


def spec_fingerprint(spec: QualitySpec) -> str:
    """Returns the hash (64 hex digits) of all that the spec's scores depend on but the model.

    Task files and texts count by their content and not by their path; hub names count as names.
    """
    identity = asdict(spec) | {
        "tasks": [task_identity(name) for name in spec.tasks],
        "text": None if spec.text is None else text_identity(spec.text),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
