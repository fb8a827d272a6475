from __future__ import annotations

import pytest
import torch

from layerboost.healing.spec import (
    HEAL,
    TRANSFER,
    HealingSpec,
    HeldOut,
    Phase,
    annealing_start,
    held_out_steps,
    last_step,
    learning_rate_at,
    mark_steps,
    phases_of,
)
from layerboost.healing.training import heal_locally, split_held_out
from layerboost.plan import Plan
from layerboost.text.batches import GlobalBatches
from tests.layerboost.healing.test_distillation import batches, spec_of, tiny_model


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("divergence_weight", -1.0),
        ("window_dropout", 1.5),
        ("stop_when_flat", 0.0),
        ("held_out_sequences", 0),
        ("micro_batch_sequences", 0),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_field(field, value):
    with pytest.raises(ValueError, match=f"{field}: .*{value}"):
        spec_of(1, **{field: value})


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"divergence_weight: 0\.0 leaves no loss"):
        spec_of(1, divergence_weight=0.0)
    assert spec_of(1, divergence_weight=0.0, cross_entropy_weight=1.0).cross_entropy_weight == 1.0


def test_marks_are_the_steps_that_end_at_shares_of_the_budget():
    spec = spec_of(1000)
    assert mark_steps(spec, (0.3, 0.01, 0.0001, 1.0, 0.1)) == {10: 0.01, 100: 0.1, 300: 0.3}
    assert mark_steps(spec_of(5), (0.01, 0.3)) == {1: 0.3}


def test_the_curve_is_flat_when_two_tenths_bring_little_of_the_fall():
    spec = spec_of(100, stop_when_flat=0.05)
    phase = Phase(HEAL, 0, 100, 1.0)
    assert held_out_steps(spec, phase) == list(range(0, 100, 10))
    assert held_out_steps(spec_of(100), phase) == held_out_steps(spec, Phase(TRANSFER, 0, 100, 1.0)) == []
    values = [1.0, 0.5, 0.4, 0.39, 0.385, 0.384]
    measured = [HeldOut(10 * n, value) for n, value in enumerate(values)]
    assert [annealing_start(spec, measured[:n]) for n in range(7)] == [None, None, None, None, None, 40, 40]
    assert annealing_start(spec_of(100), measured) is None
    rising = [HeldOut(10 * n, 1.0 + n) for n in range(4)]
    assert annealing_start(spec, rising) == 30  # a healing that only does harm stops, too


def test_the_learning_rate_comes_down_in_a_tenth_of_the_steps_before():
    phase = Phase(HEAL, 20, 100, 1.0)
    assert last_step(phase, None) == 120
    assert last_step(phase, 60) == 64
    assert last_step(phase, 118) == 120
    rates = [learning_rate_at(phase, step, 0.0, annealed_from=60) for step in range(20, 64)]
    assert rates[:40] == [learning_rate_at(phase, step, 0.0) for step in range(20, 60)]
    assert rates[39:] == sorted(rates[39:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_healing_stops_early_and_the_same_way_again():
    spec = spec_of(60, stop_when_flat=0.9, held_out_sequences=5, learning_rate=1e-2)
    data = batches(spec, n_sequences=37)
    train, held_out = split_held_out(data.text, spec)
    assert (len(train), len(held_out)) == (32, 5)
    assert torch.equal(held_out.input_ids, data.text.input_ids[:5])
    curves = []
    for _ in range(2):
        rows = []
        heal_locally(tiny_model(), Plan.parse("LSNN", 3), data.text, spec, on_step=rows.append)
        curves.append(rows)
    (heal,) = (phase for phase in phases_of(spec, Plan.parse("LSNN", 3), 32) if phase.name == HEAL)
    stopped = len(curves[0])
    assert heal.first_step + 3 * heal.steps // 10 < stopped < spec.steps
    assert curves[0] == curves[1]
    with pytest.raises(ValueError, match="held_out_sequences: 5 of 5 sequences"):
        split_held_out(held_out, spec)


def test_marks_are_given_the_student_as_it_is_then():
    spec = spec_of(10, window_dropout=1.0)
    seen = []

    def on_mark(share, student):
        seen.append((share, [m.layerboost.window for m in student.modules() if hasattr(m, "linear_window")]))

    text = GlobalBatches(batches(spec).text, 1).text
    heal_locally(tiny_model(), Plan.parse("LSNN", 3), text, spec, marks=(0.1, 0.5), on_mark=on_mark)
    assert seen == [(0.1, [3]), (0.5, [3])]


def test_spec_survives_json():
    spec = spec_of(3, method="full", divergence="reverse_kl", stop_when_flat=0.1)
    assert HealingSpec.from_dict(spec.to_dict()) == spec
    assert isinstance(spec.to_dict()["divergence"], str)
