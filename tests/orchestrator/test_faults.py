"""Tests whole runs of the command that meet a full disk, Ctrl-C or a broken checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from orchestrator.run.kinds import STAGE_NAMES
from tests.conftest import Inputs, mounted_disk, repeatable_recipe
from tests.orchestrator.test_pipeline import command, environment, records, run, table

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SMALL = repeatable_recipe(
    sensitivity={"treatments": ["none"], "shares": 2, "compare": False},
    search={"refine": None},
    healing={"baselines": ["linear_window"], "checkpoint_every_steps": 3},
    placement={"workers": 1},
)


@dataclass(frozen=True)
class Prepared:
    """Holds inputs and the folders of undisturbed runs up to a stage."""

    inputs: Inputs
    folder: Path

    def until(self, stage: str) -> Path:
        out = self.folder / stage
        if not out.exists():
            # The run goes on behind the latest stage that is there.
            earlier = [self.folder / name for name in STAGE_NAMES[: STAGE_NAMES.index(stage)]]
            if there := [folder for folder in earlier if folder.exists()]:
                shutil.copytree(there[-1], out)
            run(self.inputs, out, "--until", stage)
        return out

    def copy(self, stage: str, out: Path) -> Path:
        """Copies the folder of a run that has finished a stage, so that a test can go on from there."""
        return Path(shutil.copytree(self.until(stage), out))


def prepared(pristine_inputs: Path, folder: Path) -> Prepared:
    shutil.copytree(pristine_inputs, folder / "inputs")
    inputs = Inputs(folder / "inputs", SMALL)
    inputs.write_recipe()
    return Prepared(inputs, folder)


@pytest.fixture(scope="module")
def small(pristine_inputs, tmp_path_factory) -> Prepared:
    """Prepares runs of a minute that heal two plans."""
    return prepared(pristine_inputs, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def heavy(pristine_inputs, tmp_path_factory) -> Prepared:
    """Prepares the same runs with a model of 2 MiB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heavy = prepared(pristine_inputs, tmp_path_factory.mktemp("heavy"))
    config = LlamaConfig.from_pretrained(heavy.inputs.model)
    config.update({"hidden_size": 64, "intermediate_size": 768})
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(heavy.inputs.model)
    return heavy


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a real filesystem of 50 MB of which a little more than 3 MB are free."""
    with mounted_disk(tmp_path / "disk", "50m") as folder:
        (folder / "others").write_bytes(bytes(shutil.disk_usage(folder).free - int(3.3 * 2**20)))
        yield folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_full_disk_stops_the_run_and_with_more_room_it_ends_as_if_nothing_had_happened(
    heavy, small_disk, tmp_path, method
):
    # In full healing the first checkpoint of the trained parameters fills the disk, otherwise the healed models do.
    settings = ["--until", "heal", "--set", f"healing.method={method}"]
    inputs = heavy.inputs
    out, undisturbed = (heavy.copy("search", folder / "out") for folder in (small_disk, tmp_path))
    stopped = run(inputs, out, *settings, expect=1)
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
    finished = run(inputs, out, *settings)
    assert "is damaged" not in finished.stderr
    after = records(out)
    assert {name: after[name] for name in before} == before
    run(inputs, undisturbed, *settings)
    assert set(after) == set(records(undisturbed))
    for name in ("sensitivity.csv", "candidates.csv", "healing_curves.csv"):
        pd.testing.assert_frame_equal(table(out, name), table(undisturbed, name), rtol=1e-5)


def interrupted(inputs: Inputs, out: Path, line: str, times: int) -> tuple[int, list[str]]:
    """Returns exit code and lines of a run that gets Ctrl-C `times` times, from the first match of `line` on."""
    process = subprocess.Popen(
        command(inputs, out), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    lines, sent = [], 0
    assert process.stderr is not None
    for written in process.stderr:
        lines.append(written)
        is_warned = "press Ctrl-C again" in written
        if (sent == 0 and re.match(line, written)) or (is_warned and sent < times):
            process.send_signal(signal.SIGINT)
            sent += 1
    assert sent == times, "".join(lines)
    return process.wait(), lines


@pytest.mark.parametrize(
    ("done", "line"),
    [
        ("evaluate", "sensitivity 1/"),
        ("sensitivity", "search 2/"),
        ("search", "heal step "),
        ("heal", "measure .* start"),
        ("heal", "throughput 0/"),
    ],
)
def test_the_first_interrupt_finishes_what_is_in_flight_in_each_stage(small, tmp_path, done, line):
    out = small.copy(done, tmp_path / "out")
    code, lines = interrupted(small.inputs, out, line, times=1)
    text = "".join(lines)
    assert code == 130 and "interrupted; the same command goes on" in lines[-1], text
    assert "Traceback" not in text
    if line.startswith("heal"):
        assert len(list((out / "healed").glob("*/healing.json"))) == 1
        assert any(written.startswith("heal 1/2 done") for written in lines)
    assert json.loads((out / "progress.json").read_text())["state"] == "stopped"
    assert not (out / "run.lock").exists()


def test_the_second_interrupt_stops_a_healing_at_once_and_it_goes_on_from_its_checkpoint(small, tmp_path):
    out = small.copy("search", tmp_path / "out")
    inputs = Path(shutil.copytree(small.inputs.folder, tmp_path / "inputs"))
    # There are so many steps that none of these healings ends before the second interrupt, however fast the machine is.
    longer = Inputs(inputs, SMALL | {"healing": SMALL["healing"] | {"tokens": 64 * 200, "checkpoint_every_steps": 10}})
    longer.write_recipe()
    code, _ = interrupted(longer, out, r"heal step ([4-9]\d|\d\d\d)/200", times=2)
    assert code == 130 and not list((out / "healed").glob("*"))
    result = run(longer, out, "--until", "heal")
    steps = [int(line.split()[2].split("/")[0]) for line in result.stderr.splitlines() if line.startswith("heal step")]
    assert steps[0] > 20, "started over"


def test_a_model_that_cannot_be_judged_fails_after_three_times_and_the_rest_is_done(small, tmp_path):
    out = small.copy("heal", tmp_path / "out")
    broken, whole = sorted((out / "healed").iterdir())
    (broken / "model.safetensors").write_bytes(b"no tensors")
    result = run(small.inputs, out, expect=1)
    assert "failed: measure" in result.stderr
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    retried = [event for event in events if event["what"] == "retried" and event["stage"] == "measure"]
    by_unit: dict[str, list[int]] = {}
    for event in retried:
        by_unit.setdefault(json.dumps(event["name"]), []).append(event["attempt"])
    assert by_unit and set(map(tuple, by_unit.values())) == {(1, 2)}
    pareto = table(out, "pareto.csv")
    assert set(pareto.loc[pareto["plan_id"] == whole.name, "status"]) == {"ok"}
    assert "ok" not in set(pareto.loc[pareto["healed"] & (pareto["plan_id"] == broken.name), "status"])
    assert json.loads((out / "progress.json").read_text())["state"] == "some units failed"
    status = subprocess.run(
        [sys.executable, "-m", "orchestrator", "status", str(out)], capture_output=True, text=True, check=True
    )
    assert status.stdout.startswith("some units failed")
    shutil.rmtree(broken)  # so that it is healed again
    run(small.inputs, out)
