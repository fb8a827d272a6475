"""Implements the engine `stopwatch`, which times like the transformers engine, under its own name."""

from __future__ import annotations

from tasks.timing import Group, MeasurementWorker


class StopwatchWorker(MeasurementWorker):
    def run(self, group: Group) -> list[dict]:
        return [{**measured, "engine": "stopwatch"} for measured in super().run(group)]
