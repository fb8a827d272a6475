from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerboost.batches import PackedText
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import plan_of
from layerboost.data import pack, read_documents
from layerboost.healing_spec import HealingSpec
from layerboost.plan import Plan
from layerboost.training import NonFiniteLossError, heal_locally
from tasks.healing import HealingJob, StepEvent, heal
from tasks.healing_worker import publish_folder

PLAN = Plan.parse("LNSW", window=3)
SPEC = HealingSpec(
    tokens=8 * 4 * 16, sequence_tokens=16, batch_sequences=4, rank=4, learning_rate=5e-3, transfer_fraction=0.4
)
TRANSFER_STEPS, STEPS = 3, 8
CLOSE = {"rel": 0, "abs": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer in `model/`, and a text that it can read."""
    folder = tmp_path_factory.mktemp("healing")
    words = ["<s>", "</s>", *(f"w{n}" for n in range(59))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
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
        "text": str(folder / "text.txt"),
        "output": str(folder / "out" / name),
        "storage_path": str(folder / "storage"),
        "name": name,
        "checkpoint_every_steps": 2,
        "max_failures": 0,
    }
    return HealingJob(**(defaults | settings))


@pytest.fixture(scope="module")
def local(folder):
    """Losses and weights of healing in this process, without Ray and DeepSpeed, by method."""
    results = {}
    for method in ("lora", "full"):
        spec = replace(SPEC, method=method)
        documents = read_documents(str(folder / "text.txt"))
        sequences = pack(documents, load_tokenizer(str(folder / "model")), 16, limit_sequences=STEPS * 4)
        rows = []
        model = load_model(str(folder / "model"))
        healed = heal_locally(model, PLAN, PackedText(sequences), spec, on_step=rows.append)
        results[method] = rows, healed.state_dict()
    return results


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def check_result(result, job: HealingJob, expected) -> None:
    rows, weights = expected
    assert [row.to_dict() | {"loss": 0} for row in result.curve] == [row.to_dict() | {"loss": 0} for row in rows]
    assert [row.loss for row in result.curve] == pytest.approx([row.loss for row in rows], **CLOSE)
    assert result.final_loss == result.curve[-1].loss
    assert result.tokens == SPEC.tokens
    healed = load_model(job.output)
    assert plan_of(healed) == PLAN
    assert healed.config.layerboost["parent"] == job.model
    for name, tensor in healed.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert not Path(f"{job.output}.writing").exists()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("n_workers", "zero_stage", "settings"),
    [
        (2, 0, {}),
        (2, 1, {}),
        (2, 2, {}),
        (2, 3, {}),
        (2, 3, {"method": "full"}),
    ],
)
def test_workers_and_zero_stages_reach_the_losses_of_one_process(
    cluster, folder, local, n_workers, zero_stage, settings
):
    spec = replace(SPEC, **settings)
    options = {"stage3_param_persistence_threshold": 0} if zero_stage == 3 else None  # else tiny weights stay whole
    name = f"zero{zero_stage}-{n_workers}-{spec.method}"
    job = job_of(
        folder,
        name,
        spec=spec,
        n_workers=n_workers,
        zero_stage=zero_stage,
        zero_options=options,
        checkpoint_every_steps=100,
    )
    progress = []
    result = heal(job, on_progress=progress.append)
    check_result(result, job, local[spec.method])
    assert [step.step for step in progress] == list(range(1, STEPS + 1))
    assert progress[-1].remaining_s == 0


@pytest.mark.cluster
def test_killed_workers_end_with_the_losses_of_the_undisturbed_run(cluster, folder, local):
    marks = folder / "marks"
    marks.mkdir()

    def die_once_in_each_phase(event: StepEvent) -> None:
        import signal

        with (marks / f"rank{event.rank}").open("a") as file:
            file.write(f"{event.step}\n")
        mark = marks / event.phase
        if event.rank == 1 and event.step in (3, 7) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    job = job_of(folder, "killed", n_workers=2, zero_stage=2, max_failures=2, on_step=die_once_in_each_phase)
    result = heal(job)
    assert (marks / "transfer").exists()
    assert (marks / "heal").exists()
    check_result(result, job, local["lora"])
    ran = [int(line) for line in (marks / "rank1").read_text().split()]
    assert ran[0] == 1
    assert sorted(set(ran)) == list(range(1, STEPS + 1))
    assert len(ran) < 2 * STEPS, f"started over instead of resuming: {ran}"


_DRIVER = """
import os
from pathlib import Path

import ray

from tasks.healing import heal
from tests.tasks.test_healing import job_of

driver = os.getpid()

def kill_driver(event):
    import signal, time
    if event.step == 6:
        os.kill(driver, signal.SIGKILL)
        time.sleep(600)

# As in a Ray job, workers see relative paths in a copy of the working directory.
environment = {"working_dir": ".", "excludes": ["storage", "out"]}
ray.init(address="local", num_cpus=2, include_dashboard=False, runtime_env=environment)
heal(job_of(Path.cwd(), "driver", model="./model", text="./text.txt", on_step=kill_driver))
"""


@pytest.mark.cluster
def test_a_killed_driver_goes_on_with_the_same_storage_and_name(cluster, folder, local):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    driver = subprocess.run(
        [sys.executable, "-c", _DRIVER], cwd=folder, env=environment, capture_output=True, timeout=200
    )
    assert driver.returncode == -9, driver.stderr.decode()[-2000:]
    marks = folder / "driver-steps"

    def record(event: StepEvent) -> None:
        with marks.open("a") as file:
            file.write(f"{event.step}\n")

    job = job_of(folder, "driver", on_step=record)
    check_result(heal(job), job, local["lora"])
    first = int(marks.read_text().split()[0])
    assert 4 < first <= 7, f"resumed at step {first}; checkpoints were at 4 and 6"

    # A finished run asked for again computes nothing and gives the same; another spec under its name starts over.
    marks.unlink()
    check_result(heal(job), job, local["lora"])
    assert not marks.exists()
    other = replace(job, spec=replace(SPEC, learning_rate=1e-3))
    assert heal(other).final_loss != pytest.approx(local["lora"][0][-1].loss, abs=1e-6)
    assert marks.read_text().split()[0] == "1"


@pytest.mark.cluster
def test_a_non_finite_loss_stops_once_and_overwrites_nothing(cluster, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.inf
    from safetensors.torch import save_file

    save_file(tensors, weights, metadata={"format": "pt"})
    output = tmp_path / "out"
    output.mkdir()
    (output / "kept").touch()
    job = job_of(folder, "non-finite", model=str(tmp_path / "model"), output=str(output), max_failures=5)
    with pytest.raises(NonFiniteLossError, match=r"phase heal at step 4, batch 3"):
        heal(job)
    assert [path.name for path in output.iterdir()] == ["kept"]


@pytest.mark.parametrize(("field", "value"), [("zero_stage", 4), ("n_workers", 0), ("checkpoint_every_steps", 0)])
def test_a_job_that_cannot_be_meant_is_refused_by_field(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}: {value}"):
        job_of(tmp_path, "bad", **{field: value})


def test_more_workers_than_sequences_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_sequences: 4 cannot feed 5 workers"):
        job_of(tmp_path, "bad", n_workers=5)


@pytest.mark.parametrize("scheme", ["local", "memory"])
def test_a_folder_is_published_whole_or_not_at_all(tmp_path, scheme):
    output = str(tmp_path / "out") if scheme == "local" else "memory://healed/out"
    filesystem, path = fsspec.core.url_to_fs(output)

    def write(content: str, fails: bool = False):
        def writer(folder: str) -> None:
            Path(folder, "sub").mkdir()
            Path(folder, "sub", "a.txt").write_text(content)
            if fails:
                raise OSError("disk full")
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
