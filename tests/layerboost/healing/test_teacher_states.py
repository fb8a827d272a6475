"""Healing with stored teacher states gives the same to the bit, and the teacher runs once for each text."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from layerboost.convert import convert
from layerboost.healing.distillation import Distillation, make_trainee
from layerboost.healing.spec import HEAL
from layerboost.healing.teacher_states import TeacherStates
from layerboost.healing.training import heal_locally
from layerboost.plan import Plan
from layerboost.storage import publish
from layerboost.text.batches import PackedText
from tests.layerboost.healing.test_distillation import VOCABULARY, WINDOW, spec_of, tiny_model

PLANS = [Plan.parse(letters, WINDOW) for letters in ("LNSW", "SSNN", "SSSS")]


@pytest.fixture
def runs(monkeypatch) -> list[torch.Tensor]:
    """Lists the tokens of each pass of a teacher."""
    found = []
    original = Distillation._run

    def run(self, model, input_ids, *others):
        if model is self.teacher:
            found.append(input_ids)
        return original(self, model, input_ids, *others)

    monkeypatch.setattr(Distillation, "_run", run)
    return found


def text_of(n_sequences: int = 12, *, documents: bool = False) -> PackedText:
    input_ids = torch.randint(3, VOCABULARY, (n_sequences, 16))
    return PackedText(input_ids, torch.arange(16).remainder(5).expand(n_sequences, 16) if documents else None)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"micro_batch_sequences": 1}, {"stop_when_flat": 0.01, "held_out_sequences": 4}]
)
def test_healings_that_share_a_teacher_equal_those_that_do_not(tmp_path, runs, documents, dtype, settings):
    model, text, spec = tiny_model().to(dtype), text_of(documents=documents), spec_of(4, **settings)
    stored = TeacherStates(tmp_path, 2**30, reserved_bytes=0)
    for number, plan in enumerate(PLANS):
        curves, weights = [], []
        for shared in (None, stored):
            rows, n_before = [], len(runs)
            healed = heal_locally(model, plan, text, spec, stored=shared, on_step=rows.append)
            curves.append([row.loss for row in rows])
            weights.append(healed.state_dict())
            n_runs = len(runs) - n_before
        assert curves[0] == curves[1]
        for name, tensor in weights[0].items():
            assert torch.equal(tensor, weights[1][name]), name
        # A plan with a transfer phase leaves the first rows of the text to that phase, so the next one meets some new.
        assert n_runs == 0 if number == 2 else n_runs > 0 or number == 1


def test_states_are_found_by_their_sequence_alone(tmp_path, runs):
    teacher, student = tiny_model(), convert(tiny_model(seed=1), PLANS[1])
    module = make_trainee(HEAL, teacher, student, spec_of(1), TeacherStates(tmp_path, 2**30, reserved_bytes=0))
    text = text_of(7)
    text, new = text[:6], text[6:]
    expected = module(text.input_ids)
    assert len(runs) == 1
    other = make_trainee(
        HEAL,
        teacher,
        convert(tiny_model(seed=1), PLANS[1]),
        spec_of(1),
        TeacherStates(tmp_path, 2**30, reserved_bytes=0),
    )
    torch.testing.assert_close(other(text.input_ids.flip(0)), expected)  # another order, another process
    assert len(runs) == 1
    one_is_new = torch.cat([text.input_ids[:3], new.input_ids])
    other(one_is_new)
    assert len(runs) == 2
    other(text.input_ids, torch.arange(16).remainder(5).expand(6, 16))  # other positions are another sequence
    other(text.input_ids[:, :-1])
    assert len(runs) == 4
    assert len(list(Path(tmp_path).iterdir())) == 6 + 1 + 6 + 6


def test_a_loss_over_all_layers_and_a_folder_that_is_full_run_the_teacher(tmp_path, runs):
    teacher, text = tiny_model(), text_of(4)
    student = convert(tiny_model(seed=1), PLANS[1])
    module = make_trainee(
        HEAL, teacher, student, spec_of(1, hidden_weight=0.5), TeacherStates(tmp_path, 2**30, reserved_bytes=0)
    )
    for _ in range(2):
        module(text.input_ids)
    assert len(runs) == 2
    assert list(Path(tmp_path).iterdir()) == []
    each = 16 * 32 * 4 + 256  # with room for the header of a file
    stored = TeacherStates(tmp_path, 2.5 * each, reserved_bytes=0)
    module = make_trainee(HEAL, teacher, convert(tiny_model(seed=1), PLANS[1]), spec_of(1), stored)
    module(text.input_ids)
    assert len(list(Path(tmp_path).iterdir())) == 2
    module(text.input_ids[:2])
    assert len(runs) == 3
    module(text.input_ids[2:])
    assert len(runs) == 4
    again = TeacherStates(tmp_path, 2.5 * each, reserved_bytes=0)  # what lies there already counts
    again.states(text_of(1).input_ids, None, lambda: torch.zeros(1, 16, 32))
    assert len(list(Path(tmp_path).iterdir())) == 2


def test_damaged_and_deleted_files_are_written_again(tmp_path, caplog):
    stored, text = TeacherStates(tmp_path / "states", 2**30, reserved_bytes=0), text_of(2)
    states, n_computed = torch.randn(2, 16, 8), 0

    def compute() -> torch.Tensor:
        nonlocal n_computed
        n_computed += 1
        return states

    for _ in range(2):
        assert torch.equal(stored.states(text.input_ids, None, compute), states)
    assert n_computed == 1
    first, second = (tmp_path / "states").iterdir()
    first.write_bytes(first.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(stored.states(text.input_ids, None, compute), states)
    assert first.name in caplog.text and second.name not in caplog.text
    assert torch.equal(stored.states(text.input_ids, None, compute), states)
    assert n_computed == 2
    shutil.rmtree(tmp_path / "states")
    for _ in range(2):
        assert torch.equal(stored.states(text.input_ids, None, compute), states)
    assert n_computed == 3


def test_several_processes_keep_to_one_limit_and_leave_the_disk_some_room(tmp_path, monkeypatch):
    each = 16 * 8 * 4 + 256
    several = [TeacherStates(tmp_path / "states", 40 * each, reserved_bytes=0) for _ in range(4)]
    for _ in range(40):
        for stored in several:
            stored.states(text_of(1).input_ids, None, lambda: torch.randn(1, 16, 8))
    # A process counts what the others wrote after 32 files of its own.
    assert 40 <= len(list((tmp_path / "states").iterdir())) <= 40 + 3 * 32
    free = shutil.disk_usage(tmp_path).free
    for reserved, n_kept in ((2 * free, 0), (free // 2, 1)):
        stored = TeacherStates(tmp_path / str(reserved), 2**30, reserved_bytes=reserved)
        stored.states(text_of(1).input_ids, None, lambda: torch.randn(1, 16, 8))
        assert len(list((tmp_path / str(reserved)).iterdir())) == n_kept


def test_a_passing_storage_error_is_tried_again(tmp_path, monkeypatch):
    stored, states, n_tried = TeacherStates(tmp_path, 2**30, reserved_bytes=0), torch.randn(1, 16, 8), 0
    original = publish.save_file

    def flaky(tensors, file, **_) -> None:
        nonlocal n_tried
        n_tried += 1
        if n_tried == 1:
            raise OSError(errno.EIO, "the file server is away")
        original(tensors, file)

    monkeypatch.setattr(publish, "save_file", flaky)
    monkeypatch.setattr("layerboost.storage.errors.RETRY_DELAYS_S", (0.0,))
    stored.states(text_of(1).input_ids, None, lambda: states)
    assert n_tried == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_no_more_and_leaves_nothing_half_written(tmp_path, monkeypatch, caplog):
    stored, states, n_tried = TeacherStates(tmp_path, 2**30, reserved_bytes=0), torch.randn(2, 16, 8), 0

    def full(tensors, file, **_) -> None:
        nonlocal n_tried
        n_tried += 1
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(publish, "save_file", full)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(stored.states(text_of(2).input_ids, None, lambda: states), states)
    assert n_tried == 1
    assert caplog.text.count("is full") == 1
    assert list(tmp_path.iterdir()) == []

    def broken(tensors, file, **_) -> None:
        raise PermissionError(errno.EACCES, "not yours")

    monkeypatch.setattr(publish, "save_file", broken)
    with pytest.raises(PermissionError):  # anything else is no matter of room and must be seen
        TeacherStates(tmp_path, 2**30, reserved_bytes=0).states(text_of(2).input_ids, None, lambda: states)
