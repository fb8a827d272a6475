"""Tests conversion of each family: softmax is untouched, decoding equals the full forward, checkpoints reload."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import layerboost
from layerboost import Plan, PlanCache, Treatment, convert, plan_of, restore
from layerboost.attention import LinearWindow
from layerboost.cache import cache_bytes, cache_tensors
from layerboost.checkpoint import CheckpointError, load_model, save_checkpoint
from layerboost.convert import ConversionError
from layerboost.families import UnsupportedFamilyError, attention_module, family_of
from layerboost.speed.byte_model import ByteModel
from layerboost.treatments import AffineMap
from tests.models import VARIANTS, tiny_model

FAMILIES = [*layerboost.supported_families(), *VARIANTS]
WINDOW, N_TOKENS = 5, 41
PLANS = ["SSSS", "WWWW", "LLLL", "NNNN", "NLWS", "LNSW", "WSNL", "SWLN", "WWWW+2", "LLLL+2", "NLWS+3", "AAAA", "LAWS+2"]
"""Plans of four layers; some keep the number of sinks after the plus."""
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=FAMILIES)
def parent(request):
    return tiny_model(request.param)


def random_tokens(model, batch=3, n_tokens=N_TOKENS):
    return torch.randint(3, model.config.vocab_size, (batch, n_tokens))


def converted(parent, plan, window=WINDOW):
    letters, _, sinks = plan.partition("+")
    model = convert(parent, Plan.parse(letters, window, int(sinks or 0)))
    with torch.no_grad():  # makes the feature maps affect the output
        for module in model.modules():
            if isinstance(module, LinearWindow | AffineMap):
                for parameter in module.parameters():
                    parameter.normal_(std=0.5 if isinstance(module, LinearWindow) else 0.1)
    return model


@torch.no_grad()
def decode(model, tokens, mask=None, piece_tokens=1, prefill_tokens=1):
    """Returns the logits of every position (batch, tokens, vocabulary) with the text fed in pieces through a cache."""
    positions = None if mask is None else (mask.cumsum(dim=1) - 1).clamp(min=0)
    bounds = [0, *range(prefill_tokens, tokens.shape[1], piece_tokens), tokens.shape[1]]
    cache, logits = None, []
    for start, stop in itertools.pairwise(bounds):
        output = model(
            tokens[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
def test_all_softmax_is_bit_equal(parent):
    tokens = random_tokens(parent)
    model = convert(parent, Plan.uniform(Treatment.SOFTMAX, 4))
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    assert torch.equal(model(tokens).logits, parent(tokens).logits)
    assert torch.equal(model(tokens, attention_mask=mask).logits, parent(tokens, attention_mask=mask).logits)
    assert torch.equal(decode(model, tokens)[0], decode(parent, tokens)[0])


@pytest.mark.parametrize("letters", PLANS)
def test_cached_decode_equals_the_full_forward(parent, letters):
    model = converted(parent, letters)
    tokens = random_tokens(model)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    for pieces in (
        {},
        {"piece_tokens": 3, "prefill_tokens": 2},
        {"piece_tokens": 1, "prefill_tokens": 20},
        {"piece_tokens": 11, "prefill_tokens": 1},
    ):
        logits, cache = decode(model, tokens, **pieces)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        assert cache.get_seq_length() == N_TOKENS


@pytest.mark.parametrize("letters", PLANS)
def test_left_padded_rows_of_unequal_length_equal_each_row_alone(parent, letters):
    model = converted(parent, letters)
    tokens, lengths = random_tokens(model), [N_TOKENS, 9, 23]
    mask = torch.stack([(torch.arange(N_TOKENS) >= N_TOKENS - n).long() for n in lengths])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = [model(tokens[i : i + 1, -n:], use_cache=False).logits[0] for i, n in enumerate(lengths)]
    cached = [decode(model, tokens, mask, *pieces)[0] for pieces in ((1, 1), (1, 30), (4, 3), (9, 2), (3, 19))]
    for row, n in enumerate(lengths):
        for logits in (full, *cached):
            assert logits[row].isfinite().all()
            torch.testing.assert_close(logits[row, -n:], alone[row], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("plan", ["WWWW+2", "LLLL+1", "WLWL+4"])
def test_sinks_are_found_in_rows_with_holes_whatever_the_pieces(plan):
    model = converted(tiny_model("llama"), plan)
    tokens = random_tokens(model, batch=6)
    mask = (torch.rand(tokens.shape) < 0.5).long()
    mask[:, -1] = 1
    mask[0, :3] = torch.tensor([1, 0, 1])
    mask[1, :20] = 0
    mask[2] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = [
            model(row[kept.bool()][None], use_cache=False).logits[0] for row, kept in zip(tokens, mask, strict=True)
        ]
    for pieces in ((1, 1), (1, 30), (4, 3), (9, 2), (3, 19)):
        logits, _ = decode(model, tokens, mask, *pieces)
        real = mask.bool()
        torch.testing.assert_close(logits[real], expected[real], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(expected[2], alone[2], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("letters", PLANS)
def test_live_cache_bytes_equal_the_formula(parent, letters):
    model, bytes_of = converted(parent, letters), ByteModel(parent.config)
    for n_tokens in (WINDOW + 1, N_TOKENS):
        _, cache = decode(model, random_tokens(model, n_tokens=n_tokens), prefill_tokens=n_tokens // 2)
        expected = bytes_of.cache_bytes(plan_of(model), concurrency=3, context_tokens=n_tokens, dtype_bytes=4)
        assert cache_bytes(cache) == expected
    if letters == "NNNN":
        assert not cache_tensors(cache)


def test_what_a_plan_removes_is_gone_and_the_rest_is_shared(parent):
    model = converted(parent, "NLWS")
    own, theirs = dict(model.named_parameters()), dict(parent.named_parameters())
    norms = [
        norm
        for norm in family_of(parent.config).attention_norms(parent.config)
        if list(getattr(parent.base_model.layers[0], norm).parameters())  # OLMo's norms have no parameters
    ]
    removed = set(theirs) - set(own)
    attention = family_of(parent.config).attention
    assert any(f"layers.0.{attention}." in name for name in removed)
    assert all(
        f"layers.0.{attention}." in name or any(f"layers.0.{norm}." in name for norm in norms) for name in removed
    )
    for norm in norms:
        assert any(f"layers.0.{norm}." in name for name in removed)
    assert all(own[name] is theirs[name] for name in set(own) & set(theirs))
    assert {name.rsplit(".", 1)[0] for name in set(own) - set(theirs)} == {
        name for name, module in model.named_modules() if isinstance(module, LinearWindow)
    }


def _silent(module, args, output):
    return output * 0 if isinstance(output, torch.Tensor) else (output[0] * 0, *output[1:])


@torch.no_grad()
def test_removal_equals_a_parent_whose_attention_writes_nothing(parent):
    tokens = random_tokens(parent)
    model = converted(parent, "SNSN")
    hooks = []
    for layer in (1, 3):
        block = parent.base_model.layers[layer]
        # The last module before the residual is silenced: the norm after attention if there is one, else attention.
        norms = [n for n in family_of(parent.config).attention_norms(parent.config) if n == "post_attention_layernorm"]
        writer = getattr(block, norms[-1]) if norms else attention_module(parent, layer)
        hooks.append(writer.register_forward_hook(_silent))
    expected = parent(tokens).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_restoring_gives_the_parent_back(parent):
    tokens = random_tokens(parent)
    expected = parent(tokens).logits
    model = converted(parent, "NLWS")
    with pytest.raises(ConversionError, match="parent_model"):
        restore(model)
    for back in (restore(model, parent), restore(converted(parent, "LWSL"))):
        assert type(back) is type(parent) and plan_of(back) is None
        assert torch.equal(back(tokens).logits, expected)
    assert torch.equal(parent(tokens).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["NLWS", "NLWS+2"])
def test_save_and_load_is_bit_equal(parent, plan, tmp_path):
    model = converted(parent, plan)
    tokens = random_tokens(model)
    save_checkpoint(model, None, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    loaded = load_model(str(tmp_path / "model"))
    assert type(loaded) is type(model) and plan_of(loaded) == plan_of(model)
    for parameter in loaded.parameters():  # mapped tensors may be unaligned, which changes the order of sums
        parameter.data = parameter.data.clone()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(decode(loaded, tokens)[0], decode(model, tokens)[0])
    record = json.loads((tmp_path / "model" / "config.json").read_text())["layerboost"]
    assert record["plan"] == "NLWS" and record["window"] == WINDOW and record.get("sinks", 0) == plan_of(model).sinks
    assert record["plan_id"] == plan_of(model).plan_id


def test_remote_code_loads_without_the_package(tmp_path):
    tokens = torch.randint(3, 97, (2, N_TOKENS))
    expected = {}
    for name in ("llama", "gemma2", "gpt_neox"):
        model = converted(tiny_model(name), "NLWS")
        save_checkpoint(model, None, tmp_path / name)
        with torch.no_grad():
            expected[name] = decode(model, tokens)[0]
    torch.save({"tokens": tokens, "expected": expected}, tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["layerboost"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
data = torch.load("expected.pt")
for name, expected in data["expected"].items():
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    cache, logits = None, []
    with torch.no_grad():
        for step in range(expected.shape[1]):
            output = model(data["tokens"][:, step : step + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert torch.equal(torch.cat(logits, dim=1), expected), name
    again = f"{name}-again"
    model.save_pretrained(again)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()(
        data["tokens"]).logits, model(data["tokens"]).logits), name
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def generate(model, tokens, mask, **kwargs):
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(1)
    return model.generate(tokens, attention_mask=mask, **{**settings, **kwargs})


@pytest.mark.parametrize("letters", ["WWWW", "LLLL", "NNNN", "NLWS", "NLWS+2"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_generate_gives_the_same_with_and_without_a_cache(name, letters):
    torch.manual_seed(7)  # avoids the rare draw in which a tie within rounding changes a sampled token
    model = converted(tiny_model(name), letters)
    tokens = random_tokens(model, n_tokens=12)
    mask = torch.ones_like(tokens)
    mask[0, :8] = 0
    for settings in (
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 10},
        {"num_return_sequences": 2, "do_sample": True},
    ):
        cached = generate(model, tokens, mask, **settings)
        assert torch.equal(cached, generate(model, tokens, mask, use_cache=False, **settings)), settings
    assert torch.equal(generate(model, tokens, mask), generate(model, tokens, mask, prefill_chunk_size=5))
    short = generate(model, tokens[:1, 8:], mask[:1, 8:])
    assert torch.equal(generate(model, tokens, mask)[0, 12:], short[0, 4:])


@pytest.mark.parametrize("plan", ["NLWS", "LLWW+2"])
@pytest.mark.parametrize("lengths", [[30, 3, 67], [1, 90, 2, 200, 4]])
def test_packed_documents_do_not_see_each_other(plan, lengths):
    model = converted(tiny_model("llama"), plan)
    tokens = random_tokens(model, batch=1, n_tokens=sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, position_ids=positions, use_cache=False).logits[0]
        alone = [model(part, use_cache=False).logits[0] for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("plan", ["NLWS", "NLWS+2"])
def test_gradients_reach_every_parameter_also_with_checkpointing(parent, plan):
    tokens = random_tokens(parent)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = converted(parent, plan)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        loss = model(tokens, labels=tokens).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
        model.eval()
    names = [name for name, _ in model.named_parameters()]
    for name, plain, checkpointed in zip(names, *gradients, strict=True):
        if plain is None:
            assert "experts" in name or "gate" in name, name  # no token chose this expert
            continue
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", ["NLWS", "NLWS+2"])
def test_the_cache_keeps_beams_apart_and_refuses_to_go_back(plan):
    model = converted(tiny_model("llama"), plan)
    tokens = random_tokens(model)
    mask = torch.ones(3, N_TOKENS, dtype=torch.long)
    mask[1, :13] = 0
    _, cache = decode(model, tokens, mask)
    rows = torch.tensor([2, 0, 1])
    cache.reorder_cache(rows)
    mask = torch.nn.functional.pad(mask[rows], (0, 1), value=1)
    positions = mask.cumsum(dim=1) - 1
    with torch.no_grad():
        following = torch.randint(3, 97, (3, 1))
        actual = model(following, attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache).logits
        expected = model(
            torch.cat([tokens[rows], following], dim=1), attention_mask=mask, position_ids=positions.clamp(min=0)
        ).logits[:, -1:]
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(NotImplementedError, match="softmax and none"):
        cache.crop(-1)


def test_a_model_does_not_keep_the_cache_alive():
    model = converted(tiny_model("llama"), "NLWS")
    with torch.no_grad():
        cache = weakref.ref(model(random_tokens(model), use_cache=True).past_key_values)
    gc.collect()
    assert cache() is None


def test_wrong_calls_are_refused_with_a_remedy():
    parent = tiny_model("llama")
    model = converted(parent, "NLWS")
    tokens = random_tokens(model)
    with pytest.raises(TypeError, match="PlanCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="2-dimensional"):
        model(tokens, attention_mask=torch.ones(3, 1, N_TOKENS, N_TOKENS))
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ConversionError, match="converted already"):
        convert(model, Plan.parse("SSSS"))
    with pytest.raises(ValueError, match="2 letters; the model has 4"):
        convert(parent, Plan.parse("SS"))
    assert isinstance(model(tokens).past_key_values, PlanCache)


def test_a_family_that_cannot_be_converted_is_named_with_those_that_can():
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=11)
    with pytest.raises(UnsupportedFamilyError, match=r"'gpt2' cannot be converted.*llama"):
        convert(AutoModelForCausalLM.from_config(config), Plan.parse("N"))


def test_pickled_weights_are_refused(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(str(tmp_path))
