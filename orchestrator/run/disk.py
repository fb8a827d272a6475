"""Measures the free space on the disk of a run folder, and estimates what the rest of a run will need."""

from __future__ import annotations

import shutil

from orchestrator.run.context import RunContext
from orchestrator.run.folder import RunFolder

_SMALL_FILES_MIB = 8.0
"""Upper bound on the size of a run's records, CSVs, pictures and page."""


def free_mib(folder: RunFolder) -> float | None:
    """Returns the free space on the folder's disk; None for a URL, which is on no local disk."""
    return shutil.disk_usage(folder.path).free / 2**20 if folder.is_local else None


def needed_mib(run: RunContext) -> float:
    """Estimates the space that the rest of the run needs, including checkpoints that are deleted again."""
    found = _SMALL_FILES_MIB
    for stage in run.state.estimates:
        n_left = stage.units - stage.recorded
        if n_left > 0 and (of_rest := stage.disk_mib):
            listing = run.listings.get(stage.stage)  # None if the run has not reached this stage
            n_left_now = n_left if listing is None else listing.n_left_now()
            found += of_rest * min(1.0, n_left_now / n_left)
    return found


def disk_full_message(run: RunContext, error: BaseException) -> str:
    """Writes a message with the folder, its free and needed space, and what could not be written."""
    free, needed = free_mib(run.folder), needed_mib(run)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    again = "make room, and the same command goes on"
    if free is not None and free > needed and str(run.folder) not in reason:
        return f"{run.folder} has {free:,.0f} MiB free, but another disk that is written to is full: {reason}; {again}"
    room = "" if free is None else f"{free:,.1f} MiB are free, "
    needs = f"the rest of the run needs about {needed:,.0f} MiB"
    return f"{run.folder}: the disk is full: {room}{needs}; {again} ({reason})"
