"""The commands for single checkpoints: convert, export, evaluate, bench, generate."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.model_check import ModelFacts, check_model, check_tokenizer
from orchestrator.recipe import InputError, load_recipe
from orchestrator.recipe_sections import environment_folder
from orchestrator.tables import print_rows


def convert(arguments: argparse.Namespace) -> int:
    """`layerboost convert`: applies a plan and saves a checkpoint."""
    from layerboost.plan import Plan, PlanError

    out = Path(arguments.out)
    _check_new_folder(out)
    if arguments.window < 1:
        raise InputError("--window", arguments.window, "must be at least 1 token")
    facts = _check(arguments.model, arguments, allow_converted=False)
    tokenizer = _tokenizer(facts, arguments)
    try:
        plan = Plan.parse(arguments.plan, window=arguments.window)
        plan.check_length(facts.n_layers)
    except PlanError as error:
        raise InputError("--plan", arguments.plan, str(error).removeprefix("plan: ")) from None
    from layerboost.convert import convert as apply_plan

    converted = apply_plan(
        _load(facts, arguments, "cpu"), plan, parent=facts.path, revision=facts.commit or arguments.revision
    )
    _save_whole(converted, tokenizer, out)
    print(f"{out}: {plan} (plan_id {plan.plan_id}), from {facts.path}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`layerboost export`: saves a converted checkpoint in its family's own format, where that can say the plan."""
    out = Path(arguments.out)
    _check_new_folder(out)
    facts = _check(arguments.model, arguments)
    tokenizer = _tokenizer(facts, arguments)
    from layerboost.export import ExportError, export_stock

    try:
        stock = export_stock(_load(facts, arguments, "cpu"))
    except ExportError as error:
        raise InputError("MODEL", arguments.model, str(error)) from None
    _save_whole(stock, tokenizer, out)
    print(f"{out}: {type(stock).__name__} with the logits of {facts.path}")
    return 0


def _save_whole(model: Any, tokenizer: Any, out: Path) -> None:
    """Saves a checkpoint under another name first: a folder that is there is whole."""
    from layerboost.checkpoint import save_checkpoint

    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        staging.chmod(0o755)
        save_checkpoint(model, tokenizer, staging)
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def evaluate(arguments: argparse.Namespace) -> int:
    """`layerboost evaluate`: judges models side by side; the first is the base."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    device = choose_device(arguments.device)
    every_facts = [_check(path, arguments) for path in arguments.models]
    tokenizers = [_tokenizer(facts, arguments) for facts in every_facts]
    from orchestrator.preflight import check_quality

    for facts, tokenizer in zip(every_facts, tokenizers):
        check_quality(recipe.quality, facts, tokenizer)
    from layerboost.evaluation import Scores, quality, retained
    from layerboost.evaluation import evaluate as judge

    every_scores: list[Scores] = []
    base_model = None
    for facts, tokenizer in zip(every_facts, tokenizers):
        model = _load(facts, arguments, device)
        spec = recipe.quality.spec(facts.context_tokens)
        # A divergence of predictions over different vocabularies means nothing.
        has_kl = base_model is not None and spec.text is not None and tokenizer.get_vocab() == tokenizers[0].get_vocab()
        every_scores.append(judge(model, tokenizer, spec, base=base_model if has_kl else None))
        base_model = base_model or model
        print(f"evaluate {len(every_scores)}/{len(every_facts)} done model={facts.path}", file=sys.stderr)
    rows = []
    for facts, scores in zip(every_facts, every_scores):
        for metric in scores.metrics:
            rows.append(_row(facts.path, metric.task, metric.metric, metric.n_items, metric.value, metric.stderr))
        rows.append(_row(facts.path, "mean", "quality", None, *quality(scores)))
        rows.append(_row(facts.path, "mean", "quality_retained", None, *retained(every_scores[0], scores)))
    names = [facts.path for facts in every_facts]
    print_rows(rows if arguments.form else _side_by_side(rows, names), arguments.form)
    return 0


def _row(model: str, task: str, metric: str, n_items: int | None, value: float, stderr: float | None) -> dict[str, Any]:
    return {"model": model, "task": task, "metric": metric, "n_items": n_items, "value": value, "stderr": stderr}


def _side_by_side(rows: list[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    """A line for each metric, a column for each model."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["task"], row["metric"]),
            {"task": row["task"], "metric": row["metric"], "n_items": row["n_items"]} | dict.fromkeys(models),
        )
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
        line[row["model"]] = f"{row['value']:.4g}{error}"
    return list(lines.values())


def bench(arguments: argparse.Namespace) -> int:
    """`layerboost bench`: times decoding of models side by side; the first is the base."""
    for field, value, least in (
        *(("--concurrency", n, 1) for n in arguments.concurrency),
        ("--prompt-tokens", arguments.prompt_tokens, 1),
        ("--new-tokens", arguments.new_tokens, 2),
        ("--repeats", arguments.repeats, 3),
    ):
        if value < least:
            raise InputError(field, value, f"must be at least {least}")
    with_vllm = arguments.engine == "vllm"
    if with_vllm and arguments.device != "auto":
        raise InputError("--device", arguments.device, "is for transformers; vllm runs on what its build is for")
    if with_vllm and arguments.no_prefill:
        raise InputError("--no-prefill", "given", "is for transformers; leave it out")
    if arguments.environment is not None and not with_vllm:
        raise InputError("--environment", arguments.environment, "is where vllm is; give --engine vllm, or leave it")
    from orchestrator.preflight import check_decoded

    device = choose_device(arguments.device)
    every_facts = [_check(path, arguments) for path in arguments.models]
    for facts in every_facts:
        check_decoded("--prompt-tokens", arguments.prompt_tokens, arguments.new_tokens, facts, arguments.engine)
    if with_vllm:
        return _bench_with_vllm(arguments, every_facts)
    from layerboost.byte_model import decode_bytes, predicted_speedup
    from layerboost.convert import parent_config, plan_of
    from layerboost.decoding import measure_together
    from layerboost.hardware import copy_bandwidth_bytes_per_s, hardware_name

    bandwidth = copy_bandwidth_bytes_per_s(device)
    rows: list[dict[str, Any]] = []
    base = _load(every_facts[0], arguments, device)
    for facts in every_facts[1:] or every_facts:
        # Side by side, so that a machine whose speed drifts is fair to both.
        models = [base] if len(every_facts) == 1 else [base, _load(facts, arguments, device)]
        for concurrency in arguments.concurrency:
            setting = {
                "concurrency": concurrency,
                "prompt_tokens": arguments.prompt_tokens,
                "new_tokens": arguments.new_tokens,
            }
            timed = measure_together(
                models, **setting, repeats=arguments.repeats, seed=arguments.seed, read_prompts=not arguments.no_prefill
            )
            for model, path, measured in zip(models, (every_facts[0].path, facts.path), timed):
                if model is base and facts not in every_facts[:2]:
                    continue  # its row is there already
                config, plan = parent_config(model.config), plan_of(model)
                condition = {
                    "concurrency": concurrency,
                    "context_tokens": arguments.prompt_tokens + arguments.new_tokens // 2,
                    "dtype_bytes": model.dtype.itemsize,
                }
                speed = measured.output_throughput_tok_per_s
                speedup = speed / timed[0].output_throughput_tok_per_s
                possible = predicted_speedup(config, plan, **condition) if plan is not None else 1.0
                limit = concurrency * bandwidth / decode_bytes(config, plan, **condition)
                rows.append(
                    {
                        "model": path,
                        "hardware": hardware_name(device),
                        **setting,
                        "output_throughput_tok_per_s": speed,
                        "output_throughput_stderr": measured.output_throughput_stderr,
                        "limit_tok_per_s": limit,
                        "ttft_ms_p50": measured.ttft_ms_p50,
                        "tpot_ms_p50": measured.tpot_ms_p50,
                        "peak_memory_mib": measured.peak_memory_mib,
                        "kv_bytes_per_token": measured.kv_bytes_per_token,
                        "speedup": speedup,
                        "possible_speedup": possible,
                        "share_of_possible_gain": (speedup - 1) / (possible - 1) if possible > 1 else None,
                    }
                )
            print(f"bench {facts.path} concurrency={concurrency} done", file=sys.stderr)
    in_order = [facts.path for facts in every_facts]
    rows.sort(key=lambda row: in_order.index(row["model"]))
    print_rows(rows, arguments.form)
    return 0


def _bench_with_vllm(arguments: argparse.Namespace, every_facts: list[ModelFacts]) -> int:
    from layerboost.serving_bench import (
        ServingCondition,
        ServingError,
        ServingMeasurement,
        local_checkpoint,
        measure_served,
    )
    from orchestrator.preflight import check_vllm

    given = arguments.environment
    environment = check_vllm(given and environment_folder(given), every_facts, prefix="--")
    conditions = [
        ServingCondition(n, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats, arguments.seed)
        for n in arguments.concurrency
    ]
    rows: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    for facts in every_facts:

        def on_result(
            condition: ServingCondition, result: ServingMeasurement | ServingError, path: str = facts.path
        ) -> None:
            if isinstance(result, ServingError):
                raise result
            speed = result.output_throughput_tok_per_s
            told = {name: value for name, value in result.to_dict().items() if not isinstance(value, list)}
            rows.append({"model": path, **told, "speedup": speed / base.setdefault(condition.concurrency, speed)})
            print(f"bench {path} concurrency={condition.concurrency} done", file=sys.stderr)

        folder = local_checkpoint(facts.path, facts.commit or arguments.revision)
        measure_served(environment, folder, conditions, dtype=arguments.dtype, on_result=on_result)
    print_rows(rows, arguments.form)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """`layerboost generate`: prints what the model writes after the prompt."""
    if arguments.max_new_tokens < 1:
        raise InputError("--max-new-tokens", arguments.max_new_tokens, "must be at least 1")
    if not 0 <= arguments.temperature < float("inf"):
        raise InputError("--temperature", arguments.temperature, "must be 0 or more")
    device = choose_device(arguments.device)
    facts = _check(arguments.model, arguments)
    tokenizer = _tokenizer(facts, arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    n_prompt = inputs["input_ids"].shape[1]
    if n_prompt == 0:
        raise InputError("PROMPT", prompt, "holds no tokens; write something to continue")
    if facts.context_tokens is not None and n_prompt + arguments.max_new_tokens > facts.context_tokens:
        raise InputError(
            "--max-new-tokens",
            arguments.max_new_tokens,
            f"with a prompt of {n_prompt} tokens is more than the model's context of {facts.context_tokens}; "
            "give fewer or a shorter prompt",
        )
    import torch

    model = _load(facts, arguments, device)
    torch.manual_seed(arguments.seed)
    sampling = (
        {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        tokens = model.generate(
            **inputs.to(device), max_new_tokens=arguments.max_new_tokens, pad_token_id=pad, **sampling
        )
    print(tokenizer.decode(tokens[0, n_prompt:], skip_special_tokens=True))
    return 0


def choose_device(device: str) -> str:
    """The device that a name means on this machine; `auto` is the GPU where there is one.

    Raises:
        InputError: if this machine does not have it.
    """
    from orchestrator.preflight import check_device

    check_device(device, "--device")
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check(path: str, arguments: argparse.Namespace, *, allow_converted: bool = True) -> ModelFacts:
    return check_model(
        path,
        field="MODEL",
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        allow_converted=allow_converted,
    )


def _tokenizer(facts: ModelFacts, arguments: argparse.Namespace) -> Any:
    return check_tokenizer(
        facts, field="MODEL", revision=arguments.revision, trust_remote_code=arguments.trust_remote_code
    )


def _load(facts: ModelFacts, arguments: argparse.Namespace, device: str) -> Any:
    import torch

    from layerboost.checkpoint import load_model

    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    return load_model(
        facts.path,
        dtype=dtype,
        device=device,
        revision=facts.commit or arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def _check_new_folder(out: Path) -> None:
    from orchestrator.run_folder import RunFolder

    if ":/" in str(out):  # of a URL: a Path has one slash there
        raise InputError("--out", out, "must be a local folder")
    if out.is_dir() and any(out.iterdir()):
        raise InputError("--out", out, "is there already and not empty; give a new folder")
    RunFolder(out).preflight_writable()
