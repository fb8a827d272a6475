"""Tests that `run.json` reads back as it was written, and that files of earlier versions can be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orchestrator.recipe.errors import InputError
from orchestrator.run.entries import AblationEntry, Failure, Finalist
from orchestrator.run.folder import RunFolder
from orchestrator.run.state import RUN_FILE, RunState, load_state

STATE: dict[str, Any] = {
    "model": "m",
    "n_layers": 2,
    "score": "nll",
    "environment": {"python": "3.11"},
    "base_key": "b",
    "sensitivity": [
        {"source": "text", "context_tokens": 8, "layer": 0, "treatment": "none", "key": "k", "base_key": "b"},
        {"source": "text", "context_tokens": 8, "layer": None, "treatment": "none", "key": "c", "base_key": None},
    ],
    "adaptive": None,
    "stable": None,
    "trials": [
        {
            "plan": "NL",
            "window": 8,
            "origin": "search",
            "remove_below": 0.1,
            "keep_above": None,
            "status": "ok",
            "error": None,
            "quality": 0.5,
            "quality_stderr": None,
            "objective": -0.25,
            "speedup": 1.5,
            "key": "t",
            "share": 1.0,
            "beaten_by": None,
        }
    ],
    "baselines": [{"plan": "NS", "window": None, "origin": "first", "speedup": 1.25, "key": "f"}],
    "healed": [
        {
            "plan": "NL",
            "window": 8,
            "origin": "search",
            "key": "h",
            "quality_key": "q",
            "curve": [{"share": 0.0, "tokens": 0, "key": "s"}, {"share": 0.5, "tokens": 64, "key": "e"}],
        }
    ],
    "finalists": [{"plan": "LN", "window": 8, "origin": "search", "healed_key": "h", "quality_key": "q"}],
    "branches": [{"plan": "LN", "window": 8, "origin": "search", "healed_key": "h", "key": "r"}],
    "throughput": [
        {
            "plan": "LN",
            "window": 8,
            "origin": "search",
            "healed_key": "h",
            "concurrency": 4,
            "prompt_tokens": 16,
            "new_tokens": 8,
            "key": "t",
        }
    ],
    "speed": {
        "measured": [{"plan": "NL", "window": 8, "concurrency": 4, "key": "t"}],
        "models": [
            {
                "concurrency": 4,
                "native_windows": [None, 16],
                "window": 8,
                "kinds": [["softmax", None], ["linear_window", None]],
                "rest_s": 0.001,
                "attention_s": [0.0002, 0.0001],
                "covariance": [[0.1, 0.0, 0.2], [0.0, 0.3, 0.0], [0.2, 0.0, 0.4]],
                "scatter": 0.02,
                "n_points": 8,
            }
        ],
    },
    "lengths": [
        {
            "plan": "LN",
            "window": 8,
            "origin": "search",
            "healed_key": "h",
            "concurrency": 2,
            "prompt_tokens": 32,
            "new_tokens": 8,
            "key": "l",
        }
    ],
    "halving": [
        {
            "plan": "NS",
            "window": None,
            "origin": "search",
            "rung": 1,
            "share": 0.125,
            "speedup": 1.5,
            "key": "h",
            "tokens": None,
            "quality_key": None,
            "objective": None,
            "survived": False,
        }
    ],
    "units": {
        "heal": [
            {"kind": "heal", "keys": ["h"], "is_beside": False},
            {"kind": "heal", "keys": ["h", "i"], "is_beside": True},
        ]
    },
    "estimates": [
        {
            "stage": "heal",
            "units": 2,
            "recorded": 1,
            "seconds": 9.5,
            "tokens": 64,
            "gpus": 2.0,
            "memory_mib": 100.5,
            "disk_mib": 0.0,
            "n_open": 3,
        }
    ],
    "stage_s": {"heal": 0.1},
    "failures": [{"stage": "heal", "name": {"plan": "NS", "window": None}, "error": "no room\nat all"}],
}
"""One entry of each kind, as `run.json` holds it."""


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def test_run_json_reads_back_to_the_same_text(folder):
    text = json.dumps(STATE, indent=1)
    folder.write_text(RUN_FILE, text)
    state = load_state(folder)
    assert json.dumps(state.to_dict(), indent=1) == text, "members keep their order too"
    assert state.sensitivity[0] == AblationEntry("text", 8, 0, "none", "k", "b")
    assert state.failures == [Failure("heal", {"plan": "NS", "window": None}, "no room\nat all")]


def test_lists_that_an_earlier_version_did_not_know_are_empty(folder):
    known = ("model", "n_layers", "score", "environment", "sensitivity")
    folder.write_text(RUN_FILE, json.dumps({name: STATE[name] for name in known}))
    state = load_state(folder)
    assert (len(state.sensitivity), state.halving, state.speed, state.failures) == (2, [], None, [])


def test_a_member_that_is_missing_is_named():
    with pytest.raises(KeyError, match="base_key"):
        AblationEntry.from_dict({"source": "text", "context_tokens": 8, "layer": 0, "treatment": "none", "key": "k"})


def test_a_finalist_has_its_plan_among_its_members():
    written = {"plan": "NL", "window": 8, "origin": "search", "healed_key": None}
    assert Finalist.from_dict(written).to_dict() == written
    assert list(Finalist.from_dict(written).to_dict()) == list(written)


def test_a_folder_without_a_run_is_an_input_error(folder):
    with pytest.raises(InputError, match=RUN_FILE):
        load_state(folder)


def test_a_new_state_is_written_whole():
    assert set(RunState("m", 2, "nll", {}).to_dict()) == set(STATE)
