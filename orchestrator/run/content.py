"""Fingerprints of a model by the content of its files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from orchestrator.run.model_facts import ModelFacts

_WHOLE_FILE_BYTES = 1 << 30


_SAMPLE_BYTES, _N_SAMPLES = 1 << 20, 64


def model_content(facts: ModelFacts, revision: str | None) -> dict[str, Any]:
    """A folder by its content, a hub name by its commit."""
    content = model_fingerprint(Path(facts.path)) if Path(facts.path).is_dir() else None
    return {"content": content, "hub": None if content else {"name": facts.path, "commit": facts.commit or revision}}


def shipped(path: str) -> str:
    """A local path as the workers of a Ray job see it: relative, where it lies in the job's working directory.

    Every node unpacks the working directory at a place of its own. Elsewhere the path is what it was.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job and Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return f"./{Path(path).relative_to(Path.cwd())}"
    return path


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder's content: configuration, tokenizer, weights.

    Files above 1 GiB count by their size, their first MiB (names, types and shapes of all tensors) and 64 samples.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in {".json", ".safetensors", ".py", ".jinja", ".model", ".txt"}:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for sample in range(_N_SAMPLES):
                file.seek(sample * (size - _SAMPLE_BYTES) // (_N_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
