"""Tests calibration, and the flags for what a model lost although its accuracy held."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from layerboost.evaluation.calibration_error import bin_gaps, calibration_difference, calibration_score
from layerboost.evaluation.flags import Flag, flag_text, flags
from layerboost.evaluation.likelihood import score_sequences, score_text
from layerboost.evaluation.scores import MetricScore, QualityError, Scores, mean_score
from layerboost.plan import Plan
from layerboost.sweep.layer_sweep import LayerSweep
from tests.models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def _naive_ece(confidence: np.ndarray, correct: np.ndarray) -> float:
    total = 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & ((confidence < (b + 1) / 15) | (b == 14))
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


def _predictions(n: int, per_item: int, tilt: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draws confidences and whether they are right, which is less often than they say by `tilt`."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1.0, (n, per_item))
    return confidence, rng.uniform(size=(n, per_item)) < confidence - tilt


def _score(confidence: np.ndarray, correct: np.ndarray, task: str = "text") -> MetricScore:
    return calibration_score(task, bin_gaps(torch.tensor(confidence), torch.tensor(correct)))


@pytest.mark.parametrize(("n", "per_item"), [(50, 1), (12, 40), (1, 9)])
def test_ece_is_the_naive_one(n, per_item):
    confidence, correct = _predictions(n, per_item, 0.1)
    assert _score(confidence, correct).value == pytest.approx(_naive_ece(confidence.ravel(), correct.ravel()))
    assert _score(np.ones((2, 1)), np.array([[True], [False]])).value == 0.5


def test_bootstrap_error_is_that_of_repeated_samples():
    found = [_score(*_predictions(100, 5, 0.2, seed)) for seed in range(30)]
    assert found[0].stderr == pytest.approx(np.std([score.value for score in found]), rel=0.35)


def test_a_pair_is_told_apart_better_than_two_strangers_and_only_over_the_same_items():
    base, other = (_score(*_predictions(80, 20, tilt)) for tilt in (0.1, 0.2))
    difference, stderr = calibration_difference(base.gaps, other.gaps)
    assert 0.04 < difference < 0.12, "0.1, less what chance may explain"
    assert 0 < stderr < np.hypot(base.stderr, other.stderr)
    assert calibration_difference(base.gaps, base.gaps) == (0.0, 0.0)
    with pytest.raises(ValueError, match="80 items of the base against 79"):
        calibration_difference(base.gaps, other.gaps[1:])


def test_being_less_sure_is_no_fault_of_calibration():
    sure = _score(np.full((60, 1), 0.999), np.ones((60, 1), dtype=bool), "easy")
    unsure = [_score(*_predictions(60, 1, 0.0, seed), "easy") for seed in range(40)]
    assert np.mean([score.value for score in unsure]) > 0.1, "the plain ECE of 60 items would accuse it"
    accused = [score for score in unsure if flags(_scores(sure), _scores(score))]
    assert len(accused) <= 4


def test_text_gives_what_the_models_own_logits_do_on_both_paths():
    model, sequences = tiny_model("llama"), torch.randint(3, 90, (5, 30))
    plans = [Plan.parse("SSSS"), Plan.parse("SNSS")]
    with torch.no_grad():
        p = model(sequences).logits[:, :-1].softmax(-1)
    confidence, token = p.max(-1)
    naive = _naive_ece(confidence.numpy().ravel(), (token == sequences[:, 1:]).numpy().ravel())
    found = score_text(LayerSweep(model, plans), sequences, base=0, batch_size=2).gaps
    assert calibration_score("text", score_sequences(model, sequences).gaps).value == pytest.approx(naive, abs=1e-4)
    assert calibration_score("text", found[0]).value == pytest.approx(naive, abs=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def _scores(*more: MetricScore, acc: float = 1.0) -> Scores:
    items = [1.0] * round(100 * acc) + [0.0] * (100 - round(100 * acc))
    return Scores([mean_score("easy", "acc", items, True, primary=True), *more])


def _written(right: int) -> MetricScore:
    score = mean_score("write", "exact_match", [1.0] * right + [0.0] * (50 - right), True, primary=True)
    score.generated = True
    return score


def _found_again(share: float) -> MetricScore:
    return mean_score("text", "retrieval@128", [share + 0.1 * (i % 2) for i in range(20)], True)


def test_what_fell_behind_a_held_accuracy_is_flagged():
    ece = [_score(*_predictions(100, 20, tilt), "text") for tilt in (0.0, 0.15)]
    base = _scores(_written(40), _found_again(0.8), ece[0])
    other = _scores(_written(20), _found_again(0.3), ece[1], acc=0.98)
    other = Scores.from_dict(json.loads(json.dumps(other.to_dict())))
    found = flags(base, other)
    assert [(flag.aspect, flag.name) for flag in found] == [
        ("generation", "write"),
        ("retrieval", "retrieval@128"),
        ("calibration", "text"),
    ]
    assert found[0] == Flag("generation", "write", 0.8, 0.4, pytest.approx(-0.4), pytest.approx(0.07, abs=0.01))
    assert flag_text(found).startswith("generation write -0.40; retrieval@128 -0.50; calibration text +0.1")
    assert flags(base, base) == [] and flag_text([]) == ""


def test_nothing_is_flagged_where_the_accuracy_fell_too_or_the_loss_is_small():
    base = _scores(_written(40), _found_again(0.8))
    assert flags(base, _scores(_written(20), _found_again(0.3), acc=0.8)) == []
    assert flags(base, _scores(_written(38), _found_again(0.75))) == []


def test_other_items_are_refused_and_old_records_read():
    other = _scores(mean_score("text", "retrieval@128", [0.1] * 3, True))
    with pytest.raises(QualityError, match="20 items of the base against 3"):
        flags(_scores(_found_again(0.8)), other)
    old = {"task": "a", "metric": "acc", "value": 1.0, "stderr": None, "higher_is_better": True}
    assert not Scores.from_dict({"metrics": [old]}).metrics[0].generated
