"""Compares our scores of a model, and of plans of it, with lm-eval called directly and with a plain loop.

    python benchmarks/scoring.py --model MODEL --tasks arc_easy piqa --text TEXT --limit 200
    python benchmarks/scoring.py --model MODEL.gguf --plan SSNW...SS --tasks TASK.yaml --text TEXT

Values of benchmarks must equal those of `lm_eval.simple_evaluate` to the last digit for the untouched model. A plan is
judged together with others, which changes the order of floating-point sums; its column `difference` is the largest
difference of a metric. The likelihood is compared with one forward pass for each sequence. The script ends with exit
code 1 if the untouched model's values differ, or, in float32, its likelihood by more than 1e-4: in bfloat16 logits
are rounded to two or three digits, and the size of a batch changes how.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import yaml
from results_csv import write_rows

from layerboost import Plan, convert, gguf
from layerboost.checkpoint import load_model, load_tokenizer
from layerboost.evaluation.evaluate import evaluate, text_sequences
from layerboost.evaluation.plan_evaluation import PlanEvaluation
from layerboost.evaluation.scores import QualitySpec, Scores

NLL_TOLERANCE = 1e-4
ADDED = ("margin", "ece")
"""Metrics that we add to those of a task."""


def values_of_lm_eval(model: Any, tokenizer: Any, spec: QualitySpec) -> dict[tuple[str, str], float]:
    """Returns the value of each metric by task and metric, from lm-eval as its documentation calls it."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def as_config(file: Path) -> dict[str, Any]:
        config = yaml.safe_load(file.read_text())
        files = config["dataset_kwargs"]["data_files"]
        config["dataset_kwargs"]["data_files"] = {split: str(file.parent / data) for split, data in files.items()}
        return config

    tasks = [as_config(Path(name)) if Path(name).is_file() else name for name in spec.tasks]
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=spec.batch_size),
        tasks=tasks,
        task_manager=TaskManager(),
        limit=spec.limit,
        bootstrap_iters=0,
    )["results"]
    found = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                found[task, metric if filter_name == "none" else f"{metric}@{filter_name}"] = value
    return found


def compare_benchmarks(ours: Scores, theirs: dict[tuple[str, str], float], model: str) -> list[dict[str, Any]]:
    """Returns a row for each metric of each task."""
    return [
        {
            "model": model,
            "task": score.task,
            "metric": score.metric,
            "value": score.value,
            "reference": theirs[score.task, score.metric],
            "difference": abs(score.value - theirs[score.task, score.metric]),
        }
        for score in ours.metrics
        if score.task != "text" and score.metric not in ADDED
    ]


@torch.no_grad()
def plain_nll(model: Any, sequences: torch.Tensor) -> float:
    """Returns the mean nats per predicted token, with one sequence at a time and whole logits."""
    of_each = []
    for row in sequences:
        logits = model(input_ids=row[None].long(), use_cache=False).logits[0, :-1].float()
        of_each.append(float(F.cross_entropy(logits, row[1:].long())))
    return sum(of_each) / len(of_each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, hub name or GGUF file")
    parser.add_argument("--plan", action="append", default=[], help="a plan to judge, too; may be given several times")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sequence-tokens", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="dtype to judge in; the default is the model's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="append the rows to this CSV")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache:
        path = arguments.model
        if gguf.is_gguf(path):
            folder = gguf.folder_for(Path(path), Path(cache), gguf.content_of(Path(path)))
            gguf.unpack(Path(path), folder)
            path = str(folder)
        model, tokenizer = load_model(path, dtype=arguments.dtype), load_tokenizer(path)
    spec = QualitySpec(
        tasks=tuple(arguments.tasks),
        limit=arguments.limit,
        text=arguments.text,
        n_sequences=arguments.sequences,
        sequence_tokens=arguments.sequence_tokens,
    )
    plans = [Plan.parse(letters, arguments.window) for letters in arguments.plan]
    name, sequences = Path(arguments.model).name, text_sequences(tokenizer, spec)
    rows, is_equal = [], True
    judged = [("untouched", evaluate(model, tokenizer, spec), model)]
    if plans:
        scores = PlanEvaluation(model, tokenizer, spec).run(plans)
        judged += [(str(plan), score, convert(model, plan)) for plan, score in zip(plans, scores, strict=True)]
    for plan, ours, alone in judged:
        found = compare_benchmarks(ours, values_of_lm_eval(alone, tokenizer, spec), name)
        nll, reference = ours.get("text", "nll").value, plain_nll(alone, sequences)
        found.append(
            {
                "model": name,
                "task": "text",
                "metric": "nll",
                "value": nll,
                "reference": reference,
                "difference": abs(nll - reference),
            }
        )
        for row in found:
            print(f"{plan[:40]:40} {row['task']:12} {row['metric']:12} {row['value']:.6f} {row['reference']:.6f}")
        if plan == "untouched":
            is_equal = not any(row["difference"] for row in found[:-1])
            is_equal &= model.dtype != torch.float32 or found[-1]["difference"] <= NLL_TOLERANCE
        about = {
            "plan": plan,
            "dtype": str(model.dtype).removeprefix("torch."),
            "model": name,
            "limit": arguments.limit,
        }
        rows += [about | row for row in found]
    if arguments.out:
        before = list(csv.DictReader(arguments.out.open())) if arguments.out.exists() else []
        write_rows(arguments.out, [*before, *rows])
    if not is_equal:
        sys.exit("the values are not those of lm-eval and the plain loop")


if __name__ == "__main__":
    main()
