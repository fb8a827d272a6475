"""Checks that the model can answer the tasks and the retrieval distances of the quality section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.checks.texts import check_plain_text
from orchestrator.recipe.errors import InputError, without_prefix
from orchestrator.recipe.fields import resolve_sequence_tokens
from orchestrator.recipe.sections import QualitySection
from orchestrator.run.model_facts import ModelFacts


def check_quality(quality: QualitySection, facts: ModelFacts, tokenizer: Any) -> None:
    """Checks that the tasks are known and that the text gives at least one sequence.

    Raises:
        InputError: a task is unknown or the text is unusable; it names the first fault.
    """
    _check_tasks("quality.tasks", quality.tasks)
    _check_tasks("quality.final_tasks", quality.final_tasks)
    _check_tasks("quality.tasks", (*quality.tasks, *quality.final_tasks))
    if quality.text is not None:
        tokens = resolve_sequence_tokens(quality.sequence_tokens, facts.context_tokens)
        check_plain_text("quality.text", quality.text, tokens, tokenizer, facts)
    if quality.retrieval:
        _check_retrieval(quality, facts, tokenizer)


def _check_retrieval(quality: QualitySection, facts: ModelFacts, tokenizer: Any) -> None:
    from layerboost.evaluation.retrieval import check_retrieval_context, retrieval_items
    from layerboost.evaluation.scores import QualityError

    spec = quality.spec(facts.context_tokens)
    try:
        check_retrieval_context(spec, facts.context_tokens)
        retrieval_items(tokenizer, spec)
    except QualityError as error:
        field = "quality.retrieval"
        raise InputError(field, list(quality.retrieval), without_prefix(error, field)) from None


def _check_tasks(field: str, tasks: Sequence[str]) -> None:
    from layerboost.evaluation.task_files import UnknownTaskError, check_tasks

    value = ", ".join(tasks)
    try:
        check_tasks(tasks)
    except UnknownTaskError as error:
        raise InputError(field, value, without_prefix(error, "quality.tasks")) from None
