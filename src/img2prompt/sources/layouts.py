"""The supported layouts of images and prompts, and how a source's layout is recognised."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from img2prompt.sources import tabular
from img2prompt.sources.params import Source
from img2prompt.sources.readers import (
    IMAGE_COLUMNS,
    PROMPT_COLUMNS,
    Entry,
    count_files,
    file_names,
    from_diffusiondb,
    from_img2dataset,
    from_kaggle,
    from_lines,
    from_prompts,
    from_table,
    from_webdataset,
    parts_of,
)

ALL = ("image", "prompt", "fold")
SHARD = re.compile(r"\d+(\.parquet)?")


class Layout(NamedTuple):
    """A recognised source: its kind, its entries in order, roughly how many, and the columns that can be named."""

    name: str
    entries: Callable[[], Iterator[Entry]]
    count: Callable[[], int | None]
    columns: tuple[str, ...] = ()
    texts: bool = False  # prompts without images


def recognise(source: Source, split: str) -> Layout:
    """Find the layout of a source; reading begins with `entries()`.

    Args:
        source: a folder or a file, and the names of its columns where they are not the usual ones.
        split: `train`, where prompts are needed, or `test`, where they are not.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the source is in none of the layouts, or a table lacks a column.
    """
    path = Path(source.path)
    layout = _recognise_file(path, source, split) if path.is_file() else _recognise_folder(path, source, split)
    told = [name for name in ("image", "prompt", "fold") if getattr(source, name) and name not in layout.columns]
    if told:
        raise ValueError(f"{path}: a source of the kind {layout.name} has no such columns: leave out {', '.join(told)}")
    return layout


def _recognise_folder(path: Path, source: Source, split: str) -> Layout:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    kaggle = Layout("kaggle", lambda: from_kaggle(path, source, split), lambda: count_files([path / "images"]), ALL)
    if (path / "prompts.csv").is_file() or (path / "sample_submission.csv").is_file():
        return kaggle
    metadata = next((f for s in tabular.SUFFIXES if (f := path / f"metadata{s}").is_file()), None)
    if parts := parts_of(path):
        return Layout("diffusiondb", lambda: from_diffusiondb(parts, metadata), lambda: count_files(parts))
    if metadata:
        return _recognise_file(metadata, source, split)
    if tars := sorted(path.glob("*.tar")):
        return Layout("webdataset", lambda: from_webdataset(tars), lambda: None)
    shards = sorted({path / name.removesuffix(".parquet") for name in file_names(path) if SHARD.fullmatch(name)})
    if shards:
        return Layout("img2dataset", lambda: from_img2dataset(shards), lambda: count_files(shards) // 3)
    if (path / "images").is_dir():
        return kaggle
    raise ValueError(
        f"{path}: in none of the layouts: images/ with prompts.csv; part-000001/; metadata.csv, .jsonl or .parquet; "
        f"*.tar; 00000/ with 00000.parquet. It holds {file_names(path)[:10]}; name a folder further in, or a table"
    )


def _recognise_file(path: Path, source: Source, split: str) -> Layout:
    if path.suffix == ".tar":
        return Layout("webdataset", lambda: from_webdataset([path]), lambda: None)
    if path.suffix == ".txt":
        return Layout("texts", lambda: from_lines(path), lambda: tabular.count(path), texts=True)
    if path.suffix not in tabular.SUFFIXES:
        raise ValueError(f"{path}: neither a folder nor {', '.join(tabular.SUFFIXES)}, .txt or .tar")
    known = tabular.columns(path)
    prompt = tabular.pick(path, known, source.prompt, PROMPT_COLUMNS)
    # DiffusionDB's own table names images of part folders that lie elsewhere.
    elsewhere = source.image is None and {"image_name", "part_id"} <= set(known)
    image = None if elsewhere else tabular.pick(path, known, source.image, IMAGE_COLUMNS)
    for role, found, needed in (("prompt", prompt, split == "train" or not image), ("image", image, not prompt)):
        if needed and not found:
            what = tabular.missing_column(path, role, known)
            raise ValueError(f"{what}; or say which it is: {{path: {path}, {role}: COLUMN}}")
    if image is None:
        return Layout("texts", lambda: from_prompts(path, prompt), lambda: tabular.count(path), ("prompt",), texts=True)
    fold = tabular.pick(path, known, source.fold, ("fold",))
    return Layout("table", lambda: from_table(path, image, prompt, fold), lambda: tabular.count(path), ALL)
