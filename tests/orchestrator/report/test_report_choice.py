"""Tests what helps to choose a plan: the inline front, verdict, flags, lengths, halving, predicted speed, cost."""

import math
import re
from xml.etree import ElementTree

import pandas as pd
import pytest

from layerboost.plan import Plan
from orchestrator.report.chart import Axis, Point, charts, draw
from orchestrator.report.choice import (
    ESTIMATE_COLUMNS,
    FIDELITY_COLUMNS,
    HALVING_COLUMNS,
    LENGTH_COLUMNS,
    SPEED_COLUMNS,
    estimates_table,
    fidelity_sentences,
    fidelity_table,
    halving_table,
    lengths_table,
    speed_sentences,
    speed_table,
)
from orchestrator.report.choice_figures import halving_picture, lengths_picture, speed_picture
from orchestrator.report.data import ReportData
from orchestrator.report.front import conditions, under
from orchestrator.report.front_page import front_views
from orchestrator.report.render import render
from orchestrator.report.tables import pareto_table, read_csv, to_csv
from tests.report_rows import Page, pareto_row, pareto_rows, sample

GUIDED, OTHER = Plan.parse("SSNN"), Plan.parse("SNNN")
AXIS = Axis("value", str)


def about(plan, origin="search"):
    return {"plan_id": plan.plan_id, "plan": str(plan), "origin": origin}


def length_rows():
    return [
        {**about(plan, origin), "healed": True, "concurrency": 16, "prompt_tokens": tokens, "new_tokens": 8}
        | {"tpot_ms_p50": tokens / 100 * plan_factor, "peak_memory_mib": 10.0 + tokens, "status": "ok"}
        for plan, origin, plan_factor in ((GUIDED, "search", 1.0), (OTHER, "cosine", 0.5))
        for tokens in (512, 128)
    ]


def halving_rows():
    rows = [
        {**about(plan), "rung": rung, "share": share, "tokens": int(1000 * share), "quality": quality + share}
        | {"quality_stderr": 0.01, "quality_retained": quality, "survived": rung == 0 and plan is GUIDED}
        for rung, share in ((1, 0.4), (0, 0.1))
        for plan, quality in ((GUIDED, 0.4), (OTHER, 0.3))
    ]
    return [row for row in rows if row["rung"] == 0 or row["plan"] == str(GUIDED)]


def fidelity_row(**values):
    row = {"of": "quality", "rung_a": 0, "rung_b": 1, "share_a": 0.1, "share_b": 0.4, "n_plans": 8}
    return row | {"spearman": 0.9, "spearman_low": 0.6, "spearman_high": 0.98} | values


def speed_rows():
    return [
        {"plan_id": plan.plan_id, "plan": str(plan), "healed": False, "concurrency": 8, "in_fit": in_fit}
        | {"predicted_throughput_tok_per_s": 1000.0 * factor, "output_throughput_tok_per_s": 1000.0}
        for plan, in_fit, factor in ((GUIDED, False, 1.04), (OTHER, False, 0.98), (Plan.parse("SSSS"), True, 1.01))
    ]


def estimate_rows():
    return [
        {"stage": "search", "units": 40, "estimated_s": 100.0, "actual_s": 150.0, "memory_mib": 512.0},
        {"stage": "evaluate", "units": 1, "estimated_s": 0.0, "actual_s": 2.0},
    ]


TABLES = {
    "lengths": (lengths_table, length_rows(), LENGTH_COLUMNS),
    "halving": (halving_table, halving_rows(), HALVING_COLUMNS),
    "fidelity": (fidelity_table, [fidelity_row()], FIDELITY_COLUMNS),
    "speed": (speed_table, speed_rows(), SPEED_COLUMNS),
    "estimates": (estimates_table, estimate_rows(), ESTIMATE_COLUMNS),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_written_as_they_are_read(name):
    build, rows, columns = TABLES[name]
    table = build(rows)
    assert list(table.columns) == list(columns)
    pd.testing.assert_frame_equal(read_csv(to_csv(table), columns), table, check_exact=True)
    if name != "estimates":
        assert to_csv(build(rows[::-1])) == to_csv(table)
    with pytest.raises(ValueError, match="'colour' is no column"):
        build([rows[0] | {"colour": 1}])


def test_ratios_and_errors_are_computed_where_they_are_absent():
    assert speed_table(speed_rows())["relative_error"].abs().max() == pytest.approx(0.04)
    ratios = estimates_table(estimate_rows())["ratio"].tolist()
    assert ratios[0] == 1.5
    assert math.isnan(ratios[1]), "nothing was estimated"


def test_speed_is_told_of_plans_that_were_not_seen_first():
    unseen, seen = speed_sentences(speed_table(speed_rows()))
    assert unseen.startswith("Of 2 measurements that the prediction had not seen")
    assert "off by 3.0 % in the median and 4.0 % at most" in unseen
    assert seen.startswith("Of 1 measurement that it was made from")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "correlate at 0.90 (0.60 to 0.98) (Spearman): the early order predicts the later one well."),
        ({"spearman_low": -0.2}, "do not show that the early order predicts the later one."),
        ({"spearman": 0.5, "spearman_low": 0.1}, "predicts the later one in part."),
        ({"spearman": 0.2, "spearman_low": None}, "predicts little."),
        ({"spearman": None}, "too few for a correlation."),
    ],
)
def test_fidelity_says_how_far_early_ranks_are_to_be_trusted(values, expected):
    (sentence,) = fidelity_sentences(fidelity_table([fidelity_row(**values)]))
    assert sentence.endswith(expected)
    assert "at 10 % and at 40 % of the healing budget" in sentence


def test_pictures_tell_what_they_show_and_need_something_to_show():
    names = {GUIDED.plan_id: "guided"}
    assert "guided: 1.28 to 5.12 ms per token" in lengths_picture(lengths_table(length_rows()), names).alt
    assert lengths_picture(lengths_table(length_rows()[:1]), names) is None
    alt = halving_picture(halving_table(halving_rows()), names).alt
    assert "for 2, 1 plans in the rungs" in alt
    assert "guided: 0.800" in alt
    assert halving_picture(halving_table([]), names) is None
    assert "+4.0 %" in speed_picture(speed_table(speed_rows())).alt
    assert speed_picture(speed_table([])) is None


def test_the_page_holds_every_new_table_and_its_sentences():
    tables = {name: build(rows) for name, (build, rows, _) in TABLES.items()}
    files = render(ReportData("m", "", **tables, verdict=["Nothing holds at_most.n_softmax: 1."]))
    assert {f"{name}.csv" for name in TABLES} <= set(files)
    assert {"lengths.png", "halving.svg", "speed.png"} <= set(files)
    page = Page(files["report.html"])
    text = " ".join(page.text)
    for expected in (
        "Nothing holds at_most.n_softmax: 1.",
        "Cost by stage: what was expected",
        *fidelity_sentences(tables["fidelity"]),
        *speed_sentences(tables["speed"]),
        "All lengths (4 rows)",
        "All rungs (3 rows)",
    ):
        assert expected in text
    assert len(page.all("img")) == 3


def point(x, y, label="", **values):
    given = {"x_error": 0.0, "y_error": 0.0, "shape": "circle", "look": "front", "must_label": True, "name": "n"}
    return Point(x=x, y=y, label=label, plan="SN", details=(), in_front=True, **(given | values))


def test_larger_values_are_further_right_and_up_and_bars_stay_inside():
    chart = draw([point(1, 1, x_error=0.5), point(2, 3, y_error=9.0)], AXIS, AXIS, "wide", 760, 430)
    low, high = chart.marks
    assert low.x < high.x
    assert low.y > high.y
    left, top, right, bottom = chart.plot
    for mark in chart.marks:
        assert left <= mark.x_bar[0] <= mark.x <= mark.x_bar[1] <= right
        assert top <= mark.y_bar[1] <= mark.y <= mark.y_bar[0] <= bottom
    assert low.x_bar[1] - low.x == pytest.approx((high.x - low.x) / 2, abs=0.2)
    assert charts([], AXIS, AXIS) == []
    assert len({(mark.x, mark.y) for mark in draw([point(1, 1)] * 2, AXIS, AXIS, "wide", 760, 430).marks}) == 1


def test_the_line_of_the_front_covers_what_it_dominates():
    chart = draw([point(2, 1), point(1, 3)], AXIS, AXIS, "wide", 760, 430)
    ((look, path),) = chart.lines
    corners = [tuple(map(float, pair.split())) for pair in re.findall(r"[\d.]+ [\d.]+", path)]
    best, fastest = sorted(chart.marks, key=lambda mark: mark.x)
    assert look == "front"
    assert corners == [(best.x, best.y), (best.x, fastest.y), (fastest.x, fastest.y)]


def test_labels_do_not_cover_each_other_and_give_way_where_there_is_no_room():
    crowd = [point(1 + i / 50, 1 + i / 90, "a_long_name_of_a_baseline", must_label=False) for i in range(12)]
    for chart in charts(crowd, AXIS, AXIS):
        boxes = []
        for label in chart.labels:
            width = 6.7 * len(label.text)
            left = label.x - {"start": 0, "middle": width / 2, "end": width}[label.anchor]
            boxes.append((left, label.y, left + width))
        assert 0 < len(boxes) < len(crowd)
        for index, (left, y, right) in enumerate(boxes):
            assert all(right < a or b < left or abs(y - other) >= 13 for a, other, b in boxes[:index])


def test_a_view_for_each_condition_with_its_errors_and_the_best_first():
    table = pareto_table([row | {"feasible": row["plan"] == "SSSN"} for row in pareto_rows()])
    best = [under(table, c).query("plan == 'SSSN'").index[0] for c in conditions(table)]
    views = front_views(table, best)
    assert [view.label for view in views] == ["concurrency 100", "concurrency 50"]
    first, second, *_ = views[0].headlines
    assert first.sentence.startswith("1.20x throughput at 99.7 ± 0.4 % of the quality (concurrency 100")
    assert first.remark.endswith("not healed. Best under the constraints.")
    assert second.sentence == "1.52x throughput at 99.1 ± 0.4 % of the quality"
    assert second.remark.endswith("healed. Does not hold the constraints.")
    marks = {mark.point.plan + mark.point.shape: mark.point for mark in views[0].charts[0].marks}
    assert marks["SSSSstar"].x_error == 0
    expected = 1.2 * math.hypot(1.25 / 204, 1.25 / 170)
    assert marks["SSSNtriangle"].x_error == pytest.approx(expected)
    assert marks["SSSNtriangle"].y_error == pytest.approx(0.4)
    assert marks["SSNNcircle"].hollow
    assert not marks["SSSNtriangle"].hollow


def test_without_constraints_the_fastest_that_keeps_enough_comes_first():
    table = pareto_table(pareto_rows())
    (view, _) = front_views(table, [])
    assert view.headlines[0].sentence.startswith("1.52x")
    assert "keeps at least 99 %" in view.headlines[0].remark
    assert "holds constraints" not in view.table.header


def test_flags_are_marked_in_figure_table_and_headline():
    flagged = [row | {"flags": "generation"} if row["healed"] else row for row in pareto_rows()]
    page = Page(render(sample(pareto=pareto_table(flagged)))["report.html"])
    text = " ".join(page.text)
    assert "Flagged: generation." in text
    assert text.count("generation") > 6
    assert len([attrs for attrs in page.all("circle") if attrs.get("class") == "flag"]) == 2 * 2 + 2


def test_points_are_named_and_reachable_and_the_svg_is_well_formed():
    content = render(sample())["report.html"].decode()
    drawings = re.findall(r'<svg class="chart.*?</svg>', content, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        points = [g for g in ElementTree.fromstring(drawing).iter("g") if g.get("role") == "img"]
        assert len(points) == 6
        assert all(g.get("tabindex") == "0" and "speed-up" in g.get("aria-label") for g in points)
        assert {"Plan SSNN, point 3 on the front", "Plan NNNN, not on the front"} <= {
            g.get("aria-label").split(":")[0] for g in points
        }
    assert "<script" not in content


def test_speed_alone_is_drawn_without_a_base():
    rows = [pareto_row("SSSN", quality_retained=None), pareto_row("SSNN", quality_retained=None, tok_per_s=50.0)]
    (view,) = front_views(pareto_table(rows), [])
    assert view.charts[0].x_axis.label == "output throughput (tokens/s)"
    assert view.charts[0].y_axis.label == "quality"
    assert view.headlines == []
