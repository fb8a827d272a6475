"""`layerboost convert` and `export` write a model with a plan applied, or in its family's own format."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.commands.single_model import check_new_folder, checked_model, checked_tokenizer, load_checked
from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.errors import InputError


def convert(arguments: argparse.Namespace) -> int:
    """`layerboost convert`: applies a plan and saves a checkpoint."""
    from layerboost.plan import Plan, PlanError

    out = Path(arguments.out)
    check_new_folder(out)
    if arguments.window < 1:
        raise InputError("--window", arguments.window, "must be at least 1 token")
    facts = checked_model(arguments.model, arguments, allow_converted=False)
    tokenizer = checked_tokenizer(facts, arguments)
    try:
        plan = Plan.parse(arguments.plan, window=arguments.window)
        plan.check_length(facts.n_layers)
    except PlanError as error:
        raise InputError("--plan", arguments.plan, str(error).removeprefix("plan: ")) from None
    from layerboost.convert import convert as apply_plan

    converted = apply_plan(
        load_checked(facts, arguments, "cpu"), plan, parent=facts.path, revision=facts.commit or arguments.revision
    )
    _save_whole(converted, tokenizer, out)
    print(f"{out}: {plan} (plan_id {plan.plan_id}), from {facts.path}")
    return EXIT_DONE


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
