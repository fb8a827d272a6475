"""Progress: one plain line for each finished unit, with counts and the time left, on stderr."""

from __future__ import annotations

import shutil
import statistics
import sys
import threading
import time
from typing import TextIO


class Progress:
    """Says what is finished. Safe to call from several threads.

    Lines read `sensitivity 7/36 done layer=3 treatment=none duration_s=1.2 left_s=17`. In a log each stands by itself;
    on a terminal the next one overwrites it, except for lines that say that something failed.

    Args:
        stream: where lines go; stderr if None.

    Attributes:
        stage_s: wall seconds of each stage so far, together the whole time since this was made.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty()
        self._mutex = threading.Lock()
        self._line_is_open = False
        self._stage = ""
        self._total = self._finished = self._failed = self._recorded = 0
        self._workers = 1
        self._durations_s: list[float] = []
        self._started_at = time.monotonic()
        self.stage_s: dict[str, float] = {}
        self._clocked_at, self._clocked_stage = time.monotonic(), ""

    def start_stage(self, stage: str, total: int, *, recorded: int = 0, workers: int = 1) -> None:
        """Begins a stage.

        Args:
            stage: its name.
            total: its units of work, those already recorded among them.
            recorded: units that an earlier run has done.
            workers: units that run at the same time.
        """
        with self._mutex:
            # What went on since the last stage was made ready for this one.
            self._clock(self._clocked_stage or stage)
            self._clocked_stage = stage
            self._stage, self._total, self._recorded, self._finished = stage, total, recorded, recorded
            self._workers, self._failed, self._durations_s = max(1, workers), 0, []
            self._started_at = time.monotonic()
            self._write(self._text("start", recorded=recorded, workers=self._workers), keep=True)

    def finish_unit(self, duration_s: float, *, status: str = "done", **fields: object) -> None:
        """Says that a unit is finished.

        Args:
            duration_s: seconds that the unit took on its worker.
            status: `done`, or `failed`, which stays on the screen.
            fields: what tells the unit from others, written as `name=value`.
        """
        with self._mutex:
            self._finished += 1
            if status == "failed":
                # How long a failure took says nothing about the units that are left.
                self._failed += 1
            else:
                self._durations_s.append(duration_s)
            left_s = self._left_s()
            self._write(
                self._text(status, **fields, duration_s=round(duration_s, 1), left_s=round(left_s)),
                keep=status == "failed",
            )

    def end_stage(self) -> None:
        """Says how the stage went."""
        with self._mutex:
            self.stop_clock(self._stage)
            wall_s = round(time.monotonic() - self._started_at, 1)
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
        """Writes a line that is no unit's, and that stays."""
        with self._mutex:
            self._write(" ".join([text, *_written(fields)]), keep=True)

    @property
    def left_s(self) -> float:
        """Seconds that the rest of the stage will take, as far as its finished units tell."""
        with self._mutex:
            return self._left_s()

    def _left_s(self) -> float:
        remaining = max(0, self._total - self._finished)
        if not remaining or not self._durations_s:
            return 0.0
        # The last wave takes a whole unit's time, however few units are in it.
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
        """Ends an overwritable line, so that what follows starts on a line of its own."""
        with self._mutex:
            if self._line_is_open:
                self._stream.write("\n")
                self._stream.flush()
                self._line_is_open = False


def _written(fields: dict[str, object]) -> list[str]:
    """`name=value`, a value with spaces in quotes, on one line."""
    written = []
    for name, value in fields.items():
        text = " ".join(str(value).split())
        written.append(f'{name}="{text}"' if " " in text or not text else f"{name}={text}")
    return written
