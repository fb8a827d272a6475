"""Tests the comparison of runs: one figure, one table, the differences, and runs that cannot be compared."""

import io

import pandas as pd
import pytest

from orchestrator import cli
from orchestrator.commands import compare
from orchestrator.report.comparison import Run, comparison_summary, comparison_table, render_comparison
from orchestrator.report.data import ReportData
from orchestrator.report.tables import pareto_table
from tests.report_rows import Page, pareto_row, pareto_rows, sample


@pytest.fixture(scope="module")
def runs():
    rows = [pareto_row("SSSS", "base", hardware="Other GPU"), pareto_row("SSSN", tok_per_s=130.0, hardware="Other GPU")]
    rows = [row | {"scores": [{"task": "arc", "metric": "acc", "value": 0.5, "stderr": 0.1}]} for row in rows]
    cost = pd.DataFrame({"stage": ["evaluate", "heal"], "worker seconds": [2.0, 40.0]})
    other = ReportData(
        "another/model",
        "model: {path: another/model}\nhealing: {tokens: 5}\n",
        pareto=pareto_table(rows),
        environment={"versions": {"torch": "9.8"}},
        cost=cost,
    )
    return [Run("first", sample()), Run("<second>", other)]


def test_the_table_holds_every_row_with_its_run(runs):
    files = render_comparison(runs)
    assert files == render_comparison(runs)
    table = pd.read_csv(io.BytesIO(files["comparison.csv"]))
    assert table["run"].value_counts().to_dict() == {"first": 14, "<second>": 2}
    assert list(table.columns[:3]) == ["run", "model", "plan_id"]
    assert table.loc[table["run"] == "first", "arc_acc"].isna().all()
    assert table.loc[table["run"] == "<second>", "quiz_acc"].isna().all()
    assert comparison_table(runs)["on_front"].sum() == 8 + 1, "the second base is dominated"


def test_the_page_names_headlines_differences_and_cost(runs):
    page = Page(render_comparison(runs)["comparison.html"])
    text = " ".join(page.text)
    for expected in (
        "A: first: 1.52x throughput at 99.1 ± 0.4 % of the quality (concurrency 100",
        "B: <second>: 1.30x throughput at 100.0 ± 0.4 % of the quality",
        "B: <second>: nothing on the front under this condition",
        "The runs start from different models",
        "The runs were timed on different hardware.",
        "healing.tokens",
        "versions.torch",
        "40.0",
    ):
        assert expected in text
    assert "by different engines" not in text
    assert not page.all("script")
    same = " ".join(Page(render_comparison([runs[0], Run("again", sample())])["comparison.html"]).text)
    assert "The recipes do not differ." in same
    assert "different" not in same.split("</style>")[-1]


def test_the_terminal_gets_a_line_for_each_run(runs):
    lines = comparison_summary([*runs, Run("empty", ReportData("m", ""))]).splitlines()
    assert lines[0].startswith("first: 1.52x throughput at 99.1 ± 0.4 %")
    assert lines[2] == "empty: nothing measured yet"


def test_the_command_compares_and_refuses_what_it_cannot(tmp_path, monkeypatch, capsys):
    folders = [tmp_path / name / "run" for name in ("a", "b")]
    for folder in folders:
        (folder / "records").mkdir(parents=True)
    names = [str(folder) for folder in folders]
    assert cli.main(["report", *names]) == 2
    assert "run.json" in capsys.readouterr().err
    assert cli.main(["report", names[0], names[0]]) == 2
    assert "given twice" in capsys.readouterr().err
    assert cli.main(["report", names[0], str(tmp_path / "none")]) == 2
    assert "holds no records" in capsys.readouterr().err
    assert cli.main(["report", names[0], "--out", str(tmp_path / "c")]) == 2
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(compare, "report_data", lambda folder: ReportData("m", "", pareto=pareto_table(pareto_rows())))
    assert cli.main(["report", *names, "--out", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "a/run: 1.52x throughput" in out
    assert "b/run: 1.52x throughput" in out
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["comparison.csv", "comparison.html"]
