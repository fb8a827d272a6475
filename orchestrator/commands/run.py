"""`layerboost run`: runs a recipe, or estimates its cost."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(arguments: argparse.Namespace) -> int:
    """`layerboost run`: checks a recipe, then runs it or, with `--dry-run`, prints its cost."""
    from orchestrator.recipe.load import load_recipe
    from orchestrator.run.folder import RunFolder

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    folder = RunFolder(arguments.out or Path("runs", Path(arguments.recipe).stem))
    from orchestrator.checks.preflight import preflight

    facts = preflight(recipe, folder, address=arguments.address)
    from orchestrator import pipeline
    from orchestrator.run.progress import Progress

    if arguments.dry_run:
        return pipeline.dry_run(recipe, folder, facts)
    progress = Progress()
    try:
        return pipeline.run(recipe, folder, facts, until=arguments.until, address=arguments.address, progress=progress)
    finally:
        progress.close()
