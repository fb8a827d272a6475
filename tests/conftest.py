"""Fixtures that all tests share: real models where they stand beside the project, and tiny inputs that fit together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fork_server import fork_workers
from tests.parallel import (  # noqa: F401 - pytest finds hooks here
    pytest_cmdline_main,
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
)

# Real models and texts, where they stand beside the project; everything else works without them.
_SHARED = Path(__file__).resolve().parents[2] / "shared"

# A shell that starts the tests in the background has them and their children ignore Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
fork_workers()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real models and texts beside the project; the test is skipped elsewhere."""
    if not (_SHARED / "models").is_dir():
        pytest.skip(f"needs the models and texts in {_SHARED.name}/ beside the project")
    return _SHARED


@pytest.fixture(scope="module")
def one_thread():
    """With several threads the order of sums, and so the last bits, depends on what else is in a batch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


N_LAYERS, CONTEXT_TOKENS = 3, 64
WORDS = [f"word{i}" for i in range(60)]


@dataclass
class Inputs:
    """A folder of inputs. `recipe` is good; change a copy of `values` to make a bad one."""

    folder: Path
    values: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def write_recipe(self) -> Path:
        self.recipe.write_text(yaml.safe_dump(self.values, sort_keys=False))
        return self.recipe


@pytest.fixture(scope="session")
def pristine_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def write_inputs(folder: Path) -> Path:
    """Writes a tiny model, texts, and a task into a folder, which is given back."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for name, shift in (("judge", 0), ("heal", 7)):
        lines = [" ".join(WORDS[(i * j + shift) % len(WORDS)] for j in range(1, 30)) for i in range(1, 40)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    items = [{"question": f"{WORDS[i]} {WORDS[i + 1]}", "choices": WORDS[:2], "gold": i % 2} for i in range(8)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "items.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    return folder


def small_recipe(**changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe for the files of `write_inputs` whose runs are short, with changes to its sections."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": "./model"},
        "quality": {"text": "judge.txt", "sequences": 4, "sequence_tokens": 32},
        "search": {"trials": 2, "window": 8},
        "healing": {"tokens": 512, "text": "heal.txt", "batch_sequences": 2, "sequence_tokens": 32, "candidates": 1},
        "throughput": {"concurrency": [1], "prompt_tokens": 16, "new_tokens": 4},
    }
    return {name: sections.get(name, {}) | changes.get(name, {}) for name in {**sections, **changes}}


def repeatable_recipe(**changes: dict[str, Any]) -> dict[str, Any]:
    """The same, without tasks, such that two runs of it anywhere give the same tables but for speeds.

    Measured speeds differ from run to run, and with them the plans; a result's last bits depend on threads and, healed,
    on the number of workers.
    """
    sections = small_recipe(**changes)
    sections["sensitivity"] = {"score": "nll"} | sections.get("sensitivity", {})
    sections["search"] |= {"speed": "bytes"}
    sections["placement"] = {"cpus_per_worker": 1, "healing_workers": 1} | sections.get("placement", {})
    return sections


@pytest.fixture
def inputs(pristine_inputs: Path, tmp_path: Path) -> Inputs:
    """A copy of the inputs that a test may damage."""
    folder = tmp_path / "inputs"
    shutil.copytree(pristine_inputs, folder)
    inputs = Inputs(folder, small_recipe(quality={"tasks": ["./task.yaml"]}, healing={"tokens": 1024}))
    inputs.write_recipe()
    return inputs


def wait_for_cpus(expected: float, timeout_s: float = 20) -> None:
    """Waits until the connected cluster has so many CPUs to give."""
    import ray

    from tests.cluster.hosts import wait_until

    def free() -> float:
        return ray.available_resources().get("CPU", 0.0)

    wait_until(lambda: free() == expected, lambda: f"{expected} CPUs to give, there are {free()}", timeout_s)


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real filesystem of a size, as mount's tmpfs takes it, at a new folder; skips where that needs more rights."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a filesystem")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
