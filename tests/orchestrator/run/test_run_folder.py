"""Tests the run folder: records that are whole or absent, artefacts, and a lock that exactly one run holds."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import fsspec
import psutil
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orchestrator.recipe.errors import InputError
from orchestrator.run import lock as run_lock
from orchestrator.run.folder import SIDE_BY_SIDE, RunFolder, unit_key
from orchestrator.run.lock import LockHolder, RunFolderLockedError

IDENTITY = {"stage": "search", "plan": "NSSL", "window": 8}
KEY = unit_key(IDENTITY)
NAME = f"records/search/{KEY}.json"


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path) -> RunFolder:
    urls = {
        "local": f"{tmp_path}/a/run",
        "file": f"file://{tmp_path}/a/run",
        "memory": f"memory://{uuid.uuid4().hex}/run",
    }
    return RunFolder(urls[request.param])


def test_unit_key_is_of_the_content():
    assert unit_key({"a": 1, "b": [1, 2]}) == unit_key({"b": [1, 2], "a": 1})
    assert unit_key({"a": 1}) != unit_key({"a": 2})
    assert len(KEY) == 16
    assert int(KEY, 16) >= 0


def test_unit_key_stays_the_same_between_versions():
    # If this value changes, every record written so far counts as not done.
    assert unit_key({"a": 1}) == "015abd7f5cc57a2d"


@pytest.mark.parametrize("identity", [{"a": float("nan")}, {"a": object()}, {"a": {1, 2}}])
def test_unit_key_refuses_what_is_not_plain_json(identity):
    with pytest.raises((TypeError, ValueError)):
        unit_key(identity)


def test_records_come_back(folder):
    other = IDENTITY | {"plan": "SSSS"}
    result = {"value": 0.1 + 0.2, "nothing": None, "items": [1, 2], "infinite": float("inf"), "text": "ü"}
    assert folder.read_record("search", KEY) is None
    assert folder.records("search") == []
    folder.write_record("search", IDENTITY, result)
    folder.write_record("search", other, {})
    folder.write_record("heal", IDENTITY, {})
    record = RunFolder(folder.url).read_record("search", KEY)
    assert record is not None
    assert (record.identity, record.result) == (IDENTITY, result)
    assert [r.key for r in folder.records("search")] == sorted([KEY, unit_key(other)])
    assert folder.names("records/search") == sorted([f"{KEY}.json", f"{unit_key(other)}.json"])


def test_records_are_replaced(folder):
    for value in (1, 2):
        folder.write_record("search", IDENTITY, {"value": value})
    assert [r.result for r in folder.records("search")] == [{"value": 2}]


@pytest.mark.parametrize(("stage", "key"), [("../x", KEY), ("search", "../../etc"), ("search", "short"), ("", KEY)])
def test_names_of_records_stay_in_the_folder(folder, stage, key):
    with pytest.raises(ValueError, match="must be"):
        folder.read_record(stage, key)


def _changed(text: str, **values: object) -> str:
    return json.dumps(json.loads(text) | values)


DAMAGES = {
    "cut off": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "empty": (lambda text: "", "not valid JSON"),
    "not text": (lambda text: "\x00" * 40, "not valid JSON"),
    "no object": (lambda text: "[1]", "not a JSON object"),
    "result changed": (lambda text: text.replace("0.5", "0.6"), "checksum"),
    "identity changed": (lambda text: text.replace("NSSL", "SSSS"), "checksum"),
    "other schema": (lambda text: _changed(text, schema=0), "schema"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_noticed_said_and_put_aside(folder, caplog, damage, reason):
    with folder.lock():
        folder.write_record("search", IDENTITY, {"value": 0.5})
        folder.write_text(NAME, damage(folder.read_text(NAME)))
        with caplog.at_level(logging.WARNING):
            assert folder.read_record("search", KEY) is None
        assert reason in caplog.text
        assert NAME in caplog.text
        assert "redone" in caplog.text
        assert folder.names("records/search") == [f"{KEY}.json.damaged"]
        assert folder.records("search") == []
        folder.write_record("search", IDENTITY, {"value": 0.5})
        assert folder.read_record("search", KEY).result == {"value": 0.5}


def test_a_record_of_another_unit_is_damage(folder, caplog):
    other = IDENTITY | {"window": 9}
    folder.write_record("search", other, {"value": 1})
    folder.write_text(NAME, folder.read_text(f"records/search/{unit_key(other)}.json"))
    assert folder.read_record("search", KEY) is None
    assert "belongs to another unit" in caplog.text


def test_a_reader_without_the_lock_leaves_damage_where_it_is(folder):
    folder.write_text(NAME, "{")
    assert folder.records("search") == []
    assert folder.names("records/search") == [f"{KEY}.json"]


def test_a_failed_write_leaves_the_old_content_and_no_rest(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.write_text("pareto.csv", "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        folder.write_text("pareto.csv", "new")
    assert folder.read_text("pareto.csv") == "old"
    assert folder.names() == ["pareto.csv"]


def test_artefacts(folder):
    folder.write_bytes("a/b.bin", b"\x00\x01")
    assert folder.read_bytes("a/b.bin") == b"\x00\x01"
    folder.write_text("a/c.txt", "line\n")
    assert folder.read_text("a/c.txt") == "line\n"
    assert folder.names("a") == ["b.bin", "c.txt"]
    assert folder.names("none") == []
    folder.remove("a/b.bin")
    assert not folder.exists("a/b.bin")
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("a/b.bin")
    for outside in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(ValueError, match="does not lie in"):
            folder.write_text(outside, "")


def test_unknown_protocol():
    with pytest.raises(InputError, match="--out: nope://x: "):
        RunFolder("nope://x")


def test_preflight_leaves_nothing_behind(folder):
    folder.preflight_writable()
    assert not folder.exists()
    if folder.is_local:
        assert not Path(folder.path).parent.exists()


def test_preflight_of_an_existing_folder(tmp_path):
    (tmp_path / "old.txt").write_text("")
    RunFolder(tmp_path).preflight_writable()
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


def test_preflight_under_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(InputError, match="file is not a folder"):
            RunFolder(path).preflight_writable()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can make a file")
def test_preflight_where_nothing_can_be_written():
    with pytest.raises(InputError, match="--out: /proc/run: /proc cannot be written"):
        RunFolder("/proc/run").preflight_writable()


def test_the_lock_is_refused_and_given_back(folder):
    with folder.lock():
        assert "run.lock" in folder.names()
        with pytest.raises(RunFolderLockedError) as caught, RunFolder(folder.url).lock():
            pass
        for part in (str(folder), f"process {os.getpid()}", "wait for that run, stop it, or give another folder"):
            assert part in str(caught.value)
    assert "run.lock" not in folder.names()
    with RunFolder(folder.url).lock():
        pass


def _holder(**changes: object) -> LockHolder:
    return replace(LockHolder.this_process(), **changes)


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


STALE = {
    "dead process": lambda: _holder(pid=_dead_pid()),
    "pid of another process since": lambda: _holder(process_started_at=time.time() - 1e6),
    "other host, silent": lambda: _holder(host="elsewhere", heartbeat_at=time.time() - 61),
    "other container, silent": lambda: _holder(process_space="pid:[0]", heartbeat_at=time.time() - 61),
}


@pytest.mark.parametrize("holder", STALE.values(), ids=STALE)
def test_a_stale_lock_is_taken_over(folder, caplog, holder):
    folder.write_bytes("run.lock", holder().to_json())
    with folder.lock():
        assert "taking over" in caplog.text
        assert json.loads(folder.read_text("run.lock"))["pid"] == os.getpid()


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b'{"pid": 1}'])
def test_a_damaged_lock_is_no_lock(folder, damaged):
    folder.write_bytes("run.lock", damaged)
    with folder.lock():
        pass


def _parent() -> LockHolder:
    started_at = psutil.Process(os.getppid()).create_time()
    return _holder(pid=os.getppid(), process_started_at=started_at, heartbeat_at=0.0)


LIVE = {
    "other host, recent": lambda: _holder(host="elsewhere", heartbeat_at=time.time() - 30),
    # On this host a living process holds the lock, however long it was suspended.
    "this host, suspended": _parent,
}


@pytest.mark.parametrize("holder", LIVE.values(), ids=LIVE)
def test_a_live_lock_is_respected(folder, holder):
    written = holder().to_json()
    folder.write_bytes("run.lock", written)
    with pytest.raises(RunFolderLockedError), folder.lock():
        pass
    assert folder.read_bytes("run.lock") == written


def test_the_heartbeat_goes_on(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_INTERVAL_S", 0.05)
    with folder.lock():
        first = json.loads(folder.read_text("run.lock"))["heartbeat_at"]
        deadline = time.monotonic() + 10
        while json.loads(folder.read_text("run.lock") or "{}").get("heartbeat_at", first) == first:
            assert time.monotonic() < deadline, "no heartbeat"
            time.sleep(0.02)


def test_a_run_that_lost_its_lock_writes_no_record(folder, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT_INTERVAL_S", 0.05)
    with folder.lock():
        folder.write_bytes("run.lock", _holder(host="elsewhere").to_json())

        def write_for_10_s() -> None:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                folder.write_record("search", IDENTITY, {})
                time.sleep(0.02)

        with pytest.raises(RunFolderLockedError, match=r"taken over by process .* on host elsewhere"):
            write_for_10_s()
    assert folder.exists("run.lock"), "the lock of the other run was removed"


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_text("keep.tmp", "a name that a user may choose")
    folder.write_text(".hidden", "and this")
    (tmp_path / "run/.pareto.csv.0123abcd.tmp").write_text("half")
    (tmp_path / "run/.abc.0123abcd.tmp").mkdir()
    with folder.lock():
        assert folder.names() == [".hidden", "keep.tmp", "run.lock"]


N_RACES = 5


def _race(folder: Path, barrier, outcomes) -> None:
    for race in range(N_RACES):
        barrier.wait()
        try:
            with RunFolder(folder / f"run{race}").lock():
                outcomes.put((race, "won"))
                barrier.wait()
        except RunFolderLockedError:
            outcomes.put((race, "lost"))
            barrier.wait()


@pytest.mark.parametrize("before", ["free", "stale"])
def test_of_racing_processes_exactly_one_wins(tmp_path, before):
    n_processes = 3
    context = multiprocessing.get_context("spawn")
    if before == "stale":
        stale = _holder(pid=_dead_pid()).to_json()
        for race in range(N_RACES):
            RunFolder(tmp_path / f"run{race}").write_bytes("run.lock", stale)
    barrier, outcomes = context.Barrier(n_processes, timeout=60), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, barrier, outcomes)) for _ in range(n_processes)]
    for process in processes:
        process.start()
    found = sorted(outcomes.get(timeout=60) for _ in range(n_processes * N_RACES))
    for process in processes:
        process.join()
    assert found == sorted((race, how) for race in range(N_RACES) for how in ["lost"] * (n_processes - 1) + ["won"])


HOLD = """
import sys, time
from orchestrator.run.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_gives_way(tmp_path):
    url = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", HOLD, url], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(RunFolderLockedError, match=f"process {process.pid} "), RunFolder(url).lock():
        pass
    process.send_signal(signal.SIGKILL)
    # The process is not waited for, so it stays a zombie; a zombie holds no lock.
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with RunFolder(url).lock():
        pass
    process.wait()
    process.stdout.close()


class SlowStorage(MemoryFileSystem):
    """Simulates storage whose reads and writes take 50 ms each, and counts how many go on at once."""

    protocol = "slow"
    cachable = False
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    under_way, most = 0, 0
    mutex = threading.Lock()

    @contextlib.contextmanager
    def _slow(self):
        cls = type(self)
        with self.mutex:
            cls.under_way += 1
            cls.most = max(cls.most, cls.under_way)
        time.sleep(0.05)
        try:
            yield
        finally:
            with self.mutex:
                cls.under_way -= 1

    def pipe_file(self, path, value, **options):
        with self._slow():
            super().pipe_file(path, value, **options)

    def cat_file(self, path, **options):
        with self._slow():
            return super().cat_file(path, **options)


def test_records_are_written_and_read_side_by_side(monkeypatch):
    fsspec.register_implementation("slow", SlowStorage, clobber=True)
    folder = RunFolder("slow://bucket/run")
    results = [({"unit": i}, {"score": i * i}) for i in range(12)]
    monkeypatch.setattr(SlowStorage, "most", 0)
    folder.write_records("sweep", results)
    assert SlowStorage.most > 1
    monkeypatch.setattr(SlowStorage, "most", 0)
    keys = [unit_key(identity) for identity, _ in results]
    found = folder.read_records("sweep", [*keys, unit_key({"unit": "none"})])
    assert SlowStorage.most > 1
    assert [record and record.result for record in found] == [*(result for _, result in results), None]


def test_many_records_are_read_ahead_of_who_takes_them_and_no_further(monkeypatch):
    fsspec.register_implementation("slow", SlowStorage, clobber=True)
    folder = RunFolder("slow://bucket/long run")
    identities = [{"unit": i} for i in range(3 * SIDE_BY_SIDE)]
    folder.write_records("sweep", [(identity, {"score": i}) for i, identity in enumerate(identities)])
    read = []
    cat_file = SlowStorage.cat_file
    monkeypatch.setattr(SlowStorage, "cat_file", lambda fs, path, **o: (read.append(path), cat_file(fs, path, **o))[1])
    monkeypatch.setattr(SlowStorage, "most", 0)
    records = folder.each_record(map(unit_key, identities), ["sweep"])
    for i, record in enumerate(records):
        assert record.result == {"score": i}
        assert len(read) <= i + 1 + SIDE_BY_SIDE
    assert len(read) == len(identities)
    assert 1 < SlowStorage.most <= SIDE_BY_SIDE


def test_a_record_is_read_from_the_first_stage_that_holds_a_sound_one(folder, caplog):
    here, there, both, damaged, nowhere = keys = [unit_key({"unit": i}) for i in range(5)]
    for stage, units in {"search": (0, 2, 3), "refine": (1, 2, 3)}.items():
        folder.write_records(stage, [({"unit": i}, {"of": stage}) for i in units])
    folder.write_text(f"records/search/{damaged}.json", "{")
    found = folder.each_record(keys, ["search", "refine"])
    assert {key: record and record.result["of"] for key, record in zip(keys, found, strict=True)} == {
        here: "search",
        there: "refine",
        both: "search",
        damaged: "refine",
        nowhere: None,
    }
    assert f"{damaged}.json is damaged" in caplog.text


def test_the_same_content_in_another_layout_is_sound(folder):
    result = {"values": [random.random() for _ in range(20)], "text": "a,\n b"}
    folder.write_record("search", IDENTITY, result)
    payload = json.loads(folder.read_text(NAME))
    folder.write_text(NAME, json.dumps(dict(reversed(payload.items())), indent=2))
    assert folder.read_record("search", KEY).result == result


def test_of_several_records_those_that_can_be_written_are(folder):
    results = [({"unit": i}, {"score": i}) for i in range(4)]
    results[1] = ({"unit": 1}, {"score": object()})
    with pytest.raises(TypeError):
        folder.write_records("sweep", results)
    assert sorted(record.identity["unit"] for record in folder.records("sweep")) == [0, 2, 3]
