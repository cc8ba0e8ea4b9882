"""One reader for each layout; all yield entries of the same form."""

from __future__ import annotations

import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from img2prompt.sources import tabular
from img2prompt.sources.params import Source

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
IMAGE_COLUMNS = ("file_name", "image", "picture", "filename", "image_path", "path", "file", "image_name")
PROMPT_COLUMNS = ("prompt", "caption", "text")
# Every reason for which something is set aside, and what it means.
REASONS = {
    "broken file": "a file of many rows cannot be read, or only its beginning",
    "broken row": "a row with an open quote, too many or too few fields, or no JSON object",
    "not UTF-8": "an id, a prompt or a file's name has bytes that are not UTF-8",
    "empty id": "no id, or no name of an image",
    "repeated id": "the source has the id already; the first row stays",
    "empty prompt": "nothing, white space or null",
    "no prompt": "an image that no row names",
    "bad fold": "a fold that is no whole number from 0 on",
    "outside the folder": "an absolute path, one with `..`, or a link that leads out of the source",
    "missing image": "a row whose image is not there",
    "unreadable image": "empty, cut short, no image, or of absurd size",
    "not downloaded": "img2dataset lists it as failed",
}  # fmt: skip


class Entry(NamedTuple):
    """One row of a source as it stands there; `reason` says what, if anything, is wrong, and `fix` how to mend it.

    `row` counts as an editor or a spreadsheet does, and is 0 where there is no row. `image` is a reference that
    `images.read_image` takes; whether it can be read is not checked here.
    """

    row: int
    id: str
    image: str | None
    prompt: str | None
    fold: str | None = None
    reason: str = ""
    fix: str = ""


def from_kaggle(folder: Path, source: Source, split: str) -> Iterator[Entry]:
    """images/ID.png, prompts.csv (imgId,prompt), and for test sample_submission.csv (imgId_eId,val).

    Raises:
        FileNotFoundError: images/ is missing, or for `train` prompts.csv.
        ValueError: a table lacks a column, or see `submission_ids`.
    """
    images, table = folder / "images", folder / "prompts.csv"
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder; it holds the images as ID.png, .jpg or the like")
    if split == "train" and not table.is_file():
        raise FileNotFoundError(f"{table}: no such file; it holds the prompts, with the columns imgId,prompt")
    files, more = _files(images)
    root = os.path.realpath(images)

    def entry(row: int, name: str, prompt: str | None = None, fold: str | None = None) -> Entry:
        # A Mac's file names may be decomposed where the table's ids are composed.
        file = files.get(unicodedata.normalize("NFC", name))
        if file is None:
            aside = _outside(name) or ("missing image", f"add {images}/{name}.png or delete the row")
        else:
            aside = _leaves(root, file)
        return Entry(row, name, f"{images}/{file}", prompt, fold, *aside)

    def rows() -> Iterator[Entry]:
        names = [source.image or "imgId", source.prompt or "prompt"]
        if fold := tabular.pick(table, tabular.columns(table), source.fold, ("fold",)):
            names.append(fold)
        for row, cells, wrong in tabular.read_table(table, names):
            if wrong:
                yield Entry(row, "", None, None, None, "broken row", wrong)
            else:
                name, *others = cells
                yield entry(row, name or "", *others)

    if split == "train":
        seen = set()
        for found in rows():
            seen.add(unicodedata.normalize("NFC", found.id))
            yield found
        for name, file in files.items():
            if name not in seen and _is_image(file):
                yield entry(0, name)._replace(reason="no prompt", fix=f"add the image's row to {table}")
    else:
        asked = submission_ids(folder / "sample_submission.csv")
        wanted = asked or {name: None for name, file in files.items() if _is_image(file)}
        for found in rows() if table.is_file() else ():
            if found.reason == "broken row" or not found.id.strip():
                yield found
            elif wanted.get(found.id) is not None:
                yield found._replace(reason="repeated id", fix="give each image one row; the first was kept")
            elif found.id in wanted or not asked:
                wanted[found.id] = found
        for name, found in wanted.items():
            yield found or entry(0, name)
    for file in more:
        fix = "give each image a name of its own before the suffix; the first was kept"
        yield Entry(0, _stem(file), f"{images}/{file}", None, None, "repeated id", fix)


def submission_ids(path: Path) -> dict[str, Entry | None]:
    """The ids that a sample submission asks for, as keys in its order with the value None; empty without the file.

    Raises:
        ValueError: the file lacks its column `imgId_eId`, or has a row that is broken or names no element.
    """
    ids: dict[str, Entry | None] = {}
    if path.is_file():
        for row, cells, wrong in tabular.read_table(path, ["imgId_eId"]):
            name, mark, _ = (cells[0] if cells else "").rpartition("_")
            if wrong or not (mark and name):
                raise ValueError(f"{path}: row {row}: {wrong or 'write ID_ELEMENT'}")
            ids[name] = None
    return ids


def from_table(path: Path, image: str, prompt: str | None, fold: str | None) -> Iterator[Entry]:
    """A table with a column of image paths relative to the table, such as Hugging Face's imagefolder."""
    names = [image, *(name for name in (prompt, fold) if name)]
    root = os.path.realpath(path.parent)
    for row, cells, wrong in tabular.read_table(path, names):
        if wrong:
            yield Entry(row, "", None, None, None, "broken row", wrong)
            continue
        values = dict(zip(names, cells, strict=True))
        name = values[image] or ""
        aside = _inside(root, name) if name.strip() else ()
        yield Entry(row, _stem(name), f"{path.parent}/{name}", values.get(prompt), values.get(fold), *aside)


def from_diffusiondb(parts: list[Path], metadata: Path | None) -> Iterator[Entry]:
    """part-000001/*.png with part-000001.json; for a part without it, the rows of metadata.parquet."""
    missing: dict[str, Path] = {}
    for part in parts:
        index = part / f"{part.name}.json"
        if not index.is_file() and metadata:
            missing[str(int(part.name.removeprefix("part-")))] = part
            continue
        try:
            # As pairs, because a dict would keep only the last of repeated names.
            pairs = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
            if not isinstance(pairs, _Pairs):
                raise ValueError("it must hold {file: {p: prompt}}")
        except (OSError, ValueError, RecursionError) as error:
            images = sum(map(_is_image, file_names(part)))
            fix = f"mend {index}, which names {images} images or so ({error})"
            yield Entry(0, part.name, None, None, None, "broken file", fix)
            continue
        rows = ((name, dict(value).get("p") if isinstance(value, _Pairs) else value) for name, value in pairs)
        yield from _part(part, enumerate(rows, start=1), index)
    if missing:
        # The table is not in the order of its parts. It is read once, and only rows of these parts are held.
        held: dict[str, list[tuple[int, tuple[str, object]]]] = {number: [] for number in missing}
        for row, (name, prompt, number), _ in tabular.read_table(metadata, ["image_name", "prompt", "part_id"]):
            if number in held:
                held[number].append((row, (name or "", prompt)))
        for number, part in missing.items():
            yield from _part(part, held.pop(number), metadata)


class _Pairs(list):
    """A JSON object as (name, value) pairs, with repeated names kept."""


def _part(part: Path, rows: Iterable[tuple[int, tuple[str, object]]], index: Path) -> Iterator[Entry]:
    root, seen = os.path.realpath(part), set()
    for row, (name, prompt) in rows:
        seen.add(name)
        found = Entry(row, f"{part.name}/{_stem(name)}", f"{part}/{name}", None, None, *_inside(root, name))
        if prompt is None or isinstance(prompt, str):
            yield found._replace(prompt=prompt)
        else:
            yield found._replace(reason="broken row", fix=f"write text as the prompt, not a {type(prompt).__name__}")
    for name in file_names(part):
        if name not in seen and _is_image(name):
            fix = f"add the image to {index}"
            yield Entry(0, f"{part.name}/{_stem(name)}", f"{part}/{name}", None, None, "no prompt", fix)


def from_webdataset(tars: list[Path]) -> Iterator[Entry]:
    """img2dataset's webdataset: KEY.jpg, KEY.txt and KEY.json in tars; images are read from inside the tar."""
    for path in tars:
        row, read = 0, False
        try:
            for row, (key, members) in enumerate(_samples(path), start=1):
                read = True
                yield _sample(path, row, f"{path.stem}/{key}", members)
        except (tarfile.TarError, OSError) as error:
            what = f"the rows from {row + 1} on are lost; " if read else ""
            fix = f"{what}make it an uncompressed tar again or download it again ({error})"
            yield Entry(row + 1, path.stem, None, None, None, "broken file", fix)
        yield from _failures(path.with_suffix(".parquet"), path.stem)


Member = tuple[str, int, int]  # suffix, offset, size


def _samples(path: Path) -> Iterator[tuple[str, list[tuple[Member, bytes | None]]]]:
    """Neighbouring members of a tar whose names agree up to the first dot; for small texts also the bytes."""
    with tarfile.open(path, "r:") as tar:
        key, members = None, []
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would hold all of them in memory
            if not member.isreg():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            here = f"{folder}/{stem}" if folder else stem
            if here != key and members:
                yield key, members
                members = []
            key = here
            suffix = f".{suffix.lower()}"
            small = suffix in (".txt", ".caption", ".json") and member.size < 2**20
            data = tar.extractfile(member).read() if small else None
            members.append(((suffix, member.offset_data, member.size), data))
        if members:
            yield key, members


def _sample(path: Path, row: int, name: str, members: list[tuple[Member, bytes | None]]) -> Entry:
    image = next((f"{path}#{start}+{size}" for (suffix, start, size), _ in members if suffix in SUFFIXES), None)
    aside = () if image else (None, "missing image", f"add it to {path}, beside its text")
    texts = {suffix: data for (suffix, _, _), data in members if data is not None}
    return Entry(row, name, image, _caption(texts), *aside)


def _caption(texts: dict[str, bytes]) -> str | None:
    """The prompt from .txt or .caption, or else from .json; None without one."""
    for suffix in (".txt", ".caption"):
        if suffix in texts:
            return texts[suffix].decode("utf-8", "surrogateescape")
    try:
        values = json.loads(texts.get(".json", b"{}"))
        return next((values[name] for name in PROMPT_COLUMNS if isinstance(values.get(name), str)), None)
    except (ValueError, AttributeError, RecursionError):
        return None


def from_img2dataset(shards: list[Path]) -> Iterator[Entry]:
    """img2dataset's `files`: 00000/KEY.jpg, .txt and .json, with 00000.parquet (key, caption, status)."""
    for shard in shards:
        index, listed = shard.with_suffix(".parquet"), set()
        root, (files, _) = os.path.realpath(shard), _files(shard) if shard.is_dir() else ({}, [])
        known = tabular.columns(index) if index.is_file() else []
        prompt = next((name for name in PROMPT_COLUMNS if name in known), None)
        if {"key", "status"} <= set(known) and prompt:
            for row, (key, status, text), _ in tabular.read_table(index, ["key", "status", prompt]):
                if status == "success" and key:
                    listed.add(key)
                    aside = _leaves(root, files[key]) if key in files else ("missing image", f"add {shard}/{key}.jpg")
                    yield Entry(row, f"{shard.name}/{key}", f"{shard}/{files.get(key)}", text, None, *aside)
        for row, name in enumerate((n for n in files if n not in listed and _is_image(files[n])), start=1):
            texts = {s: f.read_bytes() for s in (".txt", ".json") if (f := shard / f"{name}{s}").is_file()}
            image = f"{shard}/{files[name]}"
            yield Entry(row, f"{shard.name}/{name}", image, _caption(texts), None, *_leaves(root, files[name]))
        yield from _failures(index, shard.name)


def _failures(index: Path, shard: str) -> Iterator[Entry]:
    """The rows that a shard's parquet lists as not downloaded."""
    if index.is_file() and {"key", "status", "error_message"} <= set(tabular.columns(index)):
        for row, (key, status, error), _ in tabular.read_table(index, ["key", "status", "error_message"]):
            if status != "success":
                yield Entry(row, f"{shard}/{key}", None, None, None, "not downloaded", f"{status}: {error}")


def from_lines(path: Path) -> Iterator[Entry]:
    """Prompts without images, one on each line."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for row, line in enumerate(file, start=1):
            if line.strip():
                yield Entry(row, str(row), None, line.strip())


def from_prompts(path: Path, prompt: str) -> Iterator[Entry]:
    """Prompts without images, from a column of a table."""
    for row, cells, wrong in tabular.read_table(path, [prompt]):
        if wrong:
            yield Entry(row, str(row), None, None, None, "broken row", wrong)
        else:
            yield Entry(row, str(row), None, cells[0])


def file_names(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def parts_of(folder: Path) -> list[Path]:
    """DiffusionDB's part folders, sorted: the folder itself, those in it, and those one level deeper."""
    found = [folder, *folder.glob("part-*"), *folder.glob("*/part-*")]
    return sorted(part for part in found if re.fullmatch(r"part-\d{6}", part.name) and part.is_dir())


def _files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """A folder's files by name without suffix (NFC), images first; and the further images of names already taken."""
    files: dict[str, str] = {}
    more = []
    for file in sorted(file_names(folder), key=lambda file: not _is_image(file)):
        name = unicodedata.normalize("NFC", _stem(file))
        if name and files.setdefault(name, file) != file and _is_image(file):
            more.append(file)
    return files, more


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES)


def _stem(name: str) -> str:
    """A path without its suffix, which is the id of an image that has no other id."""
    return re.sub(r"\.[^./]*$", "", name)


def _outside(name: str) -> tuple[str, str] | tuple[()]:
    """The reason and the fix for a path that is absolute or has `..`; else ()."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name) or ".." in re.split(r"[\\/]", name):
        return "outside the folder", "move the image into the source and name it by its path from there"
    return ()


def _leaves(root: str, name: str) -> tuple[str, str] | tuple[()]:
    """The reason and the fix where a link leads the path `name` out of `root`; else ()."""
    try:
        real = os.path.realpath(f"{root}/{name}")
    except ValueError:  # a null byte
        return "missing image", "no file can have that name"
    if real.startswith(f"{root}/"):
        return ()
    return "outside the folder", f"copy {real} into the source in place of the link"


def _inside(root: str, name: str) -> tuple[str, str] | tuple[()]:
    return _outside(name) or _leaves(root, name)


def count_files(folders: Iterable[Path]) -> int:
    """The number of names in all of the folders that exist."""
    return sum(len(file_names(folder)) for folder in folders if folder.is_dir())
