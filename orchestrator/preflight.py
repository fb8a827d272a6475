"""Everything that can be wrong with the inputs of a run, looked for before anything starts and anything is written."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from orchestrator.cluster_check import Needs, check_nodes
from orchestrator.doctor import MISSING, OK, WARN, Finding, findings_table
from orchestrator.model_check import ModelFacts, check_model, check_tokenizer, without_prefix
from orchestrator.recipe import InputError, Recipe, resolve_sequence_tokens
from orchestrator.recipe_sections import DEVICE_PATTERN, QualitySection
from orchestrator.run_folder import RunFolder
from orchestrator.text_check import check_healing_texts, check_plain_text
from tasks.cluster import (
    ClusterError,
    NodeResources,
    ResourcesError,
    addable,
    connect,
    labelled,
    no_such_node,
    resolve_workers,
)

if TYPE_CHECKING:
    from layerboost.serving_environment import ServingEnvironment

__all__ = ["InputError", "ModelFacts", "preflight"]


def preflight(recipe: Recipe, folder: RunFolder, *, address: str | None = None) -> ModelFacts:
    """Checks a recipe against the model, the texts, the folder and the machine. Starts and writes nothing.

    Args:
        recipe: a recipe from `load_recipe`.
        folder: where the run would go.
        address: the Ray cluster's address; None for this machine.

    Raises:
        InputError: for the first thing that is wrong, cheap checks first.
    """
    folder.preflight_writable()
    _check_shares(recipe)
    nodes = find_nodes(address)
    pending = check_placement(
        recipe, nodes, "the cluster" if address else "this machine", growth=addable() if address else ()
    )
    if address is None:
        check_device(recipe.model.device)
    facts = check_model(
        recipe.model.path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
        allow_converted=False,
    )
    _check_lengths(recipe, facts)
    _check_plans(recipe, facts)
    _check_constraints(recipe, facts)
    if recipe.throughput.engine == "vllm":
        check_vllm(recipe.throughput.environment, [facts], address, labels=recipe.placement.labels.time)
    tokenizer = check_tokenizer(facts, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    check_quality(recipe.quality, facts, tokenizer)
    if recipe.quality.text is not None:
        for length in recipe.sensitivity.context_tokens:
            check_plain_text("sensitivity.context_tokens", recipe.quality.text, length, tokenizer, facts)
    tokens = resolve_sequence_tokens(recipe.quality.sequence_tokens, facts.context_tokens)
    for index, text in enumerate(recipe.sensitivity.texts):
        check_plain_text(f"sensitivity.texts[{index}]", text, tokens, tokenizer, facts)
    check_healing_texts(recipe.healing, facts, tokenizer)
    facts = replace(facts, teacher=_check_teacher(recipe, facts, tokenizer))
    if address is not None:
        _check_cluster([*pending, *check_nodes(Needs.of_run(recipe, folder.url), nodes)])
    return facts


def _check_cluster(findings: Sequence[Finding]) -> None:
    """Shows what is wrong with the nodes, and raises InputError for the first fault that a run would not survive."""
    if not (faults := [finding for finding in findings if finding.state != OK]):
        return
    sys.stderr.write(findings_table(faults))
    for fault in faults:
        if fault.state == MISSING:
            raise InputError(fault.what, fault.found, fault.remedy)


def _check_lengths(recipe: Recipe, facts: ModelFacts) -> None:
    context = facts.context_tokens
    healing = recipe.healing
    if context is not None:
        for field, tokens in (
            ("quality.sequence_tokens", recipe.quality.sequence_tokens),
            ("healing.sequence_tokens", healing.sequence_tokens),
            ("sensitivity.context_tokens", max(recipe.sensitivity.context_tokens, default=None)),
        ):
            if tokens is not None and tokens > context:
                raise InputError(
                    field, tokens, f"is longer than the model's context of {context} tokens; give at most that"
                )
        if recipe.search.window >= context:
            raise InputError(
                "search.window",
                recipe.search.window,
                f"covers the model's whole context of {context} tokens, so it would change nothing; give fewer",
            )
        throughput, lengths = recipe.throughput, recipe.throughput.lengths
        for field, prompt_tokens in (
            ("throughput.prompt_tokens", throughput.prompt_tokens),
            ("throughput.lengths.prompt_tokens", max(lengths.prompt_tokens) if lengths else 0),
        ):
            check_decoded(field, prompt_tokens, throughput.new_tokens, facts, throughput.engine)
    sequence_tokens = resolve_sequence_tokens(healing.sequence_tokens, context)
    if healing.tokens and recipe.search.window >= sequence_tokens:
        raise InputError(
            "search.window",
            recipe.search.window,
            f"covers the whole sequences of {sequence_tokens} tokens that are healed on, which would teach nothing; "
            "give fewer, or longer healing.sequence_tokens",
        )
    step_tokens = healing.batch_sequences * sequence_tokens
    if 0 < healing.tokens < step_tokens:
        raise InputError(
            "healing.tokens",
            healing.tokens,
            f"is less than one step of {healing.batch_sequences} sequences, {step_tokens} tokens; "
            "give more tokens, 0 for no healing, or smaller healing.batch_sequences",
        )


def check_decoded(field: str, prompt_tokens: int, new_tokens: int, facts: ModelFacts, engine: str) -> None:
    """Raises InputError where prompt and new tokens are more than a model's context."""
    from layerboost.serving_bench import PROMPT_SLACK_TOKENS

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


def _check_shares(recipe: Recipe) -> None:
    """Every healing worker must have something to do in each step."""
    healing, workers = recipe.healing, recipe.placement.healing_workers
    if healing.tokens and not isinstance(workers, str) and workers > healing.batch_sequences:
        raise InputError(
            "placement.healing_workers",
            workers,
            f"is more than the {healing.batch_sequences} sequences of a step (healing.batch_sequences); "
            "give at most as many",
        )


def _check_teacher(recipe: Recipe, facts: ModelFacts, tokenizer: Any) -> ModelFacts | None:
    """The facts of healing's own teacher, which must read and predict the same tokens as the model."""
    healing, code = recipe.healing, recipe.model.trust_remote_code
    if healing.teacher is None or not healing.tokens:
        return None
    field, revision = "healing.teacher", healing.teacher_revision
    teacher = check_model(
        healing.teacher,
        field=field,
        revision=revision,
        revision_field="healing.teacher_revision",
        trust_remote_code=code,
        any_family=True,
    )
    vocabularies = [of.config.get_text_config().vocab_size for of in (teacher, facts)]
    if vocabularies[0] != vocabularies[1]:
        raise InputError(
            field,
            healing.teacher,
            f"has a vocabulary of {vocabularies[0]} tokens, the model one of {vocabularies[1]}; "
            "take a teacher with the same tokenizer",
        )
    of_teacher = check_tokenizer(teacher, field=field, revision=revision, trust_remote_code=code)
    if of_teacher.get_vocab() != tokenizer.get_vocab():
        raise InputError(field, healing.teacher, "its tokenizer is not the model's; take a teacher with the same one")
    shapes = [
        (config.num_hidden_layers, config.hidden_size)
        for config in (of.config.get_text_config() for of in (teacher, facts))
    ]
    if healing.hidden_weight and shapes[0] != shapes[1]:
        raise InputError(
            "healing.hidden_weight",
            healing.hidden_weight,
            f"compares layers, and the teacher has {shapes[0][0]} of width {shapes[0][1]}, the model {shapes[1][0]} of "
            f"width {shapes[1][1]}; use 0",
        )
    tokens = resolve_sequence_tokens(healing.sequence_tokens, facts.context_tokens)
    if teacher.context_tokens is not None and tokens > teacher.context_tokens:
        raise InputError(
            "healing.sequence_tokens",
            tokens,
            f"is longer than the teacher's context of {teacher.context_tokens} tokens; give at most that",
        )
    return teacher


def _check_plans(recipe: Recipe, facts: ModelFacts) -> None:
    for index, plan in enumerate(recipe.search.plans):
        if len(plan) != facts.n_layers:
            raise InputError(
                f"search.plans[{index}]",
                plan,
                f"has {len(plan)} letters; the model has {facts.n_layers} layers, give one letter for each",
            )
    adaptive = recipe.sensitivity.adaptive
    if adaptive is not None and (adaptive.removed or 0) + (adaptive.middle or 0) > facts.n_layers:
        raise InputError(
            "sensitivity.adaptive",
            adaptive.model_dump(include={"removed", "middle"}),
            f"are more than the model's {facts.n_layers} layers together; make one smaller",
        )


def _check_constraints(recipe: Recipe, facts: ModelFacts) -> None:
    """Some plan must hold pins and limits; one without attention wherever nothing is pinned holds them if any does."""
    pins = recipe.constraints.pin
    if outside := sorted(layer for layer in pins if layer >= facts.n_layers):
        raise InputError(
            f"constraints.pin.{outside[0]}",
            pins[outside[0]],
            f"the model has layers 0 to {facts.n_layers - 1}; pin one of these",
        )
    if not recipe.constraints.at_most:
        return
    from layerboost.plan import Treatment
    from orchestrator.identity import RunInputs

    space = RunInputs(recipe, facts).plan_space
    least = space.plan([Treatment.NONE] * facts.n_layers)
    for limit in space.limits:
        if not limit.holds(least):
            raise InputError(
                f"constraints.at_most.{limit.name}",
                limit.at_most,
                f"the pinned layers alone come to {limit.value(least):g}; give at least that, or pin fewer",
            )


def check_vllm(
    folder: str | None,
    every_facts: Sequence[ModelFacts],
    address: str | None = None,
    *,
    labels: Mapping[str, str] = MappingProxyType({}),
    prefix: str = "throughput.",
) -> ServingEnvironment:
    """The environment that has vLLM and serves all these models.

    Args:
        folder: of the environment; None for the running Python's.
        address: of the cluster that it is on.
        labels: of the nodes that time.
        prefix: of the fields' names in an error.

    Raises:
        InputError: there is none, or it does not serve a model's family.
    """
    from layerboost.serving_environment import ServingError, check_served

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
    """What `find_environment` finds, on this machine or on the node of a connected cluster that times."""
    from layerboost.serving_environment import find_environment
    from tasks.measurement import on_measuring_node

    return find_environment(folder) if address is None else on_measuring_node(dict(labels), find_environment, folder)


def check_device(device: str, field: str = "model.device") -> None:
    """Raises InputError if this machine does not have the device."""
    if not re.fullmatch(DEVICE_PATTERN, device):
        raise InputError(field, device, "must be auto, cpu, mps, cuda or cuda:N")
    import torch

    kind, _, index = device.partition(":")
    if kind in ("auto", "cpu"):
        return
    if kind == "mps":
        count = int(torch.backends.mps.is_available())
    else:
        count = torch.xpu.device_count() if kind == "xpu" else torch.cuda.device_count()
    if count <= int(index or 0):
        raise InputError(field, device, f"this machine has {count} of {kind}; use auto or cpu")


def find_nodes(address: str | None) -> tuple[NodeResources, ...]:
    """The CPUs and GPUs of this machine, or of each node of the Ray cluster at an address.

    The connection to a cluster stays, for the run that follows.

    Raises:
        InputError: if the cluster does not answer, or refuses us.
    """
    if address is None:
        import torch

        return (
            NodeResources(
                "here", "localhost", float(os.cpu_count() or 1), float(torch.cuda.device_count()), labels=None
            ),
        )
    try:
        return connect(address).nodes
    except ClusterError as error:
        raise InputError("--address", address, without_prefix(error, f"address: {address}")) from error


def check_placement(
    recipe: Recipe, nodes: Sequence[NodeResources], where: str, *, growth: Sequence[NodeResources] = ()
) -> list[Finding]:
    """Whether the nodes can hold what the placement asks for; returns rows for what waits for an autoscaler.

    Args:
        recipe: the run's.
        nodes: that are there.
        where: they are, for the error.
        growth: nodes that an autoscaler could add.

    Raises:
        InputError: for more than there could ever be, for which Ray would wait for ever.
    """
    placement = recipe.placement
    labels = {"workers": placement.labels.evaluate, "healing_workers": placement.labels.heal}
    for kind, asked in placement.labels:
        if not growth and not labelled(nodes, asked):
            error = no_such_node(asked)
            raise InputError(f"placement.labels.{kind}", error.value, f"on {where} {error.remedy}")
    wanted = [("workers", (placement.workers, placement.cpus_per_worker, placement.gpus_per_worker))]
    if recipe.healing.tokens and placement.healing_workers != "auto":
        # Each has a whole GPU, or at least one CPU.
        healers = labelled(nodes, placement.labels.heal)
        n_gpus = 0 if placement.gpus_per_worker == 0 else sum(node.gpus for node in healers)
        wanted.append(("healing_workers", (placement.healing_workers, 1.0, 1.0 if n_gpus else 0.0)))
    pending = []
    for field, workers in wanted:
        try:
            resolve_workers(*workers, nodes=nodes, labels=labels[field])
        except ResourcesError as error:
            at_fault = f"placement.{field if error.field == 'workers' or field == 'healing_workers' else error.field}"
            try:
                resolve_workers(*workers, nodes=nodes, growth=growth, labels=labels[field])
            except ResourcesError as never:
                raise InputError(at_fault, never.value, f"on {where} {never.remedy}") from None
            pending.append(
                Finding(
                    at_fault, f"{error.value}: {error.remedy}", WARN, "wait for the autoscaler, which can add nodes"
                )
            )
    return pending


def check_quality(quality: QualitySection, facts: ModelFacts, tokenizer: Any) -> None:
    """Checks that the tasks are known and that the text gives at least one sequence.

    Raises:
        InputError: for the first that is not.
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
    from layerboost.evaluation import QualityError
    from layerboost.retrieval import check_retrieval_context, retrieval_items

    spec = quality.spec(facts.context_tokens)
    try:
        check_retrieval_context(spec, facts.context_tokens)
        retrieval_items(tokenizer, spec)
    except QualityError as error:
        field = "quality.retrieval"
        raise InputError(field, list(quality.retrieval), without_prefix(error, field)) from None


def _check_tasks(field: str, tasks: Sequence[str]) -> None:
    from layerboost.evaluation import UnknownTaskError, check_tasks

    value = ", ".join(tasks)
    try:
        check_tasks(tasks)
    except UnknownTaskError as error:
        raise InputError(field, value, without_prefix(error, "quality.tasks")) from None
