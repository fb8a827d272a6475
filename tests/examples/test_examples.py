"""The scripts of examples/ run as they stand, and what they print is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from layerboost import Plan, Treatment, convert, plan_of
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.evaluation.evaluate import evaluate
from layerboost.evaluation.scores import QualitySpec
from layerboost.sensitivity.drops import mean_drop, single_layer_plan
from layerboost.smallworld import MODEL, TASKS, TRAIN_TEXT, VALIDATION_TEXT

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
N_LAYERS = 12


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_run_here_and_needs_no_ray():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"convert", "sweep", "heal"}
    for name in names:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert not re.search(r"^(from|import) (ray|tasks|orchestrator)\b", text, re.MULTILINE)
        assert len(text.splitlines()) <= 45


def test_the_embedded_world_is_where_it_is_said_to_be():
    assert all(Path(path).exists() for path in (MODEL, TRAIN_TEXT, VALIDATION_TEXT, *TASKS)) and len(TASKS) == 4


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    letters, folder = "NSSLLNSSLNNS", tmp_path / "converted"
    example("convert").main(letters, str(folder))
    printed = capsys.readouterr().out

    # Only softmax layers keep keys and values of every token.
    found = [float(text.replace(",", "")) for text in re.findall(r"([\d,]+) KV bytes per token", printed)]
    assert len(found) == 2 and found[1] / found[0] == pytest.approx(letters.count("S") / N_LAYERS)

    loaded, expected = load_model(str(folder)), convert(load_model(MODEL), Plan.parse(letters, window=16))
    assert plan_of(loaded) == plan_of(expected)
    tokens = load_tokenizer(MODEL)("The lamp of Luke Holt is in the", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tokens).logits, expected(tokens).logits)


def test_sweep(capsys: pytest.CaptureFixture[str]):
    module = example("sweep")
    module.main("4")
    printed = capsys.readouterr().out
    shown = [float(drop) for drop in re.findall(r"^layer +\d+: ([-+][\d.]+)", printed, re.MULTILINE)]
    letters = printed.splitlines()[-1]
    assert len(shown) == len(letters) == N_LAYERS and set(letters) == set("SLN")
    assert letters[shown.index(max(shown))] == "S" and letters[shown.index(min(shown))] == "N"

    # One pass over all layers says what judging one converted model after the other would.
    model, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    spec = QualitySpec(text=VALIDATION_TEXT, n_sequences=4, sequence_tokens=256)
    base = evaluate(model, tokenizer, spec)
    for layer in (0, 7):
        treated = convert(model, single_layer_plan(N_LAYERS, layer, Treatment.NONE))
        assert mean_drop(base, evaluate(treated, tokenizer, spec), "nll").drop == pytest.approx(shown[layer], abs=1e-4)


def test_heal(capsys: pytest.CaptureFixture[str]):
    example("heal").main("SNLNLNLSNLNN", "16384")
    printed = capsys.readouterr().out
    shares = {when: float(share) for when, share in re.findall(r"^(before|after) healing: ([\d.]+) ±", printed, re.M)}
    assert 50 < shares["before"] < shares["after"] < 100
