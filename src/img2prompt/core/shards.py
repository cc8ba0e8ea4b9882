"""Where shards lie: in the project's own RESUME, or in IMG2PROMPT_SHARDS, another folder or s3://bucket/prefix.

A shard is a file or folder that some work leaves for other work, named by its path in RESUME wherever it lies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Where a killed run finds its partial results; not an output of a stage, ignored by git and DVC.
RESUME = Path("outputs/.resume")


def root() -> str:
    """IMG2PROMPT_SHARDS; empty where shards lie in the project."""
    return os.environ.get("IMG2PROMPT_SHARDS", "").rstrip("/")


def folder(shard: Path) -> Path | None:
    """The path where a shard lies in a folder; None: it lies where only `fetched` and `sent` reach."""
    place = _place(shard)
    return None if "://" in place else Path(place)


def there(shard: Path) -> bool:
    """Whether the shard is there whole."""
    path = folder(shard)
    return path.exists() if path else _remote().exists(_place(shard))


@contextmanager
def fetched(shard: Path) -> Iterator[Path]:
    """The path of a shard, to read in the block: its own, or that of a copy."""
    path = folder(shard)
    if path:
        if not path.exists():
            list(path.parent.iterdir())  # NFS takes what was not there for absent until its folder is listed again
        yield path
        return
    with TemporaryDirectory() as copy:
        with _remote().open(_place(shard), "rb") as stored, tarfile.open(fileobj=stored, mode="r|") as packed:
            packed.extractall(copy, filter="data")
        yield Path(copy) / shard.name


def sent(path: Path, shard: Path) -> None:
    """Leave a file or folder as a shard that does not lie in a folder; until it is there whole, nothing is."""
    with TemporaryDirectory() as copy:
        packed = Path(copy) / "packed.tar"
        with tarfile.open(packed, "w") as file:
            file.add(path, shard.name)
        _remote().put_file(str(packed), _place(shard))


def forget(shard: Path) -> None:
    """Remove a shard, or a folder of shards; there may be none."""
    path = folder(shard)
    if path is None:
        if _remote().exists(_place(shard)):
            _remote().rm(_place(shard), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def forget_others(kept: Path) -> None:
    """Remove what lies beside a folder of shards, where that is not in the project."""
    if _place(kept) == str(kept):
        return
    if path := folder(kept.parent):
        found = list(path.glob("*"))
    else:
        place = _place(kept.parent)
        found = [Path(other) for other in _remote().ls(place)] if _remote().exists(place) else []
    for other in found:
        if other.name != kept.name:
            forget(kept.parent / other.name)


def taken(shard: Path, path: Path) -> None:
    """Move a shard to a path that is not there yet."""
    with fetched(shard) as found:
        shutil.move(found, path)
    forget(shard)


def _place(shard: Path) -> str:
    """A path or a URL. Projects, and a project's copies, that share IMG2PROMPT_SHARDS have a part of it each."""
    if not root() or not shard.is_relative_to(RESUME):
        return str(shard)
    project = hashlib.sha256(str(Path.cwd()).encode()).hexdigest()[:16]
    return f"{root()}/{project}/{shard.relative_to(RESUME)}"


def _remote() -> AbstractFileSystem:
    return _file_system(root())


@cache
def _file_system(url: str) -> AbstractFileSystem:
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, use_listings_cache=False)[0]  # others write there, too
    except ImportError as error:
        raise ValueError(f"IMG2PROMPT_SHARDS: {error}; pip install -r requirements-ray.txt") from None
