"""Tests the branch check of linear_window layers on hand-made models whose branches are known."""

import pytest
import torch

from layerboost.convert import convert
from layerboost.evaluation.likelihood import score_sequences
from layerboost.healing.attention_transfer import linear_window_layers
from layerboost.healing.branches import branch_check, without_branch
from layerboost.plan import Plan
from tests.models import tiny_model


@pytest.fixture(scope="module")
def parent():
    return tiny_model("llama", seed=3)


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(3, 97, (5, 24), generator=torch.Generator().manual_seed(1))


def test_without_its_linear_branch_a_layer_is_a_window(parent, sequences):
    model, window_only = (convert(parent, Plan.parse(plan, 4)) for plan in ("SLLN", "SWWN"))
    both, linear, window = branch_check(model, sequences, batch_size=2)
    expected = score_sequences(window_only, sequences).nll
    assert [row.zeroed for row in (both, linear, window)] == [None, "linear", "window"]
    assert linear.nll == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert linear.nll_loss == pytest.approx(linear.nll - both.nll, abs=1e-9)
    paired = torch.tensor(expected) - torch.tensor(score_sequences(model, sequences).nll)
    assert linear.nll_loss_stderr == pytest.approx(float(paired.std() / 5**0.5), rel=1e-2)
    assert (both.nll_loss, both.nll_loss_stderr, both.n_items) == (0.0, 0.0, 5)
    assert window.nll != both.nll


def test_a_window_over_the_whole_sequence_leaves_the_linear_branch_nothing_to_do(parent, sequences):
    _, linear, window = branch_check(convert(parent, Plan.parse("SLLN", 24)), sequences)
    assert linear.nll_loss == pytest.approx(0.0, abs=1e-6)
    assert abs(window.nll_loss) > 1e-3


def test_branches_are_back_at_work_also_after_an_error(parent, sequences):
    model = convert(parent, Plan.parse("SLLN", 4))
    before = score_sequences(model, sequences).nll
    with pytest.raises(ZeroDivisionError), without_branch(model, "linear"):
        raise ZeroDivisionError
    assert all(treated.zeroed is None for _, treated in linear_window_layers(model))
    assert score_sequences(model, sequences).nll == before


def test_what_has_no_branches_is_refused(parent, sequences):
    with pytest.raises(ValueError, match="no layer has a linear_window"):
        branch_check(convert(parent, Plan.parse("SWNS", 4)), sequences)
    with (
        pytest.raises(ValueError, match="branch: 'both' is unknown; use linear or window"),
        without_branch(parent, "both"),
    ):
        pass
