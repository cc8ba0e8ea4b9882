"""Atomic writing of files, computations that resume after a kill, and digests of what a result depends on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from img2prompt.core import shards
from img2prompt.core.shards import RESUME

# Given some of the inputs of `grow`, in order, the arrays and text of each.
Results = Callable[[Sequence[Sized]], Iterator[dict[str, np.ndarray | bytes]]]


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a path to write to, as a file or a folder; it is renamed to `target` when the block ends without an error.

    An interruption leaves the former `target` or none, never a partial one. After an error what was written is
    removed, so that a full disk gets its space back.
    """
    aside = target.with_name(f"{target.name}.partial")  # git and DVC ignore the name
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
    except BaseException:
        _remove(aside)
        raise
    for path in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
        _sync(path)
    if target.is_dir():
        shutil.rmtree(target)
    aside.replace(target)
    _sync(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """As `whole`, for a folder, which is created empty."""
    with whole(target) as aside:
        aside.mkdir()
        yield aside


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resume_folder(name: str, *parts: str | bytes | Path | np.ndarray) -> Path:
    """The folder of RESUME/`name` for the `digest` of `parts`; the folders of other digests there are removed, shards
    and all.
    """
    folder = RESUME / name / digest(*parts)
    for stale in folder.parent.glob("*"):
        if stale != folder:
            _remove(stale)
    shards.forget_others(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def grow(
    folder: Path,
    batches: Sequence[Sized],
    results: Results,
    seconds: float = 10,
    saved: Callable[[int], object] = int,
) -> dict[str, Path]:
    """Compute arrays and text batch by batch into files of a folder; after a kill, resume from the last safe state.

    Args:
        folder: for the files and the safe state; use one folder for the same batches and results only.
        batches: the inputs; the length of each is the number of its rows.
        results: given the remaining batches, yields for each, by name and always by the same names, arrays (rows, ...),
            which become NAME.npy, and bytes of any length, which follow one another in the file NAME.
        seconds: from one safe state to the next.
        saved: told of each safe state how many batches it holds.

    Returns:
        The finished files by name.
    """
    state = folder / "grown.json"
    folder.mkdir(parents=True, exist_ok=True)
    done, sizes = read_json(state).values() if state.is_file() else (0, {})
    paths = {folder / name: size for name, size in sizes.items()}
    if any(not path.is_file() or path.stat().st_size < size for path, size in paths.items()):
        done, sizes = 0, {}  # a stage had begun to remove them
    total = sum(map(len, batches))
    files: dict[str, BinaryIO] = {}
    try:
        for name, size in sizes.items():
            # What was written after the last safe state may be incomplete.
            files[name] = (folder / name).open("r+b")
            files[name].truncate(size)
            files[name].seek(size)
        with ThreadPoolExecutor(1) as beside:  # results need not wait for the disk
            last, saving = time.monotonic(), beside.submit(int)
            for found in results(batches[done:]) if done < len(batches) else ():
                for what, value in found.items():
                    text = isinstance(value, bytes)
                    name = what if text else f"{what}.npy"
                    if name not in files:
                        files[name] = (folder / name).open("wb")
                    if not text and not files[name].tell():
                        header = {"descr": value.dtype.str, "fortran_order": False, "shape": (total, *value.shape[1:])}
                        np.lib.format.write_array_header_1_0(files[name], header)
                    files[name].write(value if text else np.ascontiguousarray(value))
                done += 1
                if done == len(batches) or time.monotonic() - last > seconds:
                    saving.result()
                    for file in files.values():
                        file.flush()
                    sizes = {name: file.tell() for name, file in files.items()}
                    saving = beside.submit(_save, state, list(files.values()), {"batches": done, "sizes": sizes}, saved)
                    last = time.monotonic()
            saving.result()
    finally:
        for file in files.values():
            file.close()
    return {name.removesuffix(".npy"): folder / name for name in files}


def _save(state: Path, files: Sequence[BinaryIO], facts: dict[str, Any], saved: Callable[[int], object]) -> None:
    for file in files:
        os.fsync(file.fileno())
    with whole(state) as path:
        write_json(path, facts)
    saved(facts["batches"])


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    """Write JSON with a fixed layout, so that equal values give equal bytes; ValueError for NaN and infinity."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read JSON; ValueError where the file holds none."""
    return json.loads(path.read_text(encoding="utf-8"))


def numbered(parent: Path) -> list[Path]:
    """The folders 0, 1, ... in a folder, in order: one for each CLIP of a run."""
    return sorted((path for path in parent.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def room(name: str) -> Path:
    """The folder of one of img2prompt's packages: its `digest` changes with the code in it."""
    return Path(__file__).resolve().parent.parent / name


def digest(*parts: str | bytes | Path | np.ndarray) -> str:
    """SHA-256, in hex, of texts, bytes, arrays (dtype, shape and values), files' contents, folders' names and contents.

    Python's caches (__pycache__) in a folder do not count.
    """
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path) and part.is_dir():
            files = [path for path in part.rglob("*") if path.is_file() and path.parent.name != "__pycache__"]
            names = {str(path.relative_to(part)): path for path in files}
            total.update(digest(*(item for name in sorted(names) for item in (name, names[name]))).encode())
        elif isinstance(part, Path):
            with part.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        elif isinstance(part, np.ndarray):
            head = f"{part.dtype}{part.shape}".encode()
            total.update(hashlib.sha256(head + np.ascontiguousarray(part).tobytes()).digest())
        else:
            total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()
