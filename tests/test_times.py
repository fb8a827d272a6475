"""Tests that `tests.times` sums the seconds of each file and puts the largest gains first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def result(path: Path, **seconds: float) -> str:
    """Writes a result in which each file has two tests, one of them in a class, and returns its path."""
    cases = "".join(
        f'<testcase classname="tests.{file}{inside}" name="test_it" time="{value / 2}" />'
        for file, value in seconds.items()
        for inside in ("", ".TestClass")
    )
    path.write_text(f'<testsuites><testsuite name="pytest">{cases}</testsuite></testsuites>')
    return str(path)


def printed(*results: str) -> list[list[str]]:
    done = subprocess.run([sys.executable, "-m", "tests.times", *results], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


def test_files_are_summed_and_the_largest_gain_stands_first(tmp_path):
    before = result(tmp_path / "before.xml", test_a=3.0, test_b=20.0, test_gone=1.5)
    after = result(tmp_path / "after.xml", test_a=4.0, test_b=8.0, test_new=2.0)
    assert printed(before, after) == [
        ["20.0", "8.0", "tests.test_b"],
        ["1.5", "0.0", "tests.test_gone"],
        ["3.0", "4.0", "tests.test_a"],
        ["0.0", "2.0", "tests.test_new"],
        ["24.5", "14.0", "all"],
    ]
    assert printed(after) == [
        ["8.0", "tests.test_b"],
        ["4.0", "tests.test_a"],
        ["2.0", "tests.test_new"],
        ["14.0", "all"],
    ]
