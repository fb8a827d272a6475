"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Real models and texts, where they stand beside the project; everything else works without them.
_SHARED = Path(__file__).resolve().parents[2] / "shared"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real models and texts beside the project; the test is skipped elsewhere."""
    if not (_SHARED / "models").is_dir():
        pytest.skip(f"needs the models and texts in {_SHARED.name}/ beside the project")
    return _SHARED
