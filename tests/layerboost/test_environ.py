"""Tests what a process asks of its C library, and that the variables it sets for a while are restored."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from layerboost.environ import environment

_HEAP = """
import ctypes, sys
from layerboost.environ import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def heap_mib():
    with open("/proc/self/maps") as maps:
        (heap,) = (line.split()[0].split("-") for line in maps if line.rstrip().endswith("[heap]"))
    return (int(heap[1], 16) - int(heap[0], 16)) / 2**20

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before, block = heap_mib(), libc.malloc(30 * 2**20)
libc.free(block)
print(heap_mib() - before)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="needs glibc's own allocation"
)
@pytest.mark.parametrize(("way", "low", "high"), [("keep", 29, 64), ("return", 0, 2)])
def test_freed_memory_stays_with_the_process_only_if_asked_for(way, low, high):
    asked = subprocess.run([sys.executable, "-c", _HEAP, way], capture_output=True, text=True, check=True)
    assert low <= float(asked.stdout) <= high


def test_variables_are_restored_whatever_happens(monkeypatch):
    monkeypatch.setenv("LAYERBOOST_TEST_A", "before")
    monkeypatch.delenv("LAYERBOOST_TEST_B", raising=False)
    with pytest.raises(RuntimeError), environment({"LAYERBOOST_TEST_A": "1", "LAYERBOOST_TEST_B": "2"}):
        assert (os.environ["LAYERBOOST_TEST_A"], os.environ["LAYERBOOST_TEST_B"]) == ("1", "2")
        raise RuntimeError
    assert os.environ["LAYERBOOST_TEST_A"] == "before" and "LAYERBOOST_TEST_B" not in os.environ
