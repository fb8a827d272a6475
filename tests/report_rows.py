"""Invented rows of every table of a report, and a parser that asks a page what it holds."""

import random
from html.parser import HTMLParser

import pandas as pd

from layerboost.plan import Plan
from orchestrator.report.certainty import correlations_table, interactions_table, rankings_table, tiers_table
from orchestrator.report.data import ReportData
from orchestrator.report.healing import healing_table
from orchestrator.report.tables import candidates_table, pareto_table, sensitivity_table


def pareto_row(plan, origin="search", *, quality=0.5, tok_per_s=100.0, concurrency=100, **more):
    parsed = Plan.parse(plan, window=64)
    row = {
        "plan_id": parsed.plan_id,
        "plan": plan,
        "window": parsed.window,
        "origin": origin,
        "healed": False,
        "heal_tokens": 0,
        "engine": "transformers",
        "hardware": "Invented GPU",
        "concurrency": concurrency,
        "prompt_tokens": 512,
        "new_tokens": 128,
        "output_throughput_tok_per_s": tok_per_s,
        "output_throughput_stderr": 1.25,
        "ttft_ms_p50": 31.7,
        "tpot_ms_p50": 12.1,
        "peak_memory_mib": 2048.0,
        "kv_bytes_per_token": 1024.0 * plan.count("S"),
        "scores": [{"task": "quiz", "metric": "acc", "value": quality, "stderr": 0.01, "items": [1.0]}],
        "quality": quality,
        "quality_stderr": 0.01,
        "quality_retained": quality / 0.5,
        "quality_retained_stderr": 0.004,
        "status": "ok",
        "error": None,
    }
    return row | more


def pareto_rows():
    rows = []
    for concurrency, scale in ((50, 1.0), (100, 1.7)):
        at = {"concurrency": concurrency}
        rows += [
            pareto_row("SSSS", "base", quality=0.5, tok_per_s=100.0 * scale, **at),
            pareto_row("LLLL", "uniform", quality=0.3, tok_per_s=170.0 * scale, **at),
            pareto_row("SSSN", quality=0.4987, tok_per_s=120.0 * scale, **at),
            pareto_row("SSNN", quality=0.45, tok_per_s=150.0 * scale, **at),
            pareto_row("SSNN", quality=0.4955, tok_per_s=152.0 * scale, healed=True, heal_tokens=10_000, **at),
            pareto_row("NNNN", quality=0.2, tok_per_s=140.0 * scale, **at),
            pareto_row("SWWN", status="failed", error="CUDA out of memory", quality=0.6, tok_per_s=None, **at),
        ]
    return rows


def sensitivity_rows(n_layers=4, treatments=("none", "linear_window")):
    chance = random.Random(7)
    rows = []
    for layer in reversed(range(n_layers)):
        for treatment in treatments:
            for task in ("quiz", "mean", "arc"):
                drop = chance.gauss(0.02, 0.03)
                rows.append(
                    {
                        "layer": layer,
                        "treatment": treatment,
                        "task": task,
                        "metric": "acc",
                        "n_items": 50,
                        "base": 0.5,
                        "ablated": 0.5 - drop,
                        "drop": drop,
                        "drop_stderr": 0.01,
                        "drop_ci_low": drop - 0.0196,
                        "drop_ci_high": drop + 0.0196,
                    }
                )
    return rows


def candidate_rows():
    keep = ("plan_id", "plan", "window", "origin", "quality", "quality_stderr", "output_throughput_tok_per_s", "status")
    rows = [{name: row[name] for name in keep} for row in pareto_rows()[:7] if not row["healed"]]
    return [row | {"remove_below": 0.1 / 3, "keep_above": 0.2} for row in rows]


def ranking_rows():
    views = [("margin", "quiz", None), ("margin", "mean", None), ("nll", "wiki.txt", 2048), ("nll", "wiki.txt", 128)]
    return [
        {
            "treatment": treatment,
            "score": score,
            "source": source,
            "context_tokens": context_tokens,
            "chosen": score == "margin",
            "n_items": 400,
            "split_half_spearman": 2 / 3,
            "split_half_low": 0.5,
            "split_half_high": 0.75,
            "items_until_stable": None if score == "nll" else 150,
            "indistinct_pairs": "3<1 1<2" if source == "mean" else "",
            "ranking": "3 1 2 0",
        }
        for treatment in ("none", "window")
        for score, source, context_tokens in views
    ]


def correlation_rows(n_views=4, treatments=("none", "window")):
    chance = random.Random(11)
    names = ["margin a_task_with_quite_a_long_name", *(f"nll text.txt {16 * n}" for n in range(1, n_views))]
    rows = []
    for treatment in treatments:
        for index, view in enumerate(names):
            for other in names[:index]:
                value = chance.uniform(-0.4, 1.0)
                for method in ("kendall", "spearman"):
                    rows.append(
                        {
                            "treatment": treatment,
                            "view_a": view,
                            "view_b": other,
                            "method": method,
                            "correlation": value,
                            "ci_low": value - 0.1,
                            "ci_high": min(1.0, value + 0.1),
                        }
                    )
    return rows


def interaction_rows(score="margin"):
    chance = random.Random(5)
    rows = []
    for plan, origin in (
        ("SSSS", "base"),
        ("LLLL", "uniform"),
        ("SLSL", "alternating"),
        ("SSSN", "search"),
        ("SSNN", "search"),
        ("NSNN", "search"),
    ):
        parsed = Plan.parse(plan, window=64)
        predicted = 0.1 * (4 - plan.count("S"))
        rows.append(
            {
                "plan_id": parsed.plan_id,
                "plan": plan,
                "window": parsed.window,
                "origin": origin,
                "score": score,
                "predicted_drop": predicted,
                "measured_drop": predicted * 1.3 + chance.uniform(0.0, 0.01),
                "measured_drop_stderr": 0.01,
                "interaction_stderr": 0.012,
            }
        )
    return rows


def tier_rows(plan="NLLS", straddles=("", "remove_below", "keep_above remove_below", ""), **more):
    parsed = Plan.parse(plan, window=64)
    return [
        {
            "plan_id": parsed.plan_id,
            "plan": plan,
            "layer": layer,
            "treatment": parsed.treatments[layer].value,
            "drop": 0.1 * layer,
            "drop_ci_low": 0.1 * layer - 0.07,
            "drop_ci_high": 0.1 * layer + 0.07,
            "remove_below": 0.05,
            "keep_above": 0.25,
            "straddles": found,
        }
        | more
        for layer, found in enumerate(straddles)
    ]


def sample(**changes):
    curves = [
        {
            "plan_id": Plan.parse("SSNN").plan_id,
            "phase": phase,
            "step": step,
            "tokens": step * 100,
            "loss": 2 / (step + 1),
        }
        for phase in ("transfer", "distill")
        for step in range(1, 20)
    ]
    fields = {
        "title": "invented/model-1b",
        "recipe_yaml": "model: {path: invented/model-1b}\n",
        "sensitivity": sensitivity_table(sensitivity_rows()),
        "candidates": candidates_table(candidate_rows()),
        "pareto": pareto_table(pareto_rows()),
        "healing_curves": healing_table(curves),
        "rankings": rankings_table(ranking_rows()),
        "correlations": correlations_table(correlation_rows()),
        "interactions": interactions_table(interaction_rows()),
        "tiers": tiers_table(tier_rows()),
        "environment": {"hardware": "Invented GPU", "versions": {"torch": "9.9"}},
        "cost": pd.DataFrame({"stage": ["evaluate", "search"], "wall_s": [12.5, 300.0], "units": [1, 40]}),
        "warnings": ["the text is shorter than asked for"],
    }
    return ReportData(**(fields | changes))


VOID_TAGS = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what the tests ask of a page and fails on tags that do not nest."""

    def __init__(self, content):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(content.decode())
        self.close()
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag], f"</{tag}> closes another tag"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
