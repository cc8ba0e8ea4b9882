"""Files that are there whole or not at all, and digests of what a result depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

# What a killed run goes on from; no stage's output, ignored by git and DVC.
RESUME = Path("outputs/.resume")


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path to write `target` at, a file or a folder; it is renamed into place when the block ends well.

    An interruption leaves the former `target`, or none; never half of one.
    """
    aside = target.with_name(f"{target.name}.partial")  # git and DVC ignore the name
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.unlink(missing_ok=True)
    aside.parent.mkdir(parents=True, exist_ok=True)
    yield aside
    for path in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
        _sync(path)
    if target.is_dir():
        shutil.rmtree(target)
    aside.replace(target)
    _sync(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """`whole` for a folder, which is made empty."""
    with whole(target) as aside:
        aside.mkdir()
        yield aside


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write JSON with a fixed layout, so that equal values are equal bytes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def digest(*parts: str | bytes | Path | np.ndarray) -> str:
    """SHA-256, in hex, of texts, bytes, arrays (dtype, shape and values) and files' contents."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, np.ndarray):
            head = f"{part.dtype}{part.shape}".encode()
            total.update(hashlib.sha256(head + np.ascontiguousarray(part).tobytes()).digest())
        else:
            total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()
