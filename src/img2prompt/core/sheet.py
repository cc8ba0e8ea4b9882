"""Sheets of images with lines of text below them."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont, ImageOps

from img2prompt.core.images import open_image

SIDE, TEXT, GAP = 160, 52, 8  # pixels: side of an image, height of its text, gap between images


def draw_examples(path: Path, table: pd.DataFrame, columns: int = 6, rows: int = 3) -> None:
    """Draw evenly spaced rows of a table, each an `image` with its `prompt`, as a JPEG.

    Raises:
        OSError, ValueError: an image cannot be read or decoded.
    """
    some = table.iloc[np.linspace(0, len(table) - 1, columns * rows).astype(int)]
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + TEXT) + GAP), "white")
    for place, (image, prompt) in enumerate(zip(some.image, some.prompt, strict=True)):
        corner = GAP + place % columns * (SIDE + GAP), GAP + place // columns * (SIDE + TEXT)
        _place(sheet, corner, image, wrap(prompt, 28, max_lines=3, placeholder=" …"))
    sheet.save(path, "JPEG", quality=88)


def draw_changes(path: Path, better: pd.DataFrame, worse: pd.DataFrame) -> None:
    """Draw the images whose scores differ most between experiments A and B, as a PNG: one line for each table.

    `better`, `worse`: tables with the columns `image`, `prompt` (both null where unknown), `split`, and the cosines
    `a` and `b`.

    Raises:
        OSError, ValueError: an image cannot be read or decoded.
    """
    columns, title = max(len(better), len(worse)), 22
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, 2 * (SIDE + TEXT + title) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (name, table) in enumerate((("B better than A", better), ("B worse than A", worse))):
        top = GAP + row * (SIDE + TEXT + title)
        draw.text((GAP, top), name, "black", font)
        for column, found in enumerate(table.itertuples()):
            prompt = found.prompt if isinstance(found.prompt, str) else "(not in outputs/prepare)"
            lines = [
                f"{found.a:.3f} to {found.b:.3f}, {'test' if found.split == 'test' else 'out of fold'}",
                *wrap(prompt, 28, max_lines=2, placeholder=" …"),
            ]
            _place(sheet, (GAP + column * (SIDE + GAP), top + title), found.image, lines)
    sheet.save(path, "PNG")


def _place(sheet: Image.Image, corner: tuple[int, int], image: object, lines: list[str]) -> None:
    """Paste an image, or a grey square where there is none, and write lines below it."""
    x, y = corner
    image = open_image(image) if isinstance(image, str) else Image.new("RGB", (SIDE, SIDE), "#dddddd")
    sheet.paste(ImageOps.pad(image, (SIDE, SIDE), color="white"), (x, y))
    text = "\n".join(lines)
    ImageDraw.Draw(sheet).multiline_text((x, y + SIDE + 3), text, "black", ImageFont.load_default(11), spacing=2)
