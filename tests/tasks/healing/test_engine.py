from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from layerboost.convert import convert
from layerboost.healing.distillation import make_trainee
from layerboost.healing.spec import HEAL, HealingSpec, phases_of
from layerboost.healing.training import TorchEngine, run_phase
from layerboost.plan import Plan
from layerboost.text.batches import GlobalBatches, PackedText
from layerboost.text.sources import TextSource
from tasks.healing.engine import make_engine, save_state, saved_parameters, trained_parameters
from tasks.healing.job import HealingJob
from tests.models import tiny_model
from tests.tasks.healing.jobs import job_of_settings

PLAN = Plan.parse("LNSW", window=3)
SPEC = HealingSpec(
    tokens=6 * 2 * 12, sequence_tokens=12, batch_sequences=2, rank=3, learning_rate=5e-3, transfer_fraction=0.0
)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Makes a process group of one worker in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("LOCAL_RANK", "0")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def batches() -> GlobalBatches:
    ids = torch.randint(0, 97, (12, 12), generator=torch.Generator().manual_seed(1))
    return GlobalBatches(PackedText(ids), SPEC.batch_sequences)


def job_of(spec: HealingSpec = SPEC, **settings) -> HealingJob:
    # By default ZeRO-3 keeps tiny parameters whole.
    options = {"stage3_param_persistence_threshold": 0} if settings.get("zero_stage") == 3 else None
    about = {"model": "", "plan": PLAN, "spec": spec, "sources": (TextSource("x.txt"),), "output": ""}
    return job_of_settings(**about, storage_path="", name="", zero_options=options, **settings)


def make_heal_trainee(spec: HealingSpec, dtype: torch.dtype = torch.float32, teacher: nn.Module | None = None):
    parent = tiny_model("llama", seed=0).to(dtype)
    trainee = make_trainee(HEAL, teacher or parent, convert(parent, PLAN), spec)
    return trainee, phases_of(spec, PLAN, hidden_size=32)[0]


def train(engine, phase, batches, spec, start: int, stop: int) -> list[float]:
    """Trains some steps of a phase with the schedule of the whole phase, and returns their losses."""
    losses: list[float] = []

    class Stopped(Exception):
        pass

    def on_step(row):
        losses.append(row.loss)
        if row.step == stop:
            raise Stopped

    with pytest.raises(Stopped):
        run_phase(engine, phase, batches, spec, start=start, on_step=on_step)
    return losses


@pytest.mark.parametrize("method", ["lora", "full"])
def test_state_saved_in_one_zero_stage_goes_on_in_another_as_if_nothing_had_happened(batches, tmp_path, method):
    spec = replace(SPEC, method=method)
    trainee, phase = make_heal_trainee(spec)
    plain = TorchEngine(trainee, spec, gradient_clip=phase.gradient_clip)
    expected = train(plain, phase, batches, spec, 0, 6)

    losses: list[float] = []
    file: Path | None = None
    for number, settings in enumerate(
        [
            {"zero_stage": 3},
            {"zero_stage": 1},
            {"zero_stage": 0},
            {"zero_stage": 2, "offload_optimizer": True},
            {"zero_stage": 3, "offload_optimizer": True},
        ]
    ):
        trainee, _ = make_heal_trainee(spec)
        engine = make_engine(trainee, job_of(spec, **settings), phase, 1, file)
        losses += train(engine, phase, batches, spec, number, number + 1)
        trained = trained_parameters(engine)
        file = tmp_path / f"{number}.safetensors"
        save_state(engine, file)
        engine.destroy()
        for name, tensor in saved_parameters(file, torch.float32).items():
            torch.testing.assert_close(tensor, trained[name], rtol=0, atol=0, msg=name)
    assert losses == pytest.approx(expected[:5], rel=0, abs=1e-6)

    # The restored optimizer equals the one that took all steps: bias correction and moments of each parameter.
    trainee, _ = make_heal_trainee(spec)
    engine = make_engine(trainee, job_of(spec, zero_stage=0), phase, 1, file)
    assert train(engine, phase, batches, spec, 5, 6) == pytest.approx(expected[5:], rel=0, abs=1e-6)
    save_state(engine, tmp_path / "last.safetensors")
    with safe_open(tmp_path / "last.safetensors", "pt") as saved:
        assert saved.metadata()["optimizer_steps"] == "6"
        for name, theirs in plain.module.student.named_parameters():
            if theirs.requires_grad:
                other = plain.optimizer.state[theirs]
                assert other["step"] == 6
                torch.testing.assert_close(saved.get_tensor(f"master/{name}"), theirs.detach(), rtol=0, atol=1e-4)
                for key in ("exp_avg", "exp_avg_sq"):
                    torch.testing.assert_close(saved.get_tensor(f"{key}/{name}"), other[key], rtol=1e-3, atol=1e-6)
    engine.destroy()


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_bf16_training_goes_on_from_its_fp32_masters(batches, tmp_path, zero_stage):
    states = {}
    for name, stops in (("undisturbed", [(0, 4)]), ("resumed", [(0, 2), (2, 4)])):
        losses, file = [], None
        for start, stop in stops:
            trainee, phase = make_heal_trainee(SPEC, torch.bfloat16)
            engine = make_engine(trainee, job_of(zero_stage=zero_stage), phase, 1, file)
            losses += train(engine, phase, batches, SPEC, start, stop)
            file = tmp_path / f"{name}-{stop}.safetensors"
            save_state(engine, file)
            engine.destroy()
        states[name] = losses, load_file(file)
    (losses, masters), (resumed_losses, resumed) = states["undisturbed"], states["resumed"]
    assert resumed_losses == losses
    assert masters.keys() == resumed.keys()
    for name, tensor in masters.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(resumed[name], tensor), name
    assert any((tensor != tensor.bfloat16().float()).any() for name, tensor in masters.items() if "master/" in name)


@pytest.mark.parametrize(("dtype", "zero_stage"), [("bfloat16", 2), ("float32", 3), ("bfloat16", 3)])
def test_with_lora_parent_and_student_stay_one_copy_of_the_weights(batches, dtype, zero_stage):
    dtype = getattr(torch, dtype)
    trainee, phase = make_heal_trainee(SPEC, dtype)
    parent_bytes = sum(p.numel() * dtype.itemsize for p in tiny_model("llama").parameters())
    engine = make_engine(trainee, job_of(zero_stage=zero_stage), phase, 1)
    train(engine, phase, batches, SPEC, 0, 1)
    frozen: dict[int, int] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        data = parameter.ds_tensor if zero_stage == 3 else parameter.data
        assert data.dtype == dtype, name
        if not parameter.requires_grad:
            frozen[data.untyped_storage().data_ptr()] = data.untyped_storage().nbytes()
    assert sum(frozen.values()) == parent_bytes
    engine.destroy()


def test_another_teacher_is_held_beside_the_student(batches):
    teacher = tiny_model("llama", seed=1, num_hidden_layers=2)
    trainee, phase = make_heal_trainee(SPEC, teacher=teacher)
    expected = train(TorchEngine(trainee, SPEC, gradient_clip=1.0), phase, batches, SPEC, 0, 3)
    trainee, _ = make_heal_trainee(SPEC, teacher=tiny_model("llama", seed=1, num_hidden_layers=2))
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    engine = make_engine(trainee, job_of(zero_stage=2), phase, 1)
    assert train(engine, phase, batches, SPEC, 0, 3) == pytest.approx(expected, rel=0, abs=1e-5)
    for name, parameter in engine.module.teacher.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, msg=name)
    engine.destroy()


def test_held_out_divergence_is_measured_between_steps_of_zero_3(batches):
    text = batches.text[:2]
    trainee, phase = make_heal_trainee(SPEC)
    plain = TorchEngine(trainee, SPEC, gradient_clip=1.0)
    trainee, _ = make_heal_trainee(SPEC)
    engine = make_engine(trainee, job_of(zero_stage=3), phase, 1)
    for start in range(3):
        with torch.no_grad():
            values = [float(e(**text.tensors(), measure=True)) for e in (plain, engine)]
        assert values[1] == pytest.approx(values[0], rel=0, abs=1e-6)
        losses = [train(e, phase, batches, SPEC, start, start + 1) for e in (plain, engine)]
        assert losses[1] == pytest.approx(losses[0], rel=0, abs=1e-6)
    engine.destroy()
