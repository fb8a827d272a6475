"""Measures what healing recovers: guided plans and baselines over the token budget, and what linear branches add.

    python benchmarks/healing.py baselines --model DIR --train A.txt --val B.txt --cloze C.jsonl D.jsonl --work RUNS
    python benchmarks/healing.py curve     ... --train A.txt:0.45 N.txt:0.55 --val B.txt M.txt --tokens 10_000_000
    python benchmarks/healing.py windows   ... --windows 4 16 64

`baselines` heals every plan on the same tokens with the same settings for each seed. The guided plans come from the
sensitivity on the last sequences of the first training text, which no run on that text alone trains on: `guided` from
the layers' own NLL, `guided_refined` after greedy swaps. Differences are paired item by item; an item's value is the
mean over the seeds. Every run is a file under --work: the same command continues an earlier one, and several processes
share the runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sensitivity_sweep import cloze_task_files

from layerboost import Plan, Treatment
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.convert import convert
from layerboost.evaluation.evaluate import evaluate
from layerboost.evaluation.likelihood import score_text
from layerboost.evaluation.scores import QualitySpec, Scores
from layerboost.evaluation.statistics import paired_difference
from layerboost.healing.branches import branch_check
from layerboost.healing.spec import HealingSpec
from layerboost.healing.training import heal_locally, student_from
from layerboost.search.baselines import baseline_plans
from layerboost.search.refinement import make_refiner
from layerboost.sensitivity.cosine import cosine_scores
from layerboost.sensitivity.drops import single_layer_plan
from layerboost.speed.byte_model import predicted_speedup
from layerboost.speed.hardware import hardware_name
from layerboost.sweep.layer_sweep import LayerSweep
from layerboost.text.batches import PackedText
from layerboost.text.documents import pack, read_documents
from layerboost.text.sources import TextSource, pack_sources

BASELINES = (
    *("window", "linear_window", "linear", "interleaved_1/2", "interleaved_1/4"),
    *("interleaved", "cosine", "first", "last", "random:3"),
)
SELECTION_SEQUENCES = 32
CONTEXT_TOKENS, CONCURRENCY = 512, 32
"""Serving condition of the predicted speed-up in the tables."""


@dataclass(frozen=True)
class Setting:
    """Holds the settings that all runs of a command share."""

    model: str
    train: tuple[tuple[str, float], ...]
    val: tuple[str, ...]
    cloze: tuple[str, ...]
    val_sequences: int
    dtype: str
    threads: int
    sequence_tokens: int = CONTEXT_TOKENS


@dataclass(frozen=True)
class Run:
    """Describes one plan, healed once (or not, if `spec` is None), judged at the shares in `marks` and at its end."""

    name: str
    plan: Plan
    spec: HealingSpec | None = None
    marks: tuple[float, ...] = ()
    check_branches: bool = False

    def file(self, setting: Setting, folder: Path) -> Path:
        what = [
            asdict(setting),
            self.plan.to_dict(),
            self.spec and self.spec.to_dict(),
            self.marks,
            self.check_branches,
        ]
        return folder / f"{sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.json"


def perform(run: Run, setting: Setting, folder: Path) -> dict[str, Any]:
    """Heals and judges one plan, or reads the run's file if it exists; returns the scores item by item."""
    file = run.file(setting, folder)
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(setting.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parent = load_model(setting.model)
    start, steps, judged = time.monotonic(), [], []

    def judge_on_the_way(share: float, student) -> None:
        trained = {name: p.detach().clone() for name, p in student.named_parameters() if p.requires_grad}
        untouched = load_model(setting.model, dtype=getattr(torch, setting.dtype))
        judge_at(share, student_from(untouched, run.plan, run.spec, trained).float())

    def judge_at(share: float, student) -> None:
        judged.append({"share": share, **judge(student, parent, setting)})
        print(f"{run.name}: {share:.1%} of {run.spec.tokens if run.spec else 0} tokens judged", file=sys.stderr)

    result: dict[str, Any] = {"name": run.name, "plan": str(run.plan), "window": run.plan.window}
    if run.spec is None:
        student = parent if run.plan.count(Treatment.SOFTMAX) == len(run.plan) else convert(parent, run.plan)
    else:
        teacher = load_model(setting.model, dtype=getattr(torch, setting.dtype))
        text = training_text(setting, run.spec)
        student = heal_locally(
            teacher,
            run.plan,
            text,
            run.spec,
            marks=run.marks,
            on_mark=judge_on_the_way,
            on_step=lambda row: steps.append(row),
        )
        result |= {"tokens": steps[-1].tokens, "seed": run.spec.seed, "train_s": time.monotonic() - start}
        student = student.float()
    judge_at(1.0, student)
    if run.check_branches:
        sequences = val_sequences(setting, setting.val[0])
        result["branches"] = [loss.to_dict() for loss in branch_check(student, sequences)]
    result["judged"] = judged
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(file)
    return result


def training_text(setting: Setting, spec: HealingSpec) -> PackedText:
    """Returns the first sequences of the mixture; a single text leaves out those that plans are chosen by."""
    tokenizer = load_tokenizer(setting.model)
    sources = [TextSource(path, weight=weight) for path, weight in setting.train]
    wanted = spec.steps * spec.batch_sequences
    if len(sources) > 1:  # a mixture repeats its sources until the budget is filled
        return pack_sources(sources, tokenizer, spec.sequence_tokens, wanted)
    text = pack_sources(sources, tokenizer, spec.sequence_tokens, wanted + SELECTION_SEQUENCES)
    return text[: min(wanted, len(text) - SELECTION_SEQUENCES)]


def selection_sequences(setting: Setting) -> torch.Tensor:
    """Returns the last sequences of the first training text, by which plans are chosen."""
    sequences = pack(read_documents(setting.train[0][0]), load_tokenizer(setting.model), setting.sequence_tokens)
    return sequences[-SELECTION_SEQUENCES:]


def val_sequences(setting: Setting, text: str) -> torch.Tensor:
    tokenizer, documents = load_tokenizer(setting.model), read_documents(text)
    return pack(documents, tokenizer, setting.sequence_tokens, limit_sequences=setting.val_sequences)


def judge(student, parent, setting: Setting) -> dict[str, list[float]]:
    """Returns the scores of each item: `nll <text>` and `kl <text>` per sequence, `acc <task>` per cloze item."""
    tokenizer, items = load_tokenizer(setting.model), {}
    was_training = student.training
    with tempfile.TemporaryDirectory() as folder:
        tasks = tuple(cloze_task_files(setting.cloze, Path(folder)))
        for number, text in enumerate(setting.val):
            spec = QualitySpec(
                tasks=() if number else tasks,
                text=text,
                n_sequences=setting.val_sequences,
                sequence_tokens=setting.sequence_tokens,
            )
            scores: Scores = evaluate(student, tokenizer, spec, base=parent)
            for score in scores.metrics:
                if score.task == "text":
                    items[f"{score.metric} {Path(text).stem}"] = score.items
                elif score.metric == "acc":
                    items[f"acc {score.task}"] = score.items
    student.train(was_training)
    return items


def perform_all(runs: Sequence[Run], setting: Setting, folder: Path, processes: int) -> list[dict[str, Any]]:
    """Performs all runs in separate processes and returns their results; runs that have a file cost nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = [run for run in runs if not run.file(setting, folder).exists()]
    start = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for n_done, future in enumerate(
            as_completed([pool.submit(perform, r, setting, folder) for r in todo]), start=1
        ):
            name, left_s = future.result()["name"], (time.monotonic() - start) / n_done * (len(todo) - n_done)
            print(f"{n_done}/{len(todo)} {name}, {left_s / 60:.0f} min left", file=sys.stderr)
    return [perform(run, setting, folder) for run in runs]


def chosen_plans(args: argparse.Namespace, setting: Setting) -> dict[str, Plan]:
    """Returns the guided plans and the baselines, by name, from the file of an earlier call if it exists."""
    what = [setting.model, setting.train, args.counts, args.window, args.refined_plans, BASELINES]
    file = args.work / f"plans-{sha256(json.dumps(what).encode()).hexdigest()[:16]}.json"
    if not file.exists():
        torch.set_num_threads(setting.threads)
        plans = choose_plans(setting, args.counts, args.window, args.refined_plans)
        args.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({name: plan.to_dict() for name, plan in plans.items()}))
    return {name: Plan.from_dict(plan) for name, plan in json.loads(file.read_text()).items()}


def choose_plans(setting: Setting, counts: Sequence[int], window: int, n_refined: int) -> dict[str, Plan]:
    """Computes the guided plans and the baselines; `counts` are layers of softmax, linear_window and none."""
    model, sequences = load_model(setting.model), selection_sequences(setting)
    base, costs = single_layer_costs(model, sequences, window)
    guided = plan_by_scores(costs[Treatment.NONE], counts, window)
    n_layers = len(guided)
    plans = {"guided": guided, "guided_refined": refined(model, sequences, guided, base, costs, n_refined)}
    cosine = cosine_scores(model, sequences).mean(dim=1).tolist()
    for name in BASELINES:
        plans |= baseline_plans(name, n_layers, window=window, budget=guided, cosine=cosine)
    return plans


def single_layer_costs(model, sequences: torch.Tensor, window: int) -> tuple[float, dict[Treatment, list[float]]]:
    """Returns the base's NLL, and by treatment (none, linear_window) its rise if one layer alone is treated."""
    n_layers = model.config.num_hidden_layers
    untouched, costs, base = Plan.uniform(Treatment.SOFTMAX, n_layers), {}, 0.0
    for treatment in (Treatment.NONE, Treatment.LINEAR_WINDOW):
        single = [single_layer_plan(n_layers, layer, treatment, window) for layer in range(n_layers)]
        nll = score_text(LayerSweep(model, [untouched, *single]), sequences, base=0).nll.mean(dim=1)
        base, costs[treatment] = float(nll[0]), (nll[1:] - nll[0]).tolist()
    return base, costs


def plan_by_scores(scores: Sequence[float], counts: Sequence[int], window: int) -> Plan:
    """Removes the layers with the smallest scores and keeps the largest; `counts` are softmax, linear_window, none."""
    order = sorted(range(len(scores)), key=lambda layer: scores[layer])
    dealt = (Treatment.NONE,) * counts[2] + (Treatment.LINEAR_WINDOW,) * counts[1] + (Treatment.SOFTMAX,) * counts[0]
    by_layer = dict(zip(order, dealt, strict=True))
    return Plan(tuple(by_layer[layer] for layer in range(len(scores))), window)


def refined(
    model, sequences: torch.Tensor, start: Plan, base: float, costs: dict[Treatment, list[float]], n_plans: int
) -> Plan:
    """Returns the best plan that `n_plans` evaluations of greedy swaps find from `start`."""
    untouched = Plan.uniform(Treatment.SOFTMAX, len(start))
    refiner = make_refiner("greedy", start, costs, n_plans)
    while not refiner.finished:
        proposed = refiner.propose()
        nll = score_text(LayerSweep(model, [untouched, *proposed]), sequences, base=0).nll.mean(dim=1)
        refiner.observe({plan: float(loss) - base for plan, loss in zip(proposed, nll[1:], strict=True)})
    return refiner.best[0]


def mean_items(results: Sequence[dict[str, Any]], metric: str, share: float = 1.0) -> np.ndarray:
    """Returns each item's score, averaged over runs."""
    found = [judged[metric] for result in results for judged in result["judged"] if judged["share"] == share]
    return np.mean(np.asarray(found, dtype=np.float64), axis=0)


def compare(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Returns one row for each plan: before and after healing, against the base and against the guided plan."""
    plans = chosen_plans(args, setting)
    if args.only:
        plans = {name: plan for name, plan in plans.items() if name in {*args.only, "guided_refined"}}
    untouched = Plan.uniform(Treatment.SOFTMAX, len(plans["guided_refined"]))
    before = [Run(name, plan) for name, plan in {"base": untouched, **plans}.items()]
    healed = [Run(name, plan, replace(spec_of(args), seed=seed)) for seed in args.seeds for name, plan in plans.items()]
    results = perform_all([*before, *healed], setting, args.work, args.processes)
    base, unhealed = results[0], dict(zip(plans, results[1 : len(before)], strict=True))
    after = {name: [r for r in results[len(before) :] if r["name"] == name] for name in plans}
    config = load_model(setting.model).config
    metrics = list(base["judged"][0])
    metrics.remove("share")
    nll = next(metric for metric in metrics if metric.startswith("nll"))
    rows = []
    for name, plan in plans.items():
        row: dict[str, Any] = {"name": name, **about(plan, config), "tokens": after[name][0]["tokens"]}
        row["seeds"] = len(args.seeds)
        for metric in metrics:
            for when, found in (("before", [unhealed[name]]), ("after", after[name])):
                row |= against(mean_items(found, metric), mean_items([base], metric), f"{metric} {when}")
        gaps = [mean_items([r], nll).mean() - mean_items([base], nll).mean() for r in after[name]]
        row[f"{nll} after seed_sd".replace(" ", "_")] = statistics.stdev(gaps) if len(gaps) > 1 else None
        best = mean_items(after[name], nll), mean_items(after["guided_refined"], nll)
        row |= against(*best, f"{nll} after minus guided_refined")
        rows.append(row)
    return rows


def about(plan: Plan, config, context_tokens: int = CONTEXT_TOKENS) -> dict[str, Any]:
    speedup = predicted_speedup(config, plan, concurrency=CONCURRENCY, context_tokens=context_tokens, dtype_bytes=2)
    counts = {f"n_{treatment.value}": plan.count(treatment) for treatment in Treatment}
    return {"plan": str(plan), "window": plan.window, **counts, "predicted_speedup": speedup}


def against(items: np.ndarray, base: np.ndarray, label: str) -> dict[str, float | None]:
    """Returns the mean difference to the base and its paired standard error, in columns named after the label."""
    difference = paired_difference(items.tolist(), base.tolist(), resamples=1)
    column = label.replace(" ", "_")
    return {column: difference.mean, f"{column}_stderr": difference.stderr}


def curve(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Returns one row for each share of the budget of one long healing."""
    plans = {"guided_refined": Plan.parse(args.plan, args.window)} if args.plan else None
    name, plan = next(iter((plans or chosen_plans(args, setting)).items()))
    untouched = Plan.uniform(Treatment.SOFTMAX, len(plan))
    spec = replace(spec_of(args), seed=args.seeds[0])
    runs = [Run("base", untouched), Run(name, plan), Run(name, plan, spec, marks=tuple(args.marks))]
    base, unhealed, healed = perform_all(runs, setting, args.work, args.processes)
    rows = []
    for share, result in [(0.0, unhealed), *((judged["share"], healed) for judged in healed["judged"])]:
        row: dict[str, Any] = {"plan": str(plan), "window": plan.window, "share": share, "tokens": share * spec.tokens}
        for metric in base["judged"][0]:
            if metric != "share":
                items = mean_items([result], metric, share or 1.0)
                row[metric.replace(" ", "_")] = items.mean()
                row |= against(items, mean_items([base], metric), f"{metric} minus base")
        rows.append(row)
    return rows


def windows(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Returns one row for each window and middle treatment: linear_window against window on the same tokens."""
    letters = args.plan or str(chosen_plans(args, setting)["guided_refined"])
    untouched = Plan.uniform(Treatment.SOFTMAX, len(letters))
    runs = [Run("base", untouched)]
    for seed in args.seeds:
        spec = replace(spec_of(args), seed=seed)
        for window in args.windows:
            runs.append(Run(f"window {window}", Plan.parse(letters.replace("L", "W"), window), spec))
            for dropout in args.window_dropout:
                arm = replace(spec, window_dropout=dropout)
                plan = Plan.parse(letters, window)
                runs.append(Run(f"linear_window {window} dropout {dropout:g}", plan, arm, check_branches=True))
    results = perform_all(runs, setting, args.work, args.processes)
    base, nll = results[0], f"nll {Path(setting.val[0]).stem}"
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results[1:]:
        groups.setdefault(result["name"], []).append(result)
    rows = []
    for name, found in groups.items():
        row: dict[str, Any] = {"name": name, "plan": found[0]["plan"], "window": found[0]["window"]}
        row |= {"seeds": len(found), "tokens": found[0]["tokens"]}
        row |= against(mean_items(found, nll), mean_items([base], nll), "nll minus base")
        row |= against(
            mean_items(groups[f"window {row['window']}"], nll), mean_items(found, nll), "nll gain over window"
        )
        branches = [result["branches"] for result in found if "branches" in result]
        for number, zeroed in ((1, "linear"), (2, "window")):
            costs = [branch[number] for branch in branches]
            row[f"nll_loss_without_{zeroed}"] = statistics.fmean(c["nll_loss"] for c in costs) if costs else None
            stderrs = [cost["nll_loss_stderr"] for cost in costs]  # same sequences for all seeds: not independent
            row[f"nll_loss_without_{zeroed}_stderr"] = statistics.fmean(stderrs) if costs else None
        rows.append(row)
    return rows


def spec_of(args: argparse.Namespace) -> HealingSpec:
    return HealingSpec(
        tokens=args.tokens,
        sequence_tokens=CONTEXT_TOKENS,
        batch_sequences=args.batch_sequences,
        method=args.method,
        rank=args.rank,
        alpha=args.alpha,
        learning_rate=args.learning_rate,
        transfer_fraction=args.transfer_fraction,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["baselines", "curve", "windows"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", nargs="+", required=True, help="texts, followed by :WEIGHT if there are several")
    parser.add_argument("--val", nargs="+", required=True, help="texts to measure NLL and KL on")
    parser.add_argument("--cloze", nargs="*", default=[], help="JSONL with context, choices and gold")
    parser.add_argument("--val-sequences", type=int, default=96)
    parser.add_argument("--counts", type=int, nargs=3, default=[4, 4, 4], help="layers of softmax, linear_window, none")
    parser.add_argument("--only", nargs="+", help="baselines: only these plans and guided_refined")
    parser.add_argument("--plan", help="curve, windows: plan to use instead of the guided one")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--window-dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument("--refined-plans", type=int, default=48, help="plans evaluated to refine the guided one")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--marks", type=float, nargs="*", default=[0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=64)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--batch-sequences", type=int, default=2)
    parser.add_argument("--transfer-fraction", type=float, default=0.05)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="dtype of training (judging is in fp32)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args()
    setting = Setting(
        model=args.model,
        train=tuple((path, float(weight or 1)) for path, _, weight in (text.partition(":") for text in args.train)),
        val=tuple(args.val),
        cloze=tuple(args.cloze),
        val_sequences=args.val_sequences,
        dtype=args.dtype,
        threads=args.threads,
    )
    rows = {"baselines": compare, "curve": curve, "windows": windows}[args.command](args, setting)
    made = {"hardware": hardware_name("cpu"), "dtype": args.dtype, "torch": torch.__version__}
    made |= {"transformers": transformers.__version__, "python": platform.python_version()}
    for row in rows:
        print(json.dumps({k: round(v, 5) if isinstance(v, float) and math.isfinite(v) else v for k, v in row.items()}))
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *made], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **made} for row in rows)


if __name__ == "__main__":
    main()
