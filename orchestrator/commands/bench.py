"""`layerboost bench`: times decoding of models side by side."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from orchestrator.commands.single_model import checked_model, choose_device, load_checked
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.sections import environment_folder
from orchestrator.run.model_facts import ModelFacts
from orchestrator.text_tables import print_rows


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
        raise InputError("--device", arguments.device, "is for transformers; vllm runs on the device of its build")
    if with_vllm and arguments.no_prefill:
        raise InputError("--no-prefill", "given", "is for transformers; leave it out")
    if arguments.environment is not None and not with_vllm:
        raise InputError("--environment", arguments.environment, "is where vllm is; give --engine vllm, or leave it")
    from orchestrator.checks.serving import check_decoded

    device = choose_device(arguments.device)
    every_facts = [checked_model(path, arguments) for path in arguments.models]
    for facts in every_facts:
        check_decoded("--prompt-tokens", arguments.prompt_tokens, arguments.new_tokens, facts, arguments.engine)
    if with_vllm:
        return _bench_with_vllm(arguments, every_facts)
    from layerboost.convert import parent_config, plan_of
    from layerboost.speed.byte_model import decode_bytes, predicted_speedup
    from layerboost.speed.decoding import measure_together
    from layerboost.speed.hardware import copy_bandwidth_bytes_per_s, hardware_name

    bandwidth = copy_bandwidth_bytes_per_s(device)
    rows: list[dict[str, Any]] = []
    base = load_checked(every_facts[0], arguments, device)
    for facts in every_facts[1:] or every_facts:
        # Base and model are timed in turns, so that a machine whose speed drifts affects both alike.
        models = [base] if len(every_facts) == 1 else [base, load_checked(facts, arguments, device)]
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
                    continue  # the base has its row already
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
    from layerboost.speed.vllm_bench import ServingCondition, ServingMeasurement, local_checkpoint, measure_served
    from layerboost.speed.vllm_environment import ServingError
    from orchestrator.checks.serving import check_vllm

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
