"""The pages in a browser: nothing from elsewhere, no error, no barrier; tables sort and lists are searched."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")
Axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
CHROMIUM = shutil.which("chromium")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LEVELS = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}


@pytest.fixture(scope="module")
def chromium():
    if not CHROMIUM:
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def report(made, chromium):
    """Opens the report, or another page; in the end nothing must have been asked of a host or said in the console."""
    asked, said, contexts = [], [], []

    def show(width=1440, scheme="light", folder=made, page="report"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        opened = contexts[-1].new_page()
        opened.on("request", lambda request: asked.append(request.url))
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.goto((folder / f"outputs/{page}/index.html").as_uri(), wait_until="load")
        return opened

    yield show
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert said == []


def column(page, caption, place):
    """The cells of a table's column, as they stand."""
    table = page.locator("table", has=page.locator("caption", has_text=caption))
    return [text.strip() for text in table.locator(f"tbody tr > :nth-child({place})").all_inner_texts()]


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_stands_in_the_way(report, made, compared, width, scheme, name):
    page = report(width, scheme, {"report": made, "compare": compared}[name], name)
    for summary in page.locator("summary").all():
        summary.click()
    found = Axe().run(page, options=LEVELS).response["violations"]
    assert [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0 && image.alt)")
    grounds = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (np.mean(grounds) > 128) == (scheme == "light")


def test_what_it_shows_is_what_the_run_has(report, made):
    page = report()
    cosines = pd.read_parquet(made / "outputs/scores/cosines.parquet")
    train, test = cosines[cosines.scored & (cosines.split == "train")], cosines[cosines.split == "test"]
    models = cosines.columns[cosines.columns.get_loc("scored") + 1 :].tolist()
    assert column(page, "Mean cosine of every model", 1) == models
    of_fold = [f"{train[train.fold == 7][model].astype(float).mean():.4f}" for model in models]
    assert column(page, "Mean cosine of every model", 3) == of_fold
    shown = page.locator(".figures b").all_inner_texts()
    assert shown == [f"{rows.ensemble.astype(float).mean():.4f}" for rows in (train, test)]
    weights = json.loads((made / "outputs/ensemble/weights.json").read_text())["weights"]
    assert column(page, "Weights of the members", 2) == [f"{weight:.4f}" for weight in weights.values()]
    assert page.locator(".pairs li").count() == 20
    assert page.locator("img").evaluate_all("images => images.map(image => image.src.slice(0, 16))") == (
        ["data:image/webp;"] * page.locator("img").count()
    )


def test_a_table_is_sorted_by_any_column(report):
    page, caption = report(), "Mean cosine of every model"
    head = page.locator("table", has=page.locator("caption", has_text=caption)).locator("thead th")
    before = column(page, caption, 4)
    assert before != sorted(before)
    for order, way in (("ascending", False), ("descending", True)):
        head.nth(3).get_by_role("button").click()
        assert head.nth(3).get_attribute("aria-sort") == order
        assert column(page, caption, 4) == sorted(before, key=float, reverse=way)
    head.nth(0).get_by_role("button").click()
    assert [cell.get_attribute("aria-sort") for cell in head.all()[:4]] == ["ascending", "none", "none", "none"]
    assert column(page, caption, 1) == sorted(column(page, caption, 1))


def test_a_gallery_is_searched(report, made):
    page = report()
    cards = page.locator("#gallery [data-item]")
    texts = [text.lower() for text in cards.all_text_contents()]
    _, colour, *_, last = cards.first.locator("dd").first.inner_text().split()
    page.get_by_label("Search in: The gallery").fill(f"{last} {colour.upper()}")
    wanted = [colour in text and last in text for text in texts]
    assert [card.is_visible() for card in cards.all()] == wanted
    assert 0 < sum(wanted) < len(wanted)
    assert page.locator("#gallery output").inner_text() == f"{sum(wanted)} of {len(wanted)}"
    page.get_by_label("Search in: The gallery").fill("")
    assert all(card.is_visible() for card in cards.all())


def test_a_comparison_is_sorted_and_searched(report, compared):
    page, caption = report(folder=compared, page="compare"), "Every model against the base"
    table = pd.read_csv(compared / "outputs/compare/compare.csv")
    differences = table[table.on == "oof"].sort_values("difference").difference
    head = page.locator("table", has=page.locator("caption", has_text=caption)).locator("thead th")
    head.nth(5).get_by_role("button").click()
    assert [text.split()[0] for text in column(page, caption, 6)] == [f"{value:+.4f}" for value in differences]
    page.get_by_label(f"Search in: {caption}").fill("idea ensemble")
    rows = page.get_by_role("region", name=caption).locator("tbody tr")
    assert [row.locator("th").inner_text() for row in rows.all() if row.is_visible()] == ["idea (2 seeds)"]
    cards = page.locator("#pictures [data-item]")
    prompt = cards.first.locator("dd").first.inner_text()
    page.get_by_label("Search in: The pictures that changed most").fill(prompt)
    assert [card.is_visible() for card in cards.all()] == [prompt in text for text in cards.all_text_contents()]


def test_the_keyboard_is_enough(report):
    """From the top to the first table, which Enter and the space bar sort; where one is can always be seen."""
    page = report(390)
    focused = "(({outlineStyle}, e) => [e.tagName, e.textContent.trim(), outlineStyle])" \
              "(getComputedStyle(document.activeElement), document.activeElement)"  # fmt: skip
    seen = []
    for _ in range(80):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(focused))
        if seen[-1][0] == "BUTTON":
            break
    assert seen[0][1] == "Skip to the content"
    assert [text for tag, text, _ in seen if tag == "A"][1:3] == ["Scores", "Ensemble"]
    assert "DIV" in {tag for tag, _, _ in seen}  # a table that scrolls sideways
    assert {style for _, _, style in seen} == {"solid"}
    head = page.locator("th", has=page.locator("button:focus"))
    for key, order in (("Enter", "ascending"), ("Space", "descending")):
        page.keyboard.press(key)
        assert head.get_attribute("aria-sort") == order
    page.goto(page.url)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_times_and_memory_are_shown_where_they_are(report, made, tmp_path):
    page = report()
    assert page.locator("#run-none").is_visible()
    assert page.locator("#run-there").is_hidden()
    shutil.copytree(made / "outputs/report", tmp_path / "outputs/report")
    records = [
        {"name": name, "seconds": seconds, "peak_gb": 0.5, "commit": "<b>c", "versions": {"python": "3.11"}}
        for name, seconds in (("clip", 30.0), ("knn", 4.0))
    ]
    (tmp_path / "outputs/run.js").write_text("".join(f"stage({json.dumps(record)});\n" for record in records))
    page = report(folder=tmp_path)
    page.locator("#run-there").wait_for(state="visible")
    assert page.locator("#run-none").is_hidden()
    assert (
        "34 seconds in all, at most 0.50 GB. The last stage ran with python 3.11." in page.locator("#run").inner_text()
    )
    assert column(page, "Stages", 1) == ["clip", "knn"]
    assert column(page, "Stages", 4) == ["<b>c", "<b>c"]
    page.locator("#run th", has_text="seconds").get_by_role("button").click()
    assert column(page, "Stages", 2) == ["4.0", "30.0"]
    found = Axe().run(page, options=LEVELS).response["violations"]
    assert [rule["id"] for rule in found] == []
