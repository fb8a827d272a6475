"""`layerboost report` of several folders: compares the runs, using only their records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.errors import InputError
from orchestrator.report.comparison import MAX_RUNS, Run, comparison_summary, render_comparison
from orchestrator.results.report_data import report_data
from orchestrator.run.folder import RunFolder


def compare(folders: Sequence[RunFolder], out: RunFolder) -> int:
    """Writes comparison.html and comparison.csv of several runs and prints each run's headline.

    Raises:
        InputError: a folder holds no run or comes twice, or there are more runs than a figure can tell apart.
    """
    check_folders(folders)
    names = _names([str(folder) for folder in folders])
    runs = [Run(name, report_data(folder)) for name, folder in zip(names, folders, strict=True)]
    for name, content in render_comparison(runs).items():
        out.write_bytes(name, content)
    print(f"{comparison_summary(runs)}\n\ncomparison: {out}/comparison.html")
    return EXIT_DONE


def check_folders(folders: Sequence[RunFolder]) -> None:
    """Refuses folders that cannot be compared, before anything is read.

    Raises:
        InputError: a folder comes twice, or there are too many.
    """
    paths = [str(folder) for folder in folders]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError("DIR", twice[0], "is given twice; give each run once")
    if len(folders) > MAX_RUNS:
        raise InputError("DIR", len(folders), f"runs are too many for one figure; give at most {MAX_RUNS}")


def _names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of the paths that differ from each other."""
    parts = [PurePath(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of_one[-count:]) for of_one in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)
