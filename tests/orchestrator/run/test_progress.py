"""Tests the progress lines: counts, fields, time left, and what a terminal shows."""

from __future__ import annotations

import io
import re
import threading

import pytest

from orchestrator.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_plain_line_for_each_unit():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start_stage("sensitivity", 5, recorded=2, workers=2)
    progress.finish_unit(1.26, layer=3, treatment="none")
    progress.finish_unit(2.0, status="failed", layer=4, error="out of\nmemory")
    progress.finish_unit(1.0, layer=5)
    progress.end_stage()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sensitivity 2/5 start recorded=2 workers=2"
    assert lines[1] == "sensitivity 3/5 done layer=3 treatment=none duration_s=1.3 left_s=1"
    assert lines[2] == 'sensitivity 4/5 failed layer=4 error="out of memory" duration_s=2.0 left_s=1'
    assert lines[3] == "sensitivity 5/5 done layer=5 duration_s=1.0 left_s=0"
    assert re.fullmatch(r"sensitivity 5/5 end recorded=2 failed=1 wall_s=[\d.]+", lines[4])
    assert len(lines) == 5


def test_a_stage_may_turn_out_to_have_more_units():
    stream, events = io.StringIO(), []
    progress = Progress(stream)
    progress.listeners.append(events.append)
    progress.start_stage("sensitivity", 2)
    progress.finish_unit(1.0)
    progress.set_total(4)
    progress.finish_unit(1.0)
    progress.set_total(4)
    assert stream.getvalue().splitlines()[-1] == "sensitivity 2/4 done duration_s=1.0 left_s=2"
    assert progress.snapshot()["units"] == 4
    assert [event["units"] for event in events if event["what"] in ("stage", "units")] == [2, 4]


@pytest.mark.parametrize(("workers", "left_s"), [(1, 40.0), (2, 20.0), (3, 20.0), (4, 10.0), (9, 10.0)])
def test_time_left_counts_waves_of_workers(workers, left_s):
    progress = Progress(io.StringIO())
    progress.start_stage("search", 6, workers=workers)
    assert progress.left_s == 0
    progress.finish_unit(8.0)
    progress.finish_unit(12.0)
    assert progress.left_s == left_s


def test_a_new_stage_forgets_the_durations_of_the_last():
    progress = Progress(io.StringIO())
    progress.start_stage("search", 2)
    progress.finish_unit(100.0)
    progress.start_stage("heal", 3)
    progress.finish_unit(1.0)
    assert progress.left_s == 2.0


def test_a_terminal_overwrites_lines_but_keeps_failures():
    stream = Terminal()
    progress = Progress(stream)
    progress.start_stage("search", 3)
    progress.finish_unit(1.0, plan="NSS")
    progress.finish_unit(1.0, status="failed", plan="SSS", error="x" * 500)
    progress.finish_unit(1.0, plan="LLL", note="y" * 500)
    progress.close()
    text = stream.getvalue()
    assert text.count("\r\x1b[K") == 4
    kept = text.split("\n")
    assert len(kept) == 4
    assert "x" * 500 in kept[1], "why a unit failed is never cut"
    assert "y" * 500 not in kept[2], "a line that is overwritten must fit on one line of the screen"
    assert text.endswith("\n")
    progress.close()
    assert stream.getvalue() == text


def test_threads_do_not_mix_lines():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start_stage("search", 200)
    threads = [
        threading.Thread(target=lambda: [progress.finish_unit(0.1, plan="NSSL") for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = stream.getvalue().splitlines()[1:]
    assert [line.split()[1] for line in lines] == [f"{n}/200" for n in range(1, 201)]


def test_notes_stay():
    stream = io.StringIO()
    Progress(stream).note("report written", path="a b/report.html", n=3)
    assert stream.getvalue() == 'report written path="a b/report.html" n=3\n'
