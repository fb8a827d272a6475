"""Reports progress: one plain line on stderr for each finished unit, with counts and time left, and events."""

from __future__ import annotations

import shutil
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

from tasks.pool.watch import UnitEvent

Event = dict[str, Any]
"""An event of a run, as JSON values.

It holds `what` (`stage`, `units`, `end`, `started`, `retried`, `failed`, `recorded` or `note`) and `stage`, and as far
as they are known `name`, `key`, `plan`, `node`, `seconds`, `attempt`, `error` and `text`.
"""

_LAST_ERRORS = 5


class Progress:
    """Reports what is finished. It is safe to call from several threads.

    Lines read `sensitivity 7/36 done layer=3 treatment=none duration_s=1.2 left_s=17`. In a log each line stands by
    itself; on a terminal the next line overwrites it, unless it reports a failure.

    Args:
        stream: the stream of the lines; None is stderr.

    Attributes:
        stage_s: wall seconds of each stage so far; together they cover the whole time since this object was made.
        expected_s: seconds that each stage was expected to take before the run; they give the time left of the run.
        listeners: functions that are called with each event, on the thread where it happens; they must be quick.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._mutex = threading.RLock()
        self._line_is_open = False
        self._stage = ""
        self._total = self._finished = self._failed = self._recorded = 0
        self._workers = 1
        self._durations_s: list[float] = []
        self._started_at = time.monotonic()
        self.stage_s: dict[str, float] = {}
        self._clocked_at, self._clocked_stage = time.monotonic(), ""
        self.expected_s: dict[str, float] = {}
        self.listeners: list[Callable[[Event], None]] = []
        self._n_retried = 0
        self._in_flight: dict[str, dict[str, Any]] = {}
        self._ended: list[dict[str, Any]] = []
        self._errors: deque[dict[str, Any]] = deque(maxlen=_LAST_ERRORS)
        self._last_note = ""

    def start_stage(self, stage: str, total: int, *, recorded: int = 0, workers: int = 1, n_open: int = 0) -> None:
        """Begins a stage.

        Args:
            stage: the name of the stage.
            total: the number of its units of work, including those already recorded.
            recorded: the number of units that an earlier run has done.
            workers: the number of units that run at the same time.
            n_open: the number of units of the total that are expected and not known yet; there may be fewer or more.
        """
        with self._mutex:
            # The time since the last stage was spent in preparing this one, so it counts for this one.
            self._clock(self._clocked_stage or stage)
            self._clocked_stage = stage
            self._stage, self._total, self._recorded, self._finished = stage, total, recorded, recorded
            self._workers, self._failed, self._durations_s = max(1, workers), 0, []
            self._n_retried, self._last_note = 0, ""
            self._in_flight.clear()
            self._started_at = time.monotonic()
            expected = {"open": n_open} if n_open else {}
            self._tell("stage", units=total, recorded=recorded, workers=self._workers, **expected)
            self._write(self._text("start", recorded=recorded, workers=self._workers, **expected), keep=True)

    def set_total(self, total: int) -> None:
        """Updates the number of units of the stage, because the results of some units decide how many others follow."""
        with self._mutex:
            if total != self._total:
                self._total = total
                self._tell("units", units=total)

    def finish_unit(self, duration_s: float, *, status: str = "done", **fields: object) -> None:
        """Reports that a unit is finished.

        Args:
            duration_s: seconds that the unit took on its worker.
            status: `done`, or `failed`, which stays on the screen.
            fields: what identifies the unit, written as `name=value`.
        """
        with self._mutex:
            self._finished += 1
            if status == "failed":
                # The duration of a failure does not predict the remaining units, so it stays out of the mean.
                self._failed += 1
                self._tell("failed", **_unit(fields))
            else:
                self._durations_s.append(duration_s)
            left_s = self._left_s()
            self._write(
                self._text(status, **fields, duration_s=round(duration_s, 1), left_s=round(left_s)),
                keep=status == "failed",
            )

    def end_stage(self) -> None:
        """Reports how the stage went."""
        with self._mutex:
            self.stop_clock(self._stage)
            wall_s = round(time.monotonic() - self._started_at, 1)
            self._ended = [stage for stage in self._ended if stage["stage"] != self._stage]
            self._ended.append({**self._counts(), "wall_s": wall_s})
            self._in_flight.clear()
            self._tell("end", **{name: value for name, value in self._ended[-1].items() if name != "stage"})
            self._write(self._text("end", recorded=self._recorded, failed=self._failed, wall_s=wall_s), keep=True)

    def stop_clock(self, stage: str) -> None:
        """Adds the seconds since the last stage to `stage`, or to the stage that never ended because it failed."""
        self._clock(self._clocked_stage or stage)
        self._clocked_stage = ""

    def _clock(self, stage: str) -> None:
        now = time.monotonic()
        self.stage_s[stage] = self.stage_s.get(stage, 0.0) + now - self._clocked_at
        self._clocked_at = now

    def note(self, text: str, **fields: object) -> None:
        """Writes a line that belongs to no unit and that is not overwritten."""
        with self._mutex:
            self._last_note = " ".join([text, *_written(fields)])
            self._tell("note", text=self._last_note)
            self._write(self._last_note, keep=True)

    def unit_event(self, event: UnitEvent[object], name: dict[str, Any]) -> None:
        """Takes in an event of an unfinished unit; only a retry gets a line of its own."""
        with self._mutex:
            label, node = " ".join(_written(name)), None if event.worker is None else event.worker.node
            if event.what == "started":
                self._in_flight[label] = {"name": label, "attempt": event.attempt, "node": node, "since": time.time()}
            else:
                self._in_flight.pop(label, None)
            if event.what in ("started", "retried"):
                seconds = None if event.what == "started" else round(event.seconds, 3)
                about = {"attempt": event.attempt, "node": node, "seconds": seconds, "error": event.error}
                self._tell(event.what, name=name, **about)
            if event.what == "retried":
                self._n_retried += 1

    def recorded(self, stage: str, key: str, identity: dict[str, Any], result: dict[str, Any]) -> None:
        """Takes in that the record of a unit has been written."""
        with self._mutex:
            worker, seconds = result.get("worker") or {}, result.get("duration_s")
            plan = identity.get("plan")
            about = {"plan": plan.get("plan") if isinstance(plan, dict) else plan, "node": worker.get("node")}
            about |= {"seconds": seconds, "attempt": worker.get("attempt", 1)}
            self._tell("recorded", stage=stage, key=key, **about)

    def snapshot(self) -> dict[str, Any]:
        """Returns the state of the run as JSON values.

        Returns:
            For the current stage `stage`, `units`, `finished`, `failed`, `recorded` (before this call of the command),
            `retried`, `workers`, `in_flight` (`name`, `attempt`, `node`, `since`), `units_per_min`, `left_s` and `note`
            (the last line that belongs to no unit). For the run `ended`, the stages before; `run_left_s`, the seconds
            left of all stages, which is None without an estimate; and `errors`, the last ones.
        """
        with self._mutex:
            elapsed_s = time.monotonic() - self._started_at
            n_done = self._finished - self._recorded
            return {
                **self._counts(),
                "workers": self._workers,
                "in_flight": list(self._in_flight.values()),
                "units_per_min": 60 * n_done / elapsed_s if n_done else None,
                "left_s": self._left_s(),
                "note": self._last_note,
                "ended": list(self._ended),
                "run_left_s": self._run_left_s(elapsed_s),
                "errors": list(self._errors),
            }

    def _counts(self) -> dict[str, Any]:
        counts = {"units": self._total, "finished": self._finished, "failed": self._failed}
        return {"stage": self._stage, **counts, "recorded": self._recorded, "retried": self._n_retried}

    def _run_left_s(self, elapsed_s: float) -> float | None:
        if not self.expected_s:
            return None
        begun = {stage["stage"].split()[0] for stage in self._ended} | {self._stage.split(" ")[0]}
        later_s = sum(seconds for stage, seconds in self.expected_s.items() if stage not in begun)
        left_s = self._left_s()
        if not self._durations_s and self._finished < self._total:
            left_s = max(0.0, self.expected_s.get(self._stage, 0.0) - elapsed_s)
        return later_s + left_s

    def _tell(self, what: str, **fields: Any) -> None:
        event = {"what": what, "stage": self._stage, **{k: v for k, v in fields.items() if v is not None}}
        if event.get("error"):
            text = str(event["error"]).splitlines()
            event["error"] = text[0] if text else ""
            self._errors.append({"time": time.time(), **event})
        for listener in self.listeners:
            listener(event)

    @property
    def left_s(self) -> float:
        """Returns the seconds that the rest of the stage will take, judged by its finished units."""
        with self._mutex:
            return self._left_s()

    def _left_s(self) -> float:
        remaining = max(0, self._total - self._finished)
        if not remaining or not self._durations_s:
            return 0.0
        # Units run in waves, one unit on each worker; the last wave takes as long as a unit even if it is not full.
        waves = -(-remaining // self._workers)
        return waves * statistics.fmean(self._durations_s)

    def _text(self, status: str, **fields: object) -> str:
        return " ".join([self._stage, f"{self._finished}/{self._total}", status, *_written(fields)])

    def _write(self, line: str, *, keep: bool) -> None:
        if not self._is_terminal:
            self._stream.write(line + "\n")
        else:
            width = shutil.get_terminal_size().columns
            shown = line if keep or len(line) < width else line[: max(1, width - 1)]
            self._stream.write("\r\x1b[K" + shown + ("\n" if keep else ""))
            self._line_is_open = not keep
        self._stream.flush()

    def close(self) -> None:
        """Ends an overwritable line, so that the next output starts on a new line."""
        with self._mutex:
            if self._line_is_open:
                self._stream.write("\n")
                self._stream.flush()
                self._line_is_open = False


def _unit(fields: dict[str, object]) -> dict[str, Any]:
    """Turns the fields of a unit into those of an event: JSON values, with the error apart from the name."""
    name = {label: value if isinstance(value, (int, float)) else str(value) for label, value in fields.items()}
    error = name.pop("error", None)
    return {"name": name, "error": error}


def _written(fields: dict[str, object]) -> list[str]:
    """Writes fields as `name=value` on one line; a value with spaces is quoted."""
    written = []
    for name, value in fields.items():
        text = " ".join(str(value).split())
        written.append(f'{name}="{text}"' if " " in text or not text else f"{name}={text}")
    return written
