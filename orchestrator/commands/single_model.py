"""Holds what the commands for single checkpoints share: convert, export, evaluate, bench, generate."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from orchestrator.checks.model import check_model, check_tokenizer
from orchestrator.recipe.errors import InputError
from orchestrator.run.model_facts import ModelFacts


def choose_device(device: str) -> str:
    """Returns the device of this machine that a name stands for; `auto` is the GPU where there is one.

    Raises:
        InputError: this machine does not have the device.
    """
    from orchestrator.checks.placement import check_device

    check_device(device, "--device")
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_model(path: str, arguments: argparse.Namespace, *, allow_converted: bool = True) -> ModelFacts:
    return check_model(
        path,
        field="MODEL",
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        allow_converted=allow_converted,
    )


def checked_tokenizer(facts: ModelFacts, arguments: argparse.Namespace) -> Any:
    return check_tokenizer(
        facts, field="MODEL", revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )


def load_checked(facts: ModelFacts, arguments: argparse.Namespace, device: str) -> Any:
    import torch

    from layerboost.checkpoint import load_model

    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return load_model(
        facts.path,
        dtype=dtype,
        device=device,
        revision=facts.commit or arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def check_new_folder(out: Path) -> None:
    from orchestrator.run.folder import RunFolder

    if ":/" in str(out):  # a URL: Path turns its two slashes into one
        raise InputError("--out", out, "must be a local folder")
    if out.is_dir() and any(out.iterdir()):
        raise InputError("--out", out, "is there already and not empty; give a new folder")
    RunFolder(out).preflight_writable()
