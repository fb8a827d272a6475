"""Spreads the whole suite over two processes of pytest-xdist; runs of single files stay in one process.

The tests of a file stay together, since they share fixtures that take long, and so do files that cannot run at the same
time. What takes longest starts first, so that both processes end at about the same time.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

N_PROCESSES = 2
"""Two whole runs side by side, each with its own Ray, keep two cores busy; more would wait for each other."""

TOGETHER = {
    "tests/cluster/test_launch.py": "hosts",
    "tests/cluster/test_slurm.py": "hosts",
    "tests/cluster/test_wait_for.py": "hosts",
    "tests/cluster/test_job.py": "cluster",
    "tests/cluster/test_nodes.py": "cluster",
    "tests/cluster/test_side_by_side.py": "cluster",
    "tests/cluster/test_submitted_job.py": "cluster",
}
"""Files whose tests form one group: some start three hosts each, which is as much as a machine bears, and the others
share one cluster."""

_IS_PART = "PYTEST_XDIST_WORKER" in os.environ
"""Whether this is one of the two processes, which calls the same hooks as the one that started it."""

if _IS_PART:
    # Threads of two processes on the same cores spin for each other's results. Torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Turns pytest-xdist on for runs of the whole suite, unless `-n` or `--pdb` say otherwise."""
    options = config.option
    if not hasattr(options, "numprocesses") or options.usepdb or _IS_PART:
        return
    if options.numprocesses is None and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        options.numprocesses = N_PROCESSES
    if options.numprocesses and options.dist == "no":
        options.dist, options.loadscopereorder = "loadfile", False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives the scheduler that keeps groups of files together in place of that of single files."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadGroupsOfFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(super()._split_scope(nodeid))

    return LoadGroupsOfFiles(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the groups with most slow tests first, and then those with most tests that start Ray."""
    groups = {item: group_of(Path(item.path).relative_to(item.config.rootpath).as_posix()) for item in items}
    n_slow, n_cluster = (
        Counter(group for item, group in groups.items() if item.get_closest_marker(name))
        for name in ("slow", "cluster")
    )
    items.sort(key=lambda item: (-n_slow[groups[item]], -n_cluster[groups[item]]))


def group_of(file: str) -> str:
    """Returns the group that a test file, by its path in the project, belongs to: its own unless TOGETHER says more."""
    return TOGETHER.get(file, file)
