"""Times the sensitivity sweep against the loop that one would write by hand, over the same items in one run.

    python benchmarks/sensitivity_sweep.py                                    # the embedded model and its tasks
    python benchmarks/sensitivity_sweep.py --model DIR --cloze A.jsonl B.jsonl
    python benchmarks/sensitivity_sweep.py --model DIR --minimal-pairs blimp/*.jsonl --limit 500
    python benchmarks/sensitivity_sweep.py --workers                          # two single-threaded workers against one
    python benchmarks/sensitivity_sweep.py --memory                           # peak memory under activation budgets
    python benchmarks/sensitivity_sweep.py --shape qwen3-4b                   # random weights and items, for GPUs

`loop` runs `lm_eval.simple_evaluate` for each layer on the model without that layer's attention, as an HFLM. The model
and the tasks are loaded once, and the batch size is the fastest of those given. `unshared` is this project's engine
with each plan by itself. `sweep` runs all plans together. Each ratio is the median over rounds in which all sides are
timed in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from decode import SHAPES, build

import layerboost
from layerboost import Plan, Treatment, convert
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.evaluation.likelihood import answer_requests
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.scores import QualitySpec
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.speed.hardware import hardware_name
from layerboost.sweep.layer_sweep import LayerSweep
from layerboost.sweep.request_tries import Request

EMBEDDED = Path(layerboost.__file__).parent / "smallworld"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EMBEDDED / "model"))
    parser.add_argument("--tasks", nargs="+", default=[], help="task files of lm-eval")
    parser.add_argument("--cloze", nargs="+", default=[], help="JSONL with context, choices and gold")
    parser.add_argument("--minimal-pairs", nargs="+", default=[], help="JSONL with sentence_good and sentence_bad")
    parser.add_argument("--dtype", default="auto", help="of the model; auto takes that of its weights")
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--treatments", nargs="+", default=["none"])
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="tried for the loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tolerance", type=float, default=0.0, help="largest difference of accuracies; bfloat16 rounds by batch"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", action="store_true", help="time two single-threaded workers against one")
    parser.add_argument("--memory", action="store_true", help="measure peak memory under activation budgets")
    parser.add_argument("--shape", choices=SHAPES, help="a model of this shape with random weights, and random items")
    parser.add_argument("--items", type=int, default=256, help="with --shape: number of items")
    parser.add_argument("--context", type=int, default=256, help="with --shape: tokens of a context")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="CSV to write (default: none)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        args.tasks += _task_files(args, Path(folder))
        if not args.tasks:
            args.tasks = [str(path) for path in sorted((EMBEDDED / "data" / "tasks").glob("*.yaml"))]
        if args.shape:
            rows = compare_on_shape(args)
        elif args.workers:
            rows = compare_workers(args)
        elif args.memory:
            rows = measure_memory(args)
        else:
            rows = compare_with_loop(args)
    about = {"hardware": hardware_name(args.device), "threads": args.threads, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    rows = [{**row, **about} for row in rows]
    for row in rows:
        print(json.dumps(row))
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _task_files(args: argparse.Namespace, folder: Path) -> list[str]:
    pairs = {"doc_to_text": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "doc_to_target": 0}
    return [*cloze_task_files(args.cloze, folder), *_choice_task_files(args.minimal_pairs, pairs, folder)]


def cloze_task_files(sources: Sequence[str], folder: Path) -> list[str]:
    """Writes a multiple-choice task of lm-eval for each JSONL with `context`, `choices` and `gold`; returns paths."""
    fields = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold"}
    return _choice_task_files(sources, fields, folder)


def _choice_task_files(sources: Sequence[str], fields: dict[str, Any], folder: Path) -> list[str]:
    files = []
    for source in sources:
        task = {
            "task": Path(source).stem,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(Path(source).resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
            **fields,
        }
        file = folder / f"{Path(source).stem}.yaml"
        file.write_text(yaml.safe_dump(task))
        files.append(str(file))
    return files


def _plans(n_layers: int, treatments: Sequence[str], window: int) -> list[Plan]:
    """Returns the untouched model's plan, and plans that treat each layer alone."""
    single = [single_layer_plan(n_layers, i, Treatment(t), window) for t in treatments for i in range(n_layers)]
    return [Plan.uniform(Treatment.SOFTMAX, n_layers), *single]


def compare_with_loop(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compares the time of everything from a loaded model to every accuracy."""
    model, tokenizer = load_model(args.model, dtype=args.dtype, device=args.device), load_tokenizer(args.model)
    plans = _plans(model.config.num_hidden_layers, args.treatments, args.window)
    spec = QualitySpec(tasks=tuple(args.tasks), limit=args.limit)
    batch_size = min(
        args.batch_sizes, key=lambda size: _seconds(lambda: _loop(model, tokenizer, plans[:1], spec, size))
    )
    sides: dict[str, Callable[[], list[dict[str, float]]]] = {
        "loop": lambda: _loop(model, tokenizer, plans, spec, batch_size),
        "unshared": lambda: _sweep(model, tokenizer, [[plan] for plan in plans], spec),
        "sweep": lambda: _sweep(model, tokenizer, [plans], spec),
    }
    rounds: list[dict[str, float]] = []
    for _ in range(args.rounds):
        timed, found = {}, {}
        for name, run in sides.items():
            start = time.perf_counter()
            found[name] = run()
            timed[name] = time.perf_counter() - start
        rounds.append(timed)
        differences = [_difference(found["loop"], found[name]) for name in ("unshared", "sweep")]
        if max(differences) > args.tolerance:
            raise SystemExit(f"accuracies differ by up to {max(differences):g}: {found}")
        print({name: round(seconds, 2) for name, seconds in timed.items()}, file=sys.stderr, flush=True)
    return [
        {
            "model": Path(args.model).name,
            "tasks": " ".join(found["loop"][0]),
            "plans": len(plans),
            "loop_batch_size": batch_size,
            **{f"{name}_s": statistics.median(timed[name] for timed in rounds) for name in rounds[0]},
            "speedup_over_loop": statistics.median(timed["loop"] / timed["sweep"] for timed in rounds),
            "speedup_over_unshared": statistics.median(timed["unshared"] / timed["sweep"] for timed in rounds),
            "accuracies": f"within {max(differences):.2g}" if any(differences) else "identical",
            "rounds": args.rounds,
        }
    ]


def _difference(a: list[dict[str, float]], b: list[dict[str, float]]) -> float:
    """Returns the largest difference between accuracies of the same plan and task."""
    return max(abs(of_a[task] - of_b[task]) for of_a, of_b in zip(a, b, strict=True) for task in of_a)


def _loop(model: Any, tokenizer: Any, plans: list[Plan], spec: QualitySpec, batch_size: int) -> list[dict[str, float]]:
    """Evaluates the way one would write it by hand: an HFLM for each ablated model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not hasattr(_loop, "tasks"):
        _loop.tasks = [yaml.safe_load(Path(task).read_text()) for task in spec.tasks]  # type: ignore[attr-defined]
        for task, path in zip(_loop.tasks, spec.tasks, strict=True):  # type: ignore[attr-defined]
            files = task["dataset_kwargs"]["data_files"]
            task["dataset_kwargs"]["data_files"] = {s: str(Path(path).parent / f) for s, f in files.items()}
    manager = TaskManager(include_defaults=False)
    found = []
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        for plan in plans:
            variant = model if plan == plans[0] else convert(model, plan)
            lm = HFLM(pretrained=variant, tokenizer=tokenizer, batch_size=batch_size)
            results = lm_eval.simple_evaluate(model=lm, tasks=_loop.tasks, task_manager=manager, limit=spec.limit)  # type: ignore[attr-defined]
            found.append({task: values["acc,none"] for task, values in results["results"].items()})
    return found


def _sweep(model: Any, tokenizer: Any, groups: list[list[Plan]], spec: QualitySpec) -> list[dict[str, float]]:
    evaluation = PlanEvaluation(model, tokenizer, spec)
    scores = [of_plan for plans in groups for of_plan in evaluation.run(plans)]
    return [{s.task: s.value for s in of_plan.metrics if s.metric == "acc"} for of_plan in scores]


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_workers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the shares of a sweep on one and on two workers of one CPU each, after model and tasks are loaded."""
    import ray

    from layerboost.checkpoint import ModelSource
    from layerboost.evaluation.shares import shares
    from tasks.sweep import CountUnit, SweepUnit, SweepWorker

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    source = ModelSource(args.model, device="cpu")
    spec = QualitySpec(tasks=tuple(args.tasks), limit=args.limit)
    n_layers = load_model(args.model).config.num_hidden_layers
    plans = tuple(_plans(n_layers, args.treatments, args.window))
    actors: list[Any] = [ray.remote(SweepWorker).options(num_cpus=1).remote(source, spec, 1) for _ in range(2)]
    counts = ray.get([actor.run.remote(CountUnit(spec)) for actor in actors])
    units = [SweepUnit(spec, share, plans) for share in shares(counts[0]["costs"], 16)]

    def run(n_workers: int) -> dict[Any, Any]:
        waiting = list(units)
        found: dict[Any, Any] = {}
        in_flight: dict[Any, Any] = {}
        idle = actors[:n_workers]
        while waiting or in_flight:
            while waiting and idle:
                actor, unit = idle.pop(), waiting.pop(0)
                in_flight[actor.run.remote(unit)] = (actor, unit)
            (done,), _ = ray.wait(list(in_flight))
            actor, unit = in_flight.pop(done)
            found[unit] = ray.get(done)["log_p"]
            idle.append(actor)
        return found

    run(2)
    timings, answers = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        answers.append(run(1))
        middle = time.perf_counter()
        answers.append(run(2))
        timings.append((middle - start, time.perf_counter() - middle))
    ray.shutdown()
    return [
        {
            "model": Path(args.model).name,
            "plans": len(plans),
            "shares": len(units),
            "one_worker_s": statistics.median(one for one, _ in timings),
            "two_workers_s": statistics.median(two for _, two in timings),
            "speedup": statistics.median(one / two for one, two in timings),
            "answers": "identical" if all(found == answers[0] for found in answers) else "differ",
            "rounds": args.rounds,
        }
    ]


def measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the peak memory of a process that sweeps 64 sequences at once, above that of one plain pass of 8."""
    budgets_mib = [64, 128, 256, 4096]
    rows = []
    for budget_mib in budgets_mib:
        command = [sys.executable, "-c", _MEMORY_PROBE, args.model, str(budget_mib), str(args.context)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append({"budget_mib": budget_mib, **json.loads(printed.splitlines()[-1])})
    return rows


_MEMORY_PROBE = """
import json, resource, sys, time, torch
from layerboost.checkpoint import load_model
from layerboost.evaluation.likelihood import score_text
from layerboost.plan import Plan, Treatment
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.sweep.layer_sweep import LayerSweep
torch.set_num_threads(2)
model = load_model(sys.argv[1])
n_layers, tokens = model.config.num_hidden_layers, int(sys.argv[3])
treatments = (Treatment.NONE, Treatment.WINDOW, Treatment.LINEAR_WINDOW)
plans = [Plan.uniform(Treatment.SOFTMAX, n_layers)]
plans += [single_layer_plan(n_layers, layer, t, 16) for t in treatments for layer in range(n_layers)]
sequences = torch.randint(3, model.config.vocab_size, (64, tokens), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    model(sequences[:8], use_cache=False)  # so that memory which any use of the model needs does not count
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.perf_counter()
found = score_text(LayerSweep(model, plans, budget_bytes=int(sys.argv[2]) * 2**20), sequences, base=0, batch_size=64)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
state_mib = 64 * tokens * model.config.hidden_size * model.dtype.itemsize / 2**20
print(json.dumps({"plans": len(plans), "all_states_mib": round(state_mib * len(plans), 1),
                  "peak_above_start_mib": round(peak - before, 1), "seconds": round(seconds, 2),
                  "mean_nll": round(float(found.nll.mean()), 6)}))
"""


def compare_on_shape(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compares on a model of a published shape with multiple-choice items of random tokens, for all plans."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = build(args.shape, dtype, args.device, args.context + 64)
    n_layers, vocabulary = model.config.num_hidden_layers, model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(args.items):
        context = torch.randint(vocabulary, (args.context,), generator=generator).tolist()
        for _ in range(4):
            answer = torch.randint(vocabulary, (6,), generator=generator).tolist()
            requests.append(Request((*context, *answer), len(answer)))
    plans = _plans(n_layers, args.treatments, args.window)
    budget = torch.cuda.mem_get_info()[0] // 2 if args.device == "cuda" else 1 << 30
    few = plans[:: max(1, len(plans) // 6)]

    def one_by_one(batch_size: int) -> None:
        for plan in few:
            variant = model if plan == plans[0] else convert(model, plan)
            with torch.inference_mode():
                for start in range(0, len(requests), batch_size):
                    batch = torch.tensor([r.tokens[:-1] for r in requests[start : start + batch_size]])
                    log_p = variant(batch.to(args.device), use_cache=False).logits.log_softmax(-1)
                    log_p[:, -6:].sum().item()

    answer_requests(LayerSweep(model, few[:2], budget_bytes=budget), requests[:8])
    batch_size = min(args.batch_sizes, key=lambda size: _seconds(lambda: one_by_one(size)) if size <= 32 else 1e9)
    # The time of a full evaluation hardly depends on the plan: time a sample of plans and scale it up.
    full_s = statistics.median(_seconds(lambda: one_by_one(batch_size)) for _ in range(args.rounds))
    full_s *= len(plans) / len(few)
    sweep_s = statistics.median(
        _seconds(lambda: answer_requests(LayerSweep(model, plans, budget_bytes=budget), requests, batch_rows=16))
        for _ in range(args.rounds)
    )
    return [
        {
            "shape": args.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "items": args.items,
            "context": args.context,
            "plans": len(plans),
            "one_by_one_batch_size": batch_size,
            "one_by_one_s": full_s,
            "sweep_s": sweep_s,
            "speedup": full_s / sweep_s,
            "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None,
        }
    ]


if __name__ == "__main__":
    main()
