"""Tests the table of what nodes lack, from made-up answers and from nodes of which one sees another disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.checks.cluster import Needs, node_findings
from orchestrator.checks.findings import MISSING, OK, WARN, Finding
from orchestrator.checks.placement import check_placement
from orchestrator.checks.preflight import _check_cluster
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.load import load_recipe
from tasks.cluster.node_probe import Answer, NodeReport, ProbeRequest
from tasks.cluster.resources import NodeResources

HERE = {"python": "3.11.9", "layerboost": "0.2.0", "ray": "2.60.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
GOOD = NodeReport(versions=HERE, shm_bytes=4 << 30, missing={}, storage=None, clock_s=0.0)
NODE = NodeResources("n", "10.0.0.2", 8.0, 1.0, object_store_bytes=2 << 30)
REQUEST = ProbeRequest(
    folder="/shared/run",
    paths={"quality.text": "/data/text.txt"},
    models={"model.path": ("some/model", None)},
    datasets={"healing.text": "some/data"},
)
NEEDS = Needs(REQUEST, ("torch", "transformers", "deepspeed"))


def rows(answer: Answer, unread: str | None = None, needs: Needs = NEEDS) -> list[Finding]:
    return list(node_findings(NODE, answer, needs, HERE, unread))


def test_a_good_node_is_one_row():
    assert rows(Answer(GOOD, ahead_s=0.5)) == [Finding("10.0.0.2", "8 CPUs, 1 GPUs")]


@pytest.mark.parametrize(
    ("answer", "what", "found", "state", "remedy"),
    [
        (Answer(None, "no answer within 90 s"), "10.0.0.2", "no answer", MISSING, "ray status"),
        (replace(GOOD, storage="cannot be written (full)"), "run folder", "/shared/run cannot be", MISSING, "--out"),
        (replace(GOOD, missing={"model.path": "is gone"}), "model.path", "some/model is gone", MISSING, "hub"),
        (replace(GOOD, missing={"healing.text": "is gone"}), "healing.text", "some/data", MISSING, "hub"),
        (replace(GOOD, missing={"quality.text": "is not there"}), "quality.text", "/data/text.txt", MISSING, "copy it"),
        (replace(GOOD, versions=HERE | {"python": "3.11.2"}), "python", "3.11.2, here 3.11.9", WARN, "3.11.9 there"),
        (replace(GOOD, versions=HERE | {"python": "3.12.9"}), "python", "3.12.9", MISSING, "install python 3.11.9"),
        (replace(GOOD, versions=HERE | {"ray": "2.59.0"}), "ray", "2.59.0", MISSING, "install ray 2.60.0"),
        (replace(GOOD, versions=HERE | {"layerboost": "0.1.0"}), "layerboost", "0.1.0", MISSING, "0.2.0 there"),
        (replace(GOOD, versions=HERE | {"torch": "2.6.0"}), "torch", "2.6.0, here 2.13.0", WARN, "install torch"),
        (replace(GOOD, versions=HERE | {"deepspeed": None}), "deepspeed", "not inst", MISSING, "deepspeed==0.19.8"),
        (replace(GOOD, shm_bytes=64 << 20), "/dev/shm", "0.06 GiB, Ray's object store has 2.00", WARN, "--shm-size"),
        (Answer(GOOD, ahead_s=5.0), "clock", "5.0 s ahead of", WARN, "chrony"),
        (Answer(GOOD, ahead_s=-45.0), "clock", "45.0 s behind", MISSING, "chrony"),
    ],
)
def test_each_fault_is_a_row_with_its_remedy(answer, what, found, state, remedy):
    (row,) = rows(answer if isinstance(answer, Answer) else Answer(answer))
    assert what in row.what and row.what.startswith("10.0.0.2") and found in row.found
    assert row.state == state and remedy in row.remedy


def test_what_the_driver_cannot_read_and_what_no_run_needs():
    (row,) = rows(Answer(GOOD), unread="No such file")
    assert (row.what, row.state) == ("10.0.0.2 run folder", MISSING) and "is not here (No such file)" in row.found
    bare = replace(GOOD, versions=HERE | {"deepspeed": None})
    assert rows(Answer(bare), needs=Needs(REQUEST))[0].state == OK


def test_faults_stop_a_run_and_warnings_do_not(capsys):
    warning = Finding("10.0.0.2 clock", "5 s ahead", WARN, "set it")
    _check_cluster([Finding("10.0.0.1", "fine"), warning])
    said = capsys.readouterr()
    assert said.out == "" and "10.0.0.2 clock" in said.err and "10.0.0.1" not in said.err
    with pytest.raises(InputError, match=r"10\.0\.0\.3: no answer: look"):
        _check_cluster([warning, Finding("10.0.0.3", "no answer", MISSING, "look there")])
    _check_cluster([Finding("10.0.0.1", "fine")])
    assert "10.0.0.3" in capsys.readouterr().err


def test_what_a_recipe_needs_of_its_nodes(inputs):
    needs = Needs.of_run(load_recipe(inputs.recipe), str(inputs.folder / "a" / "run"))
    assert needs.request.folder == str(inputs.folder)
    assert set(needs.request.paths) == {"model.path", "quality.text", "healing.text", "quality.tasks[0]"}
    assert needs.packages == ("torch", "transformers", "deepspeed", "lm-eval")
    hub = ["model.path=some/model", "quality.tasks=[]", "healing.tokens=0", "sensitivity.texts=[some/data]"]
    needs = Needs.of_run(load_recipe(inputs.recipe, hub), "memory://run")
    assert needs.request.models == {"model.path": ("some/model", None)}
    assert needs.request.datasets == {"sensitivity.texts[0]": "some/data"}
    assert needs.packages == ("torch", "transformers")


def test_what_an_autoscaler_can_add_is_pending_and_more_is_refused(inputs):
    living = [NodeResources("h", "10.0.0.1", 0.0, 0.0)]
    growth = [NodeResources(f"gpu-{n}", "gpu", 8.0, 2.0) for n in range(2)]
    recipe = load_recipe(inputs.recipe, ["placement.gpus_per_worker=1", "placement.workers=4"])
    (row,) = check_placement(recipe, living, "the cluster", growth=growth)
    assert (row.what, row.state) == ("placement.gpus_per_worker", WARN) and "autoscaler" in row.remedy
    recipe = load_recipe(inputs.recipe, ["placement.gpus_per_worker=1", "placement.workers=5"])
    with pytest.raises(InputError, match=r"placement\..*on the cluster only 4 of 1 CPUs and 1 GPUs fit"):
        check_placement(recipe, living, "the cluster", growth=growth)
