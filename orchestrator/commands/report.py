"""`layerboost report`: writes a run's report again, or compares several runs."""

from __future__ import annotations

import argparse


def report(arguments: argparse.Namespace) -> int:
    """`layerboost report`: writes the report of one run, or the comparison of several."""
    from orchestrator.recipe.errors import InputError
    from orchestrator.run.folder import RECORDS, RunFolder

    folders = [RunFolder(folder) for folder in arguments.folders]
    for folder in folders:
        if not folder.exists(RECORDS):
            raise InputError("DIR", folder.url, "holds no records of a run; give the --out of an earlier run")
    if len(folders) > 1:
        from orchestrator.commands.compare import compare

        return compare(folders, RunFolder(arguments.out or "comparison"))
    if arguments.out is not None:
        raise InputError("--out", arguments.out, "is for several runs; the report of one goes into its own folder")
    from orchestrator import pipeline

    return pipeline.report(folders[0])
