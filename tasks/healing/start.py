"""Holds what Ray's own processes load of a healing, without torch and transformers, so that they start fast."""

from __future__ import annotations

import pickle
from typing import Any


class ProgressBox:
    """Is an actor that holds steps, as dictionaries, until the driver takes them."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Any]] = []

    def put(self, step: dict[str, Any]) -> None:
        self._steps.append(step)

    def take(self) -> list[dict[str, Any]]:
        steps, self._steps = self._steps, []
        return steps


def start_healing_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs on each worker of a Ray Train job.

    Args:
        config: `job`, pickled so that Train's controller need not import its class; and `progress`, an actor handle of
            a ProgressBox or None.
    """
    from tasks.healing.worker import run_healing_worker

    return run_healing_worker(pickle.loads(config["job"]), config["progress"])
