"""`layerboost bench`: times decoding of models side by side."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from orchestrator.commands.single_model import checked_model, choose_device, load_checked
from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.errors import InputError
from orchestrator.recipe.sections import environment_folder
from orchestrator.run.model_facts import ModelFacts
from orchestrator.text_tables import print_rows
from tasks.engines import ENGINES, TRANSFORMERS, Engine


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
    engine = ENGINES[arguments.engine]
    if engine.serves and arguments.device != "auto":
        raise InputError(
            "--device", arguments.device, f"is for {TRANSFORMERS}; {engine.name} runs on the device of its build"
        )
    if engine.name != TRANSFORMERS and arguments.no_prefill:
        raise InputError("--no-prefill", "given", f"is for {TRANSFORMERS}; leave it out")
    if arguments.environment is not None and engine.find_environment is None:
        raise InputError("--environment", arguments.environment, "is for vllm only; give --engine vllm, or leave it")
    from orchestrator.checks.serving import check_decoded

    device = choose_device(arguments.device)
    every_facts = [checked_model(path, arguments) for path in arguments.models]
    for facts in every_facts:
        check_decoded("--prompt-tokens", arguments.prompt_tokens, arguments.new_tokens, facts, arguments.engine)
    if engine.name != TRANSFORMERS:
        return _bench_by_worker(engine, arguments, every_facts)
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
    return EXIT_DONE


def _bench_by_worker(engine: Engine, arguments: argparse.Namespace, every_facts: list[ModelFacts]) -> int:
    """Has the engine's worker time one model after the other in this process, each under all conditions."""
    from layerboost.checkpoint import ModelSource
    from layerboost.registry import resolved
    from layerboost.speed.vllm_environment import ServingError
    from orchestrator.checks.serving import check_engine
    from tasks.timing import ERROR, ThroughputUnit

    given = arguments.environment
    environment = check_engine(engine.name, given and environment_folder(given), every_facts, prefix="--")
    units = [
        ThroughputUnit(
            concurrency,
            arguments.prompt_tokens,
            arguments.new_tokens,
            repeats=arguments.repeats,
            seed=arguments.seed,
            environment=environment,
            engine=engine.name,
        )
        for concurrency in arguments.concurrency
    ]
    groups = [tuple(units)] if engine.serves else [(unit,) for unit in units]
    rows: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    for facts in every_facts:
        revision = facts.commit or arguments.revision
        source = ModelSource(facts.path, revision, arguments.dtype, arguments.device, arguments.trust_remote_code)
        worker = resolved(engine.worker)(source)
        for group in groups:
            for unit, result in zip(group, worker.run(group), strict=True):
                if ERROR in result:
                    raise ServingError(result[ERROR])
                speed = result["output_throughput_tok_per_s"]
                told = {name: value for name, value in result.items() if not isinstance(value, list)}
                rows.append({"model": facts.path, **told, "speedup": speed / base.setdefault(unit.concurrency, speed)})
                print(f"bench {facts.path} concurrency={unit.concurrency} done", file=sys.stderr)
    print_rows(rows, arguments.form)
    return EXIT_DONE
