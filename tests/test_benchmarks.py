"""Tests that scripts in `benchmarks/` hide no library, because a script's own folder comes first on its import path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OPTIONAL_LIBRARIES = {"kernels", "fla", "vllm", "bitsandbytes", "optimum"}
"""Optional libraries that other packages try to import; a script with such a name would be imported instead."""


def test_no_script_has_the_name_of_a_library():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert names and not names & (sys.stdlib_module_names | OPTIONAL_LIBRARIES)


@pytest.mark.parametrize("script", ["report_scaling.py", "scaling.py"])
def test_a_script_imports_the_project_from_its_own_folder(script):
    asked = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert "usage:" in asked.stdout
