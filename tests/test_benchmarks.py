"""Scripts in `benchmarks/` hide no library: a script's own folder comes first on the path that it imports from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OPTIONAL_LIBRARIES = {"kernels", "fla", "vllm", "bitsandbytes", "optimum"}
"""Libraries that others look for and that need not be installed, so that no file here may have their names."""


def test_no_script_has_the_name_of_a_library():
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert names and not names & (sys.stdlib_module_names | OPTIONAL_LIBRARIES)


@pytest.mark.parametrize("script", ["report_scaling.py", "scaling.py"])
def test_a_script_imports_the_project_from_its_own_folder(script):
    asked = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert "usage:" in asked.stdout
