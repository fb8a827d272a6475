"""Tests twins of few layers: what they compute, and what is concluded from their times."""

from __future__ import annotations

import random

import pytest
import torch

from layerboost.costs import twins as module
from layerboost.costs.twins import LayerCosts, Twins, first_layers
from layerboost.families import decoder_layers, supported_families
from layerboost.plan import Treatment
from tests.models import tiny_model


@pytest.mark.parametrize("family", supported_families())
def test_a_twin_computes_what_the_first_layers_do(family):
    model = tiny_model(family).eval()
    n_layers = model.config.num_hidden_layers
    tokens = torch.randint(3, 90, (2, 12))
    reached = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(
            lambda layer, inputs, output: reached.append(output[0] if isinstance(output, tuple) else output)
        )
    with torch.inference_mode():
        whole = model(input_ids=tokens).logits
        assert torch.equal(first_layers(model, n_layers)(input_ids=tokens).logits, whole)
        few = first_layers(model, 2)
        assert len(decoder_layers(few)) == 2 and type(few) is type(model)
        ended = []
        decoder_layers(few)[1].register_forward_hook(
            lambda layer, inputs, output: ended.append(output[0] if isinstance(output, tuple) else output)
        )
        few(input_ids=tokens)
    assert torch.equal(ended[0], reached[1])
    mine = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert all(mine[name] == parameter.data_ptr() for name, parameter in few.named_parameters()), "nothing is copied"


def made_up(fixed_s: float, each_s: dict[Treatment, float]):
    """Returns a timing in which a plan takes `fixed_s` and the seconds of each of its layers."""
    return lambda model, plan: fixed_s + sum(each_s[treatment] for treatment in plan.treatments)


@pytest.mark.parametrize("deeper", [1, 2, 3, 10])
def test_the_times_of_two_depths_give_those_of_any(monkeypatch, deeper):
    monkeypatch.setattr(module, "DEEPER", deeper)
    fixed_s, softmax_s, none_s = (random.uniform(1, 9) for _ in range(3))
    twins = Twins(tiny_model("llama"), 8)
    timed_s = made_up(fixed_s, {Treatment.SOFTMAX: softmax_s, Treatment.NONE: none_s})
    costs = twins.layer_costs([Treatment.SOFTMAX, Treatment.NONE], timed_s)
    if deeper > 1:  # one layer alone cannot tell its cost from the rest
        assert costs.fixed_s == pytest.approx(fixed_s)
        expected = {"softmax": fixed_s + 40 * softmax_s, "none": fixed_s + 40 * none_s}
        assert costs.uniform_s(40) == pytest.approx(expected)
        assert costs.scaled(3).uniform_s(40)["none"] == pytest.approx(3 * expected["none"])
        deep_s = twins.deep_s(lambda model: fixed_s + softmax_s * model.config.num_hidden_layers)
        assert deep_s == pytest.approx(fixed_s + softmax_s * twins.n_layers)
    assert list(costs.layer_s) == [Treatment.SOFTMAX, Treatment.NONE], "the order is kept"


def test_a_disturbed_timing_gives_no_negative_seconds():
    twins = Twins(tiny_model("llama"), 8)
    took = {1: 5.0, twins.n_few: 4.0}  # the machine was busy while one layer was timed

    def timed_s(model, plan):
        return 0.1 if Treatment.NONE in plan.treatments else took[len(plan)]

    costs = twins.layer_costs([Treatment.SOFTMAX, Treatment.NONE], timed_s)
    assert costs == LayerCosts(4.0, {Treatment.SOFTMAX: 0.0, Treatment.NONE: 0.0})
