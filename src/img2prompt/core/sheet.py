"""A sheet of images with their prompts below them."""

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
    draw = ImageDraw.Draw(sheet)
    for place, (image, prompt) in enumerate(zip(some.image, some.prompt, strict=True)):
        corner = GAP + place % columns * (SIDE + GAP), GAP + place // columns * (SIDE + TEXT)
        sheet.paste(ImageOps.pad(open_image(image), (SIDE, SIDE), color="white"), corner)
        text = "\n".join(wrap(prompt, 28, max_lines=3, placeholder=" …"))
        below = corner[0], corner[1] + SIDE + 3
        draw.multiline_text(below, text, "black", ImageFont.load_default(11), spacing=2)
    sheet.save(path, "JPEG", quality=88)
