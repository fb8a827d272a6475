"""The pages in a real browser, offline and from disk: the switch, the points, accessibility, narrow and dark."""

import itertools
import shutil

import pytest

from orchestrator.report.choice import halving_table, lengths_table, speed_table
from orchestrator.report.comparison import Run, render_comparison
from orchestrator.report.render import render
from orchestrator.report.tables import pareto_table
from tests.report_rows import pareto_row, pareto_rows, sample

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome")

AUDITED = ((360, "dark"), (1440, "light"))
"""Screens that axe looks at: both widths and both schemes."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The files of a report with flags and constraints, and of a comparison of two runs."""
    rows = [
        row | {"feasible": row["quality"] > 0.49, "flags": "generation" if row["healed"] else None}
        for row in pareto_rows()
    ]
    about = {name: rows[0][name] for name in ("plan_id", "plan", "origin")}
    speed = {"predicted_throughput_tok_per_s": 9.0, "output_throughput_tok_per_s": 8.0, "concurrency": 8}
    speed |= {name: about[name] for name in ("plan_id", "plan")}
    data = sample(
        pareto=pareto_table(rows),
        verdict=["Best under at_least.quality_retained: 0.99: SSNN."],
        lengths=lengths_table([about | {"prompt_tokens": n, "tpot_ms_p50": n / 9, "status": "ok"} for n in (64, 128)]),
        halving=halving_table([about | {"rung": 0, "tokens": 10, "quality": 0.5}]),
        speed=speed_table([speed]),
    )
    folder = tmp_path_factory.mktemp("pages")
    (folder / "deep.html").write_bytes(render(sample(pareto=pareto_table(deep_rows())))["report.html"])
    other = sample(title="another/model", recipe_yaml="model: {path: another/model}")
    for files in (render(data), render_comparison([Run("one", data), Run("two", other)])):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return folder


def deep_rows():
    """Plans of 30 layers under one serving condition, with everything that the table of the front can show."""
    more = {"feasible": True, "control_retained": 0.99, "control_retained_stderr": 0.004}
    lost = {"flags": "retrieval@64 -0.41; generation write -0.30; calibration quiz +0.08"}
    plans = ["S" * 30, "SNWLS" * 6, "SNNWL" * 6]
    return [
        pareto_row(plans[0], "base", **more),
        pareto_row(plans[1], quality=0.49, tok_per_s=120.0, healed=True, **more, **lost),
        pareto_row(plans[2], quality=0.48, tok_per_s=150.0, healed=True, **more),
    ]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(browser, pages):
    """Opens a page from disk without a network; what it asks for elsewhere or complains of fails the test."""
    complaints, contexts = [], []

    def refuse(route):
        complaints.append(f"asked for {route.request.url}")
        route.abort()

    def open_page(name, width=1440):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        contexts.append(context)
        context.route(lambda url: not url.startswith(("file:", "data:")), refuse)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((pages / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("name", ["report.html", "comparison.html"])
def test_no_serious_fault_of_accessibility_on_any_screen(opened, name):
    page = opened(name)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    for width, scheme in itertools.product((360, 1440), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"overflows at {width}"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 30)"
        assert dark == (scheme == "dark")
        if (width, scheme) not in AUDITED:
            continue
        serious = [
            (fault["id"], fault["nodes"][0]["html"][:200])
            for fault in axe.Axe().run(page).response["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert serious == [], f"at {width} in {scheme}"


def test_the_front_of_a_deep_model_is_whole_at_1280_pixels(opened):
    page = opened("deep.html", 1280)
    view = page.locator(".view")
    assert view.count() == 1 and view.is_visible(), "a single condition needs no switch"
    table = view.get_by_role("table")
    assert table.locator("tbody tr").count() == 3
    assert table.evaluate("table => table.scrollWidth <= table.parentElement.clientWidth")
    flagged = view.locator("svg.chart:visible .labels text").all_text_contents()
    assert "2 (lost retrieval@64, generation write and 1 more)" in flagged


def test_the_switch_works_by_keyboard(opened):
    page = opened("report.html")
    views = page.locator(".view")
    assert [views.nth(index).is_visible() for index in range(2)] == [True, False]
    page.get_by_role("radio", name="concurrency 100").focus()
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("radio", name="concurrency 50").is_checked()
    assert [views.nth(index).is_visible() for index in range(2)] == [False, True]
    shown = views.nth(1)
    assert "(concurrency 50, 512 + 128 tokens, Invented GPU)" in shown.locator(".headlines li").first.inner_text()
    assert shown.get_by_role("table").locator("tbody tr").count() == 4
    assert shown.locator("svg.chart:visible").count() == 1


@pytest.mark.parametrize("width", [360, 1440])
def test_points_are_reached_by_tab_named_and_told(opened, width):
    page = opened("report.html", width)
    page.get_by_role("radio", name="concurrency 100").focus()
    names, told, rings = [], [], []
    for _ in range(6):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        assert focused.get_attribute("role") == "img"
        names.append(focused.get_attribute("aria-label"))
        told.append(page.locator(".details > div:visible").inner_text())
        rings.append(focused.locator(".ring").evaluate("ring => getComputedStyle(ring).stroke"))
    assert len(set(names)) == 6
    assert set(rings) == {"rgb(31, 41, 51)"}, "the focused point has a ring"
    healed = next(name for name in names if "SSNN, point 3 on the front" in name)
    for part in ("quality retained 99.1 ± 0.4 %", "speed-up 1.52x", "tokens/s 258.4", "flags generation"):
        assert part in healed
    assert "dominated" not in healed
    assert any("not on the front" in name for name in names)
    assert "point 3 on the front" in told[names.index(healed)]
    page.locator("svg.chart:visible .point").first.hover()
    assert page.locator(".details > div:visible").count() >= 1


def test_a_comparison_draws_both_runs_and_says_what_differs(opened):
    page = opened("comparison.html")
    assert page.locator("svg.chart:visible .point").count() == 12
    assert "different models" in page.locator("header").inner_text()
    assert page.get_by_role("table", name="Recipe fields that differ").is_visible()
