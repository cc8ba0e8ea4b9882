"""Progress with rate and ETA: a moving bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized

from tqdm import tqdm


def progress(
    items: Iterable | None, what: str, total: int | None = None, unit: str = "it", quiet: bool = False
) -> tqdm:
    """Wrap `items` in a bar labelled `what`; with None for `items`, the caller updates the bar.

    Of a single item, or none, nothing is shown; nor is with `quiet`.
    """
    live = sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        total=total,
        unit=unit,
        mininterval=0.2 if live else 10,
        dynamic_ncols=live,
        ascii=not live,
        file=sys.stderr,
        disable=quiet or (isinstance(items, Sized) and len(items) < 2),
    )
