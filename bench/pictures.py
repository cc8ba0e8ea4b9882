"""The documents' pictures that a run gives: docs/sample.jpg, which `prepare` draws, and docs/report.png, of the page.

    python bench/pictures.py [--run FOLDER]

FOLDER: a project whose pipeline has run on the sample, by default the current one. Needs what `make test-browser` does.
"""

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent.parent / "docs"
PARTS = ("body", "#gallery")  # of the page, side by side
SIZE = {"width": 760, "height": 1000}  # pixels each

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path())
    outputs = parser.parse_args().run.resolve() / "outputs"
    shutil.copyfile(outputs / "prepare/examples.jpg", DOCS / "sample.jpg")
    sheet = Image.new("RGB", (len(PARTS) * SIZE["width"], SIZE["height"]))
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE)
        page.goto((outputs / "report/index.html").as_uri())
        for place, part in enumerate(PARTS):
            clip = SIZE | {"x": 0, "y": page.locator(part).bounding_box()["y"]}
            shot = page.screenshot(full_page=True, clip=clip)
            sheet.paste(Image.open(io.BytesIO(shot)), (place * SIZE["width"], 0))
        browser.close()
    sheet.quantize(128).save(DOCS / "report.png", optimize=True)
