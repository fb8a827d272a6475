"""`layerboost evaluate`: judges models side by side by a recipe's quality section."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from orchestrator.commands.single_model import checked_model, checked_tokenizer, choose_device, load_checked
from orchestrator.exit_codes import EXIT_DONE
from orchestrator.recipe.load import load_recipe
from orchestrator.text_tables import print_rows


def evaluate(arguments: argparse.Namespace) -> int:
    """`layerboost evaluate`: judges models side by side; the first is the base."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    device = choose_device(arguments.device)
    every_facts = [checked_model(path, arguments) for path in arguments.models]
    tokenizers = [checked_tokenizer(facts, arguments) for facts in every_facts]
    from orchestrator.checks.quality import check_quality

    for facts, tokenizer in zip(every_facts, tokenizers):
        check_quality(recipe.quality, facts, tokenizer)
    from layerboost.evaluation.evaluate import evaluate as judge
    from layerboost.evaluation.scores import Scores, quality, retained

    every_scores: list[Scores] = []
    base_model = None
    for facts, tokenizer in zip(every_facts, tokenizers):
        model = load_checked(facts, arguments, device)
        spec = recipe.quality.spec(facts.context_tokens)
        # A divergence between predictions over different vocabularies has no meaning.
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
    return EXIT_DONE


def _row(model: str, task: str, metric: str, n_items: int | None, value: float, stderr: float | None) -> dict[str, Any]:
    return {"model": model, "task": task, "metric": metric, "n_items": n_items, "value": value, "stderr": stderr}


def _side_by_side(rows: list[dict[str, Any]], models: list[str]) -> list[dict[str, Any]]:
    """Arranges the rows as one line for each metric and one column for each model."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["task"], row["metric"]),
            {"task": row["task"], "metric": row["metric"], "n_items": row["n_items"]} | dict.fromkeys(models),
        )
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.2g}"
        line[row["model"]] = f"{row['value']:.4g}{error}"
    return list(lines.values())
