"""Competitions as tables: what can be used, and what was set aside and why."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.core.pictures import decode, read_picture
from img2prompt.core.progress import progress
from img2prompt.core.rows import ROWS, TEXTS, Row
from img2prompt.sources.layouts import Layout, recognise
from img2prompt.sources.params import Source
from img2prompt.sources.readers import Entry

# A test row stays for these, without its picture, and they do not count towards the limit.
PICTURE_REASONS = frozenset({"outside the folder", "missing picture", "unreadable picture", "not downloaded"})
CHUNK = 64  # rows that a thread checks at a time
GROUP = 8192  # rows of parquet that are held before they are written


class SetAside(NamedTuple):
    """A row that cannot be used, a line of quarantine.csv; `reason` is a key of `layouts.REASONS`."""

    split: str
    source: str
    row: int
    id: str
    reason: str
    fix: str


class Batch(NamedTuple):
    """Some rows of a source, and the digest of their pictures' bytes."""

    rows: list[Row]
    set_aside: list[SetAside]
    pictures: bytes = b""


class Quarantine:
    """quarantine.csv, written as rows are set aside, and how many there are of each reason."""

    def __init__(self, path: Path) -> None:
        # What is no UTF-8 must still be listed.
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._file.write(f"{','.join(SetAside._fields)}\n")
        # Quoted even where the csv module sees no need: it overlooks a lone carriage return.
        self._csv = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        self.counts: Counter[str] = Counter()

    def add(self, rows: Iterable[SetAside]) -> None:
        """List rows."""
        for row in rows:
            self._csv.writerow(row)
            self.counts[row.reason] += 1

    def close(self) -> None:
        """Make the file whole."""
        self._file.close()


def read(source: Source, split: str, max_quarantined: float = 1.0) -> Iterator[Batch]:
    """Read the rows of a source, whatever its layout; every picture is decoded once.

    For `train` a row needs a picture that can be read and a prompt. For `test` every id stays, in the
    source's order. Memory holds the ids, and of all else a few hundred rows.

    Raises:
        FileNotFoundError, ValueError: the source is in no known layout, nothing in it can be used, more than the
            share `max_quarantined` of its rows is set aside (pictures of `test` not counted), or it has no pictures.
    """
    layout = recognise(source, split)
    if layout.texts:
        raise ValueError(f"{source.path}: prompts without pictures; prepare.{split} needs pictures")
    screened = progress(_screen(layout, split), f"reading {source.path}", layout.count(), "row")
    yield from _within(_parallel(screened, source.path, split), source, split, max_quarantined)


def read_texts(source: Source, max_quarantined: float = 1.0) -> Iterator[Batch]:
    """Read prompts without pictures, each distinct one once; repeated ones are not set aside.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    layout = recognise(source, "train")
    screened = progress(_screen(layout, "train"), f"reading {source.path}", layout.count(), "row")
    yield from _within(_distinct(screened, source.path), source, "train", max_quarantined)


def is_texts(source: Source) -> bool:
    """Whether a source holds prompts without pictures."""
    return source.path != "sample" and recognise(source, "train").texts


@contextmanager
def write_rows(path: Path, quarantine: Quarantine) -> Iterator[Writer]:
    """Open a table of rows to write, whose parquet file is whole at the end of the block.

    The pictures' digest stands in the file's metadata: pictures that change under the same names change
    the file, and with it every later stage.
    """
    with pq.ParquetWriter(path, ROWS) as file:
        writer = Writer(file, quarantine)
        yield writer
        writer.flush(0)
        file.add_key_value_metadata({"pictures_sha256": writer.pictures.hexdigest()})


@contextmanager
def write_texts(path: Path, quarantine: Quarantine) -> Iterator[Writer]:
    """Open a table of prompts without pictures to write."""
    with pq.ParquetWriter(path, TEXTS) as file:
        writer = Writer(file, quarantine)
        yield writer
        writer.flush(0)


class Writer:
    """A parquet table of rows that is written as they come."""

    def __init__(self, file: pq.ParquetWriter, quarantine: Quarantine) -> None:
        self._file, self._quarantine, self._held = file, quarantine, list[Row]()
        self.pictures, self.count = hashlib.sha256(), 0

    def add(self, batches: Iterable[Batch]) -> None:
        """Write what can be used and list what cannot."""
        for batch in batches:
            self._held += batch.rows
            self.count += len(batch.rows)
            self._quarantine.add(batch.set_aside)
            self.pictures.update(batch.pictures)
            if len(self._held) >= GROUP:
                self.flush(GROUP)

    def flush(self, whole: int) -> None:
        """Write what is held; with `whole` only groups of that many rows."""
        while self._held and len(self._held) >= whole:
            group = self._held[:GROUP]
            del self._held[:GROUP]
            columns = dict(zip(Row._fields, zip(*group, strict=True), strict=True))
            schema = self._file.schema
            self._file.write_table(pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema))


def _screen(layout: Layout, split: str) -> Iterator[Entry]:
    """What can be said of entries without their pictures: each with a reason is to be set aside."""
    seen: set[str] = set()
    for entry in layout.entries():
        reason, fix = _fault(entry, split, seen)
        if reason:
            entry = entry._replace(reason=reason, fix=fix)
        if entry.reason in ("", *PICTURE_REASONS):
            seen.add(entry.id)
        yield entry


def _fault(entry: Entry, split: str, seen: set[str]) -> tuple[str, str]:
    if entry.reason and entry.reason not in PICTURE_REASONS:
        return entry.reason, entry.fix
    if not entry.id.strip():
        return "empty id", "name the picture, or delete the row"
    try:
        "\0".join(filter(None, (entry.id, entry.picture, entry.prompt))).encode()
    except UnicodeEncodeError:
        return "not UTF-8", "save the table as UTF-8 and give the file a name in UTF-8"
    if entry.id in seen:
        return "repeated id", "give each picture one row and a name of its own; the first was kept"
    if split == "test" or entry.reason:
        return entry.reason, entry.fix
    if _is_blank(entry.prompt):
        return "empty prompt", "write the prompt or delete the row"
    if entry.fold and not (entry.fold.strip().isascii() and entry.fold.strip().isdigit()):
        return "bad fold", f"write a whole number from 0 on, or nothing, instead of {entry.fold!r}"
    return "", ""


def _is_blank(prompt: str | None) -> bool:
    """Whether nothing in a prompt shows: it is white space and control characters."""
    return prompt is None or not any(c.isprintable() and not c.isspace() for c in prompt)


def _distinct(entries: Iterable[Entry], name: str) -> Iterator[Batch]:
    seen: set[bytes] = set()
    for entry in entries:
        if entry.reason:
            yield Batch([], [SetAside("train", name, entry.row, entry.id, entry.reason, entry.fix)])
            continue
        key = hashlib.blake2b(entry.prompt.encode(), digest_size=16).digest()
        yield Batch([] if key in seen else [Row(entry.id, name, None, entry.prompt)], [])
        seen.add(key)


def _parallel(entries: Iterable[Entry], name: str, split: str) -> Iterator[Batch]:
    """Check pictures in threads (Pillow decodes outside the interpreter lock), results in order."""
    entries = iter(entries)
    threads = os.cpu_count() or 1
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(entries, CHUNK)):
            waiting.append(pool.submit(_check, chunk, name, split))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check(entries: Sequence[Entry], name: str, split: str) -> Batch:
    batch, total = Batch([], []), hashlib.sha256()
    for entry in entries:
        reason, fix = entry.reason, entry.fix
        if not reason:
            data, reason, fix = _look(entry.picture)
            total.update(hashlib.sha256(data).digest())
        if reason:
            batch.set_aside.append(SetAside(split, name, entry.row, entry.id, reason, fix))
        keeps = split == "test" and reason in PICTURE_REASONS
        if not reason or keeps:
            prompt = None if _is_blank(entry.prompt) else entry.prompt
            fold = int(entry.fold) if split == "train" and entry.fold else None
            batch.rows.append(Row(entry.id, name, None if reason else entry.picture, prompt, fold))
    return batch._replace(pictures=total.digest())


def _look(reference: str) -> tuple[bytes, str, str]:
    """A picture's bytes, or why it cannot be used."""
    try:
        data = read_picture(reference)
        decode(data)
    except (FileNotFoundError, NotADirectoryError):
        return b"", "missing picture", f"add {reference} or delete the row"
    except (OSError, ValueError) as error:
        return b"", "unreadable picture", f"replace {reference} ({error})"
    return data, "", ""


def _within(batches: Iterator[Batch], source: Source, split: str, limit: float) -> Iterator[Batch]:
    """The batches, unless too much of them is set aside or nothing is left."""
    used, counts, first = 0, Counter[str](), list[str]()
    for batch in batches:
        used += len(batch.rows)
        for row in batch.set_aside:
            if row.reason == "not downloaded" or (split == "test" and row.reason in PICTURE_REASONS):
                continue
            counts[row.reason] += 1
            if len(first) < 10:
                first.append(f"  row {row.row}, id {row.id!r}: {row.reason}; {row.fix}")
        yield batch
    listed = "\n".join(first)
    if not used:
        raise ValueError(f"{source.path}: no row can be used\n{listed or '  it is empty'}")
    bad = counts.total()
    if bad > limit * (used + bad):
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        raise ValueError(
            f"{source.path}: {bad} of {used + bad} rows cannot be used ({reasons}), more than "
            f"prepare.max_quarantined ({limit}) allows. Mend them, or raise it. The first of them:\n{listed}"
        )
