from __future__ import annotations

import pytest
import torch

from layerboost.convert import convert
from layerboost.healing.attention_transfer import (
    AttentionTransfer,
    draw_windows,
    full_windows,
    linear_window_layers,
    restore_windows,
)
from layerboost.healing.distillation import Distillation
from layerboost.healing.spec import HealingSpec
from layerboost.healing.training import heal_locally
from layerboost.plan import Plan
from layerboost.text.batches import PackedText
from tests.layerboost.healing.test_distillation import VOCABULARY, batches, spec_of, tiny_model

WINDOW = 6


def windows_of(student) -> list[int]:
    return [treated.window for _, treated in linear_window_layers(student)]


def test_windows_are_drawn_by_seed_step_and_layer_and_less_often_with_time():
    spec = spec_of(1000, window_dropout=0.8)
    student, other = (convert(tiny_model(), Plan.parse("LLSL", WINDOW)) for _ in range(2))
    drawn = []
    for step in range(1000):
        draw_windows(student, spec, step)
        drawn.append(windows_of(student))
        draw_windows(other, spec, step)
        assert windows_of(other) == drawn[-1]
    short = torch.tensor(drawn) < WINDOW
    assert 0.7 < short[:100].float().mean() < 0.85
    assert 0.3 < short[325:425].float().mean() < 0.5
    assert not short[750:].any()
    assert {window for step in drawn for window in step} == set(range(1, WINDOW + 1))
    assert len({tuple(step) for step in drawn}) > 50  # each layer is drawn independently
    draw_windows(student, spec, 0)
    with full_windows(student):
        assert windows_of(student) == [WINDOW] * 3
    assert windows_of(student) == drawn[0]
    restore_windows(student)
    assert windows_of(student) == [WINDOW] * 3


def test_a_shortened_window_is_that_window_in_training_and_the_whole_one_in_measuring():
    model, plan, spec = tiny_model(), Plan.parse("LSNS", WINDOW), spec_of(20, window_dropout=1.0)
    trainee = Distillation(model, convert(model, plan), spec)
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    ((name, treated),) = linear_window_layers(trainee.student)
    step = next(step for step in range(20) if (trainee.begin_step(step), treated.window)[1] == 2)
    trainee.begin_step(step)
    narrow = convert(model, Plan.parse("LSNS", 2))
    narrow.get_submodule(name).linear_window.load_state_dict(
        trainee.student.get_submodule(name).linear_window.state_dict()
    )
    torch.testing.assert_close(trainee(input_ids), Distillation(model, narrow, spec_of(1))(input_ids))
    whole = Distillation(model, convert(model, plan), spec_of(1))(input_ids)
    torch.testing.assert_close(trainee(input_ids, measure=True), whole)
    assert trainee(input_ids) != whole


def test_a_healed_model_has_its_whole_windows():
    spec = spec_of(4, window_dropout=1.0)
    student = heal_locally(tiny_model(), Plan.parse("LSNL", WINDOW), batches(spec).text, spec)
    assert windows_of(student) == [WINDOW] * 2


def test_a_layer_learns_the_same_whatever_is_fitted_beside_it():
    model, plan = tiny_model(), Plan.parse("LSLL", 3)
    input_ids = torch.randint(3, VOCABULARY, (3, 16))
    together = convert(model, plan)
    AttentionTransfer(model, together, spec_of(1))(input_ids).backward()
    for name, _ in linear_window_layers(together):
        alone = convert(model, plan)
        AttentionTransfer(model, alone, spec_of(1), [name])(input_ids).backward()
        expected = together.get_submodule(name).linear_window.key_weight.grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(alone.get_submodule(name).linear_window.key_weight.grad, expected)


def test_targets_weigh_sequences_in_the_transfer():
    model = tiny_model()
    trainee = AttentionTransfer(model, convert(model, Plan.parse("LSSS", 3)), spec_of(1))
    input_ids = torch.randint(3, VOCABULARY, (2, 16))
    first, second = (trainee(input_ids[row : row + 1]) for row in range(2))
    targets = torch.ones(2, 16, dtype=torch.bool)
    targets[1, 6:] = False
    torch.testing.assert_close(trainee(input_ids, targets=targets), (15 * first + 5 * second) / 20)


def test_a_separate_teacher_is_learnt_from_and_one_of_other_tokens_refused():
    student, teacher = tiny_model(seed=0), tiny_model(seed=1, num_hidden_layers=6)
    spec = spec_of(60, learning_rate=1e-2)
    data = batches(spec)
    plan = Plan.parse("SSSS")
    before = Distillation(teacher, student, spec)(data.text.input_ids)
    healed = heal_locally(student, plan, data.text, spec, teacher=teacher)
    assert Distillation(teacher, healed, spec)(data.text.input_ids) < 0.9 * before
    with pytest.raises(ValueError, match=r"hidden_weight: 0\.1 needs layers"):
        heal_locally(student, plan, data.text, spec_of(1, hidden_weight=0.1), teacher=teacher)
    with pytest.raises(ValueError, match="teacher: has a vocabulary of 62 tokens and the model one of 61"):
        heal_locally(student, plan, data.text, spec, teacher=tiny_model(vocab_size=62))


def test_packed_documents_with_targets_are_healed_on():
    spec = spec_of(12)
    ids = torch.randint(3, VOCABULARY, (48, 16))
    positions = torch.arange(16).remainder(5).expand(48, 16)
    text = PackedText(ids, positions, positions != 0)
    rows = []
    heal_locally(tiny_model(), Plan.parse("LSNW", 3), text, spec, on_step=rows.append)
    assert all(torch.isfinite(torch.tensor(row.loss)) for row in rows)
    assert rows[-1].loss < rows[2].loss
    split = []
    small = HealingSpec.from_dict(spec.to_dict() | {"micro_batch_sequences": 1})
    heal_locally(tiny_model(), Plan.parse("LSNW", 3), text, small, on_step=split.append)
    assert [row.loss for row in split] == pytest.approx([row.loss for row in rows], rel=1e-4)
