"""Tests the timings that an estimate is made from: their arithmetic, and a probe of a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.costs import probe
from layerboost.costs.costs import Costs, EvaluationCosts, mixed
from layerboost.costs.probe import (
    decode_costs,
    document_count,
    evaluation_costs,
    extrapolated_s,
    healing_costs,
    n_trained,
    sample_token_s,
    scaled_s,
)
from layerboost.costs.twins import LayerCosts, Twins
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.scores import QualitySpec
from layerboost.healing.spec import HealingSpec
from layerboost.plan import Plan, Treatment
from layerboost.speed.decoding import timed_generation
from layerboost.text.sampling import SamplingSpec
from tests.models import tiny_model


class Clock:
    """Replaces the clock by one that advances only when simulated work is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(probe.time, "perf_counter", lambda: self.now)


def test_nothing_takes_no_time():
    assert extrapolated_s(lambda n: pytest.fail("there is nothing to run"), 0) == 0.0


@pytest.mark.parametrize(
    ("token_s", "expected"),
    [
        (1.0, ((64, 1), (256, 1))),
        (2e-4, ((256, 1), (512, 2))),
        (2e-5, ((512, 4), (512, 6))),
        (1e-9, ((512, 6), (512, 6))),
    ],
)
def test_a_step_of_healing_is_timed_on_as_much_as_takes_long_enough(inputs, monkeypatch, token_s, expected):
    monkeypatch.setattr(probe, "_forward_s", lambda model, tokens, sequences: token_s * tokens * sequences)
    twins = Twins(load_model(str(inputs.model)), 8)
    assert probe._step_sizes(twins, HealingSpec(100_000, sequence_tokens=512, batch_sequences=6), 6) == expected


@pytest.mark.parametrize("deeper", [2, 7, 20])
def test_what_a_step_costs_apart_from_its_tokens_is_not_scaled(inputs, monkeypatch, deeper):
    monkeypatch.setattr("layerboost.costs.twins.DEEPER", deeper)
    monkeypatch.setattr(probe, "_forward_s", lambda model, n_tokens, n_sequences: 1.0)  # the least size is enough
    slope = {Treatment.SOFTMAX: 3e-3, Treatment.NONE: 1e-3, Treatment.WINDOW: 4e-3}

    def step_seconds(model, plan, text, spec):
        n_tokens = spec.batch_sequences * spec.sequence_tokens
        layers_s = sum(0.05 + slope[treatment] * n_tokens for treatment in plan.treatments)
        return {"heal": 0.2 + 7e-3 * n_tokens + layers_s}

    monkeypatch.setattr(probe, "_step_seconds", step_seconds)
    model = tiny_model("llama", num_hidden_layers=12)
    spec = HealingSpec(100_000, sequence_tokens=512, batch_sequences=4)
    found = healing_costs(Twins(model, 8), spec, treatments=tuple(slope))
    for treatment, each_s in slope.items():
        assert found.step_s[treatment.value] == pytest.approx(0.2 + 7e-3 * 2048 + 12 * (0.05 + each_s * 2048))
    assert found.teacher_step_s == pytest.approx(2048 / 256)
    two = healing_costs(Twins(model, 8), spec, treatments=tuple(slope), n_workers=2)
    assert two.step_s["none"] == pytest.approx(0.2 + 7e-3 * 1024 + 12 * (0.05 + 1e-3 * 1024))


def test_a_constant_part_is_neither_negative_nor_more_than_all():
    small, large = LayerCosts(1.0, {Treatment.SOFTMAX: 1.0}), LayerCosts(0.5, {Treatment.SOFTMAX: 4.5})
    found = probe._constant_part(small, 1, large, 4)
    assert (found.fixed_s, found.layer_s[Treatment.SOFTMAX]) == (0.5, 0.0), "a slow moment hit the smaller size"
    assert probe._scaled_beyond(found, large, 10).uniform_s(2)["softmax"] == pytest.approx(0.5 + 2 * 45)


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
    assert mixed(costs, Plan.parse("SNNL", 8), middle="window") == pytest.approx((4 + 1 + 1 + 7) / 4)
    assert mixed(costs, None, middle="linear_window") == pytest.approx(0.4 * 4 + 0.4 * 1 + 0.2 * 7)
    in_order = dict(sorted(costs.items()))
    assert mixed(in_order, None, middle="window") == pytest.approx(0.4 * 4 + 0.4 * 1 + 0.2 * 100), "by name, not order"


def test_costs_survive_json():
    evaluation = EvaluationCosts(1, 2, {"softmax": 3}, {"softmax": 4}, 5, {"text": 6}, {"softmax": 7})
    costs = Costs(1, 2, 3, 4, evaluation, None, (), None)
    assert Costs.from_dict(costs.to_dict()) == costs


def test_a_sweep_shares_the_layers_below_the_treated_one():
    costs = LayerCosts(10.0, {Treatment.SOFTMAX: 2.0, Treatment.NONE: 0.5, Treatment.LINEAR_WINDOW: 3.0})
    # The model itself has the head (10) and 3 softmax layers (2 each). Each plan has the head and its own layer, and
    # those that treat layers 0, 1 and 2 have 2, 1 and 0 softmax layers above it.
    base_s, none_s, linear_s = 10 + 6, 3 * (10 + 0.5) + 3 * 2, 3 * (10 + 3) + 3 * 2
    assert probe._swept_s(costs, [Treatment.NONE], 3, 10) == pytest.approx(base_s + none_s)
    both = [Treatment.NONE, Treatment.LINEAR_WINDOW]
    assert probe._swept_s(costs, both, 3, 10) == pytest.approx(base_s + none_s + linear_s)


def test_the_warm_up_is_timed_too_and_the_shorter_time_counts(monkeypatch):
    clock, took = Clock(monkeypatch), [1.0, 5.0, 0.0]

    def run(n: int) -> None:
        clock.now += took.pop(0)

    assert extrapolated_s(run, 4, first=4) == 1.0 and len(took) == 1


@pytest.mark.parametrize("deeper", [2, 10])
def test_a_probe_of_a_tiny_model_is_quick_and_leaves_it_as_it_was(inputs, one_thread, monkeypatch, deeper):
    monkeypatch.setattr("layerboost.costs.twins.DEEPER", deeper)
    model, tokenizer = load_model(str(inputs.model)), load_tokenizer(str(inputs.model))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    spec = QualitySpec(text=str(inputs.folder / "judge.txt"), n_sequences=4, sequence_tokens=32)
    every = (Treatment.SOFTMAX, Treatment.NONE, Treatment.LINEAR_WINDOW)
    start = time.process_time()
    twins = Twins(model, 8)
    assert twins.n_few == min(3, deeper)
    judged = evaluation_costs(twins, tokenizer, spec, treatments=every, swept=every[1:])
    assert judged.prepare_s == 0 and judged.direct_s > 0 and set(judged.sweep_s) == {"text"}
    assert all(judged.text_s[treatment.value] > 0 for treatment in every)
    healing = HealingSpec(4096, sequence_tokens=32, batch_sequences=2, rank=4)
    healed = healing_costs(twins, healing, treatments=every)
    beside = healing_costs(twins, healing, treatments=every, teacher=load_model(str(inputs.model)))
    assert all(seconds > 0 for seconds in beside.step_s.values())
    assert healed.transfer_step_s > 0 and all(seconds > 0 for seconds in healed.step_s.values())
    decoded = decode_costs(twins, concurrency=2, prompt_tokens=16, treatments=every)
    assert all(seconds > 0 for seconds in (*decoded.prefill_s.values(), *decoded.step_s.values()))
    assert sample_token_s(twins, tokenizer, SamplingSpec(16)) > 0
    assert time.process_time() - start < 20
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert n_trained(model, replace(healing, method="full")) == sum(p.numel() for p in model.parameters())
    # Each layer has 4 projections of attention and 3 of the MLP, with rank x (in + out) parameters each.
    assert n_trained(model, healing) == 3 * 4 * (32 + 24 + 24 + 32 + 3 * 48)


def test_what_is_the_same_for_any_number_is_not_scaled():
    assert scaled_s(1.0, 1, 1.7, 8, 80) == pytest.approx(0.9 + 80 * 0.1)
    assert scaled_s(2.0, 1, 1.7, 8, 80) == pytest.approx(1.7)


class WorkClock(Clock):
    """Advances by a fixed time for each token that a decoder layer runs and for each position that the head reads."""

    LAYER_S, HEAD_S = 1e-3, 7e-3

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vocabulary: int):
        super().__init__(monkeypatch)
        run_layer, run_linear = LlamaDecoderLayer.forward, nn.Linear.forward

        def layer(module, hidden_states, *arguments, **named):
            self.now += self.LAYER_S * hidden_states.shape[:-1].numel()
            return run_layer(module, hidden_states, *arguments, **named)

        def linear(module, values):
            self.now += self.HEAD_S * values.shape[:-1].numel() * (module.out_features == vocabulary)
            return run_linear(module, values)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
        monkeypatch.setattr(nn.Linear, "forward", linear)

    def spent(self, run: Callable[[], object]) -> float:
        before = self.now
        run()
        return self.now - before


@pytest.mark.parametrize("deeper", [3, 7, 20])
def test_a_deep_model_costs_what_is_concluded_from_its_twins(inputs, monkeypatch, one_thread, deeper):
    tokenizer = load_tokenizer(str(inputs.model))
    model, n_layers = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=12), 12
    clock = WorkClock(monkeypatch, len(tokenizer))
    monkeypatch.setattr("layerboost.costs.twins.DEEPER", deeper)
    spec = QualitySpec(text=str(inputs.folder / "judge.txt"), n_sequences=4, sequence_tokens=32)
    every, swept = (Treatment.SOFTMAX, Treatment.NONE, Treatment.WINDOW), (Treatment.NONE, Treatment.WINDOW)
    found = evaluation_costs(Twins(model, 8), tokenizer, spec, treatments=every, swept=swept)
    judge = PlanEvaluation(model, tokenizer, spec)
    for treatment in every:
        actual_s = clock.spent(partial(judge.read_text, [Plan.uniform(treatment, n_layers, 8)]))
        assert found.text_s[treatment.value] == pytest.approx(actual_s, rel=0.02), treatment
    single = [
        Plan(
            tuple(treatment if layer == at else Treatment.SOFTMAX for layer in range(n_layers)),
            8 if treatment.needs_window else None,
        )
        for treatment in swept
        for at in range(n_layers)
    ]
    assert found.sweep_s["text"] == pytest.approx(clock.spent(lambda: judge.read_text(single)), rel=0.05)

    decoded = decode_costs(Twins(model, 8), concurrency=3, prompt_tokens=100, treatments=every)
    prompts = torch.randint(len(tokenizer), (3, 100))
    clock_s = clock.spent(lambda: timed_generation(model, prompts, 1))
    assert decoded.prefill_s["softmax"] == pytest.approx(clock_s, rel=0.02)
    assert decoded.step_s["softmax"] == pytest.approx(3 * (12 * clock.LAYER_S + clock.HEAD_S), rel=0.02)


def test_tasks_are_counted_and_timed(inputs, one_thread):
    model, tokenizer = load_model(str(inputs.model)), load_tokenizer(str(inputs.model))
    spec = QualitySpec((str(inputs.folder / "task.yaml"),))
    every = (Treatment.SOFTMAX, Treatment.NONE)
    found = evaluation_costs(Twins(model, 8), tokenizer, spec, treatments=every, swept=[Treatment.NONE])
    assert document_count(spec) == 8
    assert set(found.sweep_s) == {"tasks"} and found.sweep_s["tasks"] > found.tasks_s["softmax"] > 0
    assert found.score_s > 0 and found.prepare_s > 0 and found.direct_s > 0
    assert found.text_s == {"softmax": 0.0, "none": 0.0}
