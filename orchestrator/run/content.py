"""Identifies a model by the content of its files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from orchestrator.run.model_facts import ModelFacts

_WHOLE_FILE_BYTES = 1 << 30


_SAMPLE_BYTES, _N_SAMPLES = 1 << 20, 64


def model_content(facts: ModelFacts, revision: str | None) -> dict[str, Any]:
    """Identifies a folder or a GGUF file by its content and a hub name by its commit."""
    if facts.gguf_content is not None:
        return {"content": facts.gguf_content, "hub": None}
    content = model_fingerprint(Path(facts.path)) if Path(facts.path).is_dir() else None
    return {"content": content, "hub": None if content else {"name": facts.path, "commit": facts.commit or revision}}


def shipped(path: str) -> str:
    """Returns a local path as the workers of a Ray job see it.

    Every node unpacks the job's working directory at another place, so a path in that directory becomes relative. Any
    other path stays as it is.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job and Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd()):
        return f"./{Path(path).relative_to(Path.cwd())}"
    return path


def model_fingerprint(folder: Path) -> str:
    """Hashes the content of a model folder: configuration, tokenizer and weights.

    A file above 1 GiB is hashed by its size and 64 samples, because reading all of it takes long. The first sample is
    its first MiB, which holds names, types and shapes of all tensors.
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
