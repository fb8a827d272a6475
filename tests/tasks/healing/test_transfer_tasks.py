from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from layerboost.checkpoint import ModelSource, load_model, load_tokenizer
from layerboost.convert import convert
from layerboost.healing.adapters import feature_map_parameters
from layerboost.healing.distillation import make_trainee
from layerboost.healing.spec import HealingSpec, phases_of
from layerboost.healing.training import NonFiniteLossError, TorchEngine, heal_locally, run_phase
from layerboost.plan import Plan
from layerboost.storage.publish import read_tensors
from layerboost.text.batches import GlobalBatches, PackedText
from layerboost.text.sources import TextSource, pack_sources
from tasks.healing.attention_transfer import fit_layer
from tasks.healing.job import Snapshots, StepEvent
from tasks.healing.run import heal
from tests.models import tiny_model
from tests.tasks.healing.jobs import job_of_settings

PLAN = Plan.parse("LSLN", window=3)
SPEC = HealingSpec(
    tokens=9 * 2 * 12,
    sequence_tokens=12,
    batch_sequences=2,
    rank=2,
    learning_rate=5e-3,
    transfer_fraction=0.7,
    window_dropout=0.5,
)
TRANSFER_STEPS, STEPS = 6, 9


def test_layers_fitted_one_by_one_are_those_of_the_joint_fit():
    ids = torch.randint(0, 97, (20, 12), generator=torch.Generator().manual_seed(0))
    batches = GlobalBatches(PackedText(ids), 2)
    phase, _ = phases_of(SPEC, PLAN, 32)
    student = convert(parent := tiny_model("llama", seed=0), PLAN)
    untrained = {name: parameter.clone() for name, parameter in feature_map_parameters(student)}
    trainee, rows, halfway = make_trainee("transfer", parent, student, SPEC), [], {}

    def keep_halfway(row):
        rows.append(row)
        if row.step == 3:
            halfway.update({name: p.detach().clone() for name, p in feature_map_parameters(student)})

    run_phase(TorchEngine(trainee, SPEC), phase, batches, SPEC, on_step=keep_halfway)
    joint = dict(feature_map_parameters(student))

    for plan_layer in (0, 2):
        fitted = fit_layer(tiny_model("llama", seed=0), PLAN, plan_layer, phase, batches, SPEC, keep_after=(3, 6))
        assert list(fitted.parameters) == [3, 6]
        for step, expected in ((3, halfway), (6, joint)):
            assert {name.split(".")[2] for name in fitted.parameters[step]} == {str(plan_layer)}
            for name, tensor in fitted.parameters[step].items():
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)
                assert not torch.equal(tensor, untrained[name]), f"{name} did not move"
        rows = [replace(row, loss=row.loss - loss) for row, loss in zip(rows, fitted.losses, strict=True)]
    assert [row.loss for row in rows] == pytest.approx([0] * TRANSFER_STEPS, abs=1e-5)


def test_a_layer_that_learns_nonsense_is_refused():
    model = tiny_model("llama", seed=0)
    with torch.no_grad():
        model.get_submodule("model.layers.2.self_attn.v_proj").weight[0, 0] = torch.nan
    ids = torch.randint(0, 97, (20, 12), generator=torch.Generator().manual_seed(0))
    phase, _ = phases_of(SPEC, PLAN, 32)
    with pytest.raises(NonFiniteLossError, match="phase transfer at step 1"):
        fit_layer(model, PLAN, 2, phase, GlobalBatches(PackedText(ids), 2), SPEC, keep_after=(6,))


@pytest.mark.cluster
def test_a_transfer_by_layer_goes_on_from_its_stored_layers_and_ends_as_a_joint_one(
    ray_local, tiny_checkpoint, tmp_path
):
    model, text = str(tiny_checkpoint / "model"), (TextSource(str(tiny_checkpoint / "text.txt")),)

    def trouble(event: StepEvent) -> None:
        import os
        import signal

        with (tmp_path / f"{event.phase}-{event.rank}").open("a") as file:
            file.write(f"{event.step} ")
        died, stopped = tmp_path / "died", tmp_path / "stopped"
        if event.phase == "transfer" and event.rank == 2 and event.step == 4:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            elif not stopped.exists():
                stopped.touch()
                raise RuntimeError("the task fails once more")

    job = job_of_settings(
        model=model,
        plan=PLAN,
        spec=SPEC,
        sources=text,
        output=str(tmp_path / "out"),
        storage_path=str(tmp_path / "storage"),
        name="layers",
        transfer="by_layer",
        snapshots=(0.34, 0.67, 0.8),
        snapshot_url=str(tmp_path / "snapshots"),
        max_failures=1,
        on_step=trouble,
    )
    with pytest.raises(Exception, match="the task fails once more"):
        heal(job)
    assert (tmp_path / "transfer-0").read_text().split() == [str(n) for n in range(1, 7)]
    stored = tmp_path / "storage" / "layers" / "transfer"
    assert [path.name for path in stored.iterdir()] == ["0.safetensors"]

    rows, progress = [], []
    result = heal(job, on_progress=progress.append)
    assert (tmp_path / "transfer-0").read_text().split() == [str(n) for n in range(1, 7)], "fitted again"
    assert [(step.phase, step.step) for step in progress] == [("transfer", 6), ("heal", 7), ("heal", 8), ("heal", 9)]
    sequences = pack_sources(text, load_tokenizer(model), 12, STEPS * 2)
    marked = {}
    healed = heal_locally(
        load_model(model),
        PLAN,
        sequences,
        SPEC,
        on_step=rows.append,
        marks=job.snapshots.shares,
        on_mark=lambda share, student: marked.update({share: {n: p.clone() for n, p in student.named_parameters()}}),
    )
    assert [replace(row, loss=0) for row in result.curve] == [replace(row, loss=0) for row in rows]
    assert [row.loss for row in result.curve] == pytest.approx([row.loss for row in rows], rel=0, abs=1e-5)
    assert result.tokens == SPEC.tokens
    weights = load_model(job.output).state_dict()
    for name, tensor in healed.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-3, msg=name)
    assert list(result.snapshots) == [3, 6, 7]
    for share, url in zip(job.snapshots.shares, result.snapshots.values(), strict=True):
        snapshot, _ = read_tensors(url)
        assert snapshot
        assert any(".lora_A." in name for name in snapshot) == (share == 0.8)
        for name, tensor in snapshot.items():
            torch.testing.assert_close(tensor, marked[share][name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.cluster
def test_damaged_layers_are_fitted_again_and_nonsense_ends_the_job(ray_local, tiny_checkpoint, tmp_path):
    from tasks.healing.attention_transfer import fit_layers, read_fitted_layers

    text = (TextSource(str(tiny_checkpoint / "text.txt")),)
    job = job_of_settings(
        model=str(tiny_checkpoint / "model"),
        plan=PLAN,
        spec=SPEC,
        sources=text,
        output=str(tmp_path / "out"),
        storage_path=str(tmp_path),
        name="damaged",
        transfer="by_layer",
        max_failures=0,
        n_workers=2,
    )
    phase = job.transfer_phase
    fit_layers(job, phase, lambda progress: None)
    first = read_fitted_layers(job, phase)
    files = [Path(tmp_path, "damaged", "transfer", f"{layer}.safetensors") for layer in (0, 2)]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].write_bytes(files[1].read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="layer 2 is not in"):
        read_fitted_layers(job, phase)
    fit_layers(job, phase, lambda progress: None)
    assert files[0].stat().st_mtime_ns == times[0]
    assert files[1].stat().st_mtime_ns > times[1]
    again = read_fitted_layers(job, phase)
    assert again.losses == first.losses
    for name, tensor in first.parameters[TRANSFER_STEPS].items():
        assert torch.equal(again.parameters[TRANSFER_STEPS][name], tensor)

    # If the stored layers lack a snapshot, they are fitted again.
    wanted = []
    fit_layers(replace(job, snapshots=Snapshots(str(tmp_path), (0.34,))), phase, wanted.append)
    assert [step.step for step in wanted] == [3, 6]
    broken = load_model(job.parent.path)
    with torch.no_grad():
        broken.get_submodule("model.layers.2.self_attn.v_proj").weight[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer(job.parent.path).save_pretrained(tmp_path / "broken")
    with pytest.raises(NonFiniteLossError, match="layer 2: loss: nan in phase transfer at step 1"):
        elsewhere = replace(job.checkpoints, name="broken")
        broken_job = replace(job, parent=ModelSource(str(tmp_path / "broken")), checkpoints=elsewhere)
        fit_layers(broken_job, phase, lambda progress: None)
    assert not (tmp_path / "broken" / "transfer" / "2.safetensors").exists()
