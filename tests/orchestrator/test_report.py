"""The report on invented rows: schemas, order, front and speedup per condition, CSV round trips, an offline page."""

import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pandas as pd
import pytest

from layerboost.plan import Plan
from orchestrator.report import ReportData, render
from orchestrator.report.front import conditions, format_front_table, front_rows, headline, headline_row
from orchestrator.report.tables import (
    CANDIDATE_COLUMNS,
    HEALING_COLUMNS,
    PARETO_COLUMNS,
    SENSITIVITY_COLUMNS,
    candidates_table,
    healing_table,
    pareto_table,
    read_csv,
    sensitivity_table,
    to_csv,
)

DESIGN = {
    "sensitivity": "layer, treatment, task, metric, n_items, base, ablated, drop, drop_stderr, "
    "drop_ci_low, drop_ci_high",
    "candidates": "plan_id, plan, window, origin, remove_below, keep_above, quality, quality_stderr, "
    "output_throughput_tok_per_s, on_front, status",
    "pareto": "plan_id, plan, window, origin, healed, heal_tokens, n_softmax, n_linear_window, n_window, n_none, "
    "engine, hardware, concurrency, prompt_tokens, new_tokens, output_throughput_tok_per_s, output_throughput_stderr, "
    "ttft_ms_p50, tpot_ms_p50, peak_memory_mib, kv_bytes_per_token, BENCHMARKS, quality, quality_stderr, "
    "quality_retained, quality_retained_stderr, speedup, on_front, status, error",
}
"""The columns that users were promised, in words of their own so that a change of the writer shows."""


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
        "environment": {"hardware": "Invented GPU", "versions": {"torch": "9.9"}},
        "cost": pd.DataFrame({"stage": ["evaluate", "search"], "wall_s": [12.5, 300.0], "units": [1, 40]}),
        "warnings": ["the text is shorter than asked for"],
    }
    return ReportData(**(fields | changes))


@pytest.fixture(scope="module")
def files():
    return render(sample())


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


def names(key):
    return DESIGN[key].split(", ")


def test_columns_are_those_promised():
    assert list(SENSITIVITY_COLUMNS) == names("sensitivity")
    assert list(CANDIDATE_COLUMNS) == names("candidates")
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
    rows = {"pareto": pareto_rows(), "candidates": candidate_rows(), "sensitivity": sensitivity_rows()}
    builders = {"pareto": pareto_table, "candidates": candidates_table, "sensitivity": sensitivity_table}
    for key, build in builders.items():
        shuffled = rows[key][:]
        random.Random(3).shuffle(shuffled)
        assert to_csv(build(shuffled)) == to_csv(build(rows[key])), key
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
    assert lines[1].endswith(",true,ok")
    assert ",SSSS,,base," in lines[1]
    assert any(line.endswith(",,false,failed") for line in lines)
    assert not re.search(r"nan|None|<NA>|True|False", text)


def test_csv_round_trips_exactly(files):
    tables = {
        "sensitivity.csv": (sample().sensitivity, SENSITIVITY_COLUMNS),
        "candidates.csv": (sample().candidates, CANDIDATE_COLUMNS),
        "pareto.csv": (sample().pareto, PARETO_COLUMNS),
        "healing_curves.csv": (sample().healing_curves, HEALING_COLUMNS),
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
        headline(row) == "1.52x throughput at 99.1 % of the quality (concurrency 100, 512 + 128 tokens, Invented GPU)"
    )


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
        "report.html",
        *(f"{name}.{kind}" for name in ("pareto", "sensitivity", "healing", "plans") for kind in ("png", "svg")),
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
    assert len(images) == 5
    assert all(len(attrs["alt"]) > 40 for attrs in images)
    assert len(page.all("caption")) == len(page.all("table")) >= 7
    assert {attrs["scope"] for attrs in page.all("th")} == {"row", "col"}
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"


def test_page_shows_headline_failures_recipe_versions_and_cost(files):
    page = Page(files["report.html"])
    text = " ".join(page.text)
    for expected in (
        "1.52x throughput at 99.1 % of the quality (concurrency 100, 512 + 128 tokens, Invented GPU)",
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
    )
    files = render(data)
    assert {"pareto.svg", "sensitivity.svg", "healing.svg", "plans.svg"} <= set(files)
    for name, content in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(content)
    assert trap in Page(files["report.html"]).all("img")[1]["alt"]


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
    assert "Failed (2)" in text


def test_builders_of_nothing_keep_their_columns():
    assert list(sensitivity_table([]).columns) == names("sensitivity")
    assert list(candidates_table([]).columns) == names("candidates")
    assert list(pareto_table([]).columns) == list(PARETO_COLUMNS)
    assert to_csv(healing_table([])).decode() == "plan_id,phase,step,tokens,loss\n"
