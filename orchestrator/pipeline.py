"""A run, from its recipe to its report.

    evaluate ─► sensitivity ─► search ─► heal ─► report (measure the finalists, write the report)

Every unit of work is a record in the run folder, known by the hash of what changes its result; a stage does only what
is not recorded, and Ray starts only when there is something to do. What a later stage needs it reads from records, so
the same command goes on wherever an earlier one stopped. `run.json` lists the records that belong to this run: from it
and the records alone the report can be written again.
"""

from __future__ import annotations

import sys

from orchestrator.context import RunContext
from orchestrator.environment import environment
from orchestrator.identity import RunInputs
from orchestrator.model_check import ModelFacts
from orchestrator.progress import Progress
from orchestrator.recipe import Recipe
from orchestrator.reporting import report_files
from orchestrator.results import RECIPE_FILE, RunState
from orchestrator.run_folder import RunFolder
from orchestrator.stages import STAGES
from tasks import cluster


def run(
    recipe: Recipe, folder: RunFolder, facts: ModelFacts, *, until: str, address: str | None, progress: Progress
) -> int:
    """Runs a checked recipe up to the stage `until`, or goes on with it; prints the front and the report's path.

    Returns:
        0, or 1 where units failed: each is named on stderr, and the rest is recorded.
    """
    with folder.lock():
        folder.write_text(RECIPE_FILE, recipe.resolved_yaml())
        context = _context(recipe, folder, facts, progress, address)
        try:
            for name, stage in STAGES.items():
                can_go_on = stage(context)
                context.save()
                if name == until or not can_go_on:
                    break
        finally:
            cluster.shutdown()
        _write_report(folder)
    for failure in context.state.failures:
        named = " ".join(f"{label}={value}" for label, value in failure["name"].items())
        print(f"failed: {failure['stage']} {named}: {failure['error'].splitlines()[0]}", file=sys.stderr)
    if context.state.failures:
        print("the same command tries them again", file=sys.stderr)
    return 1 if context.state.failures else 0


def report(folder: RunFolder) -> int:
    """Writes CSVs, pictures and the page of a run again, from its records alone."""
    with folder.lock():
        _write_report(folder)
    return 0


def dry_run(recipe: Recipe, folder: RunFolder, facts: ModelFacts) -> int:
    """Prints each stage's units, how many are recorded, and what the rest will cost. Starts and writes nothing."""
    from orchestrator.estimate import estimate

    print(estimate(_context(recipe, folder, facts, Progress(), None)))
    return 0


def _context(
    recipe: Recipe, folder: RunFolder, facts: ModelFacts, progress: Progress, address: str | None
) -> RunContext:
    state = RunState(
        model=facts.path,
        n_layers=facts.n_layers,
        score=recipe.sensitivity.score,
        environment=environment(),
    )
    return RunContext(RunInputs(recipe, facts), folder, state, progress, address)


def _write_report(folder: RunFolder) -> None:
    files, summary = report_files(folder)
    for name, content in files.items():
        folder.write_bytes(name, content)
    print(f"{summary}\nreport: {folder}/report.html")
