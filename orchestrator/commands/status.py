"""`layerboost status`: says where a run stands, from any machine that reaches its folder."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.errors import InputError
from orchestrator.run.folder import LOCK_NAME, RunFolder
from orchestrator.run.live_files import PROGRESS_FILE, RUNNING
from orchestrator.run.lock import LockHolder

GONE = "gone"
"""The state of a run whose folder says `running` although no living process holds the lock."""

_FOLLOW_S = 2.0


def status(arguments: argparse.Namespace) -> int:
    """`layerboost status`: prints where a run stands; with `--follow` until it ends."""
    folder = RunFolder(arguments.folder)
    while True:
        found = read_status(folder)
        print(json.dumps(found) if arguments.json else status_text(found), flush=True)
        if not arguments.follow or found["state"] != RUNNING:
            return EXIT_DONE
        time.sleep(_FOLLOW_S)


def read_status(folder: RunFolder) -> dict[str, Any]:
    """Reads `progress.json` and the holder of the folder's lock.

    Returns:
        The keys of `Progress.snapshot`, and `state` (`running`, `done`, `some units failed`, `stopped` or `gone`),
        `reason`, `started_at`, `written_at`, and the lock's `holder` (`host`, `pid`, `heartbeat_age_s`,
        `is_alive`), which is None where nobody holds the folder.

    Raises:
        InputError: the folder holds no run.
    """
    try:
        found = json.loads(folder.read_bytes(PROGRESS_FILE))
    except FileNotFoundError:
        remedy = f"holds no {PROGRESS_FILE} of a run; give the --out of a run"
        raise InputError("DIR", folder.url, remedy) from None
    holder = _holder(folder)
    found["holder"] = holder
    if found["state"] == RUNNING and (holder is None or not holder["is_alive"]):
        found["state"] = GONE
    return found


def _holder(folder: RunFolder) -> dict[str, Any] | None:
    try:
        holder = LockHolder.from_json(folder.read_bytes(LOCK_NAME))
    except FileNotFoundError:
        return None
    if holder is None:
        return None
    age_s = time.time() - holder.heartbeat_at
    return {"host": holder.host, "pid": holder.pid, "heartbeat_age_s": age_s, "is_alive": holder.is_alive()}


def status_text(found: dict[str, Any]) -> str:
    """Formats a status as a few plain lines for a terminal."""
    now = time.time()
    lines = [_headline(found)]
    lines += [_stage_line(stage) + f" wall_s={stage['wall_s']:g}" for stage in found["ended"]]
    if found["state"] == RUNNING and found["stage"] and not _is_ended(found):
        at_work = [_stage_line(found), f"left_s={found['left_s']:.0f}"]
        if found["units_per_min"]:
            at_work.append(f"units_per_min={found['units_per_min']:.3g}")
        lines.append(" ".join([*at_work, f"workers={found['workers']}"]))
        for unit in found["in_flight"]:
            attempt = f" attempt={unit['attempt']}" if unit["attempt"] > 1 else ""
            node = f" node={unit['node']}" if unit["node"] else ""
            lines.append(f"  in flight {unit['name']}{attempt}{node} since_s={now - unit['since']:.0f}")
        if found["note"]:
            lines.append(f"  {found['note']}")
    for error in found["errors"]:
        named = " ".join(f"{label}={value}" for label, value in error.get("name", {}).items())
        lines.append(f"  {error['what']} {now - error['time']:.0f} s ago: {error['stage']} {named}: {error['error']}")
    return "\n".join(lines)


def _headline(found: dict[str, Any]) -> str:
    """Returns a line such as `running, about 12 min left; process 71 on host a, heartbeat 3 s ago`."""
    from orchestrator.text_tables import duration

    parts = [found["state"] + (f" ({found['reason']})" if found["reason"] else "")]
    if found["state"] == RUNNING and found["run_left_s"] is not None:
        parts[0] += f", about {duration(found['run_left_s'])} left"
    if (holder := found["holder"]) is not None:
        beat = f"heartbeat {holder['heartbeat_age_s']:.0f} s ago"
        parts.append(f"process {holder['pid']} on host {holder['host']}, {beat}")
    if found["state"] == GONE:
        parts.append("its driver is gone; repeat the command of the run to go on")
    return "; ".join(parts)


def _is_ended(found: dict[str, Any]) -> bool:
    return any(stage["stage"] == found["stage"] for stage in found["ended"])


def _stage_line(stage: dict[str, Any]) -> str:
    line = f"{stage['stage']} {stage['finished']}/{stage['units']}"
    counted = ("recorded", "failed", "retried")
    return " ".join([line, *(f"{name}={stage[name]}" for name in counted if stage[name])])
