"""Random competitions with random damage, in every layout. `pytest --hypothesis-profile=long` tries 500 of them."""

import csv
import io
import json
import tarfile
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from img2prompt.core.images import open_image
from img2prompt.core.rows import read_rows
from img2prompt.predict.submission import check_submission, write_submission
from img2prompt.sources.params import Source
from img2prompt.sources.readers import REASONS
from img2prompt.sources.reading import Quarantine, read, write_rows


def encoded(mode="RGB", form="PNG", **options):
    file = io.BytesIO()
    Image.new(mode, (5, 3)).save(file, form, **options)
    return file.getvalue()


GOOD = [
    encoded(), encoded("RGBA"), encoded("P"), encoded("1"), encoded("L"), encoded("LA"), encoded("I;16"),
    encoded(form="JPEG"), encoded("CMYK", "JPEG"), encoded(form="WEBP"), encoded("P", "GIF"), encoded(form="BMP"),
]  # fmt: skip
BAD = [
    b"", b"\0", b"no image", b"<html>404</html>", encoded()[:-30], encoded(form="JPEG")[:200], encoded()[8:],
    encoded("1", "PNG")[:16] + (10**6).to_bytes(4, "big") * 2 + encoded("1", "PNG")[24:],
]  # fmt: skip

letters = st.characters(codec="utf-8", exclude_characters="\0/\\", exclude_categories=["Cs"])
names = st.text(letters, min_size=1, max_size=20).filter(
    lambda name: name.strip() and not name.startswith(".") and ".." not in name and len(name.encode()) < 60
    and name == unicodedata.normalize("NFC", name) and not (name[1:2] == ":" and name[0].isascii())
)  # fmt: skip
plain = st.text("abcdefgh0123456789-_ üщ猫", min_size=1, max_size=12).filter(str.strip)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)
prompts = st.builds(lambda visible, rest: rest + visible, st.sampled_from(["cat", "قط", "猫", "🐈"]), words)
damages = st.sampled_from([None] * 5 + ["missing image", "unreadable image", "empty prompt", "repeated id"])
blanks = st.sampled_from(["", " ", "\t", "\x07", "\u200b"])


class Case:
    """One row: what is written of it, and the reason for which it must be set aside, if any."""

    def __init__(self, name, prompt, blank, data, bad, damage):
        self.name, self.damage = name, damage
        self.prompt = blank if damage == "empty prompt" else prompt
        self.data = None if damage == "missing image" else bad if damage == "unreadable image" else data


def cases(of_names, least=1):
    row = st.builds(
        Case, of_names, prompts, blanks, st.sampled_from(GOOD), st.sampled_from(BAD), damages
    )  # fmt: skip
    return st.lists(row, min_size=least, max_size=7, unique_by=lambda case: case.name)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def records(rows, suffix=""):
    """The rows of a table: a repeated id comes again at the end."""
    again = [(case.name + suffix, "again") for case in rows if case.damage == "repeated id"]
    return [(case.name + suffix, case.prompt) for case in rows] + again


def check(folder, source, split, rows, prefix=""):
    """What is good is in the table, in order; what is bad is listed with its reason; no test id is lost."""
    good = [case for case in rows if case.damage in (None, "repeated id")]
    quarantine = Quarantine(folder / "quarantine.csv")
    with write_rows(folder / "rows.parquet", quarantine) as writer:
        if split == "train" and not good:
            with pytest.raises(ValueError, match="no row can be used"):
                writer.add(read(source, split))
            quarantine.close()
            return
        writer.add(read(source, split))
    quarantine.close()
    table = read_rows(folder / "rows.parquet")
    with (folder / "quarantine.csv").open(encoding="utf-8", newline="") as file:
        listed = {(row["id"], row["reason"]) for row in csv.DictReader(file)}
    assert {reason for _, reason in listed} <= REASONS.keys()
    expected = good if split == "train" else rows
    assert table.id.tolist() == [prefix + case.name for case in expected]
    known = [None if case.damage == "empty prompt" else case.prompt for case in expected]
    assert table.prompt.tolist() == known
    seen = [case.damage not in ("missing image", "unreadable image") for case in expected]
    assert table.image.notna().tolist() == seen
    for image in table.image[seen]:
        assert open_image(image).size == (5, 3)
    bad = {(prefix + case.name, case.damage) for case in rows if case.damage}
    if split == "test":
        bad = {(name, reason) for name, reason in bad if reason != "empty prompt"}
    assert bad <= listed
    if split == "test":
        predictions = np.eye(4, dtype=np.float32)[np.arange(len(table)) % 4]
        write_submission(folder / "submission.csv", table.id, predictions)
        check_submission(folder / "submission.csv", [prefix + case.name for case in rows], 4)


splits = st.sampled_from(["train", "test"])
suffixes = st.sampled_from([".png", ".jpg", ".WEBP", ".gif"])


def write_csv(path, header, rows, spelling):
    with path.open("w", encoding="utf-8-sig" if spelling["bom"] else "utf-8", newline="") as file:
        writer = csv.writer(
            file, delimiter=spelling["delimiter"], lineterminator=spelling["end"], quoting=csv.QUOTE_ALL
        )
        writer.writerow(header)
        for number, row in enumerate(rows):
            if number == spelling["broken"]:
                file.write(spelling["line"])
            writer.writerow(row)


spellings = st.fixed_dictionaries({
    "bom": st.booleans(),
    "delimiter": st.sampled_from([",", ";", "\t"]),
    "end": st.sampled_from(["\n", "\r\n"]),
    "broken": st.integers(0, 10),
    "line": st.sampled_from(['"open\n', 'x,y,z;u;v\ta\tb\n', '"a" b\n', "alone\n", "\n", '"open\n\n']),
})  # fmt: skip


@given(cases(names), suffixes, spellings, splits, st.booleans())
def test_kaggle(rows, suffix, spelling, split, asked):
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "input"
        for case in rows:
            if case.data is not None:
                put(home / f"images/{case.name}{suffix}", case.data)
        (home / "images").mkdir(parents=True, exist_ok=True)
        write_csv(home / "prompts.csv", ["imgId", "prompt"], records(rows), spelling)
        if split == "test":
            # Without the submission's order the images' own is taken: then only the ids are known beforehand.
            ids = [(f"{case.name}_{element}", 0) for case in rows for element in range(2)]
            write_csv(home / "sample_submission.csv", ["imgId_eId", "val"], ids, spelling | {"broken": -1})
        check(Path(folder), Source(path=str(home)), split, rows)


@given(cases(names), suffixes, spellings, splits, st.sampled_from(["csv", "tsv", "jsonl", "parquet"]), st.booleans())
def test_tables(rows, suffix, spelling, split, form, imagefolder):
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "input"
        home.mkdir()
        for case in rows:
            if case.data is not None:
                put(home / f"{case.name}{suffix}", case.data)
        path = home / f"{'metadata' if imagefolder and form != 'tsv' else 'mine'}.{form}"
        header, lines = ["file_name", "text"], records(rows, suffix)
        if form == "parquet":
            pd.DataFrame(lines, columns=header).to_parquet(path)
        elif form == "jsonl":
            path.write_text("".join(json.dumps(dict(zip(header, line, strict=True))) + "\n" for line in lines))
        else:
            write_csv(path, header, lines, spelling)
        check(Path(folder), Source(path=str(home if path.stem == "metadata" else path)), split, rows)


@given(cases(names), suffixes, splits)
def test_diffusiondb(rows, suffix, split):
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "input/part-000007"
        part.mkdir(parents=True)
        for case in rows:
            if case.data is not None:
                put(part / f"{case.name}{suffix}", case.data)
        pairs = [f"{json.dumps(name)}: {json.dumps({'p': prompt, 'se': 1})}" for name, prompt in records(rows, suffix)]
        (part / "part-000007.json").write_text("{" + ", ".join(pairs) + "}")
        check(Path(folder), Source(path=str(part.parent)), split, rows, "part-000007/")


@given(cases(plain), splits, st.booleans())
def test_img2dataset(rows, split, tar):
    rows = [case for case in rows if case.damage != "repeated id"]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "input"
        home.mkdir()
        if tar:
            with tarfile.open(home / "00000.tar", "w") as file:
                for case in rows:
                    for suffix, data in ((".jpg", case.data), (".txt", case.prompt.encode())):
                        if data is not None:
                            member = tarfile.TarInfo(case.name + suffix)
                            member.size = len(data)
                            file.addfile(member, io.BytesIO(data))
        else:
            (home / "00000").mkdir()
            for case in rows:
                if case.data is not None:
                    put(home / f"00000/{case.name}.jpg", case.data)
            lines = [(case.name, case.prompt, "success") for case in rows]
            pd.DataFrame(lines, columns=["key", "caption", "status"]).to_parquet(home / "00000.parquet")
        if rows:
            check(Path(folder), Source(path=str(home)), split, rows, "00000/")
