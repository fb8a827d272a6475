"""What a process asks of its C library, and the variables it sets for a while."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from layerboost.environ import environment

_FAULTS = """
import resource, sys
import torch
from layerboost.environ import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def take():
    return [torch.ones(mib * 2**20 // 4) for mib in (3, 5, 8, 12, 16, 20, 24, 28)]

for _ in range(3):
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_kept_memory_is_not_asked_for_again():
    faults = {
        way: int(
            subprocess.run([sys.executable, "-c", _FAULTS, way], capture_output=True, check=True, text=True).stdout
        )
        for way in ("keep", "return")
    }
    # The blocks have 29,696 pages. By default glibc keeps 64 MiB of them, and the system clears the others each time.
    assert faults["keep"] < 29_696
    assert faults["return"] > 10 * 29_696


def test_variables_are_restored_whatever_happens(monkeypatch):
    monkeypatch.setenv("LAYERBOOST_TEST_A", "before")
    monkeypatch.delenv("LAYERBOOST_TEST_B", raising=False)
    with pytest.raises(RuntimeError), environment({"LAYERBOOST_TEST_A": "1", "LAYERBOOST_TEST_B": "2"}):
        assert (os.environ["LAYERBOOST_TEST_A"], os.environ["LAYERBOOST_TEST_B"]) == ("1", "2")
        raise RuntimeError
    assert os.environ["LAYERBOOST_TEST_A"] == "before" and "LAYERBOOST_TEST_B" not in os.environ
