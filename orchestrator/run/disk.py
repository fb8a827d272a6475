"""The disk that a run folder lies on: what is free, and what the rest of a run will need of it."""

from __future__ import annotations

import shutil

from orchestrator.run.context import RunContext
from orchestrator.run.folder import RunFolder

_SMALL_FILES_MIB = 8.0
"""Records, CSVs, pictures and the page of a run, from above."""


def free_mib(folder: RunFolder) -> float | None:
    """Room on the folder's disk; None for a URL, which has no disk of its own."""
    return shutil.disk_usage(folder.path).free / 2**20 if folder.is_local else None


def needed_mib(run: RunContext) -> float:
    """What the rest of the run will write, checkpoints that are deleted again among it, by the run's estimate."""
    found = _SMALL_FILES_MIB
    for stage in run.state.estimates:
        n_left = stage.units - stage.recorded
        if n_left > 0 and (of_rest := stage.disk_mib):
            listing = run.listings.get(stage.stage)  # None where the run has not come so far
            n_left_now = n_left if listing is None else listing.n_left_now()
            found += of_rest * min(1.0, n_left_now / n_left)
    return found


def disk_full_message(run: RunContext, error: BaseException) -> str:
    """Names the folder, what is free and what is needed, and what could not be written."""
    free, needed = free_mib(run.folder), needed_mib(run)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    again = "make room, and the same command goes on"
    if free is not None and free > needed and str(run.folder) not in reason:
        return f"{run.folder} has {free:,.0f} MiB free, but another disk that is written to is full: {reason}; {again}"
    room = "" if free is None else f"{free:,.1f} MiB are free, "
    needs = f"the rest of the run needs about {needed:,.0f} MiB"
    return f"{run.folder}: the disk is full: {room}{needs}; {again} ({reason})"
