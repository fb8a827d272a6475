"""Tests the command line: errors of wrong inputs, exit codes, and commands for single checkpoints on a tiny model."""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from layerboost.checkpoint import load_model
from layerboost.families import attention_module
from layerboost.speed.vllm_bench import ServingMeasurement
from layerboost.speed.vllm_environment import ServingEnvironment
from orchestrator import cli
from tests.models import tiny_model

# The limit covers the whole way from the shell to the refusal, including the imports of torch and transformers.
REFUSAL_S = 10.0


def layerboost(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def damage_nothing(inputs) -> None:
    pass


def drop_config(inputs) -> None:
    (inputs.model / "config.json").unlink()


def garble_config(inputs) -> None:
    (inputs.model / "config.json").write_text("{")


def make_encoder(inputs) -> None:
    (inputs.model / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')


def make_unknown_family(inputs) -> None:
    config = json.loads((inputs.model / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (inputs.model / "config.json").write_text(json.dumps(config))


def drop_tokenizer(inputs) -> None:
    for path in inputs.model.glob("tokenizer*"):
        path.unlink()


def drop_weights(inputs) -> None:
    (inputs.model / "model.safetensors").unlink()


def pickle_weights(inputs) -> None:
    (inputs.model / "model.safetensors").rename(inputs.model / "pytorch_model.bin")


def cut_weights(inputs) -> None:
    path = inputs.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shorten_text(inputs) -> None:
    (inputs.folder / "judge.txt").write_text("word1 word2")


def latin_text(inputs) -> None:
    (inputs.folder / "judge.txt").write_bytes("w\u00f6rd ".encode("latin-1") * 100)


def drop_items(inputs) -> None:
    (inputs.folder / "items.jsonl").unlink()


def block_out(inputs) -> None:
    (inputs.folder.parent / "blocked").write_text("")


OUT_BLOCKED = ["--out", "../blocked/run"]
# name: (damage to the inputs, more arguments, field, value, remedy)
WRONG = {
    "unknown key": (damage_nothing, ["--set", "healing.tokns=5"], "healing.tokns", "5", "did you mean tokens?"),
    "unknown section": (damage_nothing, ["--set", "serach.trials=5"], "serach", "trials", "did you mean search?"),
    "misspelt task": (damage_nothing, ["--set", "quality.tasks=[arc_esy]"], "quality.tasks", "arc_esy", "arc_easy"),
    "misspelt final task": (
        damage_nothing,
        ["--set", "quality.final_tasks=[arc_esy]"],
        "quality.final_tasks",
        "arc_esy",
        "arc_easy",
    ),
    "missing task file": (damage_nothing, ["--set", "quality.tasks=[./t.yaml]"], "quality.tasks", "t.yaml", "missing"),
    "missing task data": (drop_items, [], "quality.tasks", "task.yaml", "items.jsonl"),
    "missing model folder": (damage_nothing, ["--set", "model.path=./modle"], "model.path", "modle", "did you mean"),
    "unreachable hub": (
        damage_nothing,
        ["--set", "model.path=some/model"],
        "model.path",
        "some/model",
        "hub cannot be",
    ),
    "malformed hub name": (damage_nothing, ["--set", "model.path=a/b/c"], "model.path", "a/b/c", "check the path"),
    "no config": (drop_config, [], "model.path", "model", "holds no config.json"),
    "garbled config": (garble_config, [], "model.path", "config.json", "not a JSON config"),
    "not a decoder": (make_encoder, [], "model.path", "model", "not a decoder"),
    "family not supported": (make_unknown_family, [], "model.path", "model", "use one of"),
    "no tokenizer": (drop_tokenizer, [], "model.path", "model", "tokenizer does not load"),
    "no weights": (drop_weights, [], "model.path", "model", "holds no weights"),
    "pickled weights": (pickle_weights, [], "model.path", "model", "safe_serialization=True"),
    "weights cut off": (cut_weights, [], "model.path", "model.safetensors", "damaged"),
    "no such device": (damage_nothing, ["--set", "model.device=cuda:63"], "model.device", "cuda:63", "use auto or cpu"),
    "window 0": (damage_nothing, ["--set", "search.window=0"], "search.window", "0", "greater than or equal to 1"),
    "sinks that fill the window": (
        damage_nothing,
        ["--set", "search.sinks=8", "--set", "search.window=8"],
        "search.sinks",
        "8",
        "give at most 7",
    ),
    "window over the context": (damage_nothing, ["--set", "search.window=64"], "search.window", "64", "give fewer"),
    "threshold range reversed": (
        damage_nothing,
        ["--set", "search.keep_above=[0.5, 0.1]"],
        "search.keep_above",
        "[0.5, 0.1]",
        "swap",
    ),
    "thresholds crossed": (
        damage_nothing,
        ["--set", "search.remove_below=[0.5, 0.6]", "--set", "search.keep_above=[0.1, 0.2]"],
        "search.remove_below",
        "[0.5, 0.6]",
        "lower the first or raise the second",
    ),
    "plan of the wrong length": (
        damage_nothing,
        ["--set", "search.plans=[SSS, NSSL]"],
        "search.plans[1]",
        "NSSL",
        "3 layers",
    ),
    "plan of wrong letters": (damage_nothing, ["--set", "search.plans=[SXS]"], "search.plans[0]", "SXS", "letters S"),
    "negative tokens": (
        damage_nothing,
        ["--set", "healing.tokens=-5"],
        "healing.tokens",
        "-5",
        "greater than or equal",
    ),
    "less than one step": (damage_nothing, ["--set", "healing.tokens=63"], "healing.tokens", "63", "64 tokens"),
    "healing on the test": (
        damage_nothing,
        ["--set", "healing.text=judge.txt"],
        "healing.text",
        "judge.txt",
        "another",
    ),
    "context longer than the text": (
        shorten_text,
        ["--set", "quality.sequence_tokens=4", "--set", "sensitivity.context_tokens=[32]"],
        "sensitivity.context_tokens",
        "judge.txt",
        "longer text",
    ),
    "text too short": (shorten_text, [], "quality.text", "judge.txt", "longer text"),
    "text missing": (damage_nothing, ["--set", "quality.text=juge.txt"], "quality.text", "juge.txt", "path"),
    "dataset unreachable": (damage_nothing, ["--set", "healing.text=some/data"], "healing.text", "some/data", "hub"),
    "text not UTF-8": (latin_text, [], "quality.text", "judge.txt", "UTF-8"),
    "sequence over the context": (
        damage_nothing,
        ["--set", "quality.sequence_tokens=65"],
        "quality.sequence_tokens",
        "65",
        "context of 64",
    ),
    "decoding over the context": (
        damage_nothing,
        ["--set", "throughput.prompt_tokens=61"],
        "throughput.prompt_tokens",
        "61",
        "context of 64",
    ),
    "too few repeats": (damage_nothing, ["--set", "throughput.repeats=1"], "throughput.repeats", "1", "equal to 3"),
    "no vllm here": (
        damage_nothing,
        ["--set", "throughput.engine=vllm"],
        "throughput.environment",
        "missing",
        "the running Python has no vllm",
    ),
    "no vllm there": (
        damage_nothing,
        ["--set", "throughput.engine=vllm", "--set", "throughput.environment=model"],
        "throughput.environment",
        "model",
        "has no bin/python",
    ),
    "score without tasks": (
        damage_nothing,
        ["--set", "quality.tasks=[]", "--set", "sensitivity.score=benchmark"],
        "sensitivity.score",
        "benchmark",
        "needs quality.tasks",
    ),
    "out under a file": (block_out, OUT_BLOCKED, "--out", "blocked/run", "not a folder"),
    "out unwritable": (damage_nothing, ["--out", "/proc/run"], "--out", "/proc/run", "folder you can write to"),
    "out of unknown kind": (damage_nothing, ["--out", "nope://run"], "--out", "nope://run", "local folder"),
    "more GPUs than a worker uses": (
        damage_nothing,
        ["--set", "placement.gpus_per_worker=64"],
        "placement.gpus_per_worker",
        "64",
        "a worker computes on one GPU",
    ),
    "more CPUs than here": (
        damage_nothing,
        ["--set", "placement.workers=5", "--set", "placement.cpus_per_worker=512"],
        "placement.cpus_per_worker",
        "512",
        "ask for at most that",
    ),
    "more healing workers than sequences": (
        damage_nothing,
        ["--set", "placement.healing_workers=3"],
        "placement.healing_workers",
        "3",
        "more than the 2 sequences of a step",
    ),
    "no cluster there": (damage_nothing, ["--address", "127.0.0.1:1"], "--address", "127.0.0.1:1", "nobody answers"),
    "malformed override": (damage_nothing, ["--set", "trials=3"], "--set", "trials=3", "section.field=value"),
    "unknown stage": (damage_nothing, ["--until", "serach"], "layerboost run", "serach", "choose from"),
}
# These cases differ in the imports that they need and in the place where the mistake is found.
AS_PROCESSES = [
    "unknown key",
    "misspelt task",
    "missing model folder",
    "unreachable hub",
    "not a decoder",
    "weights cut off",
    "text too short",
    "out unwritable",
    "more GPUs than a worker uses",
    "no cluster there",
]


def assert_refused(code: int, stdout: str, stderr: str, field: str, value: str, remedy: str) -> None:
    assert code == 2, stderr
    assert stdout == ""
    assert stderr.count("\n") == 1, f"not one line: {stderr}"
    assert stderr.startswith(f"error: {field}")
    for part in (value, remedy):
        assert part in stderr
    assert "Traceback" not in stderr


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(("damage", "arguments", "field", "value", "remedy"), WRONG.values(), ids=WRONG)
def test_wrong_inputs(inputs, monkeypatch, capfd, damage, arguments, field, value, remedy):
    damage(inputs)
    monkeypatch.chdir(inputs.folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = everything_in(inputs.folder.parent)
    out = [] if "--out" in arguments else ["--out", "../out/run"]
    try:
        code = cli.main(["run", "recipe.yaml", *out, *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    assert_refused(code, captured.out, captured.err, field, value, remedy)
    assert everything_in(inputs.folder.parent) == before


@pytest.mark.parametrize("name", AS_PROCESSES)
def test_wrong_inputs_as_processes(inputs, name):
    damage, arguments, field, value, remedy = WRONG[name]
    damage(inputs)
    before = everything_in(inputs.folder.parent)
    out = [] if "--out" in arguments else ["--out", "../out/run"]
    start, used_s = time.monotonic(), children_s()
    # Offline mode is off, because an unreachable hub must be noticed in time as well.
    done = layerboost("run", "recipe.yaml", *out, *arguments, cwd=inputs.folder, HF_HUB_OFFLINE="0", RAY_ADDRESS="")
    seconds, used_s = time.monotonic() - start, children_s() - used_s
    assert_refused(done.returncode, done.stdout, done.stderr, field, value, remedy)
    assert everything_in(inputs.folder.parent) == before
    # On a loaded machine the process gets only its share of the processors, so its time is scaled. How long it computes
    # depends on the machine, so the limit holds for the time that it waits.
    share = min(1.0, (os.cpu_count() or 1) / os.getloadavg()[0])
    assert seconds * share - used_s < REFUSAL_S


def children_s() -> float:
    """Returns the processor time of all ended children of this process."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_missing_recipe(tmp_path):
    done = layerboost("run", "recipe.yaml", cwd=tmp_path)
    assert_refused(done.returncode, done.stdout, done.stderr, "recipe", "recipe.yaml", "no such file")
    assert everything_in(tmp_path) == []


def test_help_and_version_import_nothing_heavy(tmp_path):
    script = (
        "import sys; from orchestrator import cli\n"
        "try: cli.main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "print(sorted({'torch', 'transformers', 'ray', 'pydantic', 'fsspec', 'yaml'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["--version"], ["run", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"
    version = layerboost("--version")
    assert (version.returncode, version.stdout) == (0, f"layerboost {importlib.metadata.version('layerboost')}\n")


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert layerboost("--help").returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 0.5


def fake_pipeline(monkeypatch, **functions) -> None:
    module = types.ModuleType("orchestrator.pipeline")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "orchestrator.pipeline", module)
    monkeypatch.setattr("orchestrator.pipeline", module, raising=False)


def test_run_hands_everything_to_the_pipeline(inputs, monkeypatch):
    calls = []

    def run(recipe, folder, facts, *, until, address, progress):
        calls.append((recipe.search.trials, folder.path, facts.n_layers, until, address))
        return 1

    fake_pipeline(monkeypatch, run=run)
    monkeypatch.chdir(inputs.folder.parent)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["run", str(inputs.recipe), "--until", "search", "--set", "search.trials=9"]) == 1
    assert calls == [(9, str(inputs.folder.parent / "runs/recipe"), 3, "search", None)]


def test_dry_run_runs_nothing(inputs, monkeypatch):
    dry_runs = []
    fake_pipeline(monkeypatch, dry_run=lambda recipe, folder, facts: dry_runs.append(folder.path) or 0)
    monkeypatch.chdir(inputs.folder.parent)
    assert cli.main(["run", str(inputs.recipe), "--dry-run"]) == 0
    assert dry_runs == [str(inputs.folder.parent / "runs/recipe")]
    assert not (inputs.folder.parent / "runs").exists()


def test_the_clusters_address_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cli.build_parser().parse_args(["run", "r.yaml"]).address == "10.0.0.1:6379"
    assert cli.build_parser().parse_args(["run", "r.yaml", "--address", "auto"]).address == "auto"


def test_ctrl_c_says_how_to_go_on(inputs, monkeypatch, capsys):
    def run(*_, **__):
        raise KeyboardInterrupt

    fake_pipeline(monkeypatch, run=run)
    monkeypatch.chdir(inputs.folder)
    assert cli.main(["run", "recipe.yaml", "--out", "a b"]) == 130
    assert capsys.readouterr().err == (
        "interrupted; the same command goes on from here: layerboost run recipe.yaml --out 'a b'\n"
    )


def test_an_unexpected_error_is_one_line_unless_verbose(inputs, monkeypatch, capsys, caplog):
    def run(*_, **__):
        raise RuntimeError("first line\nsecond line")

    fake_pipeline(monkeypatch, run=run)
    monkeypatch.chdir(inputs.folder)
    assert cli.main(["run", "recipe.yaml"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: first line second line; --verbose shows where\n"
    assert not caplog.records
    assert cli.main(["run", "recipe.yaml", "--verbose"]) == 1
    assert "Traceback" in caplog.text


def test_a_second_run_on_a_folder_is_refused(inputs, monkeypatch, capsys):
    from orchestrator.run.folder import RunFolder

    def run(recipe, folder, facts, **_):
        with folder.lock():
            return 0

    fake_pipeline(monkeypatch, run=run)
    monkeypatch.chdir(inputs.folder)
    with RunFolder("out").lock():
        assert cli.main(["run", "recipe.yaml", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert_refused(2, "", error, "--out", f"process {os.getpid()}", "give another folder")
    assert cli.main(["run", "recipe.yaml", "--out", "out"]) == 0


def test_report_needs_records(tmp_path, monkeypatch, capsys):
    fake_pipeline(monkeypatch, report=lambda folder: print(folder.path) or 0)
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert_refused(2, "", capsys.readouterr().err, "DIR", "none", "--out of an earlier run")
    assert not (tmp_path / "none").exists()
    (tmp_path / "run/records").mkdir(parents=True)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/run\n"


@pytest.mark.parametrize("rank", ["full", "auto", "3"])
def test_convert_fits_affine_layers_on_a_text(rank, inputs, capsys):
    out = inputs.folder / "converted"
    text = ["--text", str(inputs.folder / "heal.txt"), "--tokens", "640", "--rank", rank]
    assert cli.main(["convert", str(inputs.model), "--plan", "AWA", "--window", "8", *text, "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "layer 0: rank" in said and "layer 2: rank" in said and "held-out error" in said
    model = load_model(str(out))
    for layer in (0, 2):
        affine = attention_module(model, layer).affine
        assert affine.bias.abs().max() > 0
        assert rank != "3" or affine.down.shape == (3, 16)
    again = load_model(str(out))
    tokens = torch.arange(3, 23)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("sinks", [[], ["--sinks", "2"]], ids=["no sinks", "sinks"])
def test_convert_then_evaluate_bench_and_generate(sinks, inputs, capsys):
    converted = inputs.folder / "made" / "converted"
    command = ["convert", str(inputs.model), "--plan", "NSL", "--window", "8", *sinks, "--out", str(converted)]
    assert cli.main(command) == 0
    assert "NSL" in capsys.readouterr().out
    assert json.loads((converted / "config.json").read_text())["layerboost"]["plan"] == "NSL"
    assert [path.name for path in converted.parent.iterdir()] == ["converted"], "a half-written folder is left"
    models = [str(inputs.model), str(converted)]

    assert cli.main(["evaluate", *models, "--recipe", str(inputs.recipe), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    measured = {(row["model"], row["task"], row["metric"]): row for row in rows}
    assert float(measured[models[0], "mean", "quality_retained"]["value"]) == 1.0
    assert (models[0], "text", "kl") not in measured
    assert cli.main(["evaluate", f"{models[0]}/", models[1], "--recipe", str(inputs.recipe)]) == 0
    assert "kl" in capsys.readouterr().out, "only the second model has a divergence"
    assert float(measured[models[1], "text", "kl"]["value"]) > 0
    for model in models:
        assert float(measured[model, "text", "nll"]["value"]) > 0
        assert measured[model, "tiny_choice", "acc"]["n_items"] == "8"

    assert cli.main(["evaluate", *models, "--recipe", str(inputs.recipe)]) == 0
    header = capsys.readouterr().out.splitlines()[0].split()
    assert header == ["task", "metric", "n_items", *models]

    sizes = ["--concurrency", "1", "2", "--prompt-tokens", "16", "--new-tokens", "4"]
    assert cli.main(["bench", *models, *sizes, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["concurrency"]) for row in rows] == [(m, n) for m in models for n in (1, 2)]
    assert [row["speedup"] for row in rows[:2]] == [1.0, 1.0]
    assert all(row["output_throughput_tok_per_s"] > 0 for row in rows)
    assert rows[2]["kv_bytes_per_token"] < rows[0]["kv_bytes_per_token"]

    outputs = []
    for _ in range(2):
        sampling = ["--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
        assert cli.main(["generate", str(converted), "word1 word2", *sampling]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].strip()


def test_bench_with_vllm(inputs, capsys, monkeypatch):
    environment = ServingEnvironment("/venv", "0.9", "0.2", "2.0", "5.0", "a machine (2 cores)")
    monkeypatch.setattr("orchestrator.checks.serving.serving_environment", lambda *asked_for: environment)

    def measure(environment, model, conditions, *, dtype, on_result):
        for condition in conditions:
            speed = 10.0 * condition.concurrency * (2 if "new" in str(model) else 1)
            about = (environment.hardware, dtype, condition.concurrency, condition.prompt_tokens, condition.new_tokens)
            told = (speed, 1.0, *range(6), None, 8.0, 4, 16, 64, 16, [])
            on_result(condition, ServingMeasurement("vllm", "0.9", *about, *told))

    monkeypatch.setattr("tasks.timing.measure_served", measure)
    shutil.copytree(inputs.model, inputs.folder / "new")
    sizes = ["--concurrency", "1", "2", "--prompt-tokens", "16", "--new-tokens", "4", "--engine", "vllm", "--json"]
    assert cli.main(["bench", str(inputs.model), str(inputs.folder / "new"), *sizes]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["concurrency"], row["speedup"], row["engine_version"]) for row in rows] == [
        *((n, 1.0, "0.9") for n in (1, 2)),
        *((n, 2.0, "0.9") for n in (1, 2)),
    ]
    assert rows[0]["itl_ms_p99"] == 5 and "repeats_tok_per_s" not in rows[0]


def test_stdout_carries_the_result_alone(inputs):
    done = layerboost("convert", "model", "--plan", "SSS", "--out", "new", cwd=inputs.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("new: SSS (plan_id ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["convert", "--plan", "SSS"], ["export"]])
def test_a_checkpoint_goes_to_a_local_folder(inputs, capsys, monkeypatch, command):
    monkeypatch.chdir(inputs.folder)
    assert cli.main([*command, str(inputs.model), "--out", "s3://bucket/model"]) == 2
    assert_refused(2, "", capsys.readouterr().err, "--out", "bucket/model", "local folder")
    assert not (inputs.folder / "s3:").exists()


def test_export_refuses_what_no_stock_format_can_say(inputs, capsys):
    converted, out = inputs.folder / "converted", inputs.folder / "stock"
    assert cli.main(["convert", str(inputs.model), "--plan", "NSS", "--out", str(converted)]) == 0
    capsys.readouterr()
    assert cli.main(["export", str(converted), "--out", str(out)]) == 2
    assert "MODEL" in (said := capsys.readouterr().err) and "none, which no stock format can say" in said
    assert not out.exists()


def test_export_writes_a_checkpoint_of_the_familys_own(inputs, capsys):
    parent, converted, out = (inputs.folder / name for name in ("qwen", "windows", "stock"))
    shutil.copytree(inputs.model, parent)
    tiny_model("qwen3", vocab_size=json.loads((parent / "config.json").read_text())["vocab_size"]).save_pretrained(
        parent
    )
    convert = ["convert", str(parent), "--plan", "SWSW", "--window", "4", "--out", str(converted)]
    assert cli.main(convert) == 0
    assert cli.main(["export", str(converted), "--out", str(out)]) == 0
    assert "Qwen3ForCausalLM" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("qwen3", 4)


COMMANDS = {
    "plan of the wrong length": (["convert", "model", "--plan", "SS", "--out", "new"], "--plan", "SS", "3 layers"),
    "plan of wrong letters": (["convert", "model", "--plan", "SXS", "--out", "new"], "--plan", "SXS", "S (softmax)"),
    "window 0": (["convert", "model", "--plan", "SLS", "--window", "0", "--out", "n"], "--window", "0", "at least 1"),
    "sinks over the window": (
        ["convert", "model", "--plan", "SLS", "--window", "4", "--sinks", "4", "--out", "n"],
        "--sinks",
        "4",
        "0 to 3",
    ),
    "affine without text": (["convert", "model", "--plan", "SAS", "--out", "n"], "--text", "missing", "give one"),
    "text for nothing": (
        ["convert", "model", "--plan", "SNS", "--text", "heal.txt", "--out", "n"],
        "--text",
        "heal.txt",
        "has none",
    ),
    "text that is missing": (
        ["convert", "model", "--plan", "SAS", "--text", "none.txt", "--out", "n"],
        "--text",
        "none.txt",
        "give the path",
    ),
    "rank over the width": (
        ["convert", "model", "--plan", "SAS", "--text", "heal.txt", "--rank", "17", "--out", "n"],
        "--rank",
        "17",
        "1 to the model's width, 16",
    ),
    "too few tokens to fit": (
        ["convert", "model", "--plan", "SAS", "--text", "heal.txt", "--tokens", "100", "--out", "n"],
        "--tokens",
        "100",
        "two sequences",
    ),
    "out not empty": (["convert", "model", "--plan", "SSS", "--out", "model"], "--out", "model", "new folder"),
    "model missing": (["evaluate", "./nodel", "--recipe", "recipe.yaml"], "MODEL", "nodel", "did you mean model?"),
    "repeats": (["bench", "model", "--repeats", "2"], "--repeats", "2", "at least 3"),
    "context": (["bench", "model", "--prompt-tokens", "64"], "--prompt-tokens", "64", "lower"),
    "device": (["bench", "model", "--device", "gpu"], "--device", "gpu", "cuda:N"),
    "device of vllm": (["bench", "model", "--engine", "vllm", "--device", "cpu"], "--device", "cpu", "its build"),
    "vllm elsewhere": (["bench", "model", "--environment", "venv"], "--environment", "venv", "--engine vllm"),
    "no vllm": (
        ["bench", "model", "--engine", "vllm", "--environment", "model", "--prompt-tokens", "8"],
        "--environment",
        "model",
        "no bin/python",
    ),
    "prompts of vllm": (
        ["bench", "model", "--engine", "vllm", "--prompt-tokens", "20"],
        "--prompt-tokens",
        "20",
        "lower",
    ),
    "prompt empty": (["generate", "model", ""], "PROMPT", "(empty)", "something to continue"),
    "prompt too long": (
        ["generate", "model", "word1", "--max-new-tokens", "64"],
        "--max-new-tokens",
        "64",
        "give fewer",
    ),
}


@pytest.mark.parametrize(("arguments", "field", "value", "remedy"), COMMANDS.values(), ids=COMMANDS)
def test_wrong_inputs_of_the_other_commands(inputs, monkeypatch, capfd, arguments, field, value, remedy):
    monkeypatch.chdir(inputs.folder)
    before = everything_in(inputs.folder)
    code = cli.main(arguments)
    captured = capfd.readouterr()
    assert_refused(code, captured.out, captured.err, field, value, remedy)
    assert everything_in(inputs.folder) == before


def test_doctor_names_what_is_missing(capsys):
    assert cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    for what in ("python", "torch", "ray", "deepspeed", "compiler", "/dev/shm", "free disk"):
        assert any(line.startswith(what) for line in table.splitlines()), what
    assert cli.main(["doctor", "--address", "127.0.0.1:1"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "missing" in last
    assert "check host, port and network" in last


def test_doctor_says_when_a_package_is_missing_or_old(monkeypatch, capsys):
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "pandas" else installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cli.main(["doctor"]) == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "missing" in rows["peft"]
    assert "pip install 'peft" in rows["peft"]
    assert "warn" in rows["pandas"]
