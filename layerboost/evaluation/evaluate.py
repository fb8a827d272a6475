"""Judges a model: benchmarks, likelihood of a text, divergence from the base, and the quality in one number."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..text.documents import pack, read_documents, text_identity
from .calibration_error import calibration_score
from .likelihood import score_sequences
from .lm_eval_run import benchmark_scores
from .retrieval import check_retrieval_context, retrieval_items, retrieval_scores
from .scores import QualityError, QualitySpec, Scores, mean_score
from .task_files import task_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    minus that of the best wrong one, which distinguishes models with far fewer items than accuracy does, and `ece`, its
    expected calibration error. The text gets an `ece`, too, and `retrieval@<distance>` for each distance of the spec.
    Code that a task would run or download is never allowed. The model, the tokenizer and the random generators stay as
    they were.

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
        check_context(model, spec)
        sequences = text_sequences(tokenizer, spec)
        beside = None if spec.likelihood_only else base
        measured = score_sequences(model, sequences, base=beside, batch_size=spec.batch_size)
        gaps = None if spec.likelihood_only else measured.gaps
        scores.metrics += text_scores(measured.nll, measured.kl, gaps, primary=not spec.tasks).metrics
        scores.metrics += retrieval_scores(model, retrieval_items(tokenizer, spec), batch_tokens=batch_tokens(spec))
    return scores


def text_scores(nll: list[float], kl: list[float] | None, gaps: torch.Tensor | None = None, *, primary: bool) -> Scores:
    """Returns a text's scores from those of its sequences; `primary` says whether the text determines the quality."""
    metrics = [mean_score("text", "nll", nll, False, primary=primary)]
    if kl is not None:
        metrics.append(mean_score("text", "kl", kl, False))
    if gaps is not None:
        metrics.append(calibration_score("text", gaps))
    return Scores(metrics)


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
    """Returns the hash (64 hex digits) of everything that the spec's scores depend on except the model.

    Task files and texts are identified by their content, not by their path; hub names are identified by the name.
    """
    identity = asdict(spec) | {
        "tasks": [task_identity(name) for name in spec.tasks],
        "text": None if spec.text is None else text_identity(spec.text),
    }
    if not spec.likelihood_only:
        del identity["likelihood_only"]  # as in records of versions that measured everything
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_context(model: PreTrainedModel, spec: QualitySpec) -> None:
    context_tokens = getattr(model.config, "max_position_embeddings", None)
    if context_tokens is not None and spec.sequence_tokens > context_tokens:
        raise QualityError(
            f"quality.sequence_tokens: {spec.sequence_tokens} is more than the model's context; "
            f"give at most {context_tokens}"
        )
    check_retrieval_context(spec, context_tokens)


def batch_tokens(spec: QualitySpec) -> int:
    return spec.batch_size * spec.sequence_tokens
