"""Checks the speed measurement: vLLM's environment, and lengths that fit the model's context."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from layerboost.speed.vllm_environment import ServingEnvironment
from orchestrator.recipe.errors import InputError
from orchestrator.run.model_facts import ModelFacts


def check_decoded(field: str, prompt_tokens: int, new_tokens: int, facts: ModelFacts, engine: str) -> None:
    """Raises InputError where prompt and new tokens together exceed the model's context."""
    from layerboost.speed.vllm_bench import PROMPT_SLACK_TOKENS

    slack = PROMPT_SLACK_TOKENS if engine == "vllm" else 0
    decoded = prompt_tokens + new_tokens + slack
    if facts.context_tokens is not None and decoded > facts.context_tokens:
        longer = f" and the {slack} by which vllm's prompts may come out longer" if slack else ""
        raise InputError(
            field,
            prompt_tokens,
            f"with {new_tokens} new tokens{longer} is {decoded}, more than the model's context of "
            f"{facts.context_tokens} tokens; lower the prompt's or the new tokens",
        )


def check_vllm(
    folder: str | None,
    every_facts: Sequence[ModelFacts],
    address: str | None = None,
    *,
    labels: Mapping[str, str] = MappingProxyType({}),
    prefix: str = "throughput.",
) -> ServingEnvironment:
    """Returns the environment that has vLLM and serves all these models.

    Args:
        folder: the folder of the environment; None for the environment of the running Python.
        address: the address of the cluster that holds the environment; None for this machine.
        labels: the labels of the nodes that measure speed.
        prefix: the prefix of the fields' names in errors.

    Raises:
        InputError: there is no such environment, or it does not serve the family of a model.
    """
    from layerboost.speed.vllm_environment import ServingError, check_served

    try:
        for facts in every_facts:
            check_served(facts.config.model_type)
    except ServingError as error:
        raise InputError(f"{prefix}engine", "vllm", f"{error}; use transformers") from None
    try:
        return serving_environment(folder, address, tuple(labels.items()))
    except ServingError as error:
        remedy = str(error) if folder else f"the running Python {error}"
        raise InputError(f"{prefix}environment", folder, remedy) from None


@functools.cache
def serving_environment(
    folder: str | None, address: str | None, labels: tuple[tuple[str, str], ...]
) -> ServingEnvironment:
    """Calls `find_environment` on this machine, or on the measuring node of a connected cluster."""
    from layerboost.speed.vllm_environment import find_environment
    from tasks.timing import on_measuring_node

    return find_environment(folder) if address is None else on_measuring_node(dict(labels), find_environment, folder)
