"""Measures what serving a model in vLLM costs, with vLLM's own server and benchmark client."""

from __future__ import annotations

import json
import math
import re
import socket
import statistics
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .child_processes import Scratch, scratch_folder
from .vllm_environment import ServingEnvironment, ServingError, cause_of, environment_variables

VLLM = "vllm"

START_LIMIT_S = 1800.0
"""Time limit for reading the weights and compiling, until the server answers."""
BENCH_LIMIT_S = 3600.0
_POLL_S = 0.2
_LOG_LINES = 25
_MIN_SEQUENCES = 256
_MIN_REQUESTS, _PROMPTS_PER_SEQUENCE = 16, 4
"""Minimum requests of a run, and requests per concurrent one: enough for the last, less busy part to matter little."""
_PERCENTILES = {f"{name}_ms_p{p}": f"p{p}_{name}_ms" for name in ("ttft", "tpot", "itl") for p in (50, 99)}
"""The client's names for the percentiles of `ServingMeasurement`."""


@dataclass(frozen=True)
class ServingCondition:
    """Describes what the client sends: concurrent requests with random prompts, each for a number of new tokens.

    Attributes:
        concurrency: Requests at a time.
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens to generate for each request.
        repeats: Number of runs of the client.
        seed: Seed of the prompts.
    """

    concurrency: int
    prompt_tokens: int
    new_tokens: int
    repeats: int = 3
    seed: int = 0

    @property
    def n_requests(self) -> int:
        return max(_MIN_REQUESTS, _PROMPTS_PER_SEQUENCE * self.concurrency)


@dataclass(frozen=True)
class ServingMeasurement:
    """Holds the cost of one serving condition with vLLM; fields shared with `DecodeMeasurement` have the same names.

    Attributes:
        output_throughput_tok_per_s: Generated tokens of a run over its seconds, including prefill and scheduling. This
            and the following values are medians over the repeats.
        output_throughput_stderr: Standard error of the mean of the repeats.
        ttft_ms_p50, ttft_ms_p99: Time to first token, over the requests.
        tpot_ms_p50, tpot_ms_p99: Each request's time per output token, without the first token.
        itl_ms_p50, itl_ms_p99: Time between two tokens of a request.
        peak_memory_mib: Always None, because vLLM fills the memory that it gets with KV cache, whatever the model
            needs.
        kv_bytes_per_token: Bytes by which the cache grows for each token of one sequence, past every window, as
            `byte_model` counts them.
        kv_blocks, kv_block_tokens: Blocks of the engine's KV cache, and tokens of a block; None without a cache.
        kv_cache_tokens: Tokens of sequences of the maximum length that the cache can hold together.
        n_requests: Requests of each repeat, all of which were answered in full.
    """

    engine: str
    engine_version: str
    hardware: str
    dtype: str
    concurrency: int
    prompt_tokens: int
    new_tokens: int
    output_throughput_tok_per_s: float
    output_throughput_stderr: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    tpot_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    peak_memory_mib: None
    kv_bytes_per_token: float
    kv_blocks: int | None
    kv_block_tokens: int | None
    kv_cache_tokens: int | None
    n_requests: int
    repeats_tok_per_s: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ServingMeasurement:
        return cls(**data)

    def scaled(self, factor: float) -> ServingMeasurement:
        """Returns the measurement as it would have been on a machine `factor` times as fast."""
        return replace(
            self,
            output_throughput_tok_per_s=self.output_throughput_tok_per_s * factor,
            output_throughput_stderr=self.output_throughput_stderr * factor,
            repeats_tok_per_s=[speed * factor for speed in self.repeats_tok_per_s],
            **{name: getattr(self, name) / factor for name in _PERCENTILES},
        )


def local_checkpoint(name: str, revision: str | None = None) -> Path:
    """Returns the folder of a checkpoint, after downloading the safetensors and metadata if `name` is a hub name."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def measure_served(
    environment: ServingEnvironment,
    model: Path | Callable[[Path], None],
    conditions: Sequence[ServingCondition],
    *,
    dtype: str = "auto",
    start_limit_s: float = START_LIMIT_S,
    on_result: Callable[[ServingCondition, ServingMeasurement | ServingError], None],
) -> None:
    """Serves one model and measures all conditions one after the other; processes and files are cleaned up.

    Args:
        environment: The environment that has vLLM.
        model: Folder of a checkpoint, or a function that writes one into a given folder, which is deleted afterwards.
        conditions: The conditions to measure.
        dtype: `auto` serves the model as it was saved, whereas vLLM itself would narrow float32.
        start_limit_s: Time limit until the server is healthy.
        on_result: Called with the result of each condition; if one fails the others still run.

    Raises:
        ServingError: The model cannot be served.
    """
    with scratch_folder() as scratch:
        folder = scratch.folder / "model" if callable(model) else model
        if callable(model):
            model(folder)
        dtype, kv_bytes = _dtype_and_kv_bytes(folder, dtype)
        n_sequences = max(_MIN_SEQUENCES, *(condition.concurrency for condition in conditions))
        server = _serve(scratch, environment, folder, dtype, n_sequences, start_limit_s)
        cache = server.kv_cache()
        for condition in conditions:
            try:
                runs = [_ask(server, condition, first=not repeat) for repeat in range(condition.repeats)]
            except ServingError as error:
                on_result(condition, error)
            else:
                on_result(condition, _measurement(environment, condition, runs, dtype, kv_bytes, cache))


def _measurement(
    environment: ServingEnvironment,
    condition: ServingCondition,
    runs: Sequence[dict[str, Any]],
    dtype: str,
    kv_bytes: float,
    cache: _KvCache,
) -> ServingMeasurement:
    speeds = [run["output_throughput"] for run in runs]
    return ServingMeasurement(
        engine=VLLM,
        engine_version=environment.vllm,
        hardware=environment.hardware,
        dtype=dtype,
        concurrency=condition.concurrency,
        prompt_tokens=condition.prompt_tokens,
        new_tokens=condition.new_tokens,
        output_throughput_tok_per_s=statistics.median(speeds),
        output_throughput_stderr=statistics.stdev(speeds) / math.sqrt(len(speeds)),
        **{ours: statistics.median(run[theirs] for run in runs) for ours, theirs in _PERCENTILES.items()},
        peak_memory_mib=None,
        kv_bytes_per_token=kv_bytes,
        kv_blocks=cache.n_blocks,
        kv_block_tokens=cache.block_tokens,
        kv_cache_tokens=cache.n_tokens,
        n_requests=condition.n_requests,
        repeats_tok_per_s=speeds,
    )


def _dtype_and_kv_bytes(folder: Path, dtype: str) -> tuple[str, float]:
    """Returns the dtype that a checkpoint is served in, and the bytes of a token in its cache."""
    import torch
    from transformers import AutoConfig

    from ..convert import parent_config
    from ..plan import Plan, Treatment
    from .byte_model import kv_bytes_of_layers

    config = AutoConfig.from_pretrained(folder)
    saved = config.dtype or torch.float32
    numbers = saved if dtype == "auto" else getattr(torch, dtype)
    parent, record = parent_config(config), getattr(config, "layerboost", None)
    plan = Plan.from_dict(record) if record else Plan.uniform(Treatment.SOFTMAX, parent.num_hidden_layers)
    of_layers = kv_bytes_of_layers(parent, numbers.itemsize)
    return str(numbers).removeprefix("torch."), sum(of_layers[t][i] for i, t in enumerate(plan.treatments))


@dataclass(frozen=True)
class _Server:
    """Holds a running `vllm serve`."""

    scratch: Scratch
    environment: ServingEnvironment
    model: Path
    port: int
    process: subprocess.Popen
    log: Path

    def check_running(self) -> None:
        """Raises ServingError with the end of the log if the server has ended."""
        if self.process.poll() is not None:
            text = self.log.read_text(errors="replace")
            raise ServingError(f"vllm serve ended with exit {self.process.returncode}: {cause_of(text)}\n{_tail(text)}")

    def get(self, path: str) -> str:
        # Proxies are bypassed, because the server is on the loopback interface.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def kv_cache(self) -> _KvCache:
        line = next((line for line in self.get("/metrics").splitlines() if "cache_config_info{" in line), "")
        told = dict(re.findall(r'(\w+)="([^"]*)"', line))
        names = ("num_gpu_blocks", "block_size", "kv_cache_size_tokens")
        return _KvCache(*(int(told[name]) if told.get(name, "").isdigit() else None for name in names))


class _KvCache(NamedTuple):
    """Holds what the engine reports about its cache; see ServingMeasurement."""

    n_blocks: int | None
    block_tokens: int | None
    n_tokens: int | None


def _serve(
    scratch: Scratch, environment: ServingEnvironment, model: Path, dtype: str, n_sequences: int, start_limit_s: float
) -> _Server:
    """Starts a server and waits until it is healthy.

    The flags are the same for every model. Prefix caching is off for all of them: prompts repeat with each run of the
    client, and a plan with constant-state layers could not reuse their beginnings as its parent could.
    """
    port, log = _free_port(), scratch.folder / "server.log"
    command = [Path(environment.folder) / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", "--port", port]
    command += ["--dtype", dtype, "--max-num-seqs", n_sequences, "--no-enable-prefix-caching"]
    command += ["--disable-uvicorn-access-log"]
    process = scratch.start(command, log, environment_variables(Path(environment.folder)))
    server = _Server(scratch, environment, model, port, process, log)
    started = time.monotonic()
    while True:
        server.check_running()
        try:
            server.get("/health")
        except (urllib.error.URLError, OSError):  # the server does not answer yet
            if time.monotonic() - started > start_limit_s:
                text = log.read_text(errors="replace")
                raise ServingError(
                    f"vllm serve was not healthy after {start_limit_s:g} s: {cause_of(text)}\n{_tail(text)}"
                ) from None
            time.sleep(_POLL_S)
        else:
            server.check_running()
            return server


def _ask(server: _Server, condition: ServingCondition, *, first: bool) -> dict[str, Any]:
    """Runs the client once; the first run of a condition warms up.

    Returns:
        The client's result.

    Raises:
        ServingError: The client or the server failed, or a request was lost, refused or cut short.
    """
    server.check_running()
    folder = server.scratch.folder
    result, log = folder / "result.json", folder / "client.log"
    result.unlink(missing_ok=True)
    command = [Path(server.environment.folder) / "bin" / "vllm", "bench", "serve", "--model", server.model]
    command += ["--host", "127.0.0.1", "--port", server.port, "--dataset-name", "random", "--seed", condition.seed]
    command += ["--max-concurrency", condition.concurrency, "--num-prompts", condition.n_requests]
    command += ["--random-input-len", condition.prompt_tokens, "--random-output-len", condition.new_tokens]
    command += ["--num-warmups", condition.concurrency if first else 0, "--ignore-eos", "--temperature", 0]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99", "--disable-tqdm"]
    command += ["--save-result", "--save-detailed", "--result-dir", folder, "--result-filename", result.name]
    process = server.scratch.start(command, log, environment_variables(Path(server.environment.folder)))
    started = time.monotonic()
    try:
        while process.poll() is None:
            server.check_running()
            if time.monotonic() - started > BENCH_LIMIT_S:
                raise ServingError(f"vllm bench serve had not finished after {BENCH_LIMIT_S:g} s")
            time.sleep(_POLL_S)
    finally:
        server.scratch.end(process, ask=False)
    if process.returncode or not result.is_file():
        text = log.read_text(errors="replace")
        raise ServingError(f"vllm bench serve ended with exit {process.returncode}: {cause_of(text)}\n{_tail(text)}")
    found = json.loads(result.read_text())
    check_answers(found, condition)
    return found


def check_answers(result: dict[str, Any], condition: ServingCondition) -> None:
    """Raises ServingError unless every request of a client's result was answered with all its tokens."""
    answered, tokens = result["completed"], result["total_output_tokens"]
    expected = condition.n_requests * condition.new_tokens
    if answered == condition.n_requests and not result["failed"] and tokens == expected:
        return
    reason = next((" ".join(error.split()) for error in result.get("errors", ()) if error), "no reason given")
    raise ServingError(
        f"{answered} of {condition.n_requests} requests were answered, with {tokens} of {expected} tokens, "
        f"at concurrency {condition.concurrency}: {reason[:300]}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(log: str) -> str:
    return "\n".join(log.splitlines()[-_LOG_LINES:])
