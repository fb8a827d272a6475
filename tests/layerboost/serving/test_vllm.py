"""Tests that vLLM serves converted checkpoints with the tokens of transformers and the blocks of the plan.

The tests need an environment with vLLM (layerboost/serving/make_environment.sh); LAYERBOOST_VLLM_PYTHON names its
python.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerboost import Plan, convert
from layerboost.attention import LinearWindow
from layerboost.checkpoint import load_model, load_tokenizer, save_checkpoint
from layerboost.smallworld.train import MODEL_DIR
from layerboost.treatments import AffineMap
from tests.models import tiny_model

VLLM_PYTHON = os.environ.get("LAYERBOOST_VLLM_PYTHON")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        VLLM_PYTHON is None, reason="LAYERBOOST_VLLM_PYTHON names no python of an environment with vLLM"
    ),
]

WINDOW, NEW_TOKENS, N_PROMPTS = 7, 16, 200
KV_CACHE_GIB = 1
# vLLM's attention for CPUs needs a head dimension of at least 32.
SHAPE = {"num_hidden_layers": 6, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
CHECKPOINTS = {
    "mixed": ("llama", "NSWLSN"),
    "grouped": ("llama", "LSNWLN"),
    "mistral": ("mistral", "NSWLSN"),
    "qwen2": ("qwen2", "NSWLSS"),
    "qwen3": ("qwen3", "LSNWLS"),
    "softmax": ("llama", "SSSSSS"),
    "half": ("llama", "NSNSNS"),
    "third": ("llama", "NNSNNS"),
    "states": ("llama", "LLLLLL"),
    "windows": ("qwen3", "WWWWWW"),
    "sinks": ("llama", "NSWLAN+2"),
    "windows with sinks": ("qwen3", "WWSWWW+3"),
    "kept windows": ("llama", "WWWWWW+3"),
    "states with sinks": ("llama", "LLLLLL+1"),
    "maps": ("qwen2", "ASAWAA"),
    "nothing": ("llama", "NNNNNN"),
    "too much": ("llama", "NSWLSN"),
    "too little": ("llama", "NSWLSN"),
    "gemma": ("gemma2", "NSSLNW"),
}
SERVED = [name for name in CHECKPOINTS if name not in ("too much", "too little", "gemma")]


def environment() -> dict[str, str]:
    """Returns variables for one thread, without network and without our own PYTHON variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Writes the checkpoints of CHECKPOINTS, and the embedded model converted as `smallworld`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    parents = {}
    for name, (family, letters) in CHECKPOINTS.items():
        shape = SHAPE | ({"num_attention_heads": 4, "num_key_value_heads": 2} if name == "grouped" else {})
        parent = parents.setdefault((family, shape["num_key_value_heads"]), tiny_model(family, seed=3, **shape))
        letters, _, sinks = letters.partition("+")
        save_checkpoint(with_maps(convert(parent, Plan.parse(letters, WINDOW, int(sinks or 0)))), None, folder / name)
    claim_plan(folder / "too much" / "config.json", "NSWSSN")
    claim_plan(folder / "too little" / "config.json", "NSWLSS")
    model = convert(load_model(str(MODEL_DIR)), Plan.parse("NSLWSLNSLWSS", 16))
    save_checkpoint(with_maps(model), load_tokenizer(str(MODEL_DIR)), folder / "smallworld")
    return folder


@torch.no_grad()
def with_maps(model):
    """Changes the feature maps, and the maps of affine layers, so that they affect the output."""
    torch.manual_seed(5)
    for module in model.modules():
        if isinstance(module, LinearWindow | AffineMap):
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def claim_plan(config_path: Path, letters: str) -> None:
    """Writes a plan into the configuration that does not fit the weights."""
    config = json.loads(config_path.read_text())
    config["layerboost"]["plan"] = letters
    config_path.write_text(json.dumps(config))


def prompts(n_prompts: int, vocabulary: int = 97, longest: int = 90) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (n_prompts,), generator=random).tolist()
    return [torch.randint(3, vocabulary, (length,), generator=random).tolist() for length in lengths]


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict]:
    """Runs all checkpoints in one vLLM process, with prefills in chunks of at most 48 tokens; returns the results."""
    engine = {"max_model_len": 128, "max_num_seqs": 32, "max_num_batched_tokens": 48}
    job = {"new_tokens": NEW_TOKENS, "engine": engine}
    few = dict.fromkeys(("softmax", "half", "third", "too much", "too little", "gemma"), 20)
    jobs = {
        name: job | {"model": str(folder / name), "prompts": prompts(few.get(name, N_PROMPTS))} for name in CHECKPOINTS
    }
    jobs["smallworld"] = job | {
        "model": str(folder / "smallworld"),
        "prompts": prompts(N_PROMPTS, vocabulary=541, longest=400),
        "engine": engine | {"max_model_len": 512, "max_num_batched_tokens": 256},
    }
    for name, n_blocks in (("mixed", 300), ("states", 100)):  # these are fewer blocks than all requests need at once
        crowded = {
            "max_num_seqs": 256,
            "max_num_batched_tokens": 256,
            "block_size": 16,
            "num_gpu_blocks_override": n_blocks,
        }
        jobs[f"crowd of {name}"] = jobs[name] | {"engine": engine | crowded}
    jobs["abort"] = jobs["mixed"] | {"prompts": prompts(8), "abort": [1, 4, 5]}
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    driver = Path(__file__).with_name("vllm_driver.py")
    command = [VLLM_PYTHON, driver, folder / "jobs.json", folder / "results.json"]
    with (folder / "log").open("w") as log:
        status = subprocess.run(command, env=environment(), cwd=folder, stdout=log, stderr=log).returncode
    assert status == 0, (folder / "log").read_text()[-4000:]
    return dict(zip(jobs, json.loads((folder / "results.json").read_text()), strict=True))


@torch.inference_mode()
def check_tokens(model, prompt: list[int], tokens: list[int], logprobs: list[float] | None) -> None:
    """Asserts that each token is the one that transformers would choose, with the same log-probability."""
    ours = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
    assert ours.argmax(dim=-1).tolist() == tokens
    if logprobs is not None:
        assert ours.amax(dim=-1).tolist() == pytest.approx(logprobs, abs=1e-3)


@pytest.mark.parametrize("name", [*SERVED, "smallworld", "crowd of mixed", "crowd of states"])
def test_tokens_and_log_probabilities_are_those_of_transformers(name, results, folder, one_thread):
    model = AutoModelForCausalLM.from_pretrained(folder / name.removeprefix("crowd of ")).eval()
    result = results[name]
    given = prompts(len(result["tokens"]), model.config.vocab_size, 400 if name == "smallworld" else 90)
    assert all(len(tokens) == NEW_TOKENS for tokens in result["tokens"])
    for prompt, tokens, logprobs in zip(given, result["tokens"], result["logprobs"], strict=True):
        check_tokens(model, prompt, tokens, logprobs)
    assert result["free_blocks_after"] == result["free_blocks_before"]


def test_blocks_are_the_memory_by_what_softmax_layers_keep(results):
    for name in ("softmax", "half", "third"):
        n_softmax = CHECKPOINTS[name][1].count("S")
        (block_tokens,) = set(results[name]["block_tokens"])
        page_bytes = 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"] * 4 * block_tokens
        assert results[name]["page_bytes"] == [page_bytes]
        assert results[name]["n_blocks"] == KV_CACHE_GIB * 2**30 // (page_bytes * n_softmax)
    assert results["nothing"]["group_layers"] == []


def test_a_state_takes_what_the_plan_says(results):
    kv_heads, dim = SHAPE["num_key_value_heads"], SHAPE["head_dim"]
    state_bytes = 4 * kv_heads * (2 * dim * (dim + 1) + 2 * WINDOW * dim)
    assert results["states"]["page_bytes"] == [state_bytes]
    assert results["states"]["n_blocks"] == KV_CACHE_GIB * 2**30 // (state_bytes * 6)


def test_windows_with_sinks_keep_no_sums_where_no_layer_has_any(results):
    window_bytes = 4 * SHAPE["num_key_value_heads"] * 2 * WINDOW * SHAPE["head_dim"]
    assert results["kept windows"]["page_bytes"] == [window_bytes]


def test_removed_layers_own_nothing_and_others_what_they_are(results):
    layers = sorted(name for group in results["mixed"]["group_layers"] for name in group)
    assert layers == [f"model.layers.{layer}.self_attn.attn" for layer in (1, 2, 3, 4)]


def test_an_aborted_request_frees_its_blocks_and_the_others_finish(results, folder, one_thread):
    result = results["abort"]
    assert sorted(map(int, result["finished"])) == [0, 2, 3, 6, 7]
    freed = result["free_blocks_aborted"] - result["free_blocks_running"]
    assert freed >= 3 * len(result["group_layers"])  # at least one block for each group of layers
    assert result["free_blocks_after"] == result["free_blocks_before"]
    model, given = AutoModelForCausalLM.from_pretrained(folder / "mixed").eval(), prompts(8)
    for number, tokens in result["finished"].items():
        check_tokens(model, given[int(number)], tokens, None)


def test_weights_of_another_plan_are_refused(results):
    unused = "checkpoint: no parameter takes model.layers.3.self_attn.linear_window."
    assert unused in results["too much"]["error"]
    assert "checkpoint: model.layers.5.input_layernorm.weight and 4 more are missing" in results["too little"]["error"]


def test_a_family_that_is_not_served_is_named(results):
    assert "model_type: 'layerboost_gemma2' cannot be served by vLLM" in results["gemma"]["error"]


def test_vllm_serve_answers_over_http(folder, one_thread):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program, model = Path(VLLM_PYTHON).with_name("vllm"), folder / "smallworld"
    command = [program, "serve", model, "--port", str(port), "--dtype", "float32"]  # only this dtype gives equal tokens
    url = f"http://127.0.0.1:{port}"
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen(command, env=environment(), cwd=folder, stdout=log, stderr=log)
    try:
        wait_until_healthy(server, url, folder / "serve.log")
        given = prompts(20, vocabulary=541, longest=300)
        with ThreadPoolExecutor(len(given)) as pool:
            answers = list(pool.map(lambda prompt: complete(url, str(model), prompt), given))
    finally:
        server.terminate()
        server.wait(60)
    reference = load_model(str(model))
    for prompt, answer in zip(given, answers, strict=True):
        check_tokens(reference, prompt, answer["token_ids"], answer["logprobs"]["token_logprobs"])


def wait_until_healthy(server: subprocess.Popen, url: str, log: Path, seconds: float = 600) -> None:
    for _ in range(int(seconds)):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    pytest.fail(f"not healthy after {seconds} s: {log.read_text()[-4000:]}")


def complete(url: str, model: str, prompt: list[int]) -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 1, "return_token_ids": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]
