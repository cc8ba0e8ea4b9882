"""The pages in a browser: nothing from elsewhere, no error, no barrier; tables sort and lists are searched."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import running

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
    mixture = json.loads((made / "outputs/ensemble/weights.json").read_text())
    weights = [*mixture["weights"].values(), mixture["constant"]]
    assert column(page, "Weights of the members", 2) == [f"{weight:.4f}" for weight in weights]
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


# The page of `img2prompt serve`


@pytest.fixture(scope="module")
def served(answers, made):
    """The page's address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        with running(answers) as (port, _):
            yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def page(served, chromium):
    """Opens the page; at the end nothing must have been asked of another host, or said in the console."""
    asked, said, contexts = [], [], []

    def show(width=1440, scheme="light", **options):
        options |= {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        contexts.append(chromium.new_context(permissions=["clipboard-read", "clipboard-write"], **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(served, wait_until="networkidle")
        return page

    yield show
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith((served, f"blob:{served}", "data:"))] == []
    # Chromium says so of every answer that refuses something.
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def picture(made):
    """A picture to give, as a page's file input takes it."""
    data = (made / "input/train/images/p007.png").read_bytes()
    return {"name": "p007.png", "mimeType": "image/png", "buffer": data}


def give(page, *files):
    """Choose files, and wait for what comes of the last of them."""
    page.locator("input[type=file]").first.set_input_files(list(files))
    page.locator(".result").nth(len(files) - 1).wait_for()
    settled(page)
    return page.locator(".result")


def settled(page):
    playwright.expect(page.locator(".state:not(.error):not([hidden])")).to_have_count(0, timeout=20_000)


def drop(page, kind, files):
    """Let an event of that kind bring files, as a browser does where someone drops or pastes them."""
    files = [{**file, "buffer": list(file["buffer"])} for file in files]
    page.evaluate(
        """([kind, files]) => {
          const data = new DataTransfer();
          for (const {name, mimeType, buffer} of files) {
            data.items.add(new File([new Uint8Array(buffer)], name, {type: mimeType}));
          }
          const about = {bubbles: true, cancelable: true};
          document.body.dispatchEvent(kind === "paste"
            ? new ClipboardEvent(kind, {...about, clipboardData: data})
            : new DragEvent(kind, {...about, dataTransfer: data}));
        }""",
        [kind, files],
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_stands_in_the_way_on_the_page_to_try(page, picture, width, scheme):
    shown = page(width, scheme)
    results = give(shown, picture, {"name": "notes.png", "mimeType": "image/png", "buffer": b"no image"})
    assert results.count() == 2
    found = Axe().run(shown, options=LEVELS).response["violations"]
    assert [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found] == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    grounds = shown.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (np.mean(grounds) > 128) == (scheme == "light")


def test_it_shows_what_the_api_says(page, picture, served):
    shown = page()
    with shown.expect_response("**/predict") as answer:
        result = give(shown, picture).first
    (said,) = answer.value.json()["images"]
    assert result.locator(".name").inner_text() == "p007.png"
    assert result.locator(".prompt").inner_text() == said["prompt"]
    assert result.locator(".under b").inner_text() == f"{said['prompt_cosine']:.3f}"
    assert result.locator(".words .word").all_inner_texts() == [entry["word"] for entry in said["words"]]
    near = said["nearest"]
    assert result.locator(".nearest .text").all_inner_texts() == [entry["prompt"] for entry in near]
    assert result.locator(".nearest .number").all_inner_texts() == [f"{entry['cosine']:.3f}" for entry in near]
    images = [served + said["thumbnails"][entry["prompt"]] for entry in near]
    assert result.locator(".nearest img").evaluate_all("images => images.map(image => image.src)") == images
    assert result.locator("img").evaluate_all("images => images.every(image => image.naturalWidth > 0)")
    models = said["models"]
    rows = result.locator("tbody tr").all()
    for row, model in zip(rows, models, strict=True):
        cosines = [f"{model['cosines'][other['model']]:.3f}" for other in models]
        numbers = [f"{model['weight']:.3f}", f"{model['cosine']:.3f}", *cosines]
        assert row.locator("th").inner_text() == model["model"]
        assert row.locator(".number").all_inner_texts() == numbers
        assert row.locator(".text").inner_text() == model["prompt"]
    assert result.locator("thead tr").last.locator("th").all_inner_texts() == [model["model"] for model in models]
    playwright.expect(shown.get_by_role("status")).to_have_text(f"p007.png: {said['prompt']}")
    result.get_by_role("button", name="Copy the prompt").click()
    playwright.expect(shown.get_by_role("status")).to_have_text("Copied")
    assert shown.evaluate("navigator.clipboard.readText()") == said["prompt"]
    # On another machine, without TLS, scripts have no clipboard.
    shown.evaluate("navigator.clipboard.writeText('something else')")
    shown.evaluate("window.kept = navigator.clipboard")
    shown.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    result.locator(".copy").click()
    assert shown.evaluate("kept.readText()") == said["prompt"]


def test_pictures_come_in_many_ways(page, picture):
    shown = page()
    for number, kind in enumerate(("drop", "paste"), start=1):
        drop(shown, kind, [picture])
        playwright.expect(shown.locator(".answer:not([hidden])")).to_have_count(number, timeout=20_000)
    drop(shown, "drop", [picture | {"name": "second.png"}, picture | {"name": "third.png"}])
    playwright.expect(shown.locator(".answer:not([hidden])")).to_have_count(4, timeout=20_000)
    assert shown.locator(".name").all_inner_texts() == ["third.png", "second.png", "p007.png", "p007.png"]
    assert len(set(shown.locator(".prompt").all_inner_texts())) == 1
    sample = shown.locator("#samples button").nth(3)
    text = sample.get_by_role("img").get_attribute("alt")
    sample.click()
    playwright.expect(shown.locator(".answer:not([hidden])")).to_have_count(5, timeout=20_000)
    assert shown.locator(".name").first.inner_text() == f"A picture of “{text}”"


def test_what_cannot_be_answered_says_why(page, picture):
    shown = page()
    broken = picture | {"buffer": picture["buffer"][:60]}
    texts = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no image"}
    large = picture | {"name": "large.png", "buffer": bytes(11 * 2**20)}
    results = give(shown, broken, texts, large, picture)
    states = results.locator(".state:not([hidden])").all_inner_texts()
    assert states[:2] == ["it is larger than 10 MB", "it is no picture"]
    assert len(states) == 3
    assert results.first.locator(".prompt").is_visible()  # the last one is answered
    assert results.locator(".lost").evaluate_all("all => all.map(one => one.hidden)") == [True, False, False, True]
    shown.route("**/predict", lambda route: route.abort())
    drop(shown, "drop", [picture])
    playwright.expect(shown.get_by_role("status")).to_have_text("p007.png: not answered: the server does not answer")


def test_it_asks_a_busy_server_again(page, picture):
    shown, asked = page(), []

    def busy(route):
        asked.append(route)
        if len(asked) < 3:
            route.fulfill(status=503, headers={"Retry-After": "1"}, json={"error": "too many images are waiting"})
        else:
            route.continue_()

    shown.route("**/predict", busy)
    result = give(shown, picture).first
    assert result.locator(".prompt").is_visible()
    assert len(asked) == 3


def test_a_phone_takes_a_picture(page):
    shown = page(390, is_mobile=True, has_touch=True)
    camera = shown.get_by_text("Take a picture")
    assert camera.is_visible()
    assert camera.locator("input").get_attribute("capture") == "environment"
    assert page(1440).get_by_text("Take a picture").is_hidden()


def test_the_keyboard_is_enough_to_try(page):
    shown = page()
    seen = []
    for _ in range(4):
        shown.keyboard.press("Tab")
        seen.append(shown.evaluate("document.activeElement.textContent || document.activeElement.type"))
    assert seen[:2] == ["Skip to the content", "file"]
    outline = "getComputedStyle(document.querySelector('.way')).outlineStyle"
    shown.keyboard.press("Shift+Tab")
    shown.keyboard.press("Shift+Tab")
    assert shown.evaluate("document.activeElement.type") == "file"
    assert shown.evaluate(outline) == "solid"
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.closest('#samples') !== null")
    shown.keyboard.press("Enter")
    playwright.expect(shown.locator(".answer:not([hidden])")).to_have_count(1, timeout=20_000)
