"""Tests that evaluation workers give what the plain functions give, in this process and through Ray."""

import fsspec
import pytest
import torch

from layerboost.checkpoint import ModelSource, load_model, load_tokenizer, save_checkpoint
from layerboost.convert import convert
from layerboost.evaluation.evaluate import evaluate, text_sequences
from layerboost.evaluation.likelihood import score_sequences
from layerboost.evaluation.scores import QualitySpec, Scores
from layerboost.healing.adapters import load_trained
from layerboost.healing.branches import branch_check
from layerboost.healing.distillation import make_trainee
from layerboost.healing.spec import HealingSpec
from layerboost.healing.training import finish_student
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.cosine import cosine_scores
from layerboost.sensitivity.drops import mean_drop, single_layer_plan
from layerboost.storage.publish import publish_tensors
from tasks.cluster.resources import WorkerResources
from tasks.evaluation import EvaluationUnit, EvaluationWorker, PlanEvaluator, base_unit, cosine_unit, evaluate_units


@pytest.fixture(scope="module")
def spec(tiny_checkpoint) -> QualitySpec:
    return QualitySpec(text=str(tiny_checkpoint / "text.txt"), n_sequences=6, sequence_tokens=24, batch_size=4)


@pytest.fixture(scope="module")
def source(tiny_checkpoint) -> ModelSource:
    return ModelSource(str(tiny_checkpoint / "model"), device="cpu")


@pytest.fixture(scope="module")
def worker(source, spec) -> EvaluationWorker:
    return EvaluationWorker(source, spec)


def _items(result: dict, metric: str) -> list[float]:
    return Scores.from_dict(result["scores"]).get("text", metric).items


def test_an_ablation_equals_evaluating_the_converted_model(worker, source, spec):
    model, tokenizer = load_model(source.path), load_tokenizer(source.path)
    base = worker.run(base_unit())
    assert _items(base, "nll") == pytest.approx(evaluate(model, tokenizer, spec).get("text", "nll").items, rel=1e-6)
    for layer, treatment, window in ((0, Treatment.NONE, None), (3, Treatment.WINDOW, 5)):
        variant = convert(model, Plan.parse("SSSS").with_layer(layer, treatment, window))
        expected = evaluate(variant, tokenizer, spec, base=model)
        result = worker.run(EvaluationUnit(plan=Plan.parse("SSSS").with_layer(layer, treatment, window)))
        for metric in ("nll", "kl"):
            assert _items(result, metric) == pytest.approx(expected.get("text", metric).items, rel=1e-5, abs=1e-7)
        drop = mean_drop(Scores.from_dict(base["scores"]), Scores.from_dict(result["scores"]), "kl").drop
        assert drop > 0 and result["evaluation_s"] > 0
    again = worker.run(base_unit())
    assert again["scores"] == base["scores"], "an ablation left its mark on the shared model"


def test_cosine_distances_come_for_every_layer_and_sequence(worker, source, spec):
    expected = cosine_scores(load_model(source.path), text_sequences(load_tokenizer(source.path), spec))
    result = worker.run(cosine_unit())
    torch.testing.assert_close(torch.tensor(result["cosine"], dtype=torch.float64), expected, atol=1e-6, rtol=1e-5)
    assert expected.shape == (4, 6)


def test_a_healed_checkpoint_is_judged_against_the_parent(worker, source, tmp_path):
    model = convert(load_model(source.path), Plan.parse("SNSW", 6))
    save_checkpoint(model, load_tokenizer(source.path), tmp_path / "healed")
    healed = worker.run(EvaluationUnit(checkpoint=str(tmp_path / "healed")))
    assert healed["scores"] == worker.run(EvaluationUnit(plan=Plan.parse("SNSW", 6)))["scores"]
    with pytest.raises(ValueError, match="its own plan"):
        EvaluationUnit(plan=Plan.parse("SNSW", 6), checkpoint="x")


def test_a_healed_checkpoint_may_lie_behind_a_url(worker, source, tmp_path):
    save_checkpoint(convert(worker.base, Plan.parse("NSSL", window=4)), worker.tokenizer, tmp_path / "healed")
    store = fsspec.filesystem("memory")
    store.put(f"{tmp_path}/healed/", "/run/healed/", recursive=True)
    by_path, by_url = (
        worker.run(EvaluationUnit(checkpoint=where)) for where in (str(tmp_path / "healed"), "memory://run/healed")
    )
    assert _items(by_url, "nll") == _items(by_path, "nll")


def test_parameters_trained_so_far_are_judged_in_the_converted_parent(worker, source, spec, tmp_path):
    plan, healing = Plan.parse("SLNS", 6), HealingSpec(tokens=96, sequence_tokens=24, batch_sequences=2, rank=2)
    model = load_model(source.path)
    sequences = text_sequences(load_tokenizer(source.path), spec)
    student = convert(model, plan)
    engine = make_trainee("heal", model, student, healing)
    generator = torch.Generator().manual_seed(5)
    trained = {
        name: 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in student.named_parameters()
        if p.requires_grad
    }
    publish_tensors(trained, str(tmp_path / "3.safetensors"))
    load_trained(student, trained)
    finish_student(engine.student, healing)
    expected = score_sequences(student, sequences, base=load_model(source.path))
    result = worker.run(EvaluationUnit(plan=plan, trained=str(tmp_path / "3.safetensors"), healing=healing))
    assert _items(result, "nll") == pytest.approx(expected.nll, rel=1e-5)
    assert _items(result, "kl") == pytest.approx(expected.kl, rel=1e-4)
    assert _items(result, "nll") != pytest.approx(_items(worker.run(EvaluationUnit(plan=plan)), "nll"), rel=1e-3)
    with pytest.raises(ValueError, match="says neither plan nor healing"):
        EvaluationUnit(trained="x")


def test_the_branches_of_a_checkpoint_are_checked(worker, source, spec, tmp_path):
    model = convert(load_model(source.path), Plan.parse("SLNL", 6))
    save_checkpoint(model, load_tokenizer(source.path), tmp_path / "healed")
    result = worker.run(EvaluationUnit("branches", checkpoint=str(tmp_path / "healed")))
    expected = branch_check(model, text_sequences(load_tokenizer(source.path), spec))
    assert [row["zeroed"] for row in result["branches"]] == [None, "linear", "window"]
    for row, branch in zip(result["branches"], expected, strict=True):
        assert row["nll_loss"] == pytest.approx(branch.nll_loss, abs=1e-6)
        assert row["n_items"] == 6


def test_the_plan_evaluator_gives_scores_and_quality(source, spec, worker):
    judge = PlanEvaluator(source, spec)
    untouched, removed = judge(Plan.parse("SSSS")), judge(Plan.parse("SNNS"))
    assert untouched["scores"] == worker.run(base_unit())["scores"]
    assert removed["quality"] != untouched["quality"]
    assert 0 < removed["quality"] < 1 and removed["quality_stderr"] > 0
    assert [metric["metric"] for metric in untouched["scores"]["metrics"]] == ["nll", "kl", "ece"]


@pytest.mark.cluster
def test_through_ray_the_scores_are_the_same(ray_local, worker, source, spec):
    units = [
        base_unit(),
        *(EvaluationUnit(plan=single_layer_plan(4, layer, Treatment.NONE)) for layer in range(4)),
        cosine_unit(),
    ]
    results, workers = {}, []

    def take(done):
        results[done.unit] = done.result
        workers.append(done.worker)

    assert evaluate_units(units, source, spec, WorkerResources(2, 1, 0), on_result=take) == []
    assert set(results) == set(units) and len({worker.pid for worker in workers}) <= 2
    for unit in units:
        here = worker.run(unit)
        if unit.kind == "cosine":
            assert results[unit]["cosine"] == here["cosine"]
        else:
            assert _items(results[unit], "nll") == pytest.approx(_items(here, "nll"), rel=1e-6)
