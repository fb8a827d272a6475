from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from ray.train import TrainingFailedError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerboost.affine import MapsSpec, save_maps
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import attach_maps, convert, plan_of
from layerboost.families import attention_module
from layerboost.healing.distillation import make_trainee
from layerboost.healing.spec import HealingSpec, HeldOut, phases_of
from layerboost.healing.training import (
    CurveRow,
    NonFiniteLossError,
    TorchEngine,
    heal_locally,
    run_phase,
    split_held_out,
    student_from,
)
from layerboost.plan import Plan
from layerboost.storage.publish import publish_folder, publish_tensors, read_tensors
from layerboost.sweep.affine_fits import fit_maps, fit_maps_of_plan, read_sequences
from layerboost.text.batches import GlobalBatches, PackedText
from layerboost.text.documents import pack, read_documents
from layerboost.text.sources import TextSource, pack_sources
from tasks.healing.job import HealingJob, StepEvent, TeacherCache
from tasks.healing.orphaned_groups import freeing_groups_of_the_dead
from tasks.healing.run import heal
from tasks.healing.worker import Progress, read_progress
from tests.conftest import wait_for_cpus
from tests.fork_server import python_path
from tests.tasks.healing.jobs import job_of_settings

PLAN = Plan.parse("LNSW", window=3)
SPEC = HealingSpec(
    tokens=8 * 4 * 16, sequence_tokens=16, batch_sequences=4, rank=3, learning_rate=5e-3, transfer_fraction=0.4
)
TRANSFER_STEPS, STEPS = 3, 8
CLOSE = {"rel": 0, "abs": 1e-5}
SHARD_TINY = {"stage3_param_persistence_threshold": 0}  # by default ZeRO-3 keeps tiny parameters whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Writes a tiny Llama with its tokenizer to `model/`, and a text that it can read."""
    folder = tmp_path_factory.mktemp("healing")
    words = ["<s>", "</s>", *(f"w{n}" for n in range(59))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=49,  # odd, so that two workers cannot divide all parameters evenly
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    numbers = torch.randint(0, 59, (90, 10), generator=torch.Generator().manual_seed(1)).tolist()
    (folder / "text.txt").write_text("\n\n".join(" ".join(f"w{n}" for n in row) for row in numbers))
    return folder


def job_of(folder: Path, name: str, **settings) -> HealingJob:
    defaults = {
        "model": str(folder / "model"),
        "plan": PLAN,
        "spec": SPEC,
        "sources": (TextSource(str(folder / "text.txt")),),
        "output": str(folder / "out" / name),
        "storage_path": str(folder / "storage"),
        "name": name,
        "checkpoint_every_steps": 2,
        "max_failures": 0,
    }
    return job_of_settings(**(defaults | settings))


def text_of(folder: Path) -> PackedText:
    documents = read_documents(str(folder / "text.txt"))
    return PackedText(pack(documents, load_tokenizer(str(folder / "model")), 16, limit_sequences=STEPS * 4))


@pytest.fixture(scope="module")
def local(folder):
    """Heals with LoRA in this process, without Ray and DeepSpeed; gives losses and weights."""
    rows = []
    healed = heal_locally(load_model(str(folder / "model")), PLAN, text_of(folder), SPEC, on_step=rows.append)
    return rows, healed.state_dict()


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def record_steps(file: Path):
    """Returns a callback that writes down the steps of rank 0."""

    def record(event: StepEvent) -> None:
        if event.rank == 0:
            with file.open("a") as opened:
                opened.write(f"{event.step}\n")

    return record


def steps_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()]


def check_result(result, job: HealingJob, expected) -> None:
    rows, weights = expected
    assert [row.to_dict() | {"loss": 0} for row in result.curve] == [row.to_dict() | {"loss": 0} for row in rows]
    assert [row.loss for row in result.curve] == pytest.approx([row.loss for row in rows], **CLOSE)
    assert result.final_loss == result.curve[-1].loss
    assert result.tokens == SPEC.tokens
    assert not result.stopped_early
    assert result.measured == ()
    healed = load_model(job.output)
    assert plan_of(healed) == PLAN
    assert healed.config.layerboost["parent"] == job.parent.path
    for name, tensor in healed.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert not Path(f"{job.output}.writing").exists()


@pytest.mark.cluster
def test_killed_workers_end_with_the_losses_and_snapshots_of_the_undisturbed_run(cluster, folder, local, tmp_path):
    marks = folder / "marks"
    marks.mkdir()
    record = record_steps(marks / "steps")

    def die_once_in_each_phase(event: StepEvent) -> None:
        import signal

        record(event)
        mark = marks / event.phase
        if event.rank == 1 and event.step in (3, 7) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    job = job_of(
        folder,
        "killed",
        n_workers=2,
        max_failures=2,
        on_step=die_once_in_each_phase,
        snapshots=(0.25, 0.875),
        snapshot_url=str(tmp_path / "snapshots"),
    )
    result = heal(job)
    assert (marks / "transfer").exists()
    assert (marks / "heal").exists()
    check_result(result, job, local)
    ran = steps_in(marks / "steps")
    assert sorted(set(ran)) == list(range(1, STEPS + 1))
    assert len(ran) < 2 * STEPS, f"started over instead of resuming: {ran}"

    ids, expected = text_of(folder).input_ids[:2], {}

    def note(share, student):
        with torch.no_grad():
            expected[share] = student(input_ids=ids).logits

    parent = load_model(job.parent.path)
    heal_locally(parent, PLAN, text_of(folder), SPEC, marks=job.snapshots.shares, on_mark=note)
    assert result.snapshots == {step: str(tmp_path / "snapshots" / f"{step}.safetensors") for step in (2, 7)}
    for share, url in zip(job.snapshots.shares, result.snapshots.values(), strict=True):
        student = student_from(parent, PLAN, SPEC, load_file(url))
        with torch.no_grad():
            torch.testing.assert_close(student(input_ids=ids).logits, expected[share], rtol=0, atol=1e-3)


@pytest.mark.cluster
@pytest.mark.parametrize(("zero_stage", "n_workers", "is_kept"), [(1, 1, True), (2, 2, True), (3, 2, False)])
def test_jobs_on_the_same_text_share_what_the_teacher_computes(
    cluster, folder, local, tmp_path, zero_stage, n_workers, is_kept
):
    kept = tmp_path / "states"
    settings = {
        "zero_stage": zero_stage,
        "n_workers": n_workers,
        "zero_options": SHARD_TINY if zero_stage == 3 else None,
        "teacher_cache": TeacherCache(str(kept), 1.0),
    }
    first = job_of(folder, f"first-{zero_stage}", **settings)
    check_result(heal(first), first, local)
    files = {file: file.read_bytes() for file in kept.glob("*")}
    assert len(files) == (4 * (STEPS - TRANSFER_STEPS) if is_kept else 0)
    assert all(file.suffix == ".safetensors" for file in files)

    second = job_of(folder, f"second-{zero_stage}", **settings)
    for file in list(files)[:2]:
        file.write_bytes(b"damaged")
    since = {file: file.stat().st_mtime_ns for file in files}
    check_result(heal(second), second, local)
    assert {file: file.read_bytes() for file in kept.glob("*")} == files, "the damaged ones are written again"
    written = [file for file in files if file.stat().st_mtime_ns != since[file]]
    assert written == list(files)[:2], "the others were only read"


@pytest.mark.cluster
@pytest.mark.parametrize("transfer", ["together", "by_layer"])
def test_healing_starts_from_maps_that_are_fitted_under_the_plan_behind_a_transfer_too(cluster, folder, transfer):
    plan, model = Plan.parse("LANA", 4, sinks=1), load_model(str(folder / "model"))
    maps = MapsSpec(TextSource(str(folder / "text.txt")), tokens=320, sequence_tokens=16)
    sequences = read_sequences(maps, load_tokenizer(str(folder / "model")))
    file = str(folder / f"maps-{transfer}.safetensors")
    save_maps(fit_maps(model, sequences, rank=8), file)
    attach_maps(model, fit_maps_of_plan(model, plan, sequences, rank=dict.fromkeys((1, 3), 8)))
    rows = []
    expected = heal_locally(model, plan, text_of(folder), SPEC, on_step=rows.append).state_dict()

    job = job_of(folder, f"maps-{transfer}", plan=plan, maps=maps, transfer=transfer)
    result = heal(replace(job, parent=replace(job.parent, maps=file)))
    losses, local_losses = ([row.loss for row in curve if row.phase == "heal"] for curve in (result.curve, rows))
    assert len(losses) == STEPS - TRANSFER_STEPS and losses == pytest.approx(local_losses, **CLOSE)
    healed = load_model(job.output)
    assert attention_module(healed, 1).affine.down.shape == (8, 32)
    for name, tensor in healed.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.cluster
def test_a_healing_outlives_the_actor_that_tells_its_steps_and_trains_controller(cluster, folder, local, tmp_path):
    def kill_once(event: StepEvent) -> None:
        from tests.ray_workers import session_of, workers_of

        for step, actor in ((2, "ray::ProgressBox"), (5, "ray::TrainController")):
            mark = tmp_path / actor
            if event.step == step and not mark.exists():
                mark.touch()
                for process in workers_of(session_of(), actor):  # Other clusters have actors of that name too.
                    process.kill()

    job = job_of(folder, "without-controller", on_step=kill_once, max_failures=1, checkpoint_every_steps=1)
    told = []
    with freeing_groups_of_the_dead():
        result = heal(job, on_progress=told.append)
    assert (tmp_path / "ray::ProgressBox").exists() and (tmp_path / "ray::TrainController").exists()
    check_result(result, job, local)
    assert len(told) < STEPS
    wait_for_cpus(4)


_DRIVER = """
import os
from pathlib import Path

import ray

from layerboost.text.sources import TextSource
from tasks.healing.run import heal
from tests.tasks.healing.test_healing import job_of

driver = os.getpid()

def kill_driver(event):
    import signal, time
    if event.step == 6:
        os.kill(driver, signal.SIGKILL)
        time.sleep(600)

# As in a Ray job, workers see relative paths in a copy of the working directory.
environment = {"working_dir": ".", "excludes": ["storage", "out"]}
ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env=environment)
inputs = {"model": "./model", "sources": (TextSource("./text.txt"),)}
heal(job_of(Path.cwd(), "driver", zero_stage=1, on_step=kill_driver, **inputs))
"""


@pytest.mark.cluster
def test_a_run_goes_on_after_its_driver_died_on_other_workers_and_in_other_zero_stages(cluster, folder, local):
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": python_path(root)}
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER], cwd=folder, env=environment, capture_output=True, timeout=200
    )
    assert driver.returncode == -9, driver.stderr.decode()[-2000:]

    marks = folder / "driver-steps"
    record = record_steps(marks)

    def stop_after_7(event: StepEvent) -> None:
        record(event)
        if event.step == 7:
            raise RuntimeError("stopped after step 7")

    wider = job_of(
        folder,
        "driver",
        n_workers=2,
        zero_stage=3,
        zero_options=SHARD_TINY,
        checkpoint_every_steps=1,
        on_step=stop_after_7,
    )
    with pytest.raises(TrainingFailedError, match="stopped after step 7"):
        heal(wider)
    ran = steps_in(marks)
    assert ran == list(range(ran[0], 8))
    assert 4 < ran[0] <= 7, f"resumed at step {ran[0]}; checkpoints were at 4 and 6"

    marks.unlink()
    job = job_of(folder, "driver", zero_stage=1, on_step=record)
    check_result(heal(job), job, local)
    assert steps_in(marks) == [8]

    # A finished run that is asked for again computes nothing and gives the same result.
    check_result(heal(job), job, local)
    assert steps_in(marks) == [8]


@pytest.mark.cluster
def test_sharded_bf16_training_with_accumulation_and_recomputed_activations(cluster, folder):
    spec = replace(SPEC, method="full", learning_rate=2e-3, micro_batch_sequences=1, activation_checkpointing=True)
    expected = []
    parent = load_model(str(folder / "model"), dtype=torch.bfloat16)
    heal_locally(parent, PLAN, text_of(folder), spec, on_step=expected.append)
    job = job_of(folder, "bf16", spec=spec, dtype="bfloat16", n_workers=2, zero_stage=3, zero_options=SHARD_TINY)
    progress = []
    result = heal(job, on_progress=progress.append)
    assert [row.loss for row in result.curve] == pytest.approx([row.loss for row in expected], rel=0.03)
    assert [step.step for step in progress] == list(range(1, STEPS + 1))
    assert progress[-1].remaining_s == 0
    healed = load_model(job.output)
    assert healed.dtype == torch.bfloat16
    latest = max((folder / "storage" / "bf16").glob("checkpoint_*/"), key=lambda path: path.stat().st_mtime)
    state = load_file(latest / "state.safetensors")
    masters = {name: tensor for name, tensor in state.items() if name.startswith("master/")}
    assert len(state) == 3 * len(masters)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    weights = healed.state_dict()
    for name, master in masters.items():
        torch.testing.assert_close(master.bfloat16(), weights[name.removeprefix("master/")], rtol=0, atol=0)
    assert any((master != master.bfloat16().float()).any() for master in masters.values())


@pytest.mark.cluster
def test_a_killed_run_stops_early_where_the_undisturbed_one_does(cluster, folder, tmp_path):
    """Uses many features at once: another teacher, documents kept apart, held-out sequences, sharded weights."""
    spec = replace(
        SPEC, tokens=30 * 4 * 16, transfer_fraction=0.0, stop_when_flat=0.9, held_out_sequences=5, learning_rate=1e-2
    )
    teacher = load_model(str(folder / "model"))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    teacher.save_pretrained(tmp_path / "teacher")
    sources = (TextSource(str(folder / "text.txt")),)
    tokenizer = load_tokenizer(str(folder / "model"))
    text, held_out = split_held_out(pack_sources(sources, tokenizer, 16, 30 * 4 + 5, apart=True), spec)
    student = convert(load_model(str(folder / "model")), PLAN)
    trainee, (phase,) = make_trainee("heal", teacher, student, spec), phases_of(spec, PLAN, 32)
    rows, measured = [], []
    run_phase(
        TorchEngine(trainee, spec, gradient_clip=phase.gradient_clip),
        phase,
        GlobalBatches(text, 4, spec.seed),
        spec,
        held_out=held_out,
        measured=measured,
        on_step=rows.append,
    )
    assert 8 <= len(rows) < 30
    mark = tmp_path / "died"

    def die_once(event: StepEvent) -> None:
        import signal

        if event.rank == 1 and event.step == 7 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    job = job_of(
        folder,
        "flat",
        spec=spec,
        sources=sources,
        apart=True,
        teacher=str(tmp_path / "teacher"),
        n_workers=2,
        zero_stage=3,
        zero_options=SHARD_TINY,
        max_failures=1,
        on_step=die_once,
    )
    result = heal(job)
    assert mark.exists()
    assert result.stopped_early
    assert result.tokens == len(rows) * 4 * 16
    assert [row.loss for row in result.curve] == pytest.approx([row.loss for row in rows], **CLOSE)
    assert [at.step for at in result.measured] == [at.step for at in measured]
    assert [at.divergence for at in result.measured] == pytest.approx([at.divergence for at in measured], **CLOSE)


@pytest.mark.cluster
def test_a_non_finite_loss_stops_once_overwrites_nothing_and_can_be_repaired(cluster, folder, local, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.inf  # after the layer whose attention is transferred
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    output, marks = tmp_path / "out", tmp_path / "steps"
    output.mkdir()
    (output / "kept").touch()
    job = job_of(folder, "broken", model=str(model), output=str(output), max_failures=5, on_step=record_steps(marks))
    with pytest.raises(NonFiniteLossError, match=r"phase heal at step 4, batch 3"):
        heal(job)
    assert [path.name for path in output.iterdir()] == ["kept"]
    assert steps_in(marks) == [1, 2, 3]
    shutil.copy(folder / "model" / "model.safetensors", model)
    check_result(heal(job), job, local)
    assert steps_in(marks) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_student_is_rebuilt_from_the_parent_and_what_was_trained(folder, method):
    spec = replace(SPEC, method=method)
    trained: dict[str, torch.Tensor] = {}
    parent = load_model(str(folder / "model"))
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}

    def keep(share: float, student) -> None:
        trained.update({name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad})
        expected.append(student(input_ids=ids).logits.detach())

    ids, expected = text_of(folder).input_ids[:2], []
    for share in (0.25, 0.875):  # the feature maps only, then everything that healing trains
        trained.clear()
        heal_locally(parent, PLAN, text_of(folder), spec, marks=(share,), on_mark=keep)
        student = student_from(parent, PLAN, spec, trained, parent="name")
        torch.testing.assert_close(student(input_ids=ids).logits, expected[-1], rtol=0, atol=1e-4)
        assert not any("lora" in name for name, _ in student.named_parameters())
        assert student.config.layerboost["parent"] == "name"
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())
    assert all(parameter.requires_grad for parameter in parent.parameters())
    with pytest.raises(ValueError, match=r"no parameter model\.layers\.0\.other of shape"):
        student_from(parent, PLAN, spec, {"model.layers.0.other": torch.zeros(2)})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("zero_stage", 4, "zero.stage: 4"),
        ("n_workers", 0, "workers.n_workers: 0"),
        ("n_workers", 5, "batch_sequences: 4 cannot feed 5 workers"),
        ("checkpoint_every_steps", 0, "checkpoints.every_steps: 0"),
        ("sources", (), "sources: there are none"),
        ("transfer", "layers", "transfer: 'layers'"),
        ("snapshots", (0.5,), "snapshots.url: None"),
    ],
)
def test_a_job_that_cannot_be_meant_is_refused_by_field(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=message):
        job_of(tmp_path, "bad", **{field: value})


def test_offloading_needs_zero(tmp_path):
    with pytest.raises(ValueError, match=r"zero\.offload_optimizer: True needs stage 1, 2 or 3"):
        job_of(tmp_path, "bad", offload_optimizer=True, zero_stage=0)


def test_a_checkpoint_of_another_job_is_not_gone_on_with(tmp_path):
    progress = Progress([CurveRow("heal", 1, 64, 2.5)], [HeldOut(0, 3.0)], {1: "a/1.safetensors"})
    (tmp_path / "progress.json").write_text(json.dumps({"fingerprint": "a", **asdict(progress)}))
    assert read_progress(tmp_path, "a") == progress
    assert read_progress(tmp_path, "b") is None


def test_what_changes_a_result_changes_the_fingerprint_and_placement_does_not(tmp_path):
    job = job_of(tmp_path, "a")
    placement = {"n_workers": 2, "zero_stage": 3, "offload_optimizer": True, "max_failures": 1, "model": "elsewhere"}
    assert job_of(tmp_path, "a", **placement).fingerprint == job.fingerprint
    changes = [
        {"plan": Plan.parse("LNSW", window=4)},
        {"spec": replace(SPEC, seed=1)},
        {"sources": (TextSource(job.text.sources[0].path, field="other"),)},
        {"apart": True},
        {"teacher": "other"},
        {"dtype": "bfloat16"},
    ]
    fingerprints = {job_of(tmp_path, "a", **change).fingerprint for change in changes}
    assert len(fingerprints | {job.fingerprint}) == len(changes) + 1


def test_checkpoints_of_earlier_versions_are_gone_on_with():
    """A fingerprint that changes makes every healing that is under way start over."""
    spec = HealingSpec(tokens=256, sequence_tokens=16, batch_sequences=4)
    about: dict[str, Any] = {"model": "m", "plan": Plan.parse("LNSS", window=4), "spec": spec}
    about |= {"storage_path": "s", "name": "n"}
    plain = job_of_settings(**about, sources=(TextSource("a.txt"),), output="o")
    assert plain.fingerprint == "d66acf2073f7b1ed81517c80f1d283b6a15a03f10b19e693e44c1fe55a72b89e"
    sources = (TextSource("a.txt", weight=2.0), TextSource("b.jsonl", format="chat"))
    about |= {"sources": sources, "apart": True, "teacher": "t", "teacher_revision": "tr", "transfer": "by_layer"}
    about |= {"revision": "r", "dtype": "bfloat16", "output": None, "snapshots": (0.5,), "snapshot_url": "u"}
    assert job_of_settings(**about).fingerprint == "1a6d489921f302b6b2e45b6fa9efcd11aa6bb27d597c83e2b7f0423457899489"


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_folder_is_published_whole_or_not_at_all(tmp_path, scheme):
    output = str(tmp_path / "out") if scheme == "local" else "memory://healed/out"
    filesystem, path = fsspec.core.url_to_fs(output)

    def write(content: str, fails: bool = False):
        def writer(folder: str) -> None:
            Path(folder, "sub").mkdir()
            Path(folder, "sub", "a.txt").write_text(content)
            if fails:
                raise OSError(errno.ENOSPC, "disk full")
            Path(folder, "b.txt").write_text(content)

        return writer

    for content in ("first", "second"):
        publish_folder(write(content), output)
        assert filesystem.cat_file(f"{path}/sub/a.txt") == filesystem.cat_file(f"{path}/b.txt") == content.encode()
    with pytest.raises(OSError, match="disk full"):
        publish_folder(write("third", fails=True), output)
    assert filesystem.cat_file(f"{path}/sub/a.txt") == b"second"
    publish_folder(write("fourth"), output)
    assert filesystem.cat_file(f"{path}/b.txt") == b"fourth"
    assert not filesystem.exists(f"{path}.writing")


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_tensors_are_published_whole_and_damage_is_noticed(tmp_path, scheme):
    url = str(tmp_path / "sub" / "a.safetensors") if scheme == "local" else "memory://tensors/sub/a.safetensors"
    with pytest.raises(FileNotFoundError):
        read_tensors(url)
    for value in (1.0, 2.0):
        publish_tensors({"x": torch.full((2, 3), value).T}, url, {"step": "4"})
        tensors, metadata = read_tensors(url)
        assert metadata["step"] == "4"
        assert torch.equal(tensors["x"], torch.full((3, 2), value))
    filesystem, path = fsspec.core.url_to_fs(url)
    assert filesystem.ls(path.rpartition("/")[0], detail=False) == [path]
    filesystem.pipe_file(path, filesystem.cat_file(path)[:-8])
    with pytest.raises(SafetensorError):
        read_tensors(url)
