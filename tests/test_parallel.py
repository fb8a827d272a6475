"""Tests that the whole suite runs in two processes, which keep a file's tests together, and single files in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import TOGETHER

PROJECT = Path(__file__).resolve().parents[1]
CONFTEST = """
from tests import parallel
from tests.parallel import pytest_cmdline_main, pytest_collection_modifyitems, pytest_xdist_make_scheduler

parallel.TOGETHER.update({"tests/test_b.py": "both", "tests/test_c.py": "both"})
"""
FILE = """
import os, pytest

{mark}
@pytest.mark.parametrize("n", range(4))
def test_it(n):
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert os.environ["OMP_NUM_THREADS"] == "1"
"""


def test_grouped_files_are_there():
    assert [name for name in TOGETHER if not (PROJECT / name).exists()] == []


@pytest.fixture
def suite(tmp_path) -> Path:
    """Makes a project of four test files; one is slow and two form a group."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\nmarkers = ["slow", "cluster"]\n'
    )
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    for name in "abcd":
        (folder / f"test_{name}.py").write_text(FILE.format(mark="@pytest.mark.slow" if name == "d" else ""))
    return tmp_path


def run(suite: Path, *arguments: str) -> str:
    hidden = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID", "PYTEST_ADDOPTS", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=suite, env=environment | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_whole_suite_runs_in_two_processes_by_groups_of_files(suite):
    ran = re.findall(r"\[(gw\d)\] .* PASSED tests/test_(\w)\.py", run(suite))
    assert len(ran) == 16
    processes = {name: {process for process, other in ran if other == name} for name in "abcd"}
    assert all(len(found) == 1 for found in processes.values())
    assert processes["b"] == processes["c"] and set.union(*processes.values()) == {"gw0", "gw1"}


def test_single_files_and_n_0_run_in_one_process_the_slow_ones_first(suite):
    assert "[gw" not in run(suite, "tests/test_a.py")
    order = re.findall(r"^tests/test_(\w)\.py", run(suite, "-n", "0"), re.M)
    assert order == [*"dddd", *"aaaa", *"bbbb", *"cccc"]
