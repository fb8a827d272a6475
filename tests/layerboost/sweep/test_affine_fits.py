"""Tests fits of affine layers against regressions on what a whole pass of the model shows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from layerboost.affine import Moments, fit_map
from layerboost.convert import convert
from layerboost.families import attention_module, decoder_layers, family_of, supported_families
from layerboost.plan import Plan, Treatment
from layerboost.sweep.affine_fits import fit_maps, fit_maps_of_plan
from tests.models import VARIANTS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = [*supported_families(), *VARIANTS]
N_SEQUENCES, N_TOKENS = 9, 60


def random_tokens(model, n: int = N_SEQUENCES) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (n, N_TOKENS))


def last_of_attention(model, layer: int):
    """Returns the module whose output attention adds to the residual stream: attention, or the norm behind it."""
    behind = family_of(model.config).norms_behind(model.config)
    return getattr(decoder_layers(model)[layer], behind[0]) if behind else attention_module(model, layer)


@torch.no_grad()
def observed(model, layer: int, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns input and output of a layer's attention in a whole pass, (n, T, d) each."""
    found = {}
    handles = [
        attention_module(model, layer).register_forward_pre_hook(
            lambda module, args, kwargs: found.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        last_of_attention(model, layer).register_forward_hook(
            lambda module, args, output: found.update(y=output[0] if isinstance(output, tuple) else output)
        ),
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found["x"], found["y"]


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_the_regressions_of_what_a_whole_pass_shows(name):
    model = tiny_model(name)
    tokens = random_tokens(model)
    maps = fit_maps(model, tokens, batch_size=2)
    judges = torch.arange(N_SEQUENCES) % 4 == 3
    for layer in range(4):
        x, y = observed(model, layer, tokens)
        parts = [Moments(x.shape[-1]) for _ in range(2)]
        for part, rows in zip(parts, (~judges, judges), strict=True):
            part.add(x[rows], y[rows])
        expected = fit_map(*parts)
        assert maps[layer].error == pytest.approx(expected.error, rel=1e-2)
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        by_maps, by_expected = (linear(x, fitted.weight, fitted.bias) for fitted in (maps[layer], expected))
        torch.testing.assert_close(by_maps, by_expected, atol=1e-2, rtol=1e-2)
    assert set(maps) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank", ["full", 5])
@torch.no_grad()
def test_an_affine_layer_adds_what_its_map_makes_of_the_input(name, rank):
    model = tiny_model(name)
    tokens = random_tokens(model)
    maps = fit_maps(model, tokens, rank=rank)
    treated = convert(model, Plan.parse("SASA"), maps=maps)
    inputs = {}
    handles = []
    for layer in (1, 3):
        fitted = maps[layer]
        weight = fitted.weight if fitted.weight is not None else fitted.up @ fitted.down

        def keep(module, args, kwargs, layer=layer):
            inputs[layer] = args[0] if args else kwargs["hidden_states"]

        def write(module, args, output, layer=layer, weight=weight, bias=fitted.bias):
            mapped = linear(inputs[layer], weight, bias)
            return (mapped, *output[1:]) if isinstance(output, tuple) else mapped

        handles += [
            attention_module(model, layer).register_forward_pre_hook(keep, with_kwargs=True),
            last_of_attention(model, layer).register_forward_hook(write),
        ]
    expected = model(tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(treated(tokens, use_cache=False).logits, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "cohere", "granite"])
def test_maps_fitted_one_after_another_see_the_treated_model_and_aim_at_the_untouched_one(name):
    model = tiny_model(name)
    tokens = random_tokens(model, 16)
    plan = Plan.parse("ANAW", 8)
    maps = fit_maps_of_plan(model, plan, tokens, batch_size=3)
    assert set(maps) == {0, 2}
    torch.testing.assert_close(maps[0].bias, fit_maps(model, tokens)[0].bias, atol=1e-3, rtol=1e-2)

    student = convert(model, plan, maps={0: maps[0]})
    with torch.no_grad():
        base, treated = (
            [*m(tokens, output_hidden_states=True, use_cache=False).hidden_states] for m in (model, student)
        )
    x, _ = observed(student, 2, tokens)
    _, added = observed(model, 2, tokens)
    multiplier = getattr(decoder_layers(model)[2], "residual_multiplier", 1.0)
    y = added + (base[2] - treated[2]) / multiplier
    judges = torch.arange(16) % 4 == 3
    parts = [Moments(x.shape[-1]) for _ in range(2)]
    for part, rows in zip(parts, (~judges, judges), strict=True):
        part.add(x[rows], y[rows])
    expected = fit_map(*parts)
    flat = x.flatten(0, 1)
    by_maps, by_expected = (linear(flat, fitted.weight, fitted.bias) for fitted in (maps[2], expected))
    torch.testing.assert_close(by_maps, by_expected, atol=2e-2, rtol=2e-2)


def test_a_plan_without_affine_layers_needs_no_maps_and_one_sequence_is_too_few():
    model = tiny_model("llama")
    assert fit_maps_of_plan(model, Plan.parse("SSNN"), random_tokens(model)) == {}
    with pytest.raises(ValueError, match="at least two"):
        fit_maps(model, random_tokens(model, 1))
    assert len(fit_maps(model, random_tokens(model, 2))) == 4


def test_a_layer_without_a_map_adds_nothing():
    model = tiny_model("llama")
    tokens = random_tokens(model)
    with torch.no_grad():
        affine, none = (convert(model, Plan.parse(plan))(tokens).logits for plan in ("SASA", "SNSN"))
    torch.testing.assert_close(affine, none)
    assert str(Plan.uniform(Treatment.AFFINE, 2)) == "AA"
