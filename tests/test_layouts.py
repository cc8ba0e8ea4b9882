"""Each layout that people have, whole and damaged."""

import io
import json
import re
import tarfile

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from img2prompt.core.images import open_image
from img2prompt.sources.layouts import recognise
from img2prompt.sources.params import Source
from img2prompt.sources.reading import read, read_texts


def image(shade=0, form="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, form)
    return file.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, str):
        data = data.encode()
    path.write_bytes(data)


def taken(path, split="train", **columns):
    batches = list(read(Source(path=str(path), **columns), split))
    return [row for batch in batches for row in batch.rows], [row for batch in batches for row in batch.set_aside]


def brief(rows):
    return [(row.id, row.prompt) for row in rows]


def why(aside):
    return [(row.row, row.id, row.reason) for row in aside]


# DiffusionDB


def part(folder, number, prompts, index=True):
    name = f"part-{number:06d}"
    for file in prompts:
        put(folder / name / file, image(form="WEBP"))
    values = {file: {"p": prompt, "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for file, prompt in prompts.items()}
    if index:
        put(folder / name / f"{name}.json", json.dumps(values))


def test_diffusiondb(tmp_path):
    part(tmp_path, 2, {"c.webp": "a tree"})
    part(tmp_path, 1, {"b.webp": "a cat", "a.webp": "a dog"})
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("part-000001/b", "a cat"), ("part-000001/a", "a dog"), ("part-000002/c", "a tree")]
    assert aside == []
    assert open_image(rows[0].image).size == (4, 4)
    assert brief(taken(tmp_path / "part-000002")[0]) == [("part-000002/c", "a tree")]
    (tmp_path / "large-part-1").mkdir()
    (tmp_path / "part-000001").rename(tmp_path / "large-part-1/part-000001")
    assert len(taken(tmp_path)[0]) == 3


def test_diffusiondb_with_damage(tmp_path):
    part(tmp_path, 1, {"a.png": "a dog", "b.png": "", "c.png": 5, "d.png": None, "../e.png": "out", "f.png": "x"})
    (tmp_path / "part-000001/f.png").unlink()
    put(tmp_path / "part-000001/new.png", image())
    index = tmp_path / "part-000001/part-000001.json"
    put(index, index.read_text()[:-1] + ', "a.png": {"p": "again"}, "g.png": 7, "h.png": []}')
    put(tmp_path / "part-000001/g.png", image())
    part(tmp_path, 2, {"a.png": "lost"})
    put(tmp_path / "part-000002/part-000002.json", '{"a.png": {"p": "lo')
    part(tmp_path, 3, {"a.png": "no index"}, index=False)
    part(tmp_path, 4, {"a.png": "a ship"})
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("part-000001/a", "a dog"), ("part-000004/a", "a ship")]
    assert why(aside) == [
        (2, "part-000001/b", "empty prompt"),
        (3, "part-000001/c", "broken row"),
        (4, "part-000001/d", "empty prompt"),
        (5, "part-000001/../e", "outside the folder"),
        (6, "part-000001/f", "missing image"),
        (7, "part-000001/a", "repeated id"),
        (8, "part-000001/g", "broken row"),
        (9, "part-000001/h", "broken row"),
        (0, "part-000001/new", "no prompt"),
        (0, "part-000002", "broken file"),
        (0, "part-000003", "broken file"),
    ]


def metadata(folder, rows):
    table = pd.DataFrame(rows, columns=["image_name", "prompt", "part_id"])
    table["seed"] = 1
    table.to_parquet(folder / "metadata.parquet", row_group_size=2)


def test_diffusiondb_parts_without_index_are_read_from_the_metadata(tmp_path):
    part(tmp_path, 1, {"a.png": "from json"})
    part(tmp_path, 12, {"b.png": "", "c.png": ""}, index=False)
    metadata(tmp_path, [("b.png", "from table", 12), ("x.png", "of another part", 3), ("a.png", "unused", 1)])
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("part-000001/a", "from json"), ("part-000012/b", "from table")]
    assert why(aside) == [(0, "part-000012/c", "no prompt")]


def test_diffusiondb_metadata_alone_is_prompts(tmp_path):
    metadata(tmp_path, [("b.png", "a cat", 12), ("x.png", "a dog", 3), ("a.png", "a cat", 1)])
    for path in (tmp_path, tmp_path / "metadata.parquet"):
        rows = [row for batch in read_texts(Source(path=str(path))) for row in batch.rows]
        assert brief(rows) == [("1", "a cat"), ("2", "a dog")]


# Hugging Face's imagefolder


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("caption", ["text", "caption", "prompt"])
def test_imagefolder(tmp_path, form, caption):
    table = pd.DataFrame(
        {"file_name": ["sub/001.png", "002.jpg"], "extra": [1, 2], caption: ["a cat, sitting", "ein Bär"]}
    )
    put(tmp_path / "sub/001.png", image())
    put(tmp_path / "002.jpg", image(form="JPEG"))
    path = tmp_path / f"metadata.{form}"
    write = {"csv": table.to_csv, "parquet": table.to_parquet}.get(form)
    if write:
        write(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("sub/001", "a cat, sitting"), ("002", "ein Bär")]
    assert aside == []


def test_json_lines_with_damage(tmp_path):
    put(tmp_path / "1.png", image())
    put(tmp_path / "8.png", image())
    lines = ['{"file_name": "1.png", "text": "a"}', "", '{"file_name": "2.png", "te', "[1]", '{"file_name": "1.png"}',
             '{"text": "b"}', '{"file_name": "3.png", "text": ["b", "c"]}', '{"file_name": "/etc/x.png", "text": "b"}',
             '{"file_name": "a\\u0000.png", "text": "b"}', '{"file_name": "8.png", "text": "\\ud800"}',
             '{"file_name": "' + "y" * 300 + '.png", "text": "c"}']  # fmt: skip
    put(tmp_path / "metadata.jsonl", "\n".join(lines))
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("1", "a")]
    assert [(row.row, row.reason) for row in aside] == [
        (3, "broken row"), (4, "broken row"), (5, "repeated id"), (6, "empty id"), (7, "broken row"),
        (8, "outside the folder"), (9, "missing image"), (10, "not UTF-8"), (11, "unreadable image"),
    ]  # fmt: skip


def test_null_cells(tmp_path):
    put(tmp_path / "1.png", image())
    table = pd.DataFrame({"file_name": ["1.png", None], "text": [np.nan, "b"], "fold": [1.0, np.nan]})
    table.to_parquet(tmp_path / "metadata.parquet")
    with pytest.raises(ValueError, match=r"row 1, id '1': empty prompt.*\n.*row 2, id '': empty id"):
        taken(tmp_path)


# A table of one's own


def test_a_table_with_folds(tmp_path):
    for number in range(3):
        put(tmp_path / f"pics/{number}.png", image())
    put(tmp_path / "mine.tsv", "image\tprompt\tfold\npics/0.png\ta\t4\npics/1.png\tb, c\t0\npics/2.png\td\t\n")
    rows, _ = taken(tmp_path / "mine.tsv")
    assert [(row.id, row.prompt, row.fold) for row in rows] == [
        ("pics/0", "a", 4), ("pics/1", "b, c", 0), ("pics/2", "d", None),
    ]  # fmt: skip
    assert {row.fold for row in taken(tmp_path / "mine.tsv", "test")[0]} == {None}


def test_named_columns(tmp_path):
    put(tmp_path / "1.png", image())
    put(tmp_path / "mine.csv", "prompt;which;what;part\nno;1.png;a cat;3\n")
    (row,), _ = taken(tmp_path / "mine.csv", image="which", prompt="what", fold="part")
    assert (row.id, row.prompt, row.fold) == ("1", "a cat", 3)
    with pytest.raises(ValueError, match=r"no column 'wich' .*rename 'which'"):
        taken(tmp_path / "mine.csv", image="wich")
    part(tmp_path / "db", 1, {"a.png": "x"})
    with pytest.raises(ValueError, match=r"diffusiondb has no such columns: leave out image, fold"):
        taken(tmp_path / "db", image="which", fold="part")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("imgae,prompt", r"no column 'image' .*rename 'imgae'"),
        ("image,promt", r"no column 'prompt' .*rename 'promt'"),
        ("image,words", r"no column 'prompt' .*say which it is: \{path: .*, prompt: COLUMN\}"),
        ("", "it is empty"),
    ],
)
def test_columns_that_are_not_there(tmp_path, header, message):
    put(tmp_path / "mine.csv", f"{header}\n1.png,a\n" if header else "")
    with pytest.raises(ValueError, match=rf"mine\.csv: .*{message}"):
        taken(tmp_path / "mine.csv")


@pytest.mark.parametrize("damage", [
    lambda text: b"\xef\xbb\xbf" + text,
    lambda text: text.replace(b"\n", b"\r\n"),
    lambda text: text.replace(b",", b";").replace(b"; sitting", b", sitting"),
    lambda text: text.replace(b",", b"\t").replace(b"\t sitting", b", sitting"),
    lambda text: text.rstrip(b"\n"),
    lambda text: text.replace(b"\n", b"\n\n"),
    lambda text: text.replace(b"image,prompt", b" image , prompt "),
])  # fmt: skip
def test_spellings_of_csv(tmp_path, damage):
    put(tmp_path / "1.png", image())
    put(tmp_path / "2.png", image())
    put(tmp_path / "mine.csv", damage(b'image,prompt\n1.png,"a ""dog"", sitting"\n2.png,a cat\n'))
    assert brief(taken(tmp_path / "mine.csv")[0]) == [("1", 'a "dog", sitting'), ("2", "a cat")]


def test_broken_rows_of_csv_cost_themselves_only(tmp_path):
    for number in range(1, 9):
        put(tmp_path / f"{number}.png", image())
    lines = ["image,prompt", '1.png,"over', 'two lines"', '2.png,"never closed', "3.png,c", '4.png,"d"', "5.png,e, f",
             "6.png", '7.png,"g" h', '8.png,5" nail']  # fmt: skip
    put(tmp_path / "mine.csv", "\n".join(lines) + "\n")
    rows, aside = taken(tmp_path / "mine.csv")
    assert brief(rows) == [("1", "over\ntwo lines"), ("3", "c"), ("4", "d"), ("8", '5" nail')]
    assert [(row.row, row.reason) for row in aside] == [(3, "broken row"), (6, "broken row"), (7, "broken row"),
                                                        (8, "broken row")]  # fmt: skip
    put(tmp_path / "mine.csv", 'image,prompt\n1.png,a\n2.png,"open\n' + "3.png,c\n" * 30_000)
    rows, aside = taken(tmp_path / "mine.csv")
    assert brief(rows) == [("1", "a"), ("3", "c")]
    assert (aside[0].row, aside[0].reason, len(aside)) == (3, "broken row", 30_000)


def test_utf16_and_what_is_no_parquet_are_refused(tmp_path):
    put(tmp_path / "mine.csv", "image,prompt\n1.png,a\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"mine\.csv: it is in UTF-16; save it as UTF-8"):
        taken(tmp_path / "mine.csv")
    for data in (b"", b"PAR1 no"):
        put(tmp_path / "mine.parquet", data)
        with pytest.raises(ValueError, match=r"mine\.parquet: no parquet file"):
            taken(tmp_path / "mine.parquet")
    put(tmp_path / "1.png", image())
    prompts = [f"prompt {number}" for number in range(20_000)]
    pd.DataFrame({"image": "1.png", "prompt": prompts}).to_parquet(tmp_path / "mine.parquet")
    data = bytearray((tmp_path / "mine.parquet").read_bytes())
    data[4:20_000] = b"x" * 19_996
    put(tmp_path / "mine.parquet", bytes(data))
    with pytest.raises(ValueError, match=r"mine\.parquet: broken after row"):
        taken(tmp_path / "mine.parquet")


def test_images_inside_parquet_are_refused_with_their_type(tmp_path):
    pd.DataFrame({"image": [{"bytes": b"x", "path": "a"}], "text": ["a"]}).to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match=r"column 'image' holds struct.*must hold text"):
        taken(tmp_path / "mine.parquet")


def test_a_table_to_predict_needs_no_prompts(tmp_path):
    put(tmp_path / "1.png", image())
    put(tmp_path / "mine.csv", "image\n1.png\n2.png\n")
    rows, aside = taken(tmp_path / "mine.csv", "test")
    assert [(row.id, row.prompt, row.image is None) for row in rows] == [("1", None, False), ("2", None, True)]
    assert why(aside) == [(3, "2", "missing image")]


# img2dataset


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def statuses(path, rows):
    pd.DataFrame(rows, columns=["key", "caption", "status", "error_message"]).to_parquet(path)


def test_webdataset(tmp_path):
    shard(tmp_path / "00000.tar", {
        "000000000.jpg": image(10, "PNG"), "000000000.txt": "a cat", "000000000.json": '{"caption": "other"}',
        "000000001.json": '{"caption": "a dog", "key": "1"}', "000000001.webp": image(20),
    })  # fmt: skip
    shard(tmp_path / "00001.tar", {"000010000.jpg": image(30), "000010000.txt": "قط"})
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("00000/000000000", "a cat"), ("00000/000000001", "a dog"), ("00001/000010000", "قط")]
    assert [np.asarray(open_image(row.image))[0, 0, 0] for row in rows] == [10, 20, 30]
    assert aside == []
    assert brief(taken(tmp_path / "00001.tar")[0]) == [("00001/000010000", "قط")]


def test_webdataset_with_damage(tmp_path):
    shard(tmp_path / "00000.tar", {
        "0.jpg": b"broken", "0.txt": "a", "1.txt": "no image", "2.jpg": image(), "2.json": "{",
        "3.jpg": image(), "3.txt": "good", "4.jpg": image(), "4.txt": b"caf\xe9",
    })  # fmt: skip
    statuses(tmp_path / "00000.parquet", [("3", "x", "success", None), ("9", "x", "failed_to_download", "404")])
    shard(tmp_path / "00001.tar", {"5.jpg": image(), "5.txt": "kept", "6.jpg": image(), "6.txt": "lost" * 5000})
    data = (tmp_path / "00001.tar").read_bytes()
    put(tmp_path / "00001.tar", data[:4096])
    put(tmp_path / "00002.tar", b"")
    put(tmp_path / "00003.tar", b"no tar at all" * 100)
    shard(tmp_path / "00004.tar", {"7.jpg": image(), "7.txt": "last"})
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("00000/3", "good"), ("00001/5", "kept"), ("00004/7", "last")]
    assert [(row.id, row.reason) for row in aside] == [
        ("00000/0", "unreadable image"), ("00000/1", "missing image"), ("00000/2", "empty prompt"),
        ("00000/4", "not UTF-8"), ("00000/9", "not downloaded"), ("00001", "broken file"),
        ("00002", "broken file"), ("00003", "broken file"),
    ]  # fmt: skip


def test_img2dataset_files(tmp_path):
    for number in range(4):
        put(tmp_path / f"00000/{number}.jpg", image(number))
    put(tmp_path / "00000/3.txt", "not in the table")
    put(tmp_path / "00000/0.txt", "not read")
    statuses(tmp_path / "00000.parquet", [
        ("0", "a cat", "success", None), ("1", "", "success", None), ("2", "a dog", "success", None),
        ("4", "gone", "success", None), ("5", "never", "failed_to_download", "timeout"),
    ])  # fmt: skip
    put(tmp_path / "00001/7.jpg", image())
    put(tmp_path / "00001/7.json", '{"caption": "from json"}')
    statuses(tmp_path / "00002.parquet", [("8", "x", "failed_to_download", "404")])
    rows, aside = taken(tmp_path)
    assert brief(rows) == [("00000/0", "a cat"), ("00000/2", "a dog"), ("00000/3", "not in the table"),
                           ("00001/7", "from json")]  # fmt: skip
    assert [(row.id, row.reason) for row in aside] == [
        ("00000/1", "empty prompt"), ("00000/4", "missing image"), ("00000/5", "not downloaded"),
        ("00002/8", "not downloaded"),
    ]  # fmt: skip


def test_failed_downloads_do_not_count_towards_the_limit(tmp_path):
    put(tmp_path / "00000/0.jpg", image())
    statuses(tmp_path / "00000.parquet", [("0", "a cat", "success", None), ("1", "b", "failed_to_download", "404")])
    assert sum(len(batch.rows) for batch in read(Source(path=str(tmp_path)), "train", 0.0)) == 1


# What is none of these


def test_a_folder_of_another_kind_is_told_what_could_be(tmp_path):
    put(tmp_path / "train/a.png", image())
    with pytest.raises(ValueError, match=r"in none of the layouts: images/ with prompts\.csv.*holds \['train'\]"):
        taken(tmp_path)
    put(tmp_path / "mine.xlsx", b"x")
    with pytest.raises(ValueError, match=re.escape("neither a folder nor .csv")):
        taken(tmp_path / "mine.xlsx")


def test_tables_are_counted_for_progress(tmp_path):
    put(tmp_path / "mine.csv", "image,prompt\n1.png,a\n2.png,b\n")
    assert recognise(Source(path=str(tmp_path / "mine.csv")), "train").count() == 3
    metadata(tmp_path, [("b.png", "a cat", 12)] * 5)
    assert recognise(Source(path=str(tmp_path / "metadata.parquet")), "train").count() == 5
    assert pq.ParquetFile(tmp_path / "metadata.parquet").num_row_groups == 3
