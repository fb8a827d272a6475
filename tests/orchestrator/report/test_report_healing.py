"""Tests healing in the report on invented rows: quality curve, baselines, branches and early stops."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from layerboost.plan import Plan
from orchestrator.report import render as rendering
from orchestrator.report.data import ReportData
from orchestrator.report.healing import (
    BASELINE_COLUMNS,
    BRANCH_COLUMNS,
    HEALING_COLUMNS,
    QUALITY_CURVE_COLUMNS,
    baseline_sentences,
    baselines_table,
    branch_sentences,
    branches_table,
    early_stop_sentences,
    healing_table,
    pace_sentences,
    quality_curve_table,
)
from orchestrator.report.healing_figures import healing_picture, quality_curve_picture
from orchestrator.report.render import legend_names, render
from orchestrator.report.tables import pareto_table, read_csv, to_csv

GUIDED, OTHER = Plan.parse("SLLN", 8), Plan.parse("NLLS", 8)
NAMES = {GUIDED.plan_id: f"{GUIDED.plan_id} (point 2)", OTHER.plan_id: f"cosine {OTHER.plan_id}"}

PROMISED = {
    "healing_quality": "plan_id, origin, share, tokens, SCORES, quality, quality_stderr, quality_retained, "
    "quality_retained_stderr",
    "baselines": "plan_id, plan, window, origin, candidate_id, candidate, quality_ratio, quality_ratio_stderr, "
    "nll_gain, nll_gain_stderr, sinks",
    "branches": "plan_id, origin, window, branch_zeroed, nll, nll_loss, nll_loss_stderr, n_items",
}


def curve_rows():
    rows = []
    for plan, origin, start in ((OTHER, "cosine", 0.4), (GUIDED, "search", 0.5)):
        for share in (1.0, 0.1, 0.0):
            quality = start + 0.3 * share
            scores = [
                {"task": task, "metric": metric, "value": quality, "stderr": 0.01}
                for task, metric in (("quiz", "acc"), ("text", "nll"), ("text", "kl"))
            ]
            rows.append(
                {
                    "plan_id": plan.plan_id,
                    "origin": origin,
                    "share": share,
                    "tokens": int(1000 * share),
                    "scores": scores,
                    "quality": quality,
                    "quality_stderr": 0.01,
                    "quality_retained": quality / 0.8,
                    "quality_retained_stderr": 0.02,
                }
            )
    return rows


def baseline_row(**values):
    row = {
        "plan_id": OTHER.plan_id,
        "plan": str(OTHER),
        "window": 8,
        "origin": "cosine",
        "candidate_id": GUIDED.plan_id,
        "candidate": str(GUIDED),
        "quality_ratio": 1.0,
        "quality_ratio_stderr": 0.01,
        "nll_gain": -0.02,
        "nll_gain_stderr": 0.005,
    }
    return row | values


def branch_rows(loss=0.001, stderr=0.002):
    about = {"plan_id": GUIDED.plan_id, "origin": "search", "window": 8, "n_items": 32}
    return [
        {**about, "branch_zeroed": None, "nll": 2.0, "nll_loss": 0.0, "nll_loss_stderr": 0.0},
        {**about, "branch_zeroed": "linear", "nll": 2.0 + loss, "nll_loss": loss, "nll_loss_stderr": stderr},
        {**about, "branch_zeroed": "window", "nll": 3.0, "nll_loss": 1.0, "nll_loss_stderr": 0.1},
    ]


def loss_rows():
    for step in range(6):
        yield {
            "plan_id": GUIDED.plan_id,
            "phase": "heal",
            "step": step,
            "tokens": 100 * step,
            "loss": None if step == 0 else 1 / step,
            "held_out_divergence": 2 / (step + 1) if step % 2 == 0 else None,
        }


def test_columns_are_those_promised_and_round_trip():
    scores = "quiz_acc, quiz_acc_stderr, text_nll, text_nll_stderr, text_kl, text_kl_stderr"
    tables = {
        "healing_quality": (quality_curve_table(curve_rows()), QUALITY_CURVE_COLUMNS),
        "baselines": (baselines_table([baseline_row()]), BASELINE_COLUMNS),
        "branches": (branches_table(branch_rows()), BRANCH_COLUMNS),
        "losses": (healing_table(loss_rows()), HEALING_COLUMNS),
    }
    for name, promised in PROMISED.items():
        assert ", ".join(tables[name][0].columns) == promised.replace("SCORES", scores)
    for table, columns in tables.values():
        pd.testing.assert_frame_equal(read_csv(to_csv(table), columns), table, check_exact=True)


def test_curves_begin_with_candidates_and_rise_in_tokens():
    table = quality_curve_table(curve_rows())
    assert table["plan_id"].tolist() == [GUIDED.plan_id] * 3 + [OTHER.plan_id] * 3
    assert table["tokens"].tolist() == [0, 100, 1000] * 2
    with pytest.raises(ValueError, match="'share' is missing"):
        quality_curve_table([{"plan_id": "a", "origin": "search", "tokens": 1}])


def test_the_quality_curve_is_drawn_from_zero_on_where_there_is_more_than_a_point():
    picture = quality_curve_picture(quality_curve_table(curve_rows()), NAMES)
    assert picture is not None
    assert f"{NAMES[GUIDED.plan_id]}: 62.5 % to 100.0 %" in picture.alt
    assert f"{NAMES[OTHER.plan_id]}: 50.0 % to 87.5 %" in picture.alt
    first = [row for row in curve_rows() if row["share"] == 0]
    assert quality_curve_picture(quality_curve_table(first)) is None
    rows = [row | {"quality_retained": math.nan} for row in curve_rows()]
    assert quality_curve_picture(quality_curve_table(rows)) is None


def test_held_out_divergence_has_a_panel_of_its_own():
    with_panel = healing_picture(healing_table(loss_rows()))
    assert f"{GUIDED.plan_id} held-out divergence: 2 to 0.4" in with_panel.alt
    assert f"{GUIDED.plan_id} heal: 1 to 0.2" in with_panel.alt
    without = healing_picture(healing_table(row | {"held_out_divergence": None} for row in loss_rows()))
    assert "held-out" not in without.alt


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"quality_ratio": 1.05, "nll_gain": 0.005}, ["105.0 ± 1.0 % of its quality"]),
        ({"quality_ratio": 1.05}, []),  # better in quality, but worse on the text
        ({"quality_ratio": 0.9, "nll_gain": 0.02}, []),
        ({"quality_ratio": 1.019}, []),
        ({"nll_gain": 0.02}, ["0.0200 ± 0.0050 nats per token less on the text"]),
        ({"quality_ratio": 1.05, "nll_gain": 0.02}, ["105.0 ± 1.0 % of its quality and 0.0200 ± 0.0050 nats"]),
        ({"quality_ratio": 1.05, "quality_ratio_stderr": None, "nll_gain": None}, []),
    ],
)
def test_a_baseline_that_is_better_beyond_the_paired_error_is_named(values, parts):
    (sentence,) = baseline_sentences(baselines_table([baseline_row(**values)]), NAMES)
    if not parts:
        assert sentence.startswith("No healed baseline of the same attention budget is better than its candidate")
        assert "(1 comparison)" in sentence
    else:
        assert f"The baseline {NAMES[OTHER.plan_id]} is better than the candidate {NAMES[GUIDED.plan_id]}" in sentence
        assert all(part in sentence for part in parts)
    assert list(baseline_sentences(baselines_table([]), NAMES)) == []


def test_a_bypassed_branch_is_told_with_its_remedy():
    (sentence,) = branch_sentences(branches_table(branch_rows()), NAMES)
    assert f"The linear branch of {NAMES[GUIDED.plan_id]} is bypassed: zeroing it costs +0.0010 ± 0.0020" in sentence
    assert "healing.window_dropout" in sentence
    for loss, stderr in ((0.01, 0.002), (0.004, 0.01), (0.001, None)):  # a useful branch, then two of unknown use
        assert list(branch_sentences(branches_table(branch_rows(loss, stderr)), NAMES)) == []


def test_a_sentence_tells_how_fast_healing_was():
    assert "at 250 to 1,300 tokens a second" in next(pace_sentences([1300.4, 250.0]))
    assert "at 250 tokens a second" in next(pace_sentences([249.9, 250.2]))
    assert not list(pace_sentences([]))


def test_the_page_tells_of_healing():
    stops = [{"plan_id": GUIDED.plan_id, "origin": "search", "tokens": 61_440, "budget": 120_000}]
    data = ReportData(
        "m",
        "",
        healing_curves=healing_table(loss_rows()),
        quality_curve=quality_curve_table(curve_rows()),
        baselines=baselines_table([baseline_row(quality_ratio=1.05, nll_gain=0.0)]),
        branches=branches_table(branch_rows()),
        early_stops=stops,
        healing_paces=[312.0],
    )
    files = render(data)
    for name in ("healing_curves", "healing_quality", "baselines", "branches"):
        assert len(files[f"{name}.csv"]) > 100
    assert {"healing.png", "healing_quality.png", "healing_quality.svg"} <= set(files)
    page = files["report.html"].decode()
    assert "stopped after 61,440 of 120,000 tokens" in page
    assert "at 312 tokens a second" in page
    for expected in (
        next(early_stop_sentences(stops, {})),
        "is better than the candidate",
        "is bypassed",
        "All points of the quality curve (6 rows)",
        "All baselines of the same attention budget (1 row)",
        "Branches of linear_window layers (3 rows)",
    ):
        assert expected in page
    assert page.count("<img") == 2


def test_a_plan_is_called_as_it_was_healed():
    about = {"plan_id": OTHER.plan_id, "plan": str(OTHER), "window": 8, "status": "ok"}
    pareto = pareto_table(
        [
            {**about, "origin": "all_linear_window", "healed": False},
            {**about, "origin": "linear_window", "healed": True},
        ]
    )
    losses, curve = healing_table(loss_rows()), quality_curve_table(curve_rows())
    data = ReportData("m", "", pareto=pareto, healing_curves=losses, quality_curve=curve)
    assert "; linear_window: 50.0 % to 87.5 %" in render(data)["report.html"].decode()


def test_legends_name_plans_by_what_a_reader_knows():
    plans = {"01": "SSNN", "02": "NNSS", "03": "SNSN", "04": "NSNS", "05": "SSSS", "06": "S" * 80}
    names = {
        "01": "01 (point 2)",
        "02": "02",
        "03": "cosine 03",
        "04": "cosine 04 (point 1)",
        "05": "base (point 3) 05",
        "06": "06",
    }
    assert legend_names(names, plans) == {
        "01": "SSNN (point 2)",
        "02": "NNSS",
        "03": "cosine",
        "04": "cosine (point 1)",
        "05": "base (point 3)",
        "06": "80 S, 06",
    }
    both = {"03": "cosine 03", "04": "cosine 04"}
    assert legend_names(both, plans) == {"03": "SNSN cosine", "04": "NSNS cosine"}, "no two plans share a name"


def test_a_plan_looks_alike_in_all_pictures(monkeypatch):
    seen = []
    for name in ("healing_picture", "quality_curve_picture", "lengths_picture", "halving_picture"):
        monkeypatch.setattr(rendering, name, lambda table, names, looks: seen.append(looks))
    render(
        ReportData("m", "", healing_curves=healing_table(loss_rows()), quality_curve=quality_curve_table(curve_rows()))
    )
    assert len(seen) == 4 and all(looks == seen[0] for looks in seen)
    assert len(set(seen[0].values())) == len(seen[0]) == 2
