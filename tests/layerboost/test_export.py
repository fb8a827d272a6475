"""Tests the export to a family's own format: only plans that it can express and that its code computes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerboost.convert import convert
from layerboost.export import ExportError, export_stock
from layerboost.plan import Plan
from tests.models import tiny_model


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
@pytest.mark.parametrize("letters", ["SWSW", "WWWW", "SSSS"])
def test_a_plan_of_windows_is_a_stock_checkpoint(family, letters, tmp_path):
    changes = {"use_sliding_window": False, "sliding_window": None} if family == "qwen2" else {}
    parent = tiny_model(family, **changes)
    model = convert(parent, Plan.parse(letters, window=7))
    export_stock(model).save_pretrained(tmp_path)
    assert "layerboost" not in json.loads((tmp_path / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(parent)
    tokens = torch.randint(3, 97, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
        if "W" in letters:
            assert (loaded(tokens).logits - parent(tokens).logits).abs().max() > 1e-2
        generated = loaded.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(generated, model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("letters, treatment", [("SNSW", "none"), ("SLSW", "linear_window"), ("NLSS", "none")])
def test_other_treatments_are_refused(letters, treatment):
    with pytest.raises(ExportError, match=f"{treatment}.* no stock format"):
        export_stock(convert(tiny_model("qwen3"), Plan.parse(letters, window=7)))


def test_a_family_whose_code_does_not_read_windows_is_refused():
    with pytest.raises(ExportError, match="not what LlamaForCausalLM computes"):
        export_stock(convert(tiny_model("llama"), Plan.parse("SWSW", window=7)))


def test_two_windows_do_not_fit_one_configuration():
    with pytest.raises(ExportError, match="one for all layers"):
        export_stock(convert(tiny_model("gemma3_text"), Plan.parse("SSSW", window=7)))


def test_an_untouched_model_needs_no_export():
    with pytest.raises(ExportError, match="already"):
        export_stock(tiny_model("llama"))
