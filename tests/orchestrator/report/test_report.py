"""Tests the report on invented rows: schemas, order, front and speedup by condition, CSV round trips, the page."""

import math
import random
import re
from dataclasses import replace
from xml.etree import ElementTree

import pandas as pd
import pytest

from layerboost.plan import Plan
from orchestrator import pipeline
from orchestrator.report.certainty import (
    CORRELATION_COLUMNS,
    INTERACTION_COLUMNS,
    RANKING_COLUMNS,
    TIER_COLUMNS,
    correlations_table,
    interaction_sentences,
    interactions_table,
    rankings_table,
    reading_sentences,
    stability_sentences,
    tier_sentences,
    tiers_table,
)
from orchestrator.report.certainty_figures import correlation_picture, interaction_picture
from orchestrator.report.data import ReportData
from orchestrator.report.figures import sensitivity_picture
from orchestrator.report.front import conditions, format_front_table, front_rows, headline, headline_row, plan_labels
from orchestrator.report.healing import HEALING_COLUMNS, healing_table
from orchestrator.report.render import render
from orchestrator.report.tables import (
    CANDIDATE_COLUMNS,
    PARETO_COLUMNS,
    SENSITIVITY_COLUMNS,
    candidates_table,
    pareto_table,
    read_csv,
    sensitivity_table,
    to_csv,
)
from orchestrator.run.folder import RunFolder
from tests.report_rows import (
    Page,
    candidate_rows,
    correlation_rows,
    interaction_rows,
    pareto_row,
    pareto_rows,
    ranking_rows,
    sample,
    sensitivity_rows,
    tier_rows,
)

DESIGN = {
    "sensitivity": "layer, treatment, task, metric, n_items, base, ablated, drop, drop_stderr, "
    "drop_ci_low, drop_ci_high",
    "candidates": "plan_id, plan, window, origin, remove_below, keep_above, quality, quality_stderr, "
    "output_throughput_tok_per_s, on_front, status, objective, predicted_throughput_tok_per_s, "
    "predicted_throughput_stderr, share, beaten_by, sinks",
    "pareto": "plan_id, plan, window, origin, healed, heal_tokens, n_softmax, n_linear_window, n_window, n_none, "
    "n_affine, engine, hardware, concurrency, prompt_tokens, new_tokens, output_throughput_tok_per_s, "
    "output_throughput_stderr, ttft_ms_p50, tpot_ms_p50, peak_memory_mib, kv_bytes_per_token, BENCHMARKS, quality, "
    "quality_stderr, "
    "quality_retained, quality_retained_stderr, speedup, on_front, status, error, "
    "predicted_throughput_tok_per_s, predicted_throughput_stderr, feasible, flags, engine_version, ttft_ms_p99, "
    "tpot_ms_p99, itl_ms_p50, itl_ms_p99, kv_cache_tokens, control_retained, control_retained_stderr, sinks",
    "rankings": "treatment, score, source, context_tokens, chosen, n_items, split_half_spearman, split_half_low, "
    "split_half_high, items_until_stable, indistinct_pairs, ranking",
    "correlations": "treatment, view_a, view_b, method, correlation, ci_low, ci_high",
    "interactions": "plan_id, plan, window, origin, score, predicted_drop, measured_drop, measured_drop_stderr, "
    "interaction, interaction_stderr, sinks",
    "tiers": "plan_id, plan, layer, treatment, drop, drop_ci_low, drop_ci_high, remove_below, keep_above, straddles",
}
"""The columns that users were promised; they are repeated here so that a change of the writer fails a test."""

PICTURES = ("pareto", "sensitivity", "healing", "plans", "rank_correlations", "interactions")


@pytest.fixture(scope="module")
def files():
    return render(sample())


def names(key):
    return DESIGN[key].split(", ")


def test_columns_are_those_promised():
    assert list(SENSITIVITY_COLUMNS) == names("sensitivity")
    assert list(CANDIDATE_COLUMNS) == names("candidates")
    assert list(RANKING_COLUMNS) == names("rankings")
    assert list(CORRELATION_COLUMNS) == names("correlations")
    assert list(INTERACTION_COLUMNS) == names("interactions")
    assert list(TIER_COLUMNS) == names("tiers")
    assert list(PARETO_COLUMNS) == [name for name in names("pareto") if name != "BENCHMARKS"]
    table = pareto_table(pareto_rows())
    at = names("pareto").index("BENCHMARKS")
    assert list(table.columns) == [*names("pareto")[:at], "quiz_acc", "quiz_acc_stderr", *names("pareto")[at + 1 :]]


def test_benchmark_columns_are_snake_case_and_keep_the_order_of_base():
    scores = [
        {"task": "./tasks/my recall", "metric": "acc,none", "value": 0.5, "stderr": None},
        {"task": "arc", "metric": "acc", "value": 0.25, "stderr": 0.125},
    ]
    table = pareto_table([pareto_row("SN", scores=scores[::-1]), pareto_row("SS", "base", scores=scores)])
    start = list(table.columns).index("kv_bytes_per_token") + 1
    assert list(table.columns[start : start + 4]) == [
        "._tasks_my_recall_acc_none",
        "._tasks_my_recall_acc_none_stderr",
        "arc_acc",
        "arc_acc_stderr",
    ]
    assert table["arc_acc_stderr"].tolist() == [0.125, 0.125]


@pytest.mark.parametrize(
    "scores",
    [
        [("a", "b_c"), ("a_b", "c")],
        [("quiz", "acc"), ("quiz", "acc")],
        [("quiz", "acc"), ("quiz", "acc_stderr")],
        [("quiz", "acc_stderr"), ("quiz", "acc")],
        [("peak", "memory_mib")],
    ],
)
def test_scores_that_would_share_a_column_are_refused(scores):
    given = [{"task": task, "metric": metric, "value": 1.0, "stderr": 0.0} for task, metric in scores]
    with pytest.raises(ValueError, match="rename the task"):
        pareto_table([pareto_row("SS", "base", scores=given)])


def test_unknown_and_missing_keys_are_refused():
    with pytest.raises(ValueError, match="'through_put' is no column"):
        pareto_table([pareto_row("SS", through_put=3.0)])
    with pytest.raises(ValueError, match="'status' is missing"):
        candidates_table([{"plan_id": "0" * 12, "plan": "SS", "origin": "base"}])


def test_row_order_does_not_depend_on_the_order_of_the_units():
    for build, rows in (
        (pareto_table, pareto_rows()),
        (candidates_table, candidate_rows()),
        (sensitivity_table, sensitivity_rows()),
        (rankings_table, ranking_rows()),
        (correlations_table, correlation_rows()),
        (interactions_table, [*interaction_rows(), *interaction_rows("kl")]),
        (tiers_table, [*tier_rows(), *tier_rows("SSSN")]),
    ):
        shuffled = rows[:]
        random.Random(3).shuffle(shuffled)
        assert to_csv(build(shuffled)) == to_csv(build(rows)), build.__name__
    pareto = pareto_table(pareto_rows())
    assert pareto["origin"].tolist() == ["base"] * 2 + ["uniform"] * 2 + ["search"] * 10
    assert pareto["concurrency"].tolist()[:4] == [50, 100, 50, 100]
    assert pareto.loc[pareto["origin"] == "search", "plan_id"].is_monotonic_increasing
    sensitivity = sensitivity_table(sensitivity_rows())
    assert sensitivity["layer"].is_monotonic_increasing
    assert sensitivity["treatment"].tolist()[:6] == ["linear_window"] * 3 + ["none"] * 3
    assert sensitivity["task"].tolist()[:3] == ["mean", "arc", "quiz"]


def test_speedup_and_front_stay_inside_a_condition():
    table = pareto_table([*pareto_rows(), pareto_row("SN", quality=0.1, tok_per_s=1.0, engine="vllm")])
    for concurrency in (50, 100):
        rows = table[(table["concurrency"] == concurrency) & (table["engine"] == "transformers")]
        speedups = dict(zip(zip(rows["plan"], rows["healed"], strict=True), rows["speedup"], strict=True))
        assert speedups["SSSS", False] == 1.0
        assert speedups["SSNN", True] == pytest.approx(1.52, rel=1e-12)
        on_front = {(r.plan, r.healed) for r in rows.itertuples() if r.on_front}
        assert on_front == {("SSSS", False), ("SSSN", False), ("SSNN", True), ("LLLL", False)}
    alone = table[table["engine"] == "vllm"].iloc[0]
    assert alone["on_front"]
    assert math.isnan(alone["speedup"])


def test_failed_candidates_stay_as_rows_with_status_and_error():
    table = pareto_table(pareto_rows())
    failed = table[table["plan"] == "SWWN"]
    assert len(failed) == 2
    assert (failed["status"] == "failed").all()
    assert (failed["error"] == "CUDA out of memory").all()
    assert not failed["on_front"].any()
    assert failed["speedup"].isna().all()
    tried = candidates_table(candidate_rows())
    assert tried.set_index("plan").loc["SWWN", ["status", "on_front"]].tolist() == ["failed", False]


def test_a_failed_base_gives_no_speedup():
    rows = [pareto_row("SS", "base", status="failed", tok_per_s=None), pareto_row("SN")]
    table = pareto_table(rows)
    assert table["speedup"].isna().all()
    assert table["on_front"].tolist() == [False, True]
    assert "unknown throughput at" in headline(table.iloc[1])
    assert headline_row(table, conditions(table)[0]) is None


def test_a_front_that_the_search_knows_is_kept():
    rows = [row | {"on_front": row["plan"] == "NNNN"} for row in candidate_rows()]
    assert candidates_table(rows).query("on_front")["plan"].tolist() == ["NNNN"]
    assert set(candidates_table(candidate_rows()).query("on_front")["plan"]) == {"SSSS", "SSSN", "SSNN", "LLLL"}


def test_csv_holds_exact_floats_true_false_and_empty_cells():
    text = to_csv(candidates_table(candidate_rows())).decode()
    lines = text.splitlines()
    assert lines[0] == ",".join(names("candidates"))
    assert repr(0.1 / 3) in lines[1]
    assert lines[1].endswith(",true,ok,,,,,,")
    assert ",SSSS,,base," in lines[1]
    assert any(line.endswith(",,false,failed,,,,,,") for line in lines)
    assert not re.search(r"nan|None|<NA>|True|False", text)


def test_csv_round_trips_exactly(files):
    tables = {
        "sensitivity.csv": (sample().sensitivity, SENSITIVITY_COLUMNS),
        "candidates.csv": (sample().candidates, CANDIDATE_COLUMNS),
        "pareto.csv": (sample().pareto, PARETO_COLUMNS),
        "healing_curves.csv": (sample().healing_curves, HEALING_COLUMNS),
        "rankings.csv": (sample().rankings, RANKING_COLUMNS),
        "rank_correlations.csv": (sample().correlations, CORRELATION_COLUMNS),
        "interactions.csv": (sample().interactions, INTERACTION_COLUMNS),
        "tiers.csv": (sample().tiers, TIER_COLUMNS),
    }
    for name, (table, columns) in tables.items():
        pd.testing.assert_frame_equal(read_csv(files[name], columns), table, check_exact=True)
        assert list(pd.read_csv(pd.io.common.BytesIO(files[name])).columns) == list(table.columns)


def test_plan_ids_that_look_like_numbers_survive_a_round_trip():
    rows = [
        {"plan_id": plan_id, "plan": "SN", "origin": "search", "status": "ok"}
        for plan_id in ("012345678901", "1234567e8901")
    ]
    assert read_csv(to_csv(candidates_table(rows)), CANDIDATE_COLUMNS)["plan_id"].tolist() == [
        r["plan_id"] for r in rows
    ]


def test_headline_is_one_sentence():
    table = pareto_table(pareto_rows())
    row = headline_row(table, conditions(table)[0])
    assert (
        headline(row)
        == "1.52x throughput at 99.1 ± 0.4 % of the quality (concurrency 100, 512 + 128 tokens, Invented GPU)"
    )


def test_the_control_stands_beside_the_base_and_on_no_front():
    beside = {"control_retained": 0.98, "control_retained_stderr": 0.003}
    rows = [row | beside for row in pareto_rows() if row["concurrency"] == 100]
    rows.append(pareto_row("SSSS", "parent", quality=0.9, tok_per_s=170.0, healed=True, heal_tokens=10_000, **beside))
    table = pareto_table(rows)
    condition = conditions(table)[0]
    assert "parent" not in set(front_rows(table, condition)["origin"]) and len(front_rows(table, condition)) > 1
    row = headline_row(table, condition)
    assert headline(row).startswith(
        "1.52x throughput at 99.1 ± 0.4 % of the quality, 98.0 ± 0.3 % of the control's (concurrency 100"
    )
    page = render(replace(sample(), pareto=table))["report.html"].decode()
    assert re.search(r"<th[^>]*>of the control</th>", page) and "98.0 ± 0.3 %" in page
    assert "of the control" not in render(sample())["report.html"].decode()


def test_headline_speaks_of_what_keeps_the_most_where_nothing_keeps_enough():
    rows = [
        pareto_row("SSSS", "base", quality=0.5, tok_per_s=100.0),
        pareto_row("SSSN", quality=0.4, tok_per_s=120.0),
        pareto_row("SSNN", quality=0.3, tok_per_s=150.0),
    ]
    table = pareto_table(rows)
    assert headline_row(table, conditions(table)[0])["plan"] == "SSSN"


def test_front_is_numbered_from_the_best_quality():
    table = pareto_table(pareto_rows())
    rows = front_rows(table, conditions(table)[0])
    assert rows["point"].tolist() == [1, 2, 3, 4]
    assert rows["plan"].tolist() == ["SSSS", "SSSN", "SSNN", "LLLL"]


def test_terminal_table_is_of_the_highest_concurrency():
    text = format_front_table(pareto_table(pareto_rows()))
    lines = text.splitlines()
    assert lines[0] == "Front: concurrency 100, 512 + 128 tokens, Invented GPU, transformers"
    assert [line.split()[1] for line in lines[2:]] == ["SSSS", "SSSN", "SSNN", "LLLL"]
    assert re.search(r"SSNN\s+2 S, 2 N\s+search\s+yes\s+99\.1 ± 0\.4 %\s+258\.4\s+1\.52x\s+2,048", lines[4])
    assert format_front_table(pareto_table([])) == "Front: nothing measured yet."


def test_plans_of_one_name_are_told_apart():
    rows = [pareto_row("SSSS", "base"), *(pareto_row(plan, "cosine") for plan in ("SSNN", "SNNN"))]
    labels = plan_labels(pareto_table(rows), candidates_table([]))
    for plan in ("SSNN", "SNNN"):
        plan_id = Plan.parse(plan).plan_id
        assert labels[plan_id][0].startswith(f"cosine {plan_id}")


def test_terminal_table_shows_a_dominated_base():
    text = format_front_table(
        pareto_table([pareto_row("SSSS", "base", quality=0.5), pareto_row("SSSN", quality=0.6, tok_per_s=200.0)])
    )
    assert re.match(r"-\s+SSSS", text.splitlines()[2])
    assert re.match(r"1\s+SSSN", text.splitlines()[3])


def test_same_data_gives_the_same_bytes(files):
    first, second = files, render(sample())
    assert first == second
    assert set(first) == {
        "sensitivity.csv",
        "candidates.csv",
        "pareto.csv",
        "healing_curves.csv",
        "rankings.csv",
        "rank_correlations.csv",
        "interactions.csv",
        "tiers.csv",
        "report.html",
        *(f"{name}.{kind}" for name in PICTURES for kind in ("png", "svg")),
    }
    assert all(content.startswith(b"\x89PNG") for name, content in first.items() if name.endswith(".png"))


def test_page_parses_and_refers_to_nothing_outside(files):
    content = files["report.html"]
    page = Page(content)
    assert not page.all("script")
    assert not page.all("link")
    for tag, attrs in page.tags:
        for key in ("src", "href", "srcset", "data", "action"):
            assert attrs.get(key, "#").startswith(("#", "data:image/svg+xml;base64,")), (tag, key)
    assert b"@import" not in content
    assert b"url(" not in content
    assert b"http://" not in content
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {attrs["href"][1:] for attrs in page.all("a")} <= targets


def test_page_can_be_read_aloud(files):
    page = Page(files["report.html"])
    images = page.all("img")
    assert len(images) == 4
    assert all(len(attrs["alt"]) > 40 for attrs in images)
    assert len(page.all("caption")) == len(page.all("table")) >= 11
    assert {attrs["scope"] for attrs in page.all("th")} == {"row", "col"}
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_page_shows_headline_failures_recipe_versions_and_cost(files):
    page = Page(files["report.html"])
    text = " ".join(page.text)
    for expected in (
        "1.52x throughput at 99.1 ± 0.4 % of the quality (concurrency 100, 512 + 128 tokens, Invented GPU)",
        "CUDA out of memory",
        "model: {path: invented/model-1b}",
        "versions.torch",
        "the text is shorter than asked for",
        "wall_s",
    ):
        assert expected in text


def test_text_from_elsewhere_is_escaped():
    evil = '"><img src=http://evil.example/x onerror=alert(1)><script>alert(2)</script>'
    rows = [
        pareto_row(
            plan,
            origin,
            hardware=evil,
            scores=[{"task": evil, "metric": "acc", "value": 0.5, "stderr": 0.1}],
            status=status,
            error=evil,
        )
        for plan, origin, status in (("SSSS", "base", "ok"), ("SSSN", evil, "ok"), ("SSNN", "search", "failed"))
    ]
    sensitivity = [row | {"task": evil} for row in sensitivity_rows() if row["task"] == "quiz"]
    data = sample(
        title=evil,
        recipe_yaml=evil,
        pareto=pareto_table(rows),
        sensitivity=sensitivity_table([*sensitivity_rows(), *sensitivity]),
        environment={evil: evil},
        cost=pd.DataFrame({evil: [evil]}),
        warnings=[evil],
        rankings=rankings_table([row | {"source": evil} for row in ranking_rows()[:1]]),
        correlations=correlations_table([row | {"view_b": evil} for row in correlation_rows(2, [evil])]),
        interactions=interactions_table([row | {"origin": evil, "score": evil} for row in interaction_rows()]),
        tiers=tiers_table([row | {"plan_id": evil} for row in tier_rows()]),
    )
    page = Page(render(data)["report.html"])
    assert not page.all("script")
    assert all(attrs["src"].startswith("data:") and "onerror" not in attrs for attrs in page.all("img"))
    assert evil in "".join(page.text)


def test_names_and_losses_that_a_plotting_library_could_trip_over():
    trap = "$\\frac{$ <b> & _x"
    rows = [pareto_row("SSSS", "base"), pareto_row("SSSN", trap, quality=0.6)]
    losses = [1000.0, 10.0, math.inf, math.nan, 0.1]
    curves = [
        {"plan_id": trap, "phase": trap, "step": i, "tokens": i * 10, "loss": loss} for i, loss in enumerate(losses)
    ]
    sensitivity = [
        row | {"metric": trap, "drop": math.inf if row["layer"] == 2 else row["drop"]} for row in sensitivity_rows()
    ]
    data = ReportData(
        trap,
        trap,
        sensitivity_table(sensitivity),
        pareto=pareto_table(rows),
        healing_curves=healing_table(curves),
        correlations=correlations_table(
            row | {"treatment": trap, "view_a": trap, "ci_low": math.nan} for row in correlation_rows(2, ["none"])
        ),
        interactions=interactions_table([row | {"origin": trap, "score": trap} for row in interaction_rows()]),
    )
    files = render(data)
    assert {f"{name}.svg" for name in PICTURES} <= set(files)
    for name, content in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content)
    assert sum(trap in attrs["alt"] for attrs in Page(files["report.html"]).all("img")) == 3


def test_what_an_earlier_state_of_the_run_had_is_not_left_beside_the_report(tmp_path, monkeypatch, capsys):
    for name in ("lengths.csv", "pareto.png", "report.html", "notes.csv", "run.json"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(pipeline, "report_files", lambda folder: ({"report.html": b"new"}, "said"))
    pipeline._write_report(RunFolder(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "notes.csv", "run.json"}
    assert (tmp_path / "report.html").read_text() == "new" and "said" in capsys.readouterr().out


def test_nothing_measured_still_renders():
    files = render(ReportData(title="m", recipe_yaml="model: {}\n"))
    assert set(files) == {"report.html"}
    assert "No candidate" in "".join(Page(files["report.html"]).text)


def test_a_run_that_stopped_after_sensitivity_renders_what_exists():
    files = render(ReportData("m", "model: {}\n", sensitivity=sensitivity_table(sensitivity_rows())))
    assert set(files) == {"sensitivity.csv", "sensitivity.png", "sensitivity.svg", "report.html"}
    assert len(Page(files["report.html"]).all("img")) == 1


def test_a_run_without_throughput_or_benchmarks_renders_what_exists():
    rows = [
        pareto_row("SSSS", "base", scores=[], tok_per_s=None, output_throughput_stderr=None, quality_retained=None),
        pareto_row("SSSN", scores=[], tok_per_s=None, output_throughput_stderr=None, kv_bytes_per_token=None),
    ]
    files = render(
        ReportData("m", "model: {}\n", pareto=pareto_table(rows), candidates=candidates_table(candidate_rows()))
    )
    assert "pareto.png" not in files
    assert "plans.png" in files
    Page(files["report.html"])


def test_a_run_whose_candidates_all_failed_renders_the_errors():
    rows = [pareto_row("SSSS", "base", status="failed", error="no such device"), pareto_row("SN", status="failed")]
    text = "".join(Page(render(ReportData("m", "", pareto=pareto_table(rows)))["report.html"]).text)
    assert "no such device" in text
    assert "Warnings and failures (2)" in text


def test_builders_of_nothing_keep_their_columns():
    assert list(sensitivity_table([]).columns) == names("sensitivity")
    assert list(candidates_table([]).columns) == names("candidates")
    assert list(pareto_table([]).columns) == list(PARETO_COLUMNS)
    assert to_csv(healing_table([])).decode() == "plan_id,phase,step,tokens,loss,held_out_divergence\n"
    assert list(rankings_table([]).columns) == names("rankings")
    assert list(correlations_table([]).columns) == names("correlations")
    assert list(interactions_table([]).columns) == names("interactions")
    assert list(tiers_table([]).columns) == names("tiers")


def test_rankings_are_sorted_and_read_as_they_were_written():
    table = rankings_table(ranking_rows())
    assert table["treatment"].tolist() == ["window"] * 4 + ["none"] * 4
    assert table["source"].tolist()[:4] == ["mean", "quiz", "wiki.txt", "wiki.txt"]
    assert table["context_tokens"].tolist()[2:4] == [128, 2048]
    line = to_csv(table).decode().splitlines()[1]
    assert line == f"window,margin,mean,,true,400,{2 / 3!r},0.5,0.75,150,3<1 1<2,3 1 2 0"
    assert to_csv(table).decode().splitlines()[3].endswith(",0.75,,,3 1 2 0")


@pytest.mark.parametrize(
    ("build", "row", "message"),
    [
        (rankings_table, ranking_rows()[0] | {"ranking": [3, 1]}, r"ranking '\[3, 1\]' cannot be read"),
        (rankings_table, ranking_rows()[0] | {"indistinct_pairs": "3-5"}, "write it like '3<5 7<2'"),
        (rankings_table, {"treatment": "none", "score": "nll"}, "'source' is missing"),
        (correlations_table, correlation_rows()[0] | {"p_value": 0.1}, "'p_value' is no column"),
        (correlations_table, {"treatment": "none", "view_a": "a", "view_b": "a", "method": "kendall"}, "with itself"),
        (interactions_table, {"plan_id": "0", "plan": "SN", "origin": "search"}, "'score' is missing"),
        (tiers_table, tier_rows()[0] | {"straddles": None}, "'straddles' is missing"),
        (tiers_table, tier_rows()[0] | {"straddles": "middle"}, "'middle' is no threshold"),
        (tiers_table, tier_rows()[0] | {"treatment": "softmax"}, "does not give layer 0 'softmax'"),
        (tiers_table, tier_rows()[0] | {"layer": 4}, "does not give layer 4"),
    ],
)
def test_rows_on_certainty_that_cannot_be_meant_are_refused(build, row, message):
    with pytest.raises(ValueError, match=message):
        build([row])


def test_a_pair_of_views_is_one_row_whichever_comes_first():
    rows = correlation_rows(3, ["none"])
    swapped = [row | {"view_a": row["view_b"], "view_b": row["view_a"]} for row in rows]
    assert to_csv(correlations_table(rows)) == to_csv(correlations_table(swapped))
    with pytest.raises(ValueError, match="there already"):
        correlations_table([rows[0], swapped[0]])


def test_views_are_sorted_by_score_and_by_the_numbers_in_their_names():
    names_of_views = ["nll t 2048", "kl t 64", "nll t 128", "margin quiz"]
    rows = [
        {"treatment": "none", "view_a": a, "view_b": b, "method": "spearman", "correlation": 0.5}
        for index, a in enumerate(names_of_views)
        for b in names_of_views[:index]
    ]
    table = correlations_table(rows)
    assert table["view_a"].tolist() == ["margin quiz"] * 3 + ["nll t 128"] * 2 + ["nll t 2048"]
    assert table["view_b"].tolist() == ["nll t 128", "nll t 2048", "kl t 64", "nll t 2048", "kl t 64", "kl t 64"]


@pytest.mark.parametrize("n_views", [2, 14])
def test_heat_map_shows_few_and_many_views(n_views):
    picture = correlation_picture(correlations_table(correlation_rows(n_views, ["none", "window", "linear_window"])))
    assert picture.png.startswith(b"\x89PNG")
    svg = ElementTree.fromstring(picture.svg)
    cells = [e for e in svg.iter("{http://www.w3.org/2000/svg}g") if e.get("id", "").startswith("patch_")]
    assert len(cells) > 3 * n_views * (n_views - 1)
    assert picture.alt.count(f"{n_views} rankings") == 3


def test_a_heat_map_needs_a_spearman_correlation():
    rows = [row for row in correlation_rows() if row["method"] == "kendall"]
    files = render(ReportData("m", "", correlations=correlations_table(rows)))
    assert set(files) == {"rank_correlations.csv", "report.html"}
    assert "All pairs of rankings" in "".join(Page(files["report.html"]).text)


def test_interaction_is_measured_less_predicted():
    table = interactions_table(interaction_rows())
    assert table["interaction"].tolist() == (table["measured_drop"] - table["predicted_drop"]).tolist()
    given = interactions_table([row | {"interaction": 7.0} for row in interaction_rows()])
    assert given["interaction"].tolist() == [7.0] * 6


def test_interactions_are_summed_up_in_one_sentence_for_each_score():
    rows = [*interaction_rows("kl")[:3], *interaction_rows()]
    assert interaction_sentences(interactions_table(rows)) == [
        "margin: the Spearman correlation between predicted and measured drop over 5 plans is 0.97; "
        "5 of them lose more than predicted.",
        "kl: 2 plans, too few for a correlation.",
    ]
    equal = [row | {"measured_drop": 0.0} for row in interaction_rows()]
    assert "undefined, as all are equal; 0 of them" in interaction_sentences(interactions_table(equal))[0]


def test_interactions_without_errors_or_with_one_plan_are_drawn():
    alone = [row | {"measured_drop_stderr": None} for row in interaction_rows()[1:2]]
    assert "furthest from it is uniform" in interaction_picture(interactions_table(alone)).alt
    assert interaction_picture(interactions_table([alone[0] | {"measured_drop": None}])) is None


def test_stability_is_told_of_the_chosen_ranking():
    assert stability_sentences(rankings_table(ranking_rows()))[1] == (
        "The plans take the order of layers for none from margin (mean); the orders by two halves of its items "
        "correlate at 0.67 (0.50 to 0.75); it is stable from 150 items on; 2 pairs of neighbours cannot be told apart."
    )
    clear = [row | {"indistinct_pairs": ""} for row in ranking_rows()[:2]]
    assert "all neighbours in it can be told apart" in stability_sentences(rankings_table(clear))[0]
    assert stability_sentences(rankings_table([row | {"chosen": None} for row in ranking_rows()])) == []


def test_uncertain_tiers_are_named_for_each_plan():
    by_plan = {plan: sentence for _, plan, sentence in tier_sentences(tiers_table(tier_rows()))}
    assert by_plan == {"NLLS": "layer 1 could as well be none; layer 2 could as well be none or softmax."}
    rows = tier_rows("NNSS", ("remove_below", "remove_below", "keep_above", ""))
    assert tier_sentences(tiers_table(rows))[0][2] == "layers 0, 1 and 2 could as well be the middle treatment."
    rows = tier_rows("NNSS", ("remove_below keep_above", "", "remove_below keep_above", ""), keep_above=0.05)
    assert tier_sentences(tiers_table(rows))[0][2] == "layer 0 could as well be softmax; layer 2 could as well be none."
    assert tier_sentences(tiers_table(tier_rows(straddles=[""] * 4)))[0][2] == "no layer's interval holds a threshold."


def test_the_page_says_how_much_of_the_text_the_sweep_read():
    stable = {"sequences": 6, "of": 16, "reliability": {"none": 0.987, "window": 0.951}}
    (sentence,) = reading_sentences(stable)
    assert "read 6 of 16 sequences" in sentence and "0.99 for none, 0.95 for window" in sentence
    assert not list(reading_sentences(None))
    page = render(replace(sample(), stable=stable))["report.html"].decode()
    assert sentence in page


def test_page_shows_how_sure_the_ranking_is(files):
    page = Page(files["report.html"])
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {"rankings", "correlations", "interactions", "tiers"} <= ids
    text = " ".join(page.text)
    for sentence in (
        *stability_sentences(sample().rankings),
        *interaction_sentences(sample().interactions),
        "layer 1 could as well be none",
    ):
        assert sentence in text
    ids_without = Page(render(ReportData("m", ""))["report.html"]).all("h2")
    assert {attrs["id"] for attrs in ids_without} == {"recipe"}


def test_sensitivity_of_many_layers_names_the_metric_where_there_are_two():
    rows = sensitivity_rows(36, ("none", "window", "linear_window"))
    one = sensitivity_picture(sensitivity_table(rows))
    assert "none: largest drop" in one.alt
    other = [row | {"metric": "margin"} for row in rows]
    two = sensitivity_picture(sensitivity_table([*rows, *other]))
    assert "none (acc): largest drop" in two.alt
    assert "none (margin): largest drop" in two.alt
