"""Spreads the whole suite over two processes of pytest-xdist; runs of single files stay in one process.

The tests of a file stay together, since they share fixtures that take long, and so do files that cannot run at the same
time. What takes longest starts first, so that both processes end at about the same time.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

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
"""Files whose tests form one group: the hosts have fixed addresses, and the others share one cluster."""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of two processes on the same cores spin for each other's results. Torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Turns pytest-xdist on for runs of the whole suite, unless `-n` or `--pdb` say otherwise."""
    options = config.option
    if not hasattr(options, "numprocesses") or options.usepdb:
        return
    if options.numprocesses is None and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        options.numprocesses = N_PROCESSES
    if options.numprocesses and options.dist == "no":
        options.dist, options.loadscopereorder = "loadgroup", False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives each test its group and puts the groups with most slow tests, and then those with Ray, first."""
    if not hasattr(config.option, "numprocesses"):
        return
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    n_slow, n_cluster = (
        Counter(groups[item] for item in items if item.get_closest_marker(name)) for name in ("slow", "cluster")
    )
    items.sort(key=lambda item: (-n_slow[groups[item]], -n_cluster[groups[item]]))


def _group(item: pytest.Item) -> str:
    path = Path(item.path).relative_to(item.config.rootpath).as_posix()
    return TOGETHER.get(path, path)
