"""Everything that can be wrong with the inputs of a run, looked for before anything starts and anything is written."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.model_check import HUB_TIMEOUT_S, ModelFacts, check_model, check_tokenizer, first_line
from orchestrator.recipe import (
    DEVICE_PATTERN,
    HealingSection,
    InputError,
    QualitySection,
    Recipe,
    resolve_sequence_tokens,
)
from orchestrator.run_folder import RunFolder
from tasks.cluster import ClusterError, NodeResources, ResourcesError, connect, resolve_workers

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
    check_placement(recipe, find_nodes(address), "the cluster" if address else "this machine")
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
    tokenizer = check_tokenizer(facts, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    check_quality(recipe.quality, facts, tokenizer)
    tokens = resolve_sequence_tokens(recipe.quality.sequence_tokens, facts.context_tokens)
    for index, text in enumerate(recipe.sensitivity.texts):
        _check_text(f"sensitivity.texts[{index}]", text, tokens, tokenizer, facts)
    _check_healing_text(recipe.healing, facts, tokenizer)
    return facts


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
        decoded = recipe.throughput.prompt_tokens + recipe.throughput.new_tokens
        if decoded > context:
            raise InputError(
                "throughput.prompt_tokens",
                recipe.throughput.prompt_tokens,
                f"with {recipe.throughput.new_tokens} new tokens is {decoded}, more than the model's context of "
                f"{context} tokens; lower prompt_tokens or new_tokens",
            )
    step_tokens = healing.batch_sequences * resolve_sequence_tokens(healing.sequence_tokens, context)
    if 0 < healing.tokens < step_tokens:
        raise InputError(
            "healing.tokens",
            healing.tokens,
            f"is less than one step of {healing.batch_sequences} sequences, {step_tokens} tokens; "
            "give more tokens, 0 for no healing, or smaller healing.batch_sequences",
        )


def _check_shares(recipe: Recipe) -> None:
    """Every healing worker must have an equal share of a batch, or their gradients would weigh unequally."""
    healing, workers = recipe.healing, recipe.placement.healing_workers
    if healing.tokens and not isinstance(workers, str) and healing.batch_sequences % workers:
        raise InputError(
            "placement.healing_workers",
            workers,
            f"does not divide healing.batch_sequences {healing.batch_sequences}; give one of "
            f"{', '.join(str(n) for n in range(1, healing.batch_sequences + 1) if healing.batch_sequences % n == 0)}",
        )


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

        return (NodeResources("here", "localhost", float(os.cpu_count() or 1), float(torch.cuda.device_count())),)
    try:
        return connect(address).nodes
    except ClusterError as error:
        raise InputError("--address", address, _without_prefix(error, f"address: {address}")) from error


def check_placement(recipe: Recipe, nodes: Sequence[NodeResources], where: str) -> None:
    """Raises InputError if the placement asks for more than the nodes have, for which Ray would wait for ever."""
    placement = recipe.placement
    stages = [("workers", placement.workers)]
    if recipe.healing.tokens:
        stages.append(("healing_workers", placement.healing_workers))
    for field, workers in stages:
        try:
            resolve_workers(workers, placement.cpus_per_worker, placement.gpus_per_worker, nodes=nodes)
        except ResourcesError as error:
            at_fault = field if error.field == "workers" else error.field
            raise InputError(f"placement.{at_fault}", error.value, f"on {where} {error.remedy}") from None


def check_quality(quality: QualitySection, facts: ModelFacts, tokenizer: Any) -> None:
    """Checks that the tasks are known and that the text gives at least one sequence.

    Raises:
        InputError: for the first that is not.
    """
    _check_tasks(quality.tasks)
    if quality.text is not None:
        tokens = resolve_sequence_tokens(quality.sequence_tokens, facts.context_tokens)
        _check_text("quality.text", quality.text, tokens, tokenizer, facts)


def _check_tasks(tasks: Sequence[str]) -> None:
    from layerboost.evaluation import UnknownTaskError, check_tasks

    field, value = "quality.tasks", ", ".join(tasks)
    try:
        check_tasks(tasks)
    except UnknownTaskError as error:
        raise InputError(field, value, _without_prefix(error, "quality.tasks")) from None


def _check_healing_text(healing: HealingSection, facts: ModelFacts, tokenizer: Any) -> None:
    if healing.text is None or healing.tokens == 0:
        return
    tokens = resolve_sequence_tokens(healing.sequence_tokens, facts.context_tokens)
    _check_text("healing.text", healing.text, tokens, tokenizer, facts, healing.split, healing.field)


def _check_text(
    name: str,
    text: str,
    sequence_tokens: int,
    tokenizer: Any,
    facts: ModelFacts,
    split: str = "train",
    field: str = "text",
) -> None:
    """Reads and packs one sequence, as the run will."""
    from layerboost.data import TextSourceError, TextTooShortError, pack, read_documents

    _check_dataset_reachable(name, text)
    try:
        documents = read_documents(text, split=split, field=field)
        sequence = pack(documents, tokenizer, sequence_tokens, limit_sequences=1)
    except (TextSourceError, TextTooShortError) as error:
        raise InputError(name, text, _without_prefix(error, "text")) from None
    except UnicodeDecodeError as error:
        raise InputError(name, text, f"is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise InputError(name, text, f"cannot be read ({first_line(error)}); check the path and the rights") from None
    except ValueError as error:
        raise InputError("model.path", facts.path, _without_prefix(error, "tokenizer")) from None
    vocabulary = facts.config.get_text_config().vocab_size
    if int(sequence.max()) >= vocabulary:
        raise InputError(
            "model.path",
            facts.path,
            f"its tokenizer gives the token {int(sequence.max())}, its vocabulary has {vocabulary}; "
            "give the tokenizer that the model was trained with",
        )


def _check_dataset_reachable(field: str, text: str) -> None:
    """`datasets` retries for half a minute before it says that there is no connection."""
    if Path(text).suffix or Path(text).exists() or "://" in text:
        return
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repository = text.partition(":")[0]
    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            HfApi().dataset_info(repository, timeout=HUB_TIMEOUT_S)
            return
        except HFValidationError:
            raise InputError(field, text, "no such file, and no hub name (owner/name) either; check the path") from None
        except RepositoryNotFoundError:
            raise InputError(
                field, text, "no such file, and the hub has no such dataset; check the name, or log in"
            ) from None
        except Exception as error:
            reason = first_line(error)
    import datasets

    if not (Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___")).is_dir():
        raise InputError(
            field,
            text,
            f"no such file, not in the cache, and the hub cannot be reached ({reason}); give a local file or connect",
        )


def _without_prefix(error: Exception, prefix: str) -> str:
    return first_line(error).removeprefix(f"{prefix}: ")
