"""`stopwatch`: times as the transformers engine does, under its own name."""

from __future__ import annotations

from tasks.timing import Group, MeasurementWorker


class StopwatchWorker(MeasurementWorker):
    def run(self, group: Group) -> list[dict]:
        return [{**measured, "engine": "stopwatch"} for measured in super().run(group)]
