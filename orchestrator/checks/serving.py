"""Checks the speed measurement: the engine's environment, and lengths that fit the model's context."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from layerboost.registry import resolved
from layerboost.speed.vllm_environment import ServingEnvironment
from orchestrator.recipe.errors import InputError
from orchestrator.run.model_facts import ModelFacts
from tasks.engines import ENGINES, TRANSFORMERS


def check_decoded(field: str, prompt_tokens: int, new_tokens: int, facts: ModelFacts, engine: str) -> None:
    """Raises InputError where prompt and new tokens together exceed the model's context."""
    slack = ENGINES[engine].prompt_slack_tokens
    decoded = prompt_tokens + new_tokens + slack
    if facts.context_tokens is not None and decoded > facts.context_tokens:
        longer = f" and the {slack} by which {engine}'s prompts may come out longer" if slack else ""
        raise InputError(
            field,
            prompt_tokens,
            f"with {new_tokens} new tokens{longer} is {decoded}, more than the model's context of "
            f"{facts.context_tokens} tokens; lower the prompt's or the new tokens",
        )


def check_engine(
    name: str,
    folder: str | None,
    every_facts: Sequence[ModelFacts],
    address: str | None = None,
    *,
    labels: Mapping[str, str] = MappingProxyType({}),
    prefix: str = "throughput.",
) -> ServingEnvironment | None:
    """Returns the environment that an engine runs all these models in, None for the running Python.

    Args:
        name: the name of the engine.
        folder: the folder of the environment; None for the environment of the running Python.
        address: the address of the cluster that holds the environment; None for this machine.
        labels: the labels of the nodes that measure speed.
        prefix: the prefix of the fields' names in errors.

    Raises:
        InputError: there is no such environment, or it does not serve the family of a model.
    """
    from layerboost.speed.vllm_environment import ServingError

    engine = ENGINES[name]
    try:
        for facts in every_facts if engine.check_model is not None else ():
            resolved(engine.check_model)(facts.config.model_type)
    except (ServingError, ValueError) as error:
        raise InputError(f"{prefix}engine", name, f"{error}; use {TRANSFORMERS}") from None
    if engine.find_environment is None:
        return None
    try:
        return serving_environment(name, folder, address, tuple(labels.items()))
    except ServingError as error:
        remedy = str(error) if folder else f"the running Python {error}"
        raise InputError(f"{prefix}environment", folder, remedy) from None


@functools.cache
def serving_environment(
    engine: str, folder: str | None, address: str | None, labels: tuple[tuple[str, str], ...]
) -> ServingEnvironment:
    """Calls the engine's `find_environment` on this machine, or on the measuring node of a connected cluster."""
    from tasks.timing import on_measuring_node

    find_environment = resolved(ENGINES[engine].find_environment)
    return find_environment(folder) if address is None else on_measuring_node(dict(labels), find_environment, folder)
