"""Reads sources into tables of rows: those that can be used, and those that are set aside and why."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.core import engine
from img2prompt.core.images import decode, read_image
from img2prompt.core.process import threads
from img2prompt.core.progress import progress
from img2prompt.core.rows import ROWS, TEXTS, Row
from img2prompt.core.shards import RESUME, fetched, forget
from img2prompt.sources.layouts import Layout, recognise
from img2prompt.sources.params import Source
from img2prompt.sources.readers import Entry

# A test row with one of these stays, without its image, and does not count towards the limit.
IMAGE_REASONS = frozenset({"outside the folder", "missing image", "unreadable image", "not downloaded"})
CHUNK = 64  # rows that a thread checks at a time
PIECE = 16 * CHUNK  # and a worker of a cluster
GROUP = 8192  # rows of a parquet row group, held until they are written


class SetAside(NamedTuple):
    """A row that cannot be used, a line of quarantine.csv; `reason` is a key of `readers.REASONS`."""

    split: str
    source: str
    row: int
    id: str
    reason: str
    fix: str


class Batch(NamedTuple):
    """Some rows of a source, those set aside, and the SHA-256 of the images' bytes."""

    rows: list[Row]
    set_aside: list[SetAside]
    images: bytes = b""


class Quarantine:
    """quarantine.csv, written as rows are set aside, and the number of rows for each reason."""

    def __init__(self, path: Path) -> None:
        # Text that is not UTF-8 must still be listed.
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        self._file.write(f"{','.join(SetAside._fields)}\n")
        # Quoted even where the csv module sees no need: it overlooks a lone carriage return.
        self._csv = csv.writer(self._file, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        self.counts: Counter[str] = Counter()

    def add(self, rows: Iterable[SetAside]) -> None:
        """Write rows to the file and count their reasons."""
        for row in rows:
            self._csv.writerow(row)
            self.counts[row.reason] += 1

    def __str__(self) -> str:
        """How many rows there are of each reason."""
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common()) or "nothing"

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._file.close()


def read(source: Source, split: str, max_quarantined: float = 1.0) -> Iterator[Batch]:
    """Read the rows of a source, whatever its layout; every image is decoded once.

    For `train` a row needs an image that can be read and a prompt. For `test` every id stays, in the
    source's order. Memory holds all ids, and everything else for a few hundred rows only.

    Raises:
        FileNotFoundError, ValueError: the source is in no known layout, nothing in it can be used, more than the
            share `max_quarantined` of its rows is set aside (images of `test` not counted), or it has no images.
    """
    layout = recognise(source, split)
    if layout.texts:
        raise ValueError(f"{source.path}: prompts without images; prepare.{split} needs images")
    screened = progress(_screen(layout, split), f"reading {source.path}", layout.count(), "row")
    checked = (_by_workers if engine.engine() == "ray" else _parallel)(screened, source.path, split)
    yield from _within(checked, source, split, max_quarantined)


def read_texts(source: Source, max_quarantined: float = 1.0) -> Iterator[Batch]:
    """Read prompts without images, each distinct one once; repeated ones are not set aside.

    Raises:
        FileNotFoundError, ValueError: as `read`.
    """
    layout = recognise(source, "train")
    screened = progress(_screen(layout, "train"), f"reading {source.path}", layout.count(), "row")
    yield from _within(_distinct(screened, source.path), source, "train", max_quarantined)


def is_texts(source: Source) -> bool:
    """Whether a source holds prompts without images."""
    return source.path != "sample" and recognise(source, "train").texts


@contextmanager
def write_rows(path: Path, quarantine: Quarantine) -> Iterator[Writer]:
    """Open a parquet table of rows for writing; the file is complete at the end of the block.

    The digest of the images' bytes is in the file's metadata: where images change under the same names, the file
    changes too, and later stages run again.
    """
    with pq.ParquetWriter(path, ROWS) as file:
        writer = Writer(file, quarantine)
        yield writer
        writer.flush(0)
        file.add_key_value_metadata({"images_sha256": writer.images.hexdigest()})


@contextmanager
def write_texts(path: Path, quarantine: Quarantine) -> Iterator[Writer]:
    """Open a parquet table of prompts without images for writing; the file is complete at the end of the block."""
    with pq.ParquetWriter(path, TEXTS) as file:
        writer = Writer(file, quarantine)
        yield writer
        writer.flush(0)


class Writer:
    """Writes rows to a parquet table as they come."""

    def __init__(self, file: pq.ParquetWriter, quarantine: Quarantine) -> None:
        self._file, self._quarantine, self._held = file, quarantine, list[Row]()
        self.images, self.count = hashlib.sha256(), 0

    def add(self, batches: Iterable[Batch]) -> None:
        """Write the rows that can be used and list the others in the quarantine."""
        for batch in batches:
            self._held += batch.rows
            self.count += len(batch.rows)
            self._quarantine.add(batch.set_aside)
            self.images.update(batch.images)
            if len(self._held) >= GROUP:
                self.flush(GROUP)

    def flush(self, whole: int) -> None:
        """Write the rows held, in row groups, as long as at least `whole` are left."""
        while self._held and len(self._held) >= whole:
            group = self._held[:GROUP]
            del self._held[:GROUP]
            columns = dict(zip(Row._fields, zip(*group, strict=True), strict=True))
            schema = self._file.schema
            self._file.write_table(pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema))


def _screen(layout: Layout, split: str) -> Iterator[Entry]:
    """Check entries without reading their images; those with a reason are to be set aside."""
    seen: set[str] = set()
    for entry in layout.entries():
        reason, fix = _fault(entry, split, seen)
        if reason:
            entry = entry._replace(reason=reason, fix=fix)
        if entry.reason in ("", *IMAGE_REASONS):
            seen.add(entry.id)
        yield entry


def _fault(entry: Entry, split: str, seen: set[str]) -> tuple[str, str]:
    if entry.reason and entry.reason not in IMAGE_REASONS:
        return entry.reason, entry.fix
    if not entry.id.strip():
        return "empty id", "name the image, or delete the row"
    try:
        "\0".join(filter(None, (entry.id, entry.image, entry.prompt))).encode()
    except UnicodeEncodeError:
        return "not UTF-8", "save the table as UTF-8 and give the file a name in UTF-8"
    if entry.id in seen:
        return "repeated id", "give each image one row and a name of its own; the first was kept"
    if split == "test" or entry.reason:
        return entry.reason, entry.fix
    if _is_blank(entry.prompt):
        return "empty prompt", "write the prompt or delete the row"
    if entry.fold and not (entry.fold.strip().isascii() and entry.fold.strip().isdigit()):
        return "bad fold", f"write a whole number from 0 on, or nothing, instead of {entry.fold!r}"
    return "", ""


def _is_blank(prompt: str | None) -> bool:
    """Whether a prompt is None or has nothing visible: only white space and control characters."""
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
    """Check images in threads (Pillow decodes outside the interpreter lock), results in order."""
    entries = iter(entries)
    workers = threads()
    waiting: deque[Future[Batch]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(entries, CHUNK)):
            waiting.append(pool.submit(_check, chunk, name, split))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _by_workers(entries: Iterable[Entry], name: str, split: str) -> Iterator[Batch]:
    """Check images by Ray's workers, results in order; what a killed run has checked may have changed since."""
    entries, folder = iter(entries), RESUME / "reading"
    forget(folder)

    def pieces() -> Iterator[engine.Piece]:
        for number in count():
            if not (chunk := list(islice(entries, PIECE))):
                return
            make = partial(_check_into, chunk, name, split)
            yield engine.Piece(f"{name}, row {chunk[0].row} and on", make, folder / f"{number}.json")

    for number, _ in enumerate(engine.run(pieces(), None)):
        file = folder / f"{number}.json"
        with fetched(file) as path:
            batches = json.loads(path.read_text(encoding="ascii"))
        for rows, set_aside, images in batches:
            yield Batch([Row(*row) for row in rows], [SetAside(*row) for row in set_aside], bytes.fromhex(images))
        forget(file)
    forget(folder)


def _check_into(entries: Sequence[Entry], name: str, split: str, path: Path) -> None:
    batches = [batch._replace(images=batch.images.hex()) for batch in _parallel(entries, name, split)]
    path.write_text(json.dumps(batches), encoding="ascii")  # which text that is not UTF-8 survives


def _check(entries: Sequence[Entry], name: str, split: str) -> Batch:
    batch, total = Batch([], []), hashlib.sha256()
    for entry in entries:
        reason, fix = entry.reason, entry.fix
        if not reason:
            data, reason, fix = _look(entry.image)
            total.update(hashlib.sha256(data).digest())
        if reason:
            batch.set_aside.append(SetAside(split, name, entry.row, entry.id, reason, fix))
        keeps = split == "test" and reason in IMAGE_REASONS
        if not reason or keeps:
            prompt = None if _is_blank(entry.prompt) else entry.prompt
            fold = int(entry.fold) if split == "train" and entry.fold else None
            batch.rows.append(Row(entry.id, name, None if reason else entry.image, prompt, fold))
    return batch._replace(images=total.digest())


def _look(reference: str) -> tuple[bytes, str, str]:
    """An image's bytes, and the reason and the fix where it cannot be used."""
    try:
        data = read_image(reference)
        decode(data)
    except (FileNotFoundError, NotADirectoryError):
        return b"", "missing image", f"add {reference} or delete the row"
    except (OSError, ValueError) as error:
        return b"", "unreadable image", f"replace {reference} ({error})"
    return data, "", ""


def _within(batches: Iterator[Batch], source: Source, split: str, limit: float) -> Iterator[Batch]:
    """Yield the batches; ValueError at the end where too many rows are set aside or none can be used."""
    used, counts, first = 0, Counter[str](), list[str]()
    for batch in batches:
        used += len(batch.rows)
        for row in batch.set_aside:
            if row.reason == "not downloaded" or (split == "test" and row.reason in IMAGE_REASONS):
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
