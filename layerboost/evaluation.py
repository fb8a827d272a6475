"""Judging a model: benchmarks, likelihood of a text, divergence from the base, and the quality in one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from layerboost.answering import Benchmarks, Item
from layerboost.calibration import calibration_score
from layerboost.convert import convert
from layerboost.data import pack, read_documents, text_identity
from layerboost.harness import benchmark_scores
from layerboost.likelihood import Answers, TextScores, answer_requests, score_sequences, score_text
from layerboost.packing import n_common
from layerboost.plan import Plan, Treatment
from layerboost.retrieval import (
    check_retrieval_context,
    plans_retrieval_scores,
    retrieval_items,
    retrieval_scores,
)
from layerboost.scores import MetricScore, QualityError, QualitySpec, Scores, mean_score, quality, retained
from layerboost.sweep import DEFAULT_BUDGET_BYTES, LayerSweep
from layerboost.task_files import TaskFileError, UnknownTaskError, check_tasks, task_identity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "MetricScore",
    "PlanEvaluation",
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
    "text_scores",
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
    minus that of the best wrong one, which tells models apart with far fewer items than accuracy does, and `ece`, its
    expected calibration error; the text gets one too, and `retrieval@<distance>` for each distance asked. Code that a
    task would run or download is never allowed. The model, the tokenizer and the random generators stay as they were.

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
        _check_context(model, spec)
        sequences = text_sequences(tokenizer, spec)
        measured = score_sequences(model, sequences, base=base, batch_size=spec.batch_size)
        scores.metrics += text_scores(measured.nll, measured.kl, measured.gaps, primary=not spec.tasks).metrics
        scores.metrics += retrieval_scores(model, retrieval_items(tokenizer, spec), batch_tokens=_batch_tokens(spec))
    return scores


def text_scores(nll: list[float], kl: list[float] | None, gaps: torch.Tensor | None = None, *, primary: bool) -> Scores:
    """The scores of a text from those of its sequences; `primary` where the text makes the quality."""
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
    """Returns the hash (64 hex digits) of all that the spec's scores depend on but the model.

    Task files and texts count by their content and not by their path; hub names count as names.
    """
    identity = asdict(spec) | {
        "tasks": [task_identity(name) for name in spec.tasks],
        "text": None if spec.text is None else text_identity(spec.text),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class PlanEvaluation:
    """Judges many plans of one model by one spec at once: what plans have in common is computed once (`LayerSweep`).

    Scores are those of `evaluate` on each plan's model to the last bits: lm-eval's metrics over log-probabilities that
    differ in rounding only. What the tasks ask and the text are prepared once; parts of both can be done on their own.

    Args:
        model: an untouched parent of a supported family, on the device that it is to be judged on.
        tokenizer: its tokenizer.
        spec: what to judge by.
        budget_bytes: bound on the activations of a pass.

    Attributes:
        items: what can be answered by likelihood, in the order in which neighbours share most.
        sequences: token ids of the text, (n, sequence_tokens); None without one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: QualitySpec,
        *,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ):
        self.model, self.spec, self.budget_bytes = model, spec, budget_bytes
        self.benchmarks = Benchmarks(model, tokenizer, spec) if spec.tasks else None
        self.items: list[Item] = []
        if self.benchmarks is not None:
            requests, items = self.benchmarks.requests, self.benchmarks.items
            answerable = [item for item in items if item.requests]
            self.items = sorted(answerable, key=lambda item: requests[item.requests[0]].tokens)
        self.sequences = None
        if spec.text is not None:
            _check_context(model, spec)
            self.sequences = text_sequences(tokenizer, spec)
        self._retrieval = retrieval_items(tokenizer, spec)
        self._base = Plan.uniform(Treatment.SOFTMAX, model.config.num_hidden_layers)

    @property
    def generating(self) -> list[str]:
        """The tasks that have the model generate, so that their items cannot be answered by likelihood."""
        items = self.benchmarks.items if self.benchmarks else []
        return sorted({item.task for item in items if not item.requests})

    def costs(self) -> list[int]:
        """The tokens that each item adds to the one before it; of a text, those of each sequence."""
        if self.sequences is not None:
            return [self.sequences.shape[1]] * len(self.sequences)
        assert self.benchmarks is not None
        found: list[int] = []
        before: tuple[int, ...] = ()
        for item in self.items:
            cost = 0
            for index in item.requests:
                tokens = self.benchmarks.requests[index].tokens
                cost += len(tokens) - n_common(before, tokens)
                before = tokens
            found.append(cost)
        return found

    def answer(self, plans: Sequence[Plan], items: Sequence[Item] | None = None) -> Answers:
        """Answers the requests of some items (all if None); those of other items stay 0 and True.

        Returns:
            log_p and greedy, (P, n_requests).
        """
        assert self.benchmarks is not None
        asked = sorted({index for item in (self.items if items is None else items) for index in item.requests})
        n_requests = len(self.benchmarks.requests)
        log_p = torch.zeros(len(plans), n_requests, dtype=torch.float64)
        greedy = torch.ones(len(plans), n_requests, dtype=torch.bool)
        found = answer_requests(
            LayerSweep(self.model, plans, budget_bytes=self.budget_bytes),
            [self.benchmarks.requests[index] for index in asked],
            batch_rows=self.spec.batch_size,
        )
        log_p[:, asked], greedy[:, asked] = found.log_p, found.greedy
        return Answers(log_p, greedy)

    def read_text(self, plans: Sequence[Plan], indices: torch.Tensor | None = None) -> TextScores:
        """Scores some sequences of the text (all if None), with the divergence from the untouched model."""
        assert self.sequences is not None
        sequences = self.sequences if indices is None else self.sequences[indices]
        sweep = LayerSweep(self.model, [*plans, self._base], budget_bytes=self.budget_bytes)
        found = score_text(sweep, sequences, base=len(plans), batch_size=self.spec.batch_size)
        return TextScores(found.nll[: len(plans)], found.kl[: len(plans)], found.gaps[: len(plans)])

    def scores(
        self,
        plan: Plan,
        answers: tuple[torch.Tensor, torch.Tensor] | None,
        text: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        items: Sequence[Item] | None = None,
    ) -> Scores:
        """The scores of a plan from its answers (log_p and greedy), and its NLL, KL and gaps of each sequence.

        Args:
            plan: what was answered for; only asked where a task has the model generate.
            answers: (n_requests,) both; None where the tasks were not asked.
            text: (n_sequences,) twice and (n_sequences, 15); None where the text was not read.
            items: what was answered, all if None.
        """
        found = Scores()
        if answers is not None:
            assert self.benchmarks is not None
            model = convert(self.model, plan) if self.generating and plan != self._base else None
            found.metrics += self.benchmarks.scores(*answers, items=items, model=model)
        if text is not None:
            nll, kl, gaps = text
            found.metrics += text_scores(nll.tolist(), kl.tolist(), gaps, primary=not self.spec.tasks).metrics
        return found

    def run(self, plans: Sequence[Plan]) -> list[Scores]:
        """Judges plans by everything in the spec."""
        answers = self.answer(plans) if self.benchmarks else None
        text = self.read_text(plans) if self.sequences is not None else None
        judged = [
            self.scores(
                plan,
                None if answers is None else (answers.log_p[i], answers.greedy[i]),
                None if text is None else (text.nll[i], text.kl[i], text.gaps[i]),
            )
            for i, plan in enumerate(plans)
        ]
        if self._retrieval:
            sweep = LayerSweep(self.model, plans, budget_bytes=self.budget_bytes)
            found = plans_retrieval_scores(sweep, self._retrieval, batch_tokens=_batch_tokens(self.spec))
            for scores, of_plan in zip(judged, found, strict=True):
                scores.metrics += of_plan
        return judged


def _check_context(model: PreTrainedModel, spec: QualitySpec) -> None:
    context_tokens = getattr(model.config, "max_position_embeddings", None)
    if context_tokens is not None and spec.sequence_tokens > context_tokens:
        raise QualityError(
            f"quality.sequence_tokens: {spec.sequence_tokens} is more than the model's context; "
            f"give at most {context_tokens}"
        )
    check_retrieval_context(spec, context_tokens)


def _batch_tokens(spec: QualitySpec) -> int:
    return spec.batch_size * spec.sequence_tokens
