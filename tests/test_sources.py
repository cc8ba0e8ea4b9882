import pandas as pd
import pytest
from PIL import Image

from img2prompt.sources import join, read_rows, read_test, read_train, write_rows


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


def reasons(rows):
    return {(row["id"], row["reason"]) for row in rows.set_aside}


def test_rows_in_the_order_of_prompts(folder):
    rows = read_train(folder)
    assert rows.table.id.tolist() == ["001", "1", "e", "ff"]
    assert rows.table.prompt.tolist() == ["a cat", "a dog, sitting", "NA", "two\nlines"]
    assert rows.table.picture[0].endswith("images/001.png")
    assert rows.set_aside == []


def test_bad_rows_are_set_aside_with_reason_and_fix(folder):
    (folder / "images/e.webp").write_bytes(b"broken")
    Image.new("RGB", (4, 4)).save(folder / "images/alone.png")
    write(folder, "prompts.csv", "imgId,prompt\n001,a cat\n001,again\n1,  \ne,x\ngone,y\nff,z\n")
    rows = read_train(folder)
    assert rows.table.id.tolist() == ["001", "ff"]
    assert reasons(rows) == {
        ("001", "repeated id"), ("1", "empty prompt"), ("e", "unreadable picture"),
        ("gone", "missing picture"), ("alone", "no prompt"),
    }  # fmt: skip
    assert all(row["fix"] for row in rows.set_aside)
    assert {row["id"]: row["row"] for row in rows.set_aside}["gone"] == 6


def test_a_misspelt_column_is_named_with_the_nearest(folder):
    write(folder, "prompts.csv", "imgId,promt\n001,a cat\n")
    with pytest.raises(ValueError, match=r"prompts.csv: no column 'prompt' .*rename 'promt'"):
        read_train(folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / "prompts.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"prompts\.csv"):
        read_train(folder)
    with pytest.raises(FileNotFoundError, match="images"):
        read_train(tmp_path / "nowhere")


def test_nothing_usable_is_an_error_that_says_why(folder):
    write(folder, "prompts.csv", "imgId,prompt\n001,\n")
    with pytest.raises(ValueError, match="001: empty prompt"):
        read_train(folder)


def test_sample_submission_gives_ids_and_order(folder):
    write(folder, "sample_submission.csv", "imgId_eId,val\nff_0,0\nff_1,0\n001_0,0\n001_1,0\n")
    assert read_test(folder).table.id.tolist() == ["ff", "001"]


def test_test_prompts_are_optional(folder):
    (folder / "prompts.csv").unlink()
    rows = read_test(folder)
    assert rows.table.id.tolist() == ["001", "1", "e", "ff"]
    assert rows.table.prompt.isna().all()


def test_a_test_picture_is_never_dropped(folder):
    (folder / "images/1.jpg").write_bytes(b"broken")
    write(folder, "sample_submission.csv", "imgId_eId,val\ngone_0,0\n1_0,0\nff_0,0\n")
    rows = read_test(folder)
    assert rows.table.id.tolist() == ["gone", "1", "ff"]
    assert rows.table.picture.isna().tolist() == [True, True, False]
    assert reasons(rows) == {("gone", "missing picture"), ("1", "unreadable picture")}


def test_sources_are_joined_and_keep_their_ids(folder):
    rows = join([read_train(folder), read_train(folder)])
    assert rows.table.id.tolist() == ["001", "1", "e", "ff"] * 2


def test_a_changed_picture_changes_the_table(folder, tmp_path):
    path = tmp_path / "rows.parquet"
    write_rows(path, read_train(folder))
    before = path.read_bytes()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "images/001.png")
    write_rows(path, read_train(folder))
    assert path.read_bytes() != before


def test_table_round_trip(folder, tmp_path):
    path = tmp_path / "rows.parquet"
    (folder / "prompts.csv").unlink()
    rows = read_test(folder)
    write_rows(path, rows)
    again = read_rows(path)
    pd.testing.assert_frame_equal(again, rows.table)
    assert again.prompt[0] is None
