"""Pages: one HTML file each that opens from disk and asks for nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from img2prompt.core.images import open_image
from img2prompt.core.metric import bootstrap_interval
from img2prompt.core.storage import room

SIDE = 192  # pixels of a picture's longer side: 128 of a page's, sharp on finer screens too
LONGEST = 600  # characters of a prompt that are shown: some are whole pages


@dataclass(frozen=True)
class Cell:
    """A cell of a table; a column is sorted by its cells' numbers, or, where they have none, by their texts.

    ends: of the interval around the number; interval: the same as a text.
    """

    text: str
    number: float | None = None
    interval: str = ""
    ends: tuple[float, float] = (np.nan, np.nan)


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort, under its caption."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    filtered: bool = False  # whether a reader can search it

    @classmethod
    def of(cls, caption: str, frame: pd.DataFrame, filtered: bool = False) -> Self:
        """A table of a data frame with text, whole numbers and shares or cosines, which get four digits."""
        rows = [[cell(value) for value in line] for line in frame.itertuples(index=False)]
        return cls(caption, list(map(str, frame.columns)), rows, filtered)


def cell(value: object) -> Cell:
    """A cell of a text or a number."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return Cell(f"{value:,}", int(value))
    if isinstance(value, float | np.floating):
        return Cell(f"{value:.4f}", float(value)) if np.isfinite(value) else Cell("unknown")
    return Cell(str(value))


def mean_cell(values: pd.Series, groups: pd.Series, sign: str = "") -> Cell:
    """The mean of values with its 95% interval over whole groups of similar prompts; sign: `+` for differences."""
    values = values.astype(float)
    mean, (low, high) = float(values.mean()), bootstrap_interval(values, groups)
    interval = f"[{low:{sign}.4f}, {high:{sign}.4f}]" if np.isfinite(low) else ""
    return Cell(f"{mean:{sign}.4f}", mean, interval, (low, high))


def picture(reference: str | None) -> str | None:
    """A small copy of an image as a `data:` address; None where there is none, or it cannot be read any more."""
    if reference is None:
        return None
    try:
        image = open_image(reference)
    except (OSError, ValueError):
        return None
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "WEBP", quality=78, method=6)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"


def shortened(text: str) -> str:
    """A text of at most LONGEST characters, and how many more there are."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def listed(names: Iterable[object]) -> str:
    """Names in a sentence: `a, b and c`."""
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}" if first else last


def render(template: str, **context: object) -> str:
    """A page from a template in this folder; all text is escaped, and scripts but the page's own are refused."""
    loader = FileSystemLoader(room("report"))
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["shortened"] = shortened
    script, style = (room("report").joinpath(f"page.{suffix}").read_text(encoding="utf-8") for suffix in ("js", "css"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(**context, script=script, style=style, allowed=allowed)
