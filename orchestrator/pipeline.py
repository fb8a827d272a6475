"""Runs a recipe, from its first stage to its report.

    evaluate ─► sensitivity ─► search ─► heal ─► report (measure the finalists, write the report)

Every unit of work is a record in the run folder, named by the hash of what changes its result. A stage does only units
without a record, and Ray starts only when there is something to do. Later stages read what they need from records, so
the same command goes on wherever an earlier one stopped. `run.json` lists the records that belong to this run; with it
and the records the report can be written again.
"""

from __future__ import annotations

import contextlib
import sys

import yaml

from layerboost.costs.costs import Costs
from layerboost.storage.errors import DiskFullError, is_disk_full
from orchestrator.exit_codes import EXIT_DONE, EXIT_FAILED
from orchestrator.recipe.recipe import Recipe
from orchestrator.report.render import REPORT_FILES
from orchestrator.results.report_data import report_files
from orchestrator.run.context import RunContext
from orchestrator.run.disk import disk_full_message
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import RunInputs
from orchestrator.run.kinds import HALVING
from orchestrator.run.live_files import FAILED, watching
from orchestrator.run.lock import RunFolderLockedError
from orchestrator.run.model_facts import ModelFacts
from orchestrator.run.progress import Progress
from orchestrator.run.state import RECIPE_FILE, RUN_FILE, RunState, load_state
from orchestrator.run.versions import environment
from orchestrator.stages.evaluate import evaluate
from orchestrator.stages.heal import heal
from orchestrator.stages.measure import measure
from orchestrator.stages.search import search
from orchestrator.stages.sensitivity import sensitivity
from orchestrator.text_tables import duration
from tasks.cluster import connection

STAGES = {"evaluate": evaluate, "sensitivity": sensitivity, "search": search, "heal": heal, "report": measure}
"""The stages by name, in order. `report` measures the finalists; the report itself is computed from the records."""

REPORT = "report"
"""The name under which the time of writing the report is counted."""


def run(
    recipe: Recipe, folder: RunFolder, facts: ModelFacts, *, until: str, address: str | None, progress: Progress
) -> int:
    """Runs or resumes a checked recipe up to the stage `until`; prints the front and the report's path.

    Returns:
        0, or 1 if units failed; each of them is named on stderr, and the others are recorded.

    Raises:
        DiskFullError: the disk is full; with more room the same command goes on.
    """
    with folder.lock(), watching(folder, progress) as watched:
        context = _context(recipe, folder, facts, progress, address)
        earlier_s = _go_on_counting(context)
        folder.write_text(RECIPE_FILE, recipe.resolved_yaml())

        def save() -> None:
            spent = progress.stage_s
            context.state.stage_s = {
                stage: earlier_s.get(stage, 0.0) + spent.get(stage, 0.0) for stage in {**earlier_s, **spent}
            }
            context.save()

        try:
            _estimate(context)
            progress.expected_s = {stage.stage: stage.seconds for stage in context.state.estimates}
            for name, stage in STAGES.items():
                can_go_on = stage(context)
                save()
                if name == until or not can_go_on:
                    break
            connection.shutdown()
            _write_report(folder)
            progress.stop_clock(REPORT)
            save()
        except RunFolderLockedError:
            raise  # the folder belongs to another run now
        except BaseException as error:
            progress.stop_clock(REPORT)
            if is_disk_full(error):
                with contextlib.suppress(OSError):  # the earlier file stays as it was
                    save()
                raise DiskFullError(disk_full_message(context, error)) from error
            save()
            raise
        finally:
            connection.shutdown()
        if context.state.failures:
            watched.state = FAILED
    for failure in context.state.failures:
        named = " ".join(f"{label}={value}" for label, value in failure.name.items())
        print(f"failed: {failure.stage} {named}: {failure.error.splitlines()[0]}", file=sys.stderr)
    if context.state.failures:
        print("the same command tries them again", file=sys.stderr)
    return EXIT_FAILED if context.state.failures else EXIT_DONE


def report(folder: RunFolder) -> int:
    """Writes CSVs, pictures and the page of a run again, from its records alone."""
    with folder.lock():
        _write_report(folder)
    return EXIT_DONE


def dry_run(recipe: Recipe, folder: RunFolder, facts: ModelFacts) -> int:
    """Prints each stage's units, how many are recorded, and what the rest will cost.

    It starts nothing and writes nothing but the calibration, which the run then need not repeat.
    """
    from orchestrator.costs.estimate import device_mib, estimate_stages, estimate_table, expected_line
    from orchestrator.costs.measure import costs_of

    context = _context(recipe, folder, facts, Progress(), None)
    stages = estimate_stages(context, costs_of(context, on_cluster=False))
    print(f"{estimate_table(stages, device_mib())}\n{expected_line(stages)}")
    return EXIT_DONE


def _go_on_counting(context: RunContext) -> dict[str, float]:
    """Returns the seconds that earlier calls of the same recipe took on this folder, and takes over their estimate."""
    if not context.folder.exists(RUN_FILE) or not context.folder.exists(RECIPE_FILE):
        return {}
    before = yaml.safe_load(context.folder.read_text(RECIPE_FILE))
    now = context.inputs.recipe.model_dump(mode="json")
    if any(before.get(section) != now[section] for section in now if section != "placement"):
        return {}
    state = load_state(context.folder)
    context.state.estimates = state.estimates
    return state.stage_s


def _estimate(context: RunContext) -> None:
    """Estimates the cost of the run before its first call, and reports it."""
    from orchestrator.costs.estimate import estimate_stages, expected_line
    from orchestrator.costs.measure import HEALING, costs_of

    if context.state.estimates:
        return

    def on_part(part: str, costs: Costs) -> None:
        if part == HEALING:
            stages = estimate_stages(context, costs)
            seconds = sum(stage.seconds for stage in stages if stage.stage in ("heal", HALVING))
            context.progress.note(f"expected: {duration(seconds)} of healing; the other stages are being timed")

    try:
        stages = estimate_stages(context, costs_of(context, on_cluster=True, on_part=on_part))
    except Exception as error:  # a failed calibration must not stop the run
        if is_disk_full(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        context.progress.note("no estimate: the calibration failed", because=reason)
        return
    context.state.estimates = stages
    context.progress.note(expected_line(stages))


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
    # Remove files of an earlier report that this one does not have, so that no stale table stays.
    for name in set(REPORT_FILES).intersection(folder.names()).difference(files):
        folder.remove(name)
    for name, content in files.items():
        folder.write_bytes(name, content)
    print(f"{summary}\nreport: {folder}/report.html")
