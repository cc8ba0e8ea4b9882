"""Predict the prompts behind images: in words, and as embeddings.

    img2prompt predict photo.png
    img2prompt predict holiday/ 'more/*.jpg' --format jsonl --output words.jsonl --embeddings vectors.npy
    find . -name '*.png' | img2prompt predict - --no-words --embeddings vectors.npy

A PATH is a file, a folder (all images in it and in its folders, sorted), a pattern, or `-` for a list of these on
stdin, one a line. The order is kept. An image that fails does not stop the others: it is named on stderr, has its error
in the output and NaN in the embeddings. A run with --output that was killed goes on where it was, by what lies beside
the file in FILE.partial/; FILE.run says what a file was made of.

Exit status: 0, all is well; 1, the model cannot be loaded or a file not be written; 2, wrong usage, or no image named;
3, some images failed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np
from tqdm import tqdm

from img2prompt.core.blocks import blocks
from img2prompt.core.progress import progress
from img2prompt.core.storage import digest, grow, read_json, whole, write_json
from img2prompt.predict.answer import answer
from img2prompt.predict.predictor import Error, Predictor
from img2prompt.sources.readers import SUFFIXES
from img2prompt.words.words import Said, Words

BATCH = 64  # images at a time, also after a kill: their vectors' last bits depend on it
OUTPUTS = Path("outputs")


def said_lines(said: Said) -> list[str]:
    """What is said of an image, for people."""
    lines = [
        f"prompt   {said.prompt}  ({said.prompt_cosine:.3f})",
        f"words    {', '.join(f'{word} {probability:.2f}' for word, probability in said.words)}",
    ]
    for place, (prompt, cosine) in enumerate(said.nearest):
        lines.append(f"{'' if place else 'nearest':7}  {cosine:.3f}  {prompt}")
    return lines


def as_text(path: str, said: Said | None, error: str) -> str:
    """An image's lines for people."""
    if not said:
        return f"{path}: {error}\n" if error else f"{path}\n"
    return "\n  ".join([path, *said_lines(said)]) + "\n\n"


def as_jsonl(path: str, said: Said | None, error: str) -> str:
    """An image's JSON object, on one line."""
    return json.dumps(answer(path, said, error), ensure_ascii=False) + "\n"


def as_csv(path: str, said: Said | None, error: str) -> str:
    """An image's row under COLUMNS."""
    return _row([path, *([said.prompt, round(said.prompt_cosine, 6)] if said else ["", ""]), error])


def _row(cells: Sequence[object]) -> str:
    with io.StringIO(newline="") as text:
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()


COLUMNS = _row(["path", "prompt", "prompt_cosine", "error"])
FORMATS: dict[str, Callable[[str, Said | None, str], str]] = {"text": as_text, "jsonl": as_jsonl, "csv": as_csv}


def whole_number(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: what to predict, by which model, and what to write."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image, a folder, a pattern, or - for a list")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="the trained model; default: the last run, outputs/")
    parser.add_argument("--format", choices=FORMATS, help="default: by the suffix of --output, else text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write; default: stdout")
    parser.add_argument("--embeddings", type=Path, metavar="FILE.npy", help="(m, 384) float32, a row an image")
    parser.add_argument("--top", type=whole_number, default=5, metavar="N", help="words and nearest prompts each (5)")
    parser.add_argument("--no-words", action="store_true", help="predict embeddings only, which is faster")
    parser.add_argument("--overwrite", action="store_true", help="start anew where the files are there already")


def main(options: argparse.Namespace) -> None:
    """Predict; end the process with the status that the help names."""
    try:
        images = list(_images(options.paths))
        if not images:
            print(f"error: no image in {', '.join(options.paths)}: name files, folders or patterns", file=sys.stderr)
            sys.exit(2)
        failures = _predict(images, options)
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        if os.environ.get("IMG2PROMPT_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted" + "; the same command goes on from here" * bool(options.output), file=sys.stderr)
        sys.exit(130)
    if failures:
        print(f"{len(failures)} of {len(images)} images failed:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(3)


def _images(paths: Iterable[str]) -> Iterator[str]:
    """The images that paths stand for. What is not there stands for itself, as a pattern without a match in a shell."""
    for path in paths:
        if path == "-":
            yield from _images(filter(None, map(os.fsdecode, sys.stdin.buffer.read().splitlines())))
        elif Path(path).is_dir():
            found = (file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            yield from sorted(map(str, found))
        elif Path(path).exists():
            yield path
        else:
            found = sorted(glob(path, recursive=True))  # noqa: PTH207 - takes absolute patterns too
            yield from [path] if found in ([], [path]) else _images(found)


def load(bundle: Path | None) -> Predictor:
    """The trained model of a bundle, or of the last run.

    Raises:
        ValueError: it cannot be loaded.
    """
    folder = bundle or OUTPUTS
    try:
        return Predictor.load(folder)
    except Exception as error:  # whatever the libraries raise that read weights
        if os.environ.get("IMG2PROMPT_DEBUG"):
            raise
        remedy = "" if bundle else "; `dvc repro` trains a model, and --bundle DIR names another"
        raise ValueError(f"{folder}: the model cannot be loaded: {error}{remedy}") from None


def _predict(images: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Write what is asked for; return a line for each image that failed.

    Raises:
        OSError, ValueError: the model cannot be loaded, or a file not be written.
    """
    predictor = load(options.bundle)
    run = _Run(predictor, None if options.no_words else predictor.words, images, options)
    return run.into(options.output) if options.output else run.to_stdout()


@dataclass(frozen=True)
class _Run:
    """One run of the command."""

    predictor: Predictor
    words: Words | None
    images: Sequence[str]
    options: argparse.Namespace

    @property
    def format(self) -> str:
        suffix = self.options.output.suffix.removeprefix(".") if self.options.output else ""
        return self.options.format or (suffix if suffix in FORMATS else "text")

    def batches(self) -> list[Sequence[str]]:
        return [self.images[part] for part in blocks(len(self.images), BATCH)]

    def results(self, left: Sequence[Sequence[str]]) -> Iterator[dict[str, np.ndarray | bytes]]:
        """Of each batch `lines` as the format has them, `failures` as lines, and `embeddings` (b, 384)."""
        write, images = FORMATS[self.format], [image for batch in left for image in batch]
        head = COLUMNS if self.format == "csv" and len(images) == len(self.images) else ""
        with progress(None, "images", len(images), "image") as bar:
            for batch, found in zip(left, self.predictor.stream(images, BATCH), strict=True):
                errors = [_reason(error, image) for error, image in zip(found.errors, batch, strict=True)]
                fine = np.array([not error for error in errors])
                said = iter(self.words(found.embeddings[fine], self.options.top) if self.words and fine.any() else ())
                lines = [
                    write(image, None if error else next(said, None), error)
                    for image, error in zip(batch, errors, strict=True)
                ]
                failures = [f"{image}: {error}\n" for image, error in zip(batch, errors, strict=True) if error]
                found.embeddings[~fine] = np.nan
                yield {
                    "lines": _encoded([head, *lines]),
                    "failures": _encoded(failures),
                    "embeddings": found.embeddings,
                }
                head = ""
                bar.update(len(batch))

    def to_stdout(self) -> list[str]:
        self.refuse_strange()
        failures, embeddings = b"", []
        for found in self.results(self.batches()):
            with tqdm.external_write_mode(sys.stdout):
                sys.stdout.buffer.write(found["lines"])
                sys.stdout.buffer.flush()
            failures += found["failures"]
            embeddings.append(found["embeddings"])
        if self.options.embeddings:
            with whole(self.options.embeddings) as aside, aside.open("wb") as file:
                np.save(file, np.concatenate(embeddings))
        return _lines(failures)

    def into(self, output: Path) -> list[str]:
        """Write a file, and the embeddings where they are asked for; go on where a former run of the same was killed.

        FILE.run says what the file is made of and, once it is whole, which images failed.
        """
        record, partial = (output.with_name(f"{output.name}.{suffix}") for suffix in ("run", "partial"))
        former = read_json(record) if record.is_file() and not self.options.overwrite else {}
        made_of = self.made_of()
        if former:
            if other := [name for name in made_of if former.get(name) != made_of[name]]:
                raise ValueError(f"{output}: made with another {' and '.join(other)}; --overwrite starts anew")
            if "failures" in former and all(path.is_file() for path in self.targets()):
                print(f"{output}: complete already; --overwrite starts anew", file=sys.stderr)
                return former["failures"]
        else:
            self.refuse_strange()
            shutil.rmtree(partial, ignore_errors=True)
            with whole(record) as aside:
                write_json(aside, made_of)
        batches = self.batches()

        def results(left: Sequence[Sequence[str]]) -> Iterator[dict[str, np.ndarray | bytes]]:
            if done := len(batches) - len(left):
                print(f"{output}: going on after {done * BATCH} images", file=sys.stderr)
            return self.results(left)

        files = grow(partial, batches, results)
        failures = _lines(files["failures"].read_bytes())
        if self.options.embeddings:
            with whole(self.options.embeddings) as aside:
                shutil.move(files["embeddings"], aside)
        files["lines"].replace(output)
        with whole(record) as aside:
            write_json(aside, made_of | {"failures": failures})
        shutil.rmtree(partial)
        return failures

    def made_of(self) -> dict[str, object]:
        """What the bytes of the output depend on."""
        options = {"format": self.format, "top": self.options.top, "words": not self.options.no_words}
        options["embeddings"] = self.options.embeddings and str(self.options.embeddings)
        return {
            "model": self.predictor.identity,
            "images": digest(json.dumps([[image, *_state(image)] for image in self.images])),
            "options": options,
        }

    def targets(self) -> list[Path]:
        return [path for path in (self.options.output, self.options.embeddings) if path]

    def refuse_strange(self) -> None:
        """Raise ValueError where a file to write is there, and no record says that this command made it."""
        for path in self.targets() if not self.options.overwrite else ():
            if path.exists():
                raise ValueError(f"{path}: is there, and not known to be this run's; --overwrite replaces it")


def _state(image: str) -> list[int]:
    """Size and time of a file, which change when it does."""
    try:
        about = Path(image).stat()
    except OSError:
        return []
    return [about.st_size, about.st_mtime_ns]


def _reason(error: Error | None, image: str) -> str:
    """Why an image failed, on one line without its name; empty where it did not."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error or "")
    return " ".join(text.removeprefix(f"{image}: ").split())


def _lines(text: bytes) -> list[str]:
    return text.decode().split("\n")[:-1]


def _encoded(lines: Sequence[str]) -> bytes:
    # A name that is not UTF-8 is written as JSON writes it.
    return "".join(lines).encode("utf-8", "backslashreplace")
