"""Checks all inputs of a run before anything starts and before anything is written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerboost.gguf import is_gguf
from orchestrator.checks.cluster import Needs, check_nodes
from orchestrator.checks.findings import MISSING, OK, Finding, findings_table
from orchestrator.checks.model import check_model, check_tokenizer
from orchestrator.checks.placement import check_device, check_placement, find_nodes
from orchestrator.checks.quality import check_quality
from orchestrator.checks.serving import check_decoded, check_engine
from orchestrator.checks.texts import check_healing_texts, check_maps_text, check_plain_text
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.fields import resolve_sequence_tokens
from orchestrator.recipe.healing import SAMPLED
from orchestrator.recipe.recipe import Recipe
from orchestrator.run.folder import RunFolder
from orchestrator.run.model_facts import ModelFacts
from tasks.cluster.connection import addable
from tasks.engines import ENGINES


def preflight(recipe: Recipe, folder: RunFolder, *, address: str | None = None) -> ModelFacts:
    """Checks a recipe against the model, the texts, the folder and the machine; it starts nothing.

    It writes nothing either, except the model of a GGUF file, which is unpacked into the folder once.

    Args:
        recipe: a recipe from `load_recipe`.
        folder: the folder of the run.
        address: the Ray cluster's address; None for this machine.

    Raises:
        InputError: an input is wrong; it names the first fault, and cheap checks come first.
    """
    folder.preflight_writable()
    _check_shares(recipe)
    nodes = find_nodes(address)
    pending = check_placement(
        recipe, nodes, "the cluster" if address else "this machine", growth=addable() if address else ()
    )
    if address is None:
        check_device(recipe.model.device)
    cache = _model_cache(recipe, folder)
    facts = check_model(
        recipe.model.path,
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
        allow_converted=False,
        cache=cache,
    )
    _check_lengths(recipe, facts)
    _check_plans(recipe, facts)
    _check_constraints(recipe, facts)
    throughput = recipe.throughput
    _check_treatments_of_engine(recipe, facts)
    check_engine(throughput.engine, throughput.environment, [facts], address, labels=recipe.placement.labels.time)
    tokenizer = check_tokenizer(facts, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    check_quality(recipe.quality, facts, tokenizer)
    if recipe.quality.text is not None:
        for length in recipe.sensitivity.context_tokens:
            check_plain_text("sensitivity.context_tokens", recipe.quality.text, length, tokenizer, facts)
    tokens = resolve_sequence_tokens(recipe.quality.sequence_tokens, facts.context_tokens)
    for index, text in enumerate(recipe.sensitivity.texts):
        check_plain_text(f"sensitivity.texts[{index}]", text, tokens, tokenizer, facts)
    check_healing_texts(recipe.healing, facts, tokenizer)
    _check_maps(recipe, facts, tokenizer)
    facts = replace(facts, teacher=_check_teacher(recipe, facts, tokenizer, cache))
    if address is not None:
        _check_cluster([*pending, *check_nodes(Needs.of_run(recipe, folder.url), nodes)])
    return facts


def _model_cache(recipe: Recipe, folder: RunFolder) -> Path | None:
    """Returns where models from GGUF files are unpacked: in the run folder, which all workers see."""
    if folder.is_local:
        return Path(folder.path) / "cache"
    for field, model in (("model.path", recipe.model.path), ("healing.teacher", recipe.healing.teacher)):
        if model is not None and is_gguf(model):
            raise InputError(
                field,
                model,
                f"is unpacked into the run folder, which {folder} cannot be; give a folder on a shared disk",
            )
    return None


def _check_cluster(findings: Sequence[Finding]) -> None:
    """Prints the faults of the nodes and raises InputError for the first one that a run would not survive."""
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


def _check_shares(recipe: Recipe) -> None:
    """Checks that every healing worker gets at least one sequence of each step."""
    healing, workers = recipe.healing, recipe.placement.healing_workers
    if healing.tokens and not isinstance(workers, str) and workers > healing.batch_sequences:
        raise InputError(
            "placement.healing_workers",
            workers,
            f"is more than the {healing.batch_sequences} sequences of a step (healing.batch_sequences); "
            "give at most as many",
        )


def _check_teacher(recipe: Recipe, facts: ModelFacts, tokenizer: Any, cache: Path | None) -> ModelFacts | None:
    """Returns the facts of healing's teacher, which must read and predict the same tokens as the model."""
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
        cache=cache,
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


def _check_treatments_of_engine(recipe: Recipe, facts: ModelFacts) -> None:
    from orchestrator.run.inputs import RunInputs

    engine = ENGINES[recipe.throughput.engine]
    for treatment in RunInputs(recipe, facts).treatments:
        if engine.treatments is not None and treatment.value not in engine.treatments:
            raise InputError(
                "throughput.engine",
                engine.name,
                f"runs no layers of {treatment.value}, which the recipe names; use transformers, or leave them out",
            )
        sinks = recipe.search.sinks
        if sinks and treatment.needs_window and not treatment.mechanism.may_have_sinks:
            raise InputError("search.sinks", sinks, f"layers of {treatment.value} cannot keep any; give 0")


def _check_maps(recipe: Recipe, facts: ModelFacts, tokenizer: Any) -> None:
    """Checks what the maps of affine layers are fitted on, if the recipe names such layers."""
    from layerboost.plan import Treatment
    from orchestrator.run.inputs import RunInputs

    affine, inputs = recipe.search.affine, RunInputs(recipe, facts)
    if Treatment.AFFINE not in inputs.treatments:
        return
    if affine.text is None and not any(text.format != SAMPLED for _, text in recipe.healing.named_sources()):
        raise InputError(
            "search.affine.text", None, "maps are fitted on a text, and no plain one is healed on; give one"
        )
    spec = inputs.maps_spec
    assert spec is not None
    check_maps_text("search.affine.text", spec, tokenizer, facts)
    if affine.tokens < 2 * spec.sequence_tokens:
        raise InputError(
            "search.affine.tokens",
            affine.tokens,
            f"is less than two sequences of {spec.sequence_tokens} tokens; give more",
        )
    width = facts.config.get_text_config().hidden_size
    if isinstance(affine.rank, int) and affine.rank > width:
        raise InputError(
            "search.affine.rank", affine.rank, f"is more than the model's width of {width}; give at most that"
        )


def _check_constraints(recipe: Recipe, facts: ModelFacts) -> None:
    """Checks that at least one plan can hold the pins and the limits.

    The plan that removes the attention of every unpinned layer is the cheapest: if it breaks a limit, every plan does.
    """
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
    from orchestrator.run.inputs import RunInputs

    space = RunInputs(recipe, facts).plan_space
    least = space.plan([Treatment.NONE] * facts.n_layers)
    for limit in space.limits:
        if not limit.holds(least):
            raise InputError(
                f"constraints.at_most.{limit.name}",
                limit.at_most,
                f"the pinned layers alone come to {limit.value(least):g}; give at least that, or pin fewer",
            )
