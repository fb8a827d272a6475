"""Shows a run to others: `progress.json` and `log.jsonl` in its folder, and Prometheus metrics of its driver.

A thread writes both files whole, at most every two seconds, because object stores cannot append. `log.jsonl` therefore
keeps only the last events, including those of earlier calls of the command. A killed driver loses the events that it
had not written yet; finished work is in the records.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from orchestrator.run.folder import RunFolder
from orchestrator.run.progress import Event, Progress

PROGRESS_FILE, LOG_FILE = "progress.json", "log.jsonl"
RUNNING, DONE, FAILED, STOPPED = "running", "done", "some units failed", "stopped"

MAX_EVENTS = 5000
"""The number of events that `log.jsonl` keeps; they take about a megabyte."""

_INTERVAL_S = 2.0
_UNIT_SECONDS_BOUNDARIES = [0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 36000.0]

logger = logging.getLogger(__name__)


class Watching:
    """Writes the state of a run into its folder while the run goes on.

    Args:
        folder: the folder of the run; this process holds its lock.
        progress: the progress of the run, to which this object listens until `close`.
    """

    def __init__(self, folder: RunFolder, progress: Progress):
        self._folder, self._progress = folder, progress
        self._events: deque[str] = deque(_earlier_events(folder), maxlen=MAX_EVENTS)
        self._mutex = threading.Lock()
        self._is_new, self._stop, self._warned = True, threading.Event(), False
        self._started_at, self.state, self.reason = time.time(), RUNNING, ""
        self._metrics = Metrics(progress)
        progress.listeners += [self._take, self._metrics.take]
        self._thread = threading.Thread(target=self._write_often, name="watching", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes how the run ended."""
        self._stop.set()
        self._thread.join()
        self._progress.listeners.remove(self._take)
        self._progress.listeners.remove(self._metrics.take)
        self._write()

    def _take(self, event: Event) -> None:
        line = json.dumps({"time": _iso(time.time()), **event}, ensure_ascii=False, default=str)
        with self._mutex:
            self._events.append(line)
            self._is_new = True

    def _write_often(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            if self._is_new:
                self._write()

    def _write(self) -> None:
        with self._mutex:
            self._is_new = False
            log = "".join(f"{line}\n" for line in self._events)
        about = {"state": self.state, "reason": self.reason, "started_at": self._started_at, "written_at": time.time()}
        try:
            self._folder.check_held()
            self._folder.write_once(PROGRESS_FILE, json.dumps({**about, **self._progress.snapshot()}).encode())
            self._folder.write_once(LOG_FILE, log.encode())
        except Exception as error:  # the run itself reports a folder that cannot be written
            if not self._warned:
                logger.warning("%s and %s cannot be written: %s", PROGRESS_FILE, LOG_FILE, error)
            self._warned, self._is_new = True, True


@contextlib.contextmanager
def watching(folder: RunFolder, progress: Progress) -> Iterator[Watching]:
    """Watches a run during a block; an error that ends the block is written to `progress.json`."""
    watched = Watching(folder, progress)
    try:
        yield watched
        if watched.state == RUNNING:
            watched.state = DONE
    except BaseException as error:
        watched.state, watched.reason = STOPPED, (str(error).strip() or type(error).__name__).splitlines()[0]
        raise
    finally:
        watched.close()


class Metrics:
    """Keeps the Prometheus metrics of a run; Ray's exporter on the driver's node shows them as `ray_layerboost_...`."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._made: dict[str, Any] = {}

    def take(self, event: Event) -> None:
        """Counts an event if Ray is connected; earlier events are not counted."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        if not self._made:
            self._make()
        what, stage = event["what"], {"stage": event["stage"]}
        if what in ("recorded", "failed", "retried"):
            outcome = "done" if what == "recorded" else what
            self._made["units"].inc(1, {**stage, "outcome": outcome})
        if what == "recorded" and event.get("seconds"):
            self._made["seconds"].observe(event["seconds"], stage)
        now = self._progress.snapshot()
        if now["stage"]:
            at_work = {"stage": now["stage"]}
            self._made["left"].set(now["units"] - now["finished"], at_work)
            self._made["left_s"].set(now["left_s"], at_work)

    def _make(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._made = {
            "units": Counter("layerboost_units", "Units of work by outcome.", tag_keys=("stage", "outcome")),
            "seconds": Histogram(
                "layerboost_unit_seconds",
                "Seconds that a unit of work took.",
                boundaries=_UNIT_SECONDS_BOUNDARIES,
                tag_keys=("stage",),
            ),
            "left": Gauge("layerboost_units_left", "Units of the stage at work that are not finished.", ("stage",)),
            "left_s": Gauge("layerboost_seconds_left", "Expected seconds of the stage at work.", ("stage",)),
        }


def _earlier_events(folder: RunFolder) -> list[str]:
    try:
        return folder.read_text(LOG_FILE).splitlines()
    except FileNotFoundError:
        return []


def _iso(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
