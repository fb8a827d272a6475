from __future__ import annotations

import pytest
import torch

from layerboost.convert import convert
from layerboost.evaluation.likelihood import answer_requests, score_sequences, score_text
from layerboost.families import decoder_layers, supported_families
from layerboost.plan import Plan, Treatment
from layerboost.sweep.layer_sweep import LayerSweep
from layerboost.sweep.request_tries import Request
from tests.models import VARIANTS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")  # tiny models gain nothing from more threads

WINDOW = 5
PLANS = [Plan.parse(plan, WINDOW) for plan in ("SSSS", "NSSS", "SWSS", "SSLS", "SSSN", "WLNS", "LLLL", "WWWW", "NNNN")]
PLANS += [Plan.parse(plan, WINDOW, sinks=2) for plan in ("SWSS", "NWLS")]


def _requests(n: int = 24) -> list[Request]:
    """Draws answer choices of one or several tokens after shared contexts, longer and shorter than windows."""
    requests = []
    for _ in range(n // 3):
        context = torch.randint(3, 90, (int(torch.randint(1, 40, ())),)).tolist()
        for _ in range(3):
            answer = torch.randint(3, 90, (int(torch.randint(1, 6, ())),)).tolist()
            requests.append(Request((*context, *answer), len(answer)))
    return requests


@torch.no_grad()
def _alone(model, requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers each request in a separate forward pass."""
    log_ps, greedys = [], []
    for request in requests:
        tokens = torch.tensor([request.tokens], device=model.device)
        log_p = model(tokens[:, :-1]).logits[0, -request.n_scored :].double().log_softmax(-1)
        scored = tokens[0, -request.n_scored :]
        log_ps.append(log_p.gather(-1, scored[:, None]).sum())
        greedys.append(bool((log_p.argmax(-1) == scored).all()))
    return torch.stack(log_ps), torch.tensor(greedys)


def _variant(model, plan: Plan):
    return model if str(plan) == "SSSS" else convert(model, plan)


@pytest.mark.parametrize("name", [*supported_families(), *VARIANTS])
def test_answers_equal_those_of_each_request_alone_on_each_plans_model(name):
    model, requests = tiny_model(name), _requests()
    answers = answer_requests(LayerSweep(model, PLANS), requests, batch_rows=2)
    for index, plan in enumerate(PLANS):
        log_p, greedy = _alone(_variant(model, plan), requests)
        torch.testing.assert_close(answers.log_p[index], log_p, atol=2e-4, rtol=1e-4, msg=lambda m, p=plan: f"{p}: {m}")
        assert torch.equal(answers.greedy[index], greedy)


@pytest.mark.parametrize("name", [*supported_families(), *VARIANTS])
def test_text_scores_equal_those_of_each_plans_model(name):
    model, sequences = tiny_model(name), torch.randint(3, 90, (5, 40))
    found = score_text(LayerSweep(model, PLANS), sequences, base=0, batch_size=2)
    for index, plan in enumerate(PLANS):
        expected = score_sequences(_variant(model, plan), sequences, base=model)
        assert found.nll[index].tolist() == pytest.approx(expected.nll, rel=1e-4)
        assert found.kl[index].tolist() == pytest.approx(expected.kl, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "implementation"), [("llama", "eager"), ("mistral", "eager"), ("mistral", "sdpa"), ("gemma2", "eager")]
)
def test_each_attention_implementation_is_followed(name, implementation):
    model, requests = tiny_model(name), _requests()
    model.set_attn_implementation(implementation)
    expected = torch.stack([_alone(_variant(model, plan), requests)[0] for plan in PLANS])
    found = answer_requests(LayerSweep(model, PLANS), requests)
    torch.testing.assert_close(found.log_p, expected, atol=2e-4, rtol=1e-4)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("n_states", [0.01, 2, 3, 4, 6, 100])
def test_any_memory_gives_the_same_and_bounds_what_is_in_flight(n_states, monkeypatch):
    model, sequences = tiny_model("llama"), torch.randint(3, 90, (3, 20))
    plans = [*PLANS, *(Plan.uniform(Treatment.SOFTMAX, 4).with_layer(i, t, 3) for t in Treatment for i in range(4))]
    expected = score_text(LayerSweep(model, plans), sequences, base=0, batch_size=3)
    state_bytes = 3 * 20 * 32 * 4
    budget_bytes = int(8 / 3 * n_states * state_bytes)
    sweep = LayerSweep(model, plans, budget_bytes=budget_bytes)
    most = 0
    advance = LayerSweep._advance

    def counted(self, layer, frontier, children, inputs):
        nonlocal most
        most = max(most, len(children) * inputs.embedded.nbytes)
        return advance(self, layer, frontier, children, inputs)

    monkeypatch.setattr(LayerSweep, "_advance", counted)
    found = score_text(sweep, sequences, base=0, batch_size=3)
    torch.testing.assert_close(found.nll, expected.nll)
    torch.testing.assert_close(found.kl, expected.kl, atol=1e-6, rtol=1e-4)
    assert most <= max(budget_bytes * 3 / 8, 2 * state_bytes / 3), "two paths of one row are the least"


def test_layers_are_computed_once_for_all_plans_that_share_them(monkeypatch):
    n_layers = 4
    model, sequences = tiny_model("llama"), torch.randint(3, 90, (1, 10))
    plans = [Plan.uniform(Treatment.SOFTMAX, n_layers)]
    plans += [plans[0].with_layer(layer, Treatment.NONE) for layer in range(n_layers)]
    rows = 0
    call = LayerSweep._call

    def counted(self, layer, step, states, inputs):
        nonlocal rows
        rows += len(states)
        return call(self, layer, step, states, inputs)

    monkeypatch.setattr(LayerSweep, "_call", counted)
    whole, half = 0, 0
    for budget in (1 << 30, 4 * 3 * 10 * 32 * 4):  # the first holds everything at once, the second three paths
        rows = 0
        LayerSweep(model, plans, budget_bytes=budget).run(sequences, lambda indices, states: None)
        whole, half = rows, whole
    assert whole == half == n_layers + sum(n_layers - layer for layer in range(n_layers))


def test_the_model_is_left_as_it_was():
    model = tiny_model("gemma3_text").train()
    layers, tokens = list(decoder_layers(model)), torch.randint(3, 90, (2, 30))
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sweep = LayerSweep(model, PLANS)
    answer_requests(sweep, _requests())
    score_text(sweep, tokens, base=0)
    assert model.training and list(decoder_layers(model)) == layers
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(parameters[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failure_in_a_layer_leaves_the_model_usable():
    model, tokens = tiny_model("llama"), torch.randint(3, 90, (1, 8))
    before = model(tokens).logits

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = decoder_layers(model)[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        answer_requests(LayerSweep(model, PLANS), _requests())
    handle.remove()
    assert torch.equal(model(tokens).logits, before)


def test_half_precision_is_read_in_single():
    model = tiny_model("llama").to(torch.bfloat16)
    requests = _requests()
    found = answer_requests(LayerSweep(model, PLANS[:2]), requests)
    expected, _ = _alone(model, requests)
    assert (found.log_p[0] - expected).abs().median() < 0.05
