"""The tables of rows that `prepare` writes and the other stages read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = pa.schema(dict.fromkeys(("id", "source", "prompt"), pa.string()))
ROWS = pa.schema(dict.fromkeys(("id", "source", "image", "prompt"), pa.string()) | {"fold": pa.int64()})


class Row(NamedTuple):
    """A usable row. `prompt` is None where it is unknown, `image` where a test image cannot be read."""

    id: str
    source: str
    image: str | None
    prompt: str | None
    fold: int | None = None


def read_rows(path: Path, columns: Sequence[str] | None = None, some: int | None = None) -> pd.DataFrame:
    """Read a table of rows, or some of its columns, as objects; unknown prompts, images and folds are None.

    With `some`, at most that many rows are read, evenly spaced.
    """
    arrow = pq.read_table(path, columns=columns)
    if some:
        arrow = arrow.take(np.linspace(0, len(arrow) - 1, min(some, len(arrow))).astype(int))
    table = arrow.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return table.astype(object).where(table.notna(), None)
