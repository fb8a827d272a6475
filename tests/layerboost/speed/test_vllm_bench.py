"""Tests serving with vLLM: the life of a server, the results of its client, and the cleanup if either fails."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig

import layerboost
from layerboost.convert import convert
from layerboost.plan import Plan
from layerboost.speed import child_processes, vllm_bench
from layerboost.speed.hardware import hardware_name
from layerboost.speed.vllm_bench import ServingCondition, ServingMeasurement, check_answers, measure_served
from layerboost.speed.vllm_environment import (
    ServingEnvironment,
    ServingError,
    cause_of,
    check_served,
    environment_variables,
    find_environment,
)

FAKE_VLLM = """
import http.server, json, os, signal, subprocess, sys, time, urllib.request

command, arguments = sys.argv[1], sys.argv[2:]
mode = os.environ.get("FAKE_VLLM", "")
port = int(arguments[arguments.index("--port") + 1])


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        info = 'vllm:cache_config_info{block_size="16",kv_cache_size_tokens="1024",num_gpu_blocks="64"} 1.0'
        self.answer(503 if mode == "never healthy" else 200, info if self.path == "/metrics" else "")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if mode == "dies asked":
            os._exit(3)
        self.answer(500 if mode == "loses" and asked["n"] % 5 == 1 and asked["crowd"] > 1 else 200, "")

    def answer(self, code, text):
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


if command == "serve":
    if mode == "exits":
        print("Traceback\\nValueError: the weights do not fit\\nRuntimeError: see root cause above")
        sys.exit(1)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleeper = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    subprocess.Popen([sys.executable, "-S", "-c", sleeper])
    print("serving", arguments[0], " ".join(arguments[1:]), flush=True)
    http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()

given = dict(zip(arguments[1::2], arguments[2::2]))
def number(name):
    return int(arguments[arguments.index(name) + 1])
n, crowd, tokens = number("--num-prompts"), number("--max-concurrency"), number("--random-output-len")
errors = []
for i in range(n):
    body = json.dumps({"n": i, "crowd": crowd}).encode()
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/completions", body).close()
        errors.append("")
    except OSError as error:
        errors.append(str(error))
    if mode == "dies asked":
        time.sleep(60)
good = errors.count("")
result = {"completed": good, "failed": n - good, "total_output_tokens": good * tokens, "errors": errors}
runs = os.environ["FAKE_VLLM_RUNS"]
with open(runs, "a") as file:
    file.write(json.dumps({"words": arguments, "env": dict(os.environ), "cwd": os.getcwd()}) + "\\n")
speed = 100.0 * crowd + len(open(runs).readlines()) % 3
result["output_throughput"] = speed
result |= {f"p{p}_{name}_ms": crowd + p / 100 for name in ("ttft", "tpot", "itl") for p in (50, 99)}
folder, name = (arguments[arguments.index(f"--result-{x}") + 1] for x in ("dir", "filename"))
with open(os.path.join(folder, name), "w") as file:
    json.dump(result, file)
"""


@pytest.fixture
def environment(tmp_path, monkeypatch) -> ServingEnvironment:
    """Makes an environment whose `vllm` speaks HTTP, ends on signals and fails as the variable FAKE_VLLM says."""
    folder = tmp_path / "environment"
    _write_program(folder / "bin" / "vllm", f"#!{sys.executable} -S\n{FAKE_VLLM}")
    monkeypatch.setenv("FAKE_VLLM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(child_processes, "STOP_S", 0.3)
    monkeypatch.setattr(vllm_bench, "_POLL_S", 0.02)
    return ServingEnvironment(str(folder), "0.0", "0.0", "0.0", "0.0", "a machine (2 cores)")


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    _config().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Asserts after every test that no process and no folder of its servers is left."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    before = {process.pid for process in psutil.process_iter()}
    yield
    left = _others(before, str(tmp_path))
    for process in left:
        process.kill()
    assert left == [] and list(place.iterdir()) == []


def _others(before: set[int], place: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if p.pid not in before and p.status() != "zombie" and _works_in(p, place)]


def _works_in(process: psutil.Process, place: str) -> bool:
    try:
        return process.cwd().startswith(place)
    except psutil.Error:
        return False


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        dtype="bfloat16",
    )


def _write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _measure(
    environment, model, *concurrency: int, repeats: int = 3, **more
) -> dict[int, ServingMeasurement | ServingError]:
    found: dict[int, ServingMeasurement | ServingError] = {}
    conditions = [ServingCondition(n, prompt_tokens=12, new_tokens=4, repeats=repeats) for n in concurrency or (1,)]
    measure_served(environment, model, conditions, on_result=lambda c, r: found.update({c.concurrency: r}), **more)
    return found


def test_one_server_is_asked_under_all_conditions(environment, model, tmp_path):
    found = _measure(environment, model, 1, 8)
    one, eight = found[1], found[8]
    assert isinstance(one, ServingMeasurement) and isinstance(eight, ServingMeasurement)
    assert one.repeats_tok_per_s == [101.0, 102.0, 100.0] and one.output_throughput_tok_per_s == 101.0
    assert one.output_throughput_stderr == pytest.approx(1 / 3**0.5)
    assert (eight.ttft_ms_p50, eight.tpot_ms_p99, eight.itl_ms_p50) == (8.5, 8.99, 8.5)
    assert (one.kv_blocks, one.kv_block_tokens, one.kv_cache_tokens) == (64, 16, 1024)
    assert (one.engine, one.dtype, one.kv_bytes_per_token, one.peak_memory_mib) == ("vllm", "bfloat16", 3 * 64, None)
    assert (one.n_requests, eight.n_requests) == (16, 32)
    runs = [json.loads(line) for line in (tmp_path / "runs").read_text().splitlines()]
    assert len(runs) == 6 and len({run["words"][run["words"].index("--port") + 1] for run in runs}) == 1
    warm_ups = [run["words"][run["words"].index("--num-warmups") + 1] for run in runs]
    assert warm_ups == ["1", "0", "0", "8", "0", "0"]
    told = runs[0]["env"]
    assert "PYTHONPATH" not in told and told["VLLM_NO_USAGE_STATS"] == told["DO_NOT_TRACK"] == "1"
    assert told["PATH"].startswith(environment.folder) and "127.0.0.1" in told["no_proxy"]


def test_what_a_writer_wrote_is_served_and_deleted(environment, tmp_path):
    written = []

    def write(folder: Path) -> None:
        written.append(folder)
        converted = convert_config("SNW")
        converted.save_pretrained(folder)

    found = _measure(environment, write, dtype="float32")
    assert found[1].kv_bytes_per_token == 128 and found[1].dtype == "float32"
    assert not written[0].exists()


def convert_config(plan: str):
    from transformers import AutoModelForCausalLM

    return convert(AutoModelForCausalLM.from_config(_config()), Plan.parse(plan, 4)).config


def test_scaling_changes_speeds_and_latencies_and_nothing_else(environment, model):
    measured = _measure(environment, model)[1]
    assert ServingMeasurement.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured
    twice, was = measured.scaled(2.0).to_dict(), measured.to_dict()
    changed = {
        name: twice[name] / was[name] for name in was if isinstance(was[name], float) and twice[name] != was[name]
    }
    assert {name for name, ratio in changed.items() if ratio == pytest.approx(2.0)} == {
        "output_throughput_tok_per_s",
        "output_throughput_stderr",
    }
    assert len(changed) == 8 and twice["repeats_tok_per_s"] == [202.0, 204.0, 200.0]


def test_a_server_that_ends_says_why(environment, model, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "exits")
    with pytest.raises(ServingError) as caught:
        _measure(environment, model)
    first, *log = str(caught.value).splitlines()
    assert first == "vllm serve ended with exit 1: ValueError: the weights do not fit"
    assert log == ["Traceback", "ValueError: the weights do not fit", "RuntimeError: see root cause above"]


def test_a_server_that_never_gets_healthy_is_given_up(environment, model, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "never healthy")
    with pytest.raises(ServingError, match=r"not healthy after 0\.5 s: "):
        _measure(environment, model, start_limit_s=0.5)


def test_a_server_that_will_not_end_is_made_to(environment, model, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    assert isinstance(_measure(environment, model)[1], ServingMeasurement)


def test_a_lost_request_fails_its_condition_alone(environment, model, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "loses")
    found = _measure(environment, model, 2, 1)
    assert isinstance(found[1], ServingMeasurement) and isinstance(found[2], ServingError)
    assert "13 of 16 requests" in str(found[2]) and "concurrency 2: HTTP Error 500" in str(found[2])


def test_a_server_that_dies_while_it_is_asked_takes_the_client_with_it(environment, model, monkeypatch):
    monkeypatch.setenv("FAKE_VLLM", "dies asked")
    found = _measure(environment, model, 1, 2)
    assert all(isinstance(error, ServingError) for error in found.values()) and list(found) == [1, 2]
    assert "vllm serve ended with exit 3" in str(found[1]) and "vllm serve ended with exit 3" in str(found[2])


def test_what_interrupts_a_measurement_ends_the_server(environment, model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vllm_bench, "_ask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _measure(environment, model)


OWNER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("child_processes", sys.argv[1])
child_processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child_processes)
import pathlib
with child_processes.scratch_folder() as place:
    server = place.start(["sh", "-c", "trap '' TERM; sleep 60 & sleep 60"], place.folder / "log", {})
    print(server.pid, place.folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_who_started_it(with_signal, tmp_path):
    variables = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
    command = [sys.executable, "-c", OWNER, child_processes.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables) as owner:
        assert owner.stdout is not None
        leader, folder = owner.stdout.readline().split()
        assert _becomes(lambda: len(child_processes._group(int(leader))) == 3 and Path(folder).is_dir())
        owner.send_signal(with_signal)
    assert _becomes(lambda: child_processes._group(int(leader)) == [] and not Path(folder).exists())


def _becomes(holds: Callable[[], bool], limit_s: float = 30.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_a_cause_is_the_last_error_that_is_not_about_another():
    assert cause_of("") == "it said nothing"
    assert cause_of("starting\n\n  listening \n") == "listening"
    log = "(Worker) torch.OutOfMemoryError: no room\nKeyError: 'x'\nRuntimeError: failed. See root cause above."
    assert cause_of(log) == "KeyError: 'x'"


def test_short_answers_count_as_lost():
    condition = ServingCondition(1, 12, new_tokens=4)
    whole = {"completed": 16, "failed": 0, "total_output_tokens": 64, "errors": [""] * 16}
    check_answers(whole, condition)
    with pytest.raises(ServingError, match="with 63 of 64 tokens"):
        check_answers({**whole, "total_output_tokens": 63}, condition)


def test_a_result_of_the_real_client_is_read(environment):
    """The result is that of vLLM 0.32's client, without the entries for single requests."""
    told = {
        "num_prompts": 32,
        "max_concurrency": 8,
        "duration": 0.5858639080033754,
        "completed": 32,
        "failed": 0,
        "total_input_tokens": 4110,
        "total_output_tokens": 1024,
        "request_throughput": 54.620193466185725,
        "output_throughput": 1747.8461909179432,
        "total_token_throughput": 8763.127289231172,
        "mean_ttft_ms": 45.2,
        "median_ttft_ms": 45.909,
        "std_ttft_ms": 13.145,
        "p50_ttft_ms": 45.909,
        "p99_ttft_ms": 60.673,
        "mean_tpot_ms": 3.233,
        "median_tpot_ms": 3.156,
        "p50_tpot_ms": 3.156,
        "p99_tpot_ms": 4.149,
        "mean_itl_ms": 3.233,
        "p50_itl_ms": 2.975,
        "p99_itl_ms": 52.292,
    }
    condition = ServingCondition(8, 128, 32)
    check_answers(told, condition)
    runs = [told, {**told, "output_throughput": 1557.1, "p99_itl_ms": 60.0}, {**told, "output_throughput": 359.6}]
    cache = vllm_bench._KvCache(5461, 128, 699008)
    read = vllm_bench._measurement(environment, condition, runs, "float32", 6144.0, cache)
    assert (read.output_throughput_tok_per_s, read.itl_ms_p99, read.ttft_ms_p50) == (1557.1, 52.292, 45.909)
    assert read.kv_cache_tokens == 699008 and read.n_requests == 32


@pytest.mark.slow
@pytest.mark.skipif(
    "LAYERBOOST_VLLM_PYTHON" not in os.environ, reason="LAYERBOOST_VLLM_PYTHON names no Python with vllm"
)
def test_a_plan_is_served_for_real(tmp_path):
    from layerboost.checkpoint import load_model, load_tokenizer, save_checkpoint

    parent = str(Path(layerboost.__file__).parent / "smallworld" / "model")
    environment = find_environment(str(Path(os.environ["LAYERBOOST_VLLM_PYTHON"]).parents[1]))

    def write(folder: Path) -> None:
        save_checkpoint(convert(load_model(parent), Plan.parse("NSSNSSNSSNSS")), load_tokenizer(parent), folder)

    found = _measure(environment, write, 4, repeats=2)[4]
    assert isinstance(found, ServingMeasurement), found
    cache_bytes = int(environment_variables(tmp_path)["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
    assert found.kv_cache_tokens == pytest.approx(cache_bytes / found.kv_bytes_per_token, rel=0.01)
    assert found.output_throughput_tok_per_s > 10 and found.itl_ms_p99 >= found.itl_ms_p50


def test_families_that_the_plugin_does_not_serve_are_named():
    check_served("qwen3")
    check_served("layerboost_llama")
    with pytest.raises(ServingError, match="'gemma2', only of llama, mistral"):
        check_served("layerboost_gemma2")


def _fake_python(folder: Path, packages: dict[str, str | None]) -> None:
    """Makes a Python with these packages and their entry points; None makes a module without a distribution."""
    libraries = folder / "lib"
    for name, entry_points in packages.items():
        (libraries / name).mkdir(parents=True)
        (libraries / name / "__init__.py").write_text("def register():\n    pass\n")
        if entry_points is not None:
            _write_metadata(libraries / f"{name}-7.5.dist-info", name, entry_points)
    for name in ("torch", "transformers"):
        _write_metadata(libraries / f"{name}-7.5.dist-info", name, "")
    (libraries / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    (libraries / "layerboost").mkdir()
    (libraries / "layerboost" / "version.py").write_text("__version__ = '7.5'\n")
    _write_program(folder / "bin" / "python", f'#!/bin/sh\nPYTHONPATH={libraries} exec {sys.executable} -S "$@"\n')
    _write_program(folder / "bin" / "vllm", "#!/bin/sh\n")


def _write_metadata(folder: Path, name: str, entry_points: str) -> None:
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 7.5\n")
    (folder / "entry_points.txt").write_text(entry_points)


ELSEWHERE = "[vllm.general_plugins]\nlayerboost = nowhere:register\n"
PLUGIN = "[vllm.general_plugins]\nlayerboost = vllm_plugin:register\n"


def test_an_environment_is_looked_into(tmp_path):
    folder = tmp_path / "environment"
    with pytest.raises(ServingError, match="no bin/python"):
        find_environment(str(folder))
    _fake_python(folder, {"vllm": "", "vllm_plugin": PLUGIN})
    found = find_environment(str(folder))
    assert set(found.versions.values()) == {"7.5"} and found.folder == str(folder)
    assert found == ServingEnvironment("elsewhere", **found.versions, hardware=hardware_name("cpu"))


@pytest.mark.parametrize(
    ("packages", "lacking"),
    [
        ({"other": ""}, "has no vllm; make"),
        ({"vllm": ""}, "without LayerBoost's plugin; make"),
        ({"vllm": None, "vllm_plugin": PLUGIN}, "does not know its own version; make"),
        (
            {"vllm": "", "vllm_plugin": PLUGIN.replace("_plugin:", "_elsewhere:")},
            "No module named 'vllm_elsewhere'; make",
        ),
    ],
)
def test_what_an_environment_lacks_is_named(packages, lacking, tmp_path):
    _fake_python(tmp_path, packages)
    with pytest.raises(ServingError, match=lacking):
        find_environment(str(tmp_path))


def test_the_space_of_the_cache_is_ones_own_where_it_is_set(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert environment_variables(tmp_path)["VLLM_CPU_KVCACHE_SPACE"] == "4"
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    assert environment_variables(tmp_path)["VLLM_CPU_KVCACHE_SPACE"] == "9"
