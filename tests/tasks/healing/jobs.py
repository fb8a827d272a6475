"""Healing jobs of flat settings, for tests that change one of them at a time."""

from __future__ import annotations

from typing import Any

from layerboost.checkpoint import ModelSource
from tasks.cluster.resources import WorkerResources
from tasks.healing.job import Checkpoints, HealingJob, HealingText, Snapshots, Survival, ZeroSettings

_FIELDS: dict[str, tuple[type, dict[str, str]]] = {
    "parent": (ModelSource, {"model": "path", "revision": "revision", "dtype": "dtype"}),
    "text": (HealingText, {"sources": "sources", "apart": "apart"}),
    "checkpoints": (
        Checkpoints,
        {"storage_path": "storage_path", "name": "name", "checkpoint_every_steps": "every_steps"},
    ),
    "snapshots": (Snapshots, {"snapshot_url": "url", "snapshots": "shares"}),
    "zero": (
        ZeroSettings,
        {"zero_stage": "stage", "offload_optimizer": "offload_optimizer", "zero_options": "options"},
    ),
    "survival": (
        Survival,
        {name: name for name in ("max_failures", "step_timeout_s", "metadata_servers")},
    ),
}
"""The objects that a job holds: the class of each, and its fields by the settings' names."""


def job_of_settings(**settings: Any) -> HealingJob:
    """The job that has some settings; `teacher` is a path, `n_workers`, `cpus` and `gpus` are the workers'."""
    parts: dict[str, Any] = {}
    for part, (kind, names) in _FIELDS.items():
        parts[part] = kind(**{field: settings.pop(name) for name, field in names.items() if name in settings})
    size = {"n_workers": 1, "cpus": 1.0, "gpus": 0.0}
    parts["workers"] = WorkerResources(**{name: settings.pop(name, default) for name, default in size.items()})
    if (teacher := settings.pop("teacher", None)) is not None:
        parts["teacher"] = ModelSource(teacher, settings.pop("teacher_revision", None))
    return HealingJob(**parts, **settings)
