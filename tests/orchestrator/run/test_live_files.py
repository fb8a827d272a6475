"""Tests what others see of a run: progress.json, log.jsonl, `layerboost status`, and metrics of a real cluster."""

from __future__ import annotations

import io
import json
import os
import re
import time
import urllib.request

import pytest

from orchestrator.cli import main
from orchestrator.commands.status import read_status
from orchestrator.run import live_files
from orchestrator.run import lock as run_lock
from orchestrator.run.folder import RunFolder
from orchestrator.run.progress import Progress
from tasks.pool.finished import WorkerInfo
from tasks.pool.watch import UnitEvent

WORKER = WorkerInfo("host-a", "a", 1)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run" if request.param == "local" else f"memory://watching-{tmp_path.name}")


def go_on(progress: Progress) -> None:
    """Runs a stage of five units: one recorded before, one done, one tried again, one failed, one in flight."""
    progress.expected_s = {"evaluate": 10.0, "sensitivity": 60.0, "search": 100.0}
    progress.start_stage("evaluate", 1)
    progress.finish_unit(1.0)
    progress.end_stage()
    progress.start_stage("sensitivity", 5, recorded=1, workers=2)
    for items in ("0-4", "4-8"):
        progress.unit_event(UnitEvent("started", items, 1, WORKER), {"items": items})
    progress.unit_event(
        UnitEvent("retried", "0-4", 1, WORKER, 2.0, "ActorDiedError: it died\ndetails"), {"items": "0-4"}
    )
    progress.unit_event(UnitEvent("started", "0-4", 2, WORKER), {"items": "0-4"})
    progress.unit_event(UnitEvent("done", "4-8", 1, WORKER, 2.0), {"items": "4-8"})
    result = {"duration_s": 2.0, "worker": {"node": "host-a", "attempt": 1}}
    progress.recorded("sweep", "0123456789abcdef", {"plan": {"plan": "NSS", "window": None}}, result)
    progress.finish_unit(2.0, items="4-8")
    progress.finish_unit(0.0, status="failed", items="8-12", error="ValueError: bad items")


def test_the_files_say_where_the_run_stands(folder):
    progress = Progress(io.StringIO())
    with folder.lock(), live_files.watching(folder, progress):
        go_on(progress)
        time.sleep(live_files._INTERVAL_S + 0.5)
        found = read_status(folder)
    assert found["state"] == "running" and found["stage"] == "sensitivity"
    counted = {name: found[name] for name in ("units", "finished", "recorded", "failed", "retried", "workers")}
    assert counted == {"units": 5, "finished": 3, "recorded": 1, "failed": 1, "retried": 1, "workers": 2}
    (in_flight,) = found["in_flight"]
    assert (in_flight["name"], in_flight["attempt"], in_flight["node"]) == ("items=0-4", 2, "host-a")
    assert found["left_s"] == 2.0 and found["run_left_s"] == 102.0
    assert found["units_per_min"] > 0
    assert [stage["stage"] for stage in found["ended"]] == ["evaluate"]
    errors = [(error["what"], error["error"]) for error in found["errors"]]
    assert errors == [("retried", "ActorDiedError: it died"), ("failed", "ValueError: bad items")]
    assert found["holder"]["pid"] == os.getpid() and found["holder"]["is_alive"]
    assert 0 <= found["holder"]["heartbeat_age_s"] < run_lock.STALE_AFTER_S
    events = [json.loads(line) for line in folder.read_text("log.jsonl").splitlines()]
    assert [event["what"] for event in events] == [
        *("stage", "end", "stage", "started", "started", "retried", "started", "recorded", "failed"),
    ]
    recorded = events[7]
    assert recorded.pop("time").endswith("Z")
    assert recorded == {
        "what": "recorded",
        "stage": "sweep",
        "key": "0123456789abcdef",
        "plan": "NSS",
        "node": "host-a",
        "seconds": 2.0,
        "attempt": 1,
    }
    assert events[5]["name"] == {"items": "0-4"} and events[5]["attempt"] == 1
    assert read_status(folder)["state"] == "done" and read_status(folder)["holder"] is None


def test_what_ended_a_run_is_there_and_earlier_events_stay_up_to_a_bound(folder, monkeypatch):
    monkeypatch.setattr(live_files, "MAX_EVENTS", 12)
    for number in range(2):
        progress = Progress(io.StringIO())
        with pytest.raises(RuntimeError), folder.lock(), live_files.watching(folder, progress):
            go_on(progress)
            raise RuntimeError(f"no more {number}\ndetails")
        found = read_status(folder)
        assert (found["state"], found["reason"]) == ("stopped", f"no more {number}")
    assert len(folder.read_text("log.jsonl").splitlines()) == 12


def test_a_run_whose_driver_died_is_gone(folder):
    progress = Progress(io.StringIO())
    with folder.lock(), live_files.watching(folder, progress) as watched:
        go_on(progress)
        watched._write()
        running = folder.read_bytes("progress.json")
    folder.write_bytes("progress.json", running)
    assert read_status(folder)["state"] == "gone"


def test_the_command_prints_lines_or_json(tmp_path, capsys):
    folder, progress = RunFolder(tmp_path / "run"), Progress(io.StringIO())
    with folder.lock(), live_files.watching(folder, progress) as watched:
        go_on(progress)
        progress.note("heal step 3/9", plan="NSS")
        watched._write()
        assert main(["status", str(tmp_path / "run")]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert main(["status", str(tmp_path / "run"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["stage"] == "sensitivity"
    assert re.fullmatch(
        rf"running, about 1 min 42 s left; process {os.getpid()} on host \S+, heartbeat \d s ago", lines[0]
    )
    assert re.fullmatch(r"evaluate 1/1 wall_s=[\d.]+", lines[1])
    assert re.fullmatch(
        r"sensitivity 3/5 recorded=1 failed=1 retried=1 left_s=2 units_per_min=[\d.e+]+ workers=2", lines[2]
    )
    assert re.fullmatch(r"  in flight items=0-4 attempt=2 node=host-a since_s=\d", lines[3])
    assert lines[4] == "  heal step 3/9 plan=NSS"
    assert lines[5].startswith("  retried 0 s ago: sensitivity items=0-4: ActorDiedError")
    assert main(["status", str(tmp_path / "none")]) == 2
    assert "holds no progress.json" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    folder, progress = RunFolder(tmp_path / "run"), Progress(io.StringIO())
    with folder.lock(), live_files.watching(folder, progress) as watched:
        watched._stop.set()  # the thread stops, because this test decides when files are written
        watched._thread.join()
        (tmp_path / "run" / "progress.json").unlink(missing_ok=True)
        (tmp_path / "run" / "progress.json").mkdir()
        go_on(progress)
        watched._write()
        (tmp_path / "run" / "progress.json").rmdir()
    assert "cannot be written" in caplog.text
    assert read_status(folder)["state"] == "done"


@pytest.mark.cluster
def test_metrics_are_on_the_exporter_of_the_drivers_node():
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        progress = Progress(io.StringIO())
        progress.listeners.append(live_files.Metrics(progress).take)
        go_on(progress)
        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        deadline_s, text = time.monotonic() + 40, ""
        while "ray_layerboost_unit_seconds_bucket" not in text and time.monotonic() < deadline_s:
            time.sleep(1)
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            text = direct.open(url, timeout=10).read().decode()
    finally:
        ray.shutdown()
    samples = {}
    for line in text.splitlines():
        if line.startswith("ray_layerboost"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
            found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            samples[name, found.get("stage"), found.get("outcome"), found.get("le")] = float(value)
    units = "ray_layerboost_units_total"
    assert samples[units, "sweep", "done", None] == samples[units, "sensitivity", "failed", None] == 1
    assert samples[units, "sensitivity", "retried", None] == 1
    assert samples["ray_layerboost_units_left", "sensitivity", None, None] == 2
    assert samples["ray_layerboost_seconds_left", "sensitivity", None, None] == 2
    assert samples["ray_layerboost_unit_seconds_count", "sweep", None, None] == 1
