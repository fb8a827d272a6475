"""Tests drops of single layers: direction, pairing, means; and the cosine score against the model's own stream."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from layerboost.evaluation.scores import MetricScore, QualityError, Scores, mean_score
from layerboost.families import decoder_layers
from layerboost.sensitivity.cosine import cosine_scores
from layerboost.sensitivity.drops import cosine_drops, drops, mean_drop
from tests.models import tiny_model


def _scores(accuracy, margin, nll, kl=None, easy=(1.0, 0.0, 1.0)):
    metrics = [
        mean_score("recall", "acc", accuracy, True, primary=True),
        mean_score("easy", "acc", list(easy), True, primary=True),
        mean_score("recall", "margin", margin, True),
        mean_score("text", "nll", nll, False),
    ]
    if kl is not None:
        metrics.append(mean_score("text", "kl", kl, False))
    return Scores(metrics)


BASE = _scores([1.0, 1.0, 0.0, 1.0], [2.0, 1.0, -0.5, 0.3], [2.0, 3.0, 4.0])
WORSE = _scores([1.0, 0.0, 0.0, 0.0], [1.0, 0.5, -1.5, -0.3], [2.5, 3.2, 4.1], kl=[0.3, 0.2, 0.4])


@pytest.mark.parametrize("score", ["benchmark", "margin", "nll", "kl"])
def test_a_worse_variant_has_a_positive_drop_whatever_the_direction_of_the_metric(score):
    rows = drops(BASE, WORSE, score)
    assert rows[-1].task == "mean" and rows[-1].drop > 0
    if score != "kl":
        back = mean_drop(WORSE, BASE, score)
        assert back.drop == pytest.approx(-rows[-1].drop)
        assert back.drop_ci_high < 0 or rows[-1].drop_ci_low <= 0


def test_the_benchmark_mean_weighs_tasks_alike_and_is_paired():
    recall, easy, mean = drops(BASE, WORSE, "benchmark")
    assert (recall.drop, easy.drop, mean.drop) == pytest.approx((0.5, 0.0, 0.25))
    paired = torch.tensor([0.0, 1.0, 0.0, 1.0]).std() / 2
    assert recall.drop_stderr == pytest.approx(paired.item())
    assert easy.drop_stderr == 0.0
    assert mean.drop_stderr == pytest.approx(paired.item() / 2)
    assert (recall.base, recall.ablated, mean.base) == pytest.approx((0.75, 0.25, (0.75 + 2 / 3) / 2))
    assert recall.n_items == 4 and mean.n_items == 7


def test_the_divergence_needs_no_entry_for_the_base():
    row = drops(BASE, WORSE, "kl")[0]
    assert row.base == 0.0 and row.drop == row.ablated == pytest.approx(0.3) and row.drop_stderr > 0


def test_a_perplexity_counts_in_the_mean_as_a_probability():
    def of(perplexity):
        return Scores(
            [
                MetricScore("wiki", "word_perplexity", perplexity, None, False, n_items=9, primary=True),
                mean_score("easy", "acc", [1.0, 0.0], True, primary=True),
            ]
        )

    wiki, _, mean = drops(of(10.0), of(20.0), "benchmark")
    assert wiki.drop == pytest.approx(10.0) and wiki.drop_stderr is None
    assert mean.drop == pytest.approx((1 / 10 - 1 / 20) / 2)


def test_scores_without_items_are_taken_as_independent():
    base, variant = (
        Scores([MetricScore("t", "f1", value, 0.03, True, primary=True)]) for value in (0.9, 0.7)
    )  # fmt: skip
    row = mean_drop(base, variant, "benchmark")
    assert row.drop == pytest.approx(0.2) and row.drop_stderr == pytest.approx(0.03 * math.sqrt(2))
    assert row.drop_ci_low < 0.2 < row.drop_ci_high and row.n_items is None


@pytest.mark.parametrize("score", ["kl", "cosine", "luck"])
def test_a_score_that_was_not_measured_is_refused_by_name(score):
    with pytest.raises(QualityError, match=score):
        drops(BASE, BASE, score)


STREAM_BEHIND_ATTENTION = {
    "llama": "post_attention_layernorm",
    "granite": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "gpt_neox-serial": "post_attention_layernorm",
}


@pytest.mark.parametrize("family", STREAM_BEHIND_ATTENTION)
def test_cosine_compares_the_stream_before_and_behind_attention(family):
    model = tiny_model(family)
    sequences = torch.randint(3, 90, (5, random.randint(7, 20)))
    before, behind = [], []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: before.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        getattr(layer, STREAM_BEHIND_ATTENTION[family]).register_forward_pre_hook(
            lambda _, args: behind.append(args[0])
        )
    with torch.no_grad():
        model(sequences)
    expected = torch.stack(
        [
            (1 - F.cosine_similarity(a.double(), b.double(), dim=-1)).mean(-1)
            for a, b in zip(before, behind, strict=True)
        ]
    )
    scores = cosine_scores(model, sequences, batch_size=2)
    assert scores.shape == (4, 5) and expected.min() > 1e-5
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-4)
    again = cosine_scores(model, sequences[:1])
    torch.testing.assert_close(again, scores[:, :1], atol=1e-6, rtol=1e-4)


def test_cosine_drops_are_the_distances_with_their_error():
    text, mean = cosine_drops([0.1, 0.2, 0.6])
    assert mean.task == "mean" and mean.drop == text.drop == text.ablated == pytest.approx(0.3)
    assert text.drop_stderr == pytest.approx(torch.tensor([0.1, 0.2, 0.6]).std().item() / math.sqrt(3))


@pytest.mark.parametrize("score", ["benchmark", "margin", "nll", "kl"])
def test_rows_without_intervals_are_the_same_but_for_them(score):
    wanted = [replace(row, drop_ci_low=None, drop_ci_high=None) for row in drops(BASE, WORSE, score)]
    assert drops(BASE, WORSE, score, intervals=False) == wanted
    assert mean_drop(BASE, WORSE, score, intervals=False) == wanted[-1]
    distances = np.random.default_rng().uniform(size=12).tolist()
    wanted = [replace(row, drop_ci_low=None, drop_ci_high=None) for row in cosine_drops(distances)]
    assert cosine_drops(distances, intervals=False) == wanted
