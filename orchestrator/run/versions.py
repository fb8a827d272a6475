"""Reads the versions and the hardware that results carry."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from layerboost.plugins import installed_plugins
from orchestrator.run.identity import plugin_identity

PACKAGES = ("layerboost", "torch", "transformers", "ray", "deepspeed", "lm-eval", "peft", "optuna", "datasets")


def environment() -> dict[str, Any]:
    """Describes what this process runs on: Python, packages, processor, memory and GPUs."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "packages": versions,
        **plugin_identity(installed_plugins()),
    }
