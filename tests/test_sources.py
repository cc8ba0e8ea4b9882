import csv
import os
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from img2prompt.core.rows import read_rows
from img2prompt.sources.params import Source
from img2prompt.sources.readers import REASONS
from img2prompt.sources.reading import Quarantine, SetAside, read, read_texts, write_rows


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for shade, name in enumerate(["001.png", "1.jpg", "e.webp", "ff.jpeg"]):
        Image.new("RGB", (4, 4), (shade * 40, 0, 0)).save(images / name)
    write(tmp_path, "prompts.csv", 'imgId,prompt\n001,a cat\n1,"a dog, sitting"\ne,NA\nff,"two\nlines"\n')
    return tmp_path


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")


def taken(path, split="train", limit=1.0, **columns):
    """The rows of a source, and what was set aside."""
    batches = list(read(Source(path=str(path), **columns), split, limit))
    return [row for batch in batches for row in batch.rows], [row for batch in batches for row in batch.set_aside]


def reasons(aside):
    return {(row.id, row.reason) for row in aside}


def test_rows_in_the_order_of_prompts(folder):
    rows, aside = taken(folder)
    assert [row.id for row in rows] == ["001", "1", "e", "ff"]
    assert [row.prompt for row in rows] == ["a cat", "a dog, sitting", "NA", "two\nlines"]
    assert rows[0].image.endswith("images/001.png")
    assert aside == []


def test_bad_rows_are_set_aside_with_reason_and_fix(folder):
    (folder / "images/e.webp").write_bytes(b"broken")
    Image.new("RGB", (4, 4)).save(folder / "images/alone.png")
    write(folder, "prompts.csv", "imgId,prompt\n001,a cat\n001,again\n1,  \ne,x\ngone,y\nff,z\n")
    rows, aside = taken(folder)
    assert [row.id for row in rows] == ["001", "ff"]
    assert reasons(aside) == {
        ("001", "repeated id"), ("1", "empty prompt"), ("e", "unreadable image"),
        ("gone", "missing image"), ("alone", "no prompt"),
    }  # fmt: skip
    assert all(row.fix for row in aside)
    assert {row.id: row.row for row in aside} == {"001": 3, "1": 4, "e": 5, "gone": 6, "alone": 0}


def test_too_much_set_aside_is_an_error_that_names_the_first_ten(folder):
    lines = [f"x{number},a prompt" for number in range(12)]
    write(folder, "prompts.csv", "\n".join(["imgId,prompt", "001,a", "1,b", "e,c", "ff,d", *lines]) + "\n")
    with pytest.raises(ValueError, match=r"12 of 16 rows .*12 missing image.*max_quarantined \(0\.5\)") as error:
        taken(folder, limit=0.5)
    assert "row 15, id 'x9'" in str(error.value)
    assert "x10" not in str(error.value)
    assert len(taken(folder, limit=0.75)[0]) == 4


def test_nothing_usable_is_an_error_that_says_why(folder):
    write(folder, "prompts.csv", "imgId,prompt\n001,\n")
    with pytest.raises(ValueError, match=r"no row can be used\n  row 2, id '001': empty prompt"):
        taken(folder)


@pytest.mark.parametrize("prompt", ['""', "   ", "\t", "\x00\x07", "\u200b\u2028", "\xa0"])
def test_prompts_in_which_nothing_shows_are_empty(folder, prompt):
    write(folder, "prompts.csv", f"imgId,prompt\n001,{prompt}\n1,a\ne,b\nff,c\n")
    assert reasons(taken(folder)[1]) == {("001", "empty prompt")}


@pytest.mark.parametrize(
    "prompt", ["wörd " * 2000, "a\x07 bell", "قطة على سطح", "חתול", "猫", "NaN", "null", "0", "🐈"]
)
def test_odd_prompts_are_kept_as_they_are(folder, prompt):
    write(folder, "prompts.csv", f"imgId,prompt\n001,{prompt}\n")
    assert taken(folder)[0][0].prompt == prompt


@pytest.mark.parametrize("name", ["a b", "ünï", "猫", "1e5", "007", "a.b.c", "NA", "-1", "a#1+2", "a'b", "x" * 200])
def test_odd_ids_are_kept_as_they_are(folder, name):
    Image.new("RGB", (4, 4)).save(folder / f"images/{name}.png")
    write(folder, "prompts.csv", f"imgId,prompt\n{name},a cat\n")
    (row,), _ = taken(folder)
    assert row.id == name
    assert taken(folder, "test")[0][-1].id in {name, "ff"}


def test_an_id_with_a_comma_is_quoted_and_a_decomposed_file_name_found(folder):
    Image.new("RGB", (4, 4)).save(folder / "images/a, b.png")
    Image.new("RGB", (4, 4)).save(folder / "images/o\u0308l.png")
    write(folder, "prompts.csv", 'imgId,prompt\n"a, b",x\nöl,y\n')
    assert [row.id for row in taken(folder)[0]] == ["a, b", "öl"]


def test_ids_that_differ_as_text_are_two(folder):
    write(folder, "prompts.csv", "imgId,prompt\n1,one\n001,another\n")
    assert [(row.id, row.prompt) for row in taken(folder)[0]] == [("1", "one"), ("001", "another")]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "C:\\secret"])
def test_ids_that_leave_the_folder_are_set_aside(folder, name):
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    write(folder, "prompts.csv", f"imgId,prompt\n001,a cat\n{name},x\n")
    rows, aside = taken(folder)
    assert [row.id for row in rows] == ["001"]
    assert (name, "outside the folder") in reasons(aside)


def test_links_are_followed_within_the_source_only(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "images/out.png").symlink_to(outside)
    (folder / "images/in.png").symlink_to("001.png")
    (folder / "images/loop.png").symlink_to("loop.png")
    write(folder, "prompts.csv", "imgId,prompt\nout,a\nin,b\nloop,c\n")
    rows, aside = taken(folder)
    assert [row.id for row in rows] == ["in"]
    assert {("out", "outside the folder"), ("loop", "unreadable image")} <= reasons(aside)


def test_a_linked_folder_of_images_is_no_way_out(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk") / "images"
    (folder / "images").rename(elsewhere)
    (folder / "images").symlink_to(elsewhere)
    assert len(taken(folder)[0]) == 4


def test_what_is_no_regular_file_is_not_waited_for(folder):
    (folder / "images/001.png").unlink()
    os.mkfifo(folder / "images/001.png")
    (folder / "images/1.jpg").unlink()
    (folder / "images/1.jpg").mkdir()
    assert reasons(taken(folder)[1]) == {("001", "unreadable image"), ("1", "unreadable image")}


def test_a_second_image_of_a_name_is_listed(folder):
    Image.new("RGB", (4, 4)).save(folder / "images/001.webp")
    (folder / "images/001.txt").write_text("a caption")
    rows, aside = taken(folder)
    assert rows[0].image.endswith("001.png")
    assert reasons(aside) == {("001", "repeated id")}


def test_a_wrong_or_missing_extension_does_no_harm(folder):
    (folder / "images/1.jpg").rename(folder / "images/1.png")
    (folder / "images/ff.jpeg").rename(folder / "images/ff")
    (folder / "images/e.webp").rename(folder / "images/e.PNG")
    assert [row.id for row in taken(folder)[0]] == ["001", "1", "e", "ff"]


def test_bytes_that_are_no_utf8_cost_their_row(folder):
    (folder / "prompts.csv").write_bytes(b"imgId,prompt\n001,caf\xe9\n1,a dog\n")
    rows, aside = taken(folder)
    assert [row.id for row in rows] == ["1"]
    assert ("001", "not UTF-8") in reasons(aside)
    write(folder, "prompts.csv", "imgId,prompt\n001,a\n")
    odd = os.fsencode(folder) + b"/images/caf\xe9.png"
    try:
        with open(odd, "wb") as file:  # noqa: PTH123 - a Path cannot hold these bytes
            file.write((folder / "images/001.png").read_bytes())
    except OSError:
        pytest.skip("a file system of UTF-8 only")
    assert "no prompt" in {row.reason for row in taken(folder)[1]}


def test_kaggle_files_that_are_missing_are_named(folder, tmp_path):
    (folder / "images/sub").mkdir()
    (folder / "prompts.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompts\.csv"):
        taken(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        taken(tmp_path / "nowhere")


def test_sample_submission_gives_ids_and_order(folder):
    write(folder, "sample_submission.csv", "imgId_eId,val\nff_0,0\nff_1,0\n001_0,0\n001_1,0\n")
    assert [row.id for row in taken(folder, "test")[0]] == ["ff", "001"]
    write(folder, "sample_submission.csv", "imgId_eId,val\nff,0\n")
    with pytest.raises(ValueError, match=r"sample_submission\.csv: row 2: write ID_ELEMENT"):
        taken(folder, "test")


def test_test_prompts_are_optional(folder):
    (folder / "prompts.csv").unlink()
    rows, _ = taken(folder, "test")
    assert [row.id for row in rows] == ["001", "1", "e", "ff"]
    assert {row.prompt for row in rows} == {None}


def test_a_test_image_is_never_dropped_and_does_not_count_towards_the_limit(folder):
    (folder / "images/1.jpg").write_bytes(b"broken")
    write(folder, "sample_submission.csv", "imgId_eId,val\ngone_0,0\n1_0,0\nff_0,0\n../x_0,0\n")
    rows, aside = taken(folder, "test", limit=0.0)
    assert [(row.id, row.image is None) for row in rows] == [
        ("gone", True), ("1", True), ("ff", False), ("../x", True),
    ]  # fmt: skip
    assert reasons(aside) == {
        ("gone", "missing image"), ("1", "unreadable image"), ("../x", "outside the folder"),
    }  # fmt: skip
    assert rows[1].prompt == "a dog, sitting"


def test_bad_rows_of_test_prompts_are_listed(folder):
    write(folder, "prompts.csv", "imgId,prompt\n001,a\n001,b\n1,\n,x\ne\nelse,y\n")
    rows, aside = taken(folder, "test")
    assert [row.id for row in rows] == ["001", "1", "e", "ff", "else"]
    assert [row.prompt for row in rows] == ["a", None, None, None, "y"]
    assert {row.reason for row in aside} == {"repeated id", "empty id", "broken row", "missing image"}


def test_the_same_id_in_two_sources_is_two_rows(folder, tmp_path):
    written(tmp_path / "rows.parquet", [folder, folder])
    assert read_rows(tmp_path / "rows.parquet").id.tolist() == ["001", "1", "e", "ff"] * 2


def written(path, folders, split="train"):
    quarantine = Quarantine(path.with_suffix(".csv"))
    with write_rows(path, quarantine) as writer:
        for folder in folders:
            writer.add(read(Source(path=str(folder)), split))
    quarantine.close()
    return path.read_bytes()


def test_a_changed_image_changes_the_table(folder, tmp_path):
    path = tmp_path / "rows.parquet"
    before = written(path, [folder])
    assert written(path, [folder]) == before
    Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "images/001.png")
    assert written(path, [folder]) != before


def test_table_and_its_groups(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("img2prompt.sources.reading.GROUP", 3)
    path = tmp_path / "rows.parquet"
    write(folder, "prompts.csv", "imgId,prompt,fold\n001,a,2\n1,b,\ne,c,0\nff,d,x\n")
    (folder / "images/1.jpg").unlink()
    written(path, [folder, folder])
    assert pq.ParquetFile(path).num_row_groups == 2
    rows = read_rows(path)
    assert rows.id.tolist() == ["001", "e"] * 2
    assert rows.fold.tolist() == [2, 0, 2, 0]
    listed = pd.read_csv(path.with_suffix(".csv"), dtype=str)
    assert list(listed) == ["split", "source", "row", "id", "reason", "fix"]
    assert listed.reason.tolist() == ["missing image", "bad fold"] * 2
    (folder / "prompts.csv").unlink()
    written(path, [folder], "test")
    assert read_rows(path)[["prompt", "fold"]].isna().all(axis=None)


def test_the_quarantine_holds_any_id(tmp_path):
    quarantine = Quarantine(tmp_path / "quarantine.csv")
    quarantine.add([SetAside("train", "s", 3, 'a,"b\nc\udce9', "not UTF-8", "f")])
    quarantine.close()
    with (tmp_path / "quarantine.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["train", "s", "3", 'a,"b\nc\\udce9', "not UTF-8", "f"]
    assert quarantine.counts == {"not UTF-8": 1}


def test_texts_are_distinct(tmp_path):
    (tmp_path / "texts.txt").write_bytes("\ufeffa cat\r\n\r\na dog\na cat\n  قط \n".encode() + b"caf\xe9\n")
    batches = list(read_texts(Source(path=str(tmp_path / "texts.txt"))))
    rows = [row for batch in batches for row in batch.rows]
    assert [(row.id, row.prompt) for row in rows] == [("1", "a cat"), ("3", "a dog"), ("5", "قط")]
    aside = [row for batch in batches for row in batch.set_aside]
    assert [(row.row, row.reason) for row in aside] == [(6, "not UTF-8")]
    with pytest.raises(ValueError, match=r"max_quarantined"):
        list(read_texts(Source(path=str(tmp_path / "texts.txt")), 0.1))
    with pytest.raises(ValueError, match=r"prompts without images"):
        taken(tmp_path / "texts.txt", "test")


def test_every_reason_has_a_meaning_and_the_documents_list_them():
    document = (Path(__file__).parents[1] / "docs/data.md").read_text()
    for reason, meaning in REASONS.items():
        assert f"| {reason} | {meaning} |" in document
