"""`layerboost convert` and `export` write a model with a plan applied, or in its family's own format."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checks.texts import check_maps_text
from orchestrator.commands.single_model import check_new_folder, checked_model, checked_tokenizer, load_checked
from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.errors import InputError
from orchestrator.run.model_facts import ModelFacts

if TYPE_CHECKING:
    from layerboost.affine import FittedMap, Rank
    from layerboost.plan import Plan

_SEQUENCE_TOKENS = 1024
"""Tokens of the sequences that maps are fitted on, if the model reads that many."""


def convert(arguments: argparse.Namespace) -> int:
    """`layerboost convert`: applies a plan and saves a checkpoint."""
    from layerboost.plan import Plan, PlanError

    out = Path(arguments.out)
    check_new_folder(out)
    if arguments.window < 1:
        raise InputError("--window", arguments.window, "must be at least 1 token")
    if not 0 <= arguments.sinks < arguments.window:
        raise InputError(
            "--sinks", arguments.sinks, f"must be 0 to {arguments.window - 1}, fewer than --window {arguments.window}"
        )
    facts = checked_model(arguments.model, arguments, allow_converted=False)
    tokenizer = checked_tokenizer(facts, arguments)
    try:
        plan = Plan.parse(arguments.plan, window=arguments.window, sinks=arguments.sinks)
        plan.check_length(facts.n_layers)
    except PlanError as error:
        raise InputError("--plan", arguments.plan, str(error).removeprefix("plan: ")) from None
    fitting = _fitting(arguments, plan, tokenizer, facts)
    from layerboost.convert import convert as apply_plan

    model = load_checked(facts, arguments, "cpu")
    maps = None if fitting is None else fitting(model)
    converted = apply_plan(model, plan, maps=maps, parent=facts.path, revision=facts.commit or arguments.revision)
    _save_whole(converted, tokenizer, out)
    print(f"{out}: {plan} (plan_id {plan.plan_id}), from {facts.path}")
    return EXIT_DONE


def _fitting(
    arguments: argparse.Namespace, plan: Plan, tokenizer: Any, facts: ModelFacts
) -> Callable[[Any], dict[int, FittedMap]] | None:
    """Checks what the maps of affine layers are fitted on and returns what fits them; None if the plan has none."""
    from layerboost.plan import Treatment

    if not plan.count(Treatment.AFFINE):
        if arguments.text is not None:
            raise InputError("--text", arguments.text, f"is what A layers are fitted on, and {plan} has none; leave it")
        return None
    if arguments.text is None:
        raise InputError("--text", None, "the A layers are fitted on a text, so give one")
    rank = _rank(arguments.rank, facts.config.get_text_config().hidden_size)
    sequence_tokens = min(_SEQUENCE_TOKENS, facts.context_tokens or _SEQUENCE_TOKENS)
    if arguments.tokens < 2 * sequence_tokens:
        raise InputError(
            "--tokens", arguments.tokens, f"is less than two sequences of {sequence_tokens} tokens; give at least these"
        )
    from layerboost.affine import MapsSpec
    from layerboost.text.sources import TextSource

    spec = MapsSpec(TextSource(arguments.text), arguments.tokens, sequence_tokens, rank)
    check_maps_text("--text", spec, tokenizer, facts)

    def fit(model: Any) -> dict[int, FittedMap]:
        from layerboost.sweep.affine_fits import fit_maps_of_plan, read_sequences

        sequences = read_sequences(spec, tokenizer)
        if len(sequences) < spec.n_sequences:
            print(
                f"--text: gives {len(sequences) * sequence_tokens} tokens of the {arguments.tokens} to fit on",
                file=sys.stderr,
            )
        maps = fit_maps_of_plan(model, plan, sequences, rank=rank)
        for layer, fitted in maps.items():
            print(f"layer {layer}: rank {fitted.rank or 'full'}, held-out error {fitted.error:.3f}", file=sys.stderr)
        return maps

    return fit


def _rank(given: str, width: int) -> Rank:
    if given in ("full", "auto"):
        return given  # type: ignore[return-value]
    if not given.isdecimal() or not 1 <= int(given) <= width:
        raise InputError("--rank", given, f"must be full, auto, or a number from 1 to the model's width, {width}")
    return int(given)


def export(arguments: argparse.Namespace) -> int:
    """`layerboost export`: saves a converted checkpoint in its family's own format, if that can express the plan."""
    out = Path(arguments.out)
    check_new_folder(out)
    facts = checked_model(arguments.model, arguments)
    tokenizer = checked_tokenizer(facts, arguments)
    from layerboost.export import ExportError, export_stock

    try:
        stock = export_stock(load_checked(facts, arguments, "cpu"))
    except ExportError as error:
        raise InputError("MODEL", arguments.model, str(error)) from None
    _save_whole(stock, tokenizer, out)
    print(f"{out}: {type(stock).__name__} with the logits of {facts.path}")
    return EXIT_DONE


def _save_whole(model: Any, tokenizer: Any, out: Path) -> None:
    """Saves a checkpoint under another name and renames it, so that an existing folder is always complete."""
    from layerboost.checkpoint import save_checkpoint

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        staging.chmod(0o755)
        save_checkpoint(model, tokenizer, staging)
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
