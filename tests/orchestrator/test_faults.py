"""Whole runs of the command that something goes wrong with: a full disk, Ctrl-C."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import Inputs, mounted_disk, repeatable_recipe
from tests.orchestrator.test_pipeline import command, environment, records, run, table

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SMALL = repeatable_recipe(
    sensitivity={"treatments": ["none"], "shares": 2, "compare": False},
    search={"refine": None},
    healing={"baselines": ["linear_window"], "checkpoint_every_steps": 3},
)


@pytest.fixture
def small(inputs) -> Inputs:
    """A run of half a minute that heals two plans."""
    small = Inputs(inputs.folder, SMALL)
    small.write_recipe()
    return small


@pytest.fixture
def heavy(small) -> Inputs:
    """The same with a model of two MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(small.model)
    config.update({"hidden_size": 64, "intermediate_size": 768})
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(small.model)
    return small


@pytest.fixture
def small_disk(tmp_path):
    """A real filesystem of 50 MB, of which a little more than three are free."""
    with mounted_disk(tmp_path / "disk", "50m") as folder:
        (folder / "others").write_bytes(bytes(shutil.disk_usage(folder).free - int(3.3 * 2**20)))
        yield folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_full_disk_stops_the_run_and_with_more_room_it_ends_as_if_nothing_had_happened(
    heavy, small_disk, tmp_path, method
):
    # The trained parameters of a full healing fill the disk with their first checkpoint, the healed models otherwise.
    settings = ["--until", "heal", "--set", f"healing.method={method}"]
    out, undisturbed = small_disk / "out", tmp_path / "undisturbed"
    stopped = run(heavy, out, *settings, expect=1)
    last = stopped.stderr.strip().splitlines()[-1]
    said = re.search(r"the disk is full: ([\d.,]+) MiB are free, the rest of the run needs about ([\d,]+) MiB", last)
    assert last.startswith(f"error: --out: {out}: ") and said, stopped.stderr
    free_mib, needed_mib = (float(number.replace(",", "")) for number in said.groups())
    assert free_mib < 3.3 < needed_mib < 60 and "the same command goes on" in last
    assert "Traceback" not in stopped.stderr
    half_written = [path for path in out.rglob("*") if re.search(r"\.(tmp|writing|part)$", path.name)]
    assert not half_written
    before = records(out)
    assert all(json.loads(text)["result"] is not None for text in before.values())
    status = json.loads((out / "progress.json").read_text())
    assert status["state"] == "stopped" and "the disk is full" in status["reason"]

    subprocess.run(["mount", "-o", "remount,size=400m", small_disk], check=True)
    finished = run(heavy, out, *settings)
    assert "is damaged" not in finished.stderr
    after = records(out)
    assert {name: after[name] for name in before} == before
    run(heavy, undisturbed, *settings)
    assert set(after) == set(records(undisturbed))
    for name in ("sensitivity.csv", "candidates.csv", "healing_curves.csv"):
        pd.testing.assert_frame_equal(table(out, name), table(undisturbed, name), rtol=1e-5)


def interrupted(inputs, out: Path, line_start: str, times: int) -> tuple[int, list[str]]:
    """Exit code and lines of a run that gets Ctrl-C so many times at the first line that starts so."""
    process = subprocess.Popen(
        command(inputs, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines, sent = [], 0
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        is_warned = "press Ctrl-C again" in line
        if (sent == 0 and line.startswith(line_start)) or (is_warned and sent < times):
            process.send_signal(signal.SIGINT)
            sent += 1
    assert sent == times, "".join(lines)
    return process.wait(), lines


@pytest.mark.parametrize("line_start", ["sensitivity 1/", "search 2/", "throughput 0/"])
def test_the_first_interrupt_finishes_what_is_in_flight_in_each_stage(small, tmp_path, line_start):
    out = tmp_path / "out"
    code, lines = interrupted(small, out, line_start, times=1)
    text = "".join(lines)
    assert code == 130 and "interrupted; the same command goes on" in lines[-1], text
    assert "Traceback" not in text
    assert json.loads((out / "progress.json").read_text())["state"] == "stopped"
    assert not (out / "run.lock").exists()
