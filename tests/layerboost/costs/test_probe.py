"""Tests the timings that an estimate is made from: their arithmetic, and a probe of a tiny model."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.costs import probe
from layerboost.costs.costs import Costs, EvaluationCosts, mixed
from layerboost.costs.probe import decode_costs, evaluation_costs, extrapolated_s, healing_costs, n_trained
from layerboost.evaluation.scores import QualitySpec
from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan, Treatment


class Clock:
    """Replaces the clock by one that advances only when simulated work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(probe.time, "perf_counter", lambda: self.now)


def test_what_is_timed_whole_is_not_extrapolated(monkeypatch):
    clock, sizes = Clock(monkeypatch), []

    def run(n: int) -> None:
        sizes.append(n)
        clock.now += 0.01 * n

    assert extrapolated_s(run, 8, first=2, enough_s=1.0) == pytest.approx(0.08)
    assert sizes == [2, 2, 4, 8], "the first warms up"


def test_the_rest_costs_what_the_last_step_added(monkeypatch):
    clock = Clock(monkeypatch)

    def run(n: int) -> None:
        clock.now += 0.1 + 0.1 * n

    assert extrapolated_s(run, 100, first=2, enough_s=0.45) == pytest.approx(0.5 + 96 * 0.1)


def test_a_plan_costs_what_its_layers_cost_alone():
    costs = {"softmax": 4.0, "none": 1.0, "linear_window": 7.0, "window": 100.0}
    assert mixed(costs, Plan.parse("SNNL", 8)) == pytest.approx((4 + 1 + 1 + 7) / 4)
    assert mixed(costs) == pytest.approx(0.4 * 4 + 0.4 * 1 + 0.2 * 7), "an unknown plan has no windows of its own"


def test_costs_survive_json():
    evaluation = EvaluationCosts(1, 2, {"softmax": 3}, {"softmax": 4}, 5, {"text": 6})
    costs = Costs(1, 2, 3, 4, evaluation, None, (), None)
    assert Costs.from_dict(costs.to_dict()) == costs


def test_some_layers_stand_for_all_of_a_sweep():
    plans, weight = probe._single_layer_plans(3, [Treatment.NONE], 8)
    assert [str(plan) for plan in plans] == ["SSS", "NSS", "SNS", "SSN"] and weight == 1
    few, weight = probe._single_layer_plans(100, [Treatment.NONE, Treatment.LINEAR_WINDOW], 8)
    assert len(few) == 1 + 2 * probe._SWEPT_LAYERS
    # The base runs 100 layers, and each plan those from its treated layer on: 100, 67, 34 and 1 layers.
    assert weight == pytest.approx((100 + 2 * 5050) / (100 + 2 * 202))


def test_a_probe_of_a_tiny_model_is_quick_and_leaves_it_as_it_was(inputs, one_thread):
    model, tokenizer = load_model(str(inputs.model)), load_tokenizer(str(inputs.model))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    spec = QualitySpec(text=str(inputs.folder / "judge.txt"), n_sequences=4, sequence_tokens=32)
    every = (Treatment.SOFTMAX, Treatment.NONE, Treatment.LINEAR_WINDOW)
    start = time.process_time()
    judged = evaluation_costs(model, tokenizer, spec, treatments=every, swept=every[1:], window=8)
    assert judged.prepare_s == 0 and judged.direct_s > 0 and set(judged.sweep_s) == {"text"}
    assert all(judged.text_s[treatment.value] > 0 for treatment in every)
    healing = HealingSpec(4096, sequence_tokens=32, batch_sequences=2, rank=4)
    healed = healing_costs(model, healing, middle=Treatment.LINEAR_WINDOW, window=8)
    assert healed.transfer_step_s > 0 and all(seconds > 0 for seconds in healed.step_s.values())
    decoded = decode_costs(model, concurrency=2, prompt_tokens=16, treatments=every, window=8)
    assert all(seconds > 0 for seconds in (*decoded.prefill_s.values(), *decoded.step_s.values()))
    assert time.process_time() - start < 20
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert n_trained(model, replace(healing, method="full")) == sum(p.numel() for p in model.parameters())
    # Each layer has 4 projections of attention and 3 of the MLP, with rank x (in + out) parameters each.
    assert n_trained(model, healing) == 3 * 4 * (32 + 24 + 24 + 32 + 3 * 48)


def test_what_is_the_same_for_any_number_is_not_scaled():
    assert probe._scaled_s(1.0, 1, 1.7, 8, 10) == pytest.approx(0.9 + 80 * 0.1)
    assert probe._scaled_s(2.0, 1, 1.7, 8, 10) == pytest.approx(1.7)
