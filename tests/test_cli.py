"""The commands on pictures: `predict`, `score` and `explain`."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from img2prompt import Predictor
from img2prompt.cli import predict
from img2prompt.cli.main import main
from img2prompt.core.images import FORMATS
from img2prompt.core.metric import bootstrap_interval, unit
from img2prompt.core.storage import grow
from img2prompt.predict.submission import read_submission, write_submission
from img2prompt.prompts.encoder import Encoder
from img2prompt.words.words import Said

rng = np.random.default_rng(0)


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with the last run in outputs/, not to be changed, and twelve images in PICTURES."""
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        Path(path.name).symlink_to(path)
    for place, image in enumerate(sorted((made / "input/train/images").iterdir())[:12]):
        folder = Path("pictures", *["more"] * (place > 6))
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{place:02d}.png")
    Path("pictures/notes.txt").write_text("no image")
    Path("empty").mkdir()
    return tmp_path


PICTURES = [f"pictures/{place:02d}.png" for place in range(7)] + [f"pictures/more/{n:02d}.png" for n in range(7, 12)]


class Parrot:
    """Stands for `Words`, and says what it heard."""

    def __call__(self, embeddings, top):
        assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
        return [
            Said(
                prompt=f'a "parrot", {value:.4f}',
                prompt_cosine=float(value),
                words=[("parrot", 0.75), ("bird", 0.5)][:top],
                nearest=[(f"parrot {place}", 1 - place / 8) for place in range(top)],
            )
            for value in embeddings[:, 0]
        ]


@pytest.fixture
def words(monkeypatch):
    monkeypatch.setattr(Predictor, "words", Parrot())


def run(*arguments):
    """The command's exit status."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    return 0


def given(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_images_are_named_in_many_ways_and_keep_their_order(here, monkeypatch, capfd):
    def listed(*paths):
        assert run("predict", *paths, "--no-words") == 0
        return capfd.readouterr().out.split()

    assert listed("pictures") == PICTURES
    assert listed("pictures/05.png", "pictures/more", "pictures/0[21].png", here / "pictures/00.png") == [
        "pictures/05.png", *PICTURES[7:], "pictures/01.png", "pictures/02.png", f"{here}/pictures/00.png",
    ]  # fmt: skip
    given(monkeypatch, "pictures/06.png\n\npictures/more/1*.png\n")
    assert listed("pictures/04.png", "-") == ["pictures/04.png", "pictures/06.png", *PICTURES[-2:]]
    Path("odd [1].png").write_bytes(Path(PICTURES[0]).read_bytes())
    assert listed("odd [1].png") == ["odd", "[1].png"]


def test_without_images_or_a_model_it_says_what_to_do(here, monkeypatch, capfd):
    for arguments in (["empty"], ["-"], []):
        given(monkeypatch, "\n")
        assert run("predict", *arguments) == 2
    assert run("predict", PICTURES[0], "--top", "0") == 2
    assert run("predict", PICTURES[0], "--bundle", "empty") == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: empty: the model cannot be loaded: ")
    Path("outputs").unlink()
    assert run("predict", PICTURES[0]) == 1
    assert "`dvc repro` trains a model" in capfd.readouterr().err


@pytest.fixture
def broken(here):
    """The places in PICTURES of two images that cannot be read."""
    Path(PICTURES[1]).write_bytes(b"broken")
    Path(PICTURES[8]).unlink()
    return [1, 8]


def test_words_and_embeddings_of_images_and_what_failed(here, words, broken, capfd):
    fine = [place for place in range(12) if place not in broken]
    expected = Predictor.load("outputs").predict([PICTURES[place] for place in fine]).embeddings
    assert run("predict", *PICTURES, "--top", 2, "--format", "jsonl", "--embeddings", "v.npy") == 3
    out, err = capfd.readouterr()
    assert err.splitlines()[-3:] == [
        "2 of 12 images failed:",
        f"  {PICTURES[1]}: UnidentifiedImageError: none of {', '.join(FORMATS)}",
        f"  {PICTURES[8]}: No such file or directory",
    ]
    vectors, lines = np.load("v.npy"), [json.loads(line) for line in out.splitlines()]
    assert vectors.dtype == np.float32
    assert np.isnan(vectors[broken]).all()
    np.testing.assert_allclose(vectors[fine], expected, atol=1e-5)
    assert [line["path"] for line in lines] == PICTURES
    assert lines[8] == {"path": PICTURES[8], "error": "No such file or directory"}
    value = float(vectors[0, 0])
    assert lines[0] == {
        "path": PICTURES[0],
        "prompt": f'a "parrot", {value:.4f}',
        "prompt_cosine": pytest.approx(value, abs=1e-6),
        "words": [{"word": "parrot", "probability": 0.75}, {"word": "bird", "probability": 0.5}],
        "nearest": [{"prompt": "parrot 0", "cosine": 1.0}, {"prompt": "parrot 1", "cosine": 0.875}],
    }
    assert run("predict", *PICTURES, "--output", "v.csv") == 3
    table = list(csv.DictReader(Path("v.csv").read_text().splitlines()))
    assert list(table[0]) == ["path", "prompt", "prompt_cosine", "error"]
    for row, line in zip(table, lines, strict=True):
        wanted = [line.get(name, "") for name in ("prompt", "prompt_cosine", "error")]
        assert [row["prompt"], row["prompt_cosine"], row["error"]] == list(map(str, wanted))
    assert run("predict", PICTURES[0], PICTURES[1]) == 3
    text = capfd.readouterr().out
    assert text.startswith(f'{PICTURES[0]}\n  prompt   a "parrot", {value:.4f}  ({value:.3f})\n  words    parrot 0.75,')
    assert text.endswith(f"\n\n{PICTURES[1]}: UnidentifiedImageError: none of {', '.join(FORMATS)}\n")


def test_the_words_of_a_run(here, capfd):
    prompts = set(pd.read_csv("input/train/prompts.csv").prompt)
    assert run("predict", *PICTURES[:3], "--format", "jsonl", "--top", 3) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["path"] for line in lines] == PICTURES[:3]
    for line in lines:
        assert len(line["nearest"]) == 3
        assert {one["prompt"] for one in line["nearest"]} <= prompts
        assert line["prompt_cosine"] >= line["nearest"][0]["cosine"] - 1e-6
    shutil.copytree("outputs", "bundle", ignore=shutil.ignore_patterns("words"))
    assert run("predict", PICTURES[0], "--bundle", "bundle", "--output", "v.csv") == 1
    assert "`dvc repro words` makes it" in capfd.readouterr().err
    assert run("predict", PICTURES[0], "--bundle", "bundle", "--output", "v.csv", "--no-words") == 0


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_run_goes_on_with_the_same_bytes(here, words, broken, monkeypatch, capfd, killed_after):
    monkeypatch.setattr(predict, "BATCH", 4)
    monkeypatch.setattr(predict, "grow", partial(grow, seconds=-1))
    assert run("predict", *PICTURES, "--output", "whole.jsonl", "--embeddings", "whole.npy") == 3
    stream, asked = Predictor.stream, []

    def killed(self, images, size):
        asked.append(list(images))
        for number, found in enumerate(stream(self, images, size)):
            if number == killed_after and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    command = ["predict", *PICTURES, "--output", "v.jsonl", "--embeddings", "v.npy"]
    monkeypatch.setattr(Predictor, "stream", killed)
    assert run(*command) == 130
    assert not Path("v.jsonl").exists()
    assert not Path("v.npy").exists()
    assert run(*command) == 3
    assert asked == [PICTURES, PICTURES[4 * killed_after :]]
    assert Path("v.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert Path("v.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert not Path("v.jsonl.partial").exists()
    # Once it is whole, it is not made again, and still says what failed.
    capfd.readouterr()
    assert run(*command) == 3
    assert len(asked) == 2
    error = capfd.readouterr().err
    assert "complete already; --overwrite starts anew\n2 of 12 images failed:" in error
    assert f"  {PICTURES[1]}: UnidentifiedImageError" in error


def test_files_of_others_are_not_written_over(here, words, capfd):
    command = ["predict", *PICTURES[:3], "--output", "v.jsonl", "--embeddings", "v.npy"]
    Path("v.npy").write_text("precious")
    assert run(*command) == run(*command[:4], *command[6:]) == 1
    assert "v.npy: is there" in capfd.readouterr().err
    assert Path("v.npy").read_text() == "precious"
    assert not Path("v.jsonl.run").exists()
    assert run(*command, "--overwrite") == 0
    before = Path("v.jsonl").read_bytes()

    def refused(*changed):
        assert run(*changed) == 1
        assert Path("v.jsonl").read_bytes() == before
        return capfd.readouterr().err.splitlines()[-1]

    assert refused(*command, "--top", 2) == "error: v.jsonl: made with another options; --overwrite starts anew"
    assert "another images;" in refused("predict", *PICTURES[:2], *command[4:])
    shutil.copytree("outputs", "bundle")
    constant = np.load("bundle/ensemble/constant.npy")
    np.save("bundle/ensemble/constant.npy", constant[::-1].copy())
    assert "another model;" in refused(*command, "--bundle", "bundle")
    os.utime(PICTURES[0], (0, 0))
    assert "another images;" in refused(*command)
    assert run(*command, "--top", 2, "--overwrite") == 0
    assert Path("v.jsonl").read_bytes() != before


def vectors(n):
    return unit(rng.normal(size=(n, 384))).astype(np.float32)


@pytest.fixture
def submission(tmp_path, monkeypatch):
    """submission.csv of three images, with the ids and vectors that are in it."""
    monkeypatch.chdir(tmp_path)
    ids, predicted = ["b", "a_1", "c,"], vectors(3)
    write_submission(Path("submission.csv"), ids, predicted)
    return ids, predicted


def test_a_score_is_the_mean_cosine_of_the_images_by_id(submission, capfd):
    ids, predicted = submission
    truth = rng.normal(size=(3, 384))
    pd.DataFrame(
        {
            "imgId_eId": [f"{ids[place]}_{element}" for place in (2, 0, 1) for element in range(384)],
            "val": (truth * [[5.0], [1e-3], [1e100]])[[2, 0, 1]].ravel(),
        }
    ).to_csv("truth.csv", index=False)
    by_hand = [p @ t / np.sqrt((p @ p) * (t @ t)) for p, t in zip(predicted.astype(np.float64), truth, strict=True)]
    assert run("score", "submission.csv", "truth.csv") == 0
    score, low, high = map(float, re.findall(r"-?\d+\.\d+", capfd.readouterr().out))
    assert score == pytest.approx(np.mean(by_hand), abs=1e-7)
    assert (low, high) == pytest.approx(bootstrap_interval(by_hand), abs=1e-5)


def test_a_truth_may_be_prompts(submission, capfd):
    ids, _ = submission
    prompts = {"c,": 'a "red" house', "b": "a river, oil on canvas", "a_1": "a cat"}
    found = vectors(3)
    found[1:] = Encoder("all-MiniLM-L6-v2", "cpu")([prompts[name] for name in ids[1:]])
    write_submission(Path("submission.csv"), ids, found)
    table = pd.DataFrame({"imgId": list(prompts), "prompt": list(prompts.values())})
    table.to_csv("prompts.csv", index=False)
    table.rename(columns={"imgId": "id"}).to_parquet("prompts.parquet")
    table.rename(columns={"imgId": "file_name"}).to_json("metadata.jsonl", orient="records", lines=True)
    scores = set()
    for truth in ("prompts.csv", "prompts.parquet", "metadata.jsonl"):
        assert run("score", "submission.csv", truth) == 0
        scores.add(capfd.readouterr().out)
    assert len(scores) == 1
    first = found[0] @ Encoder("all-MiniLM-L6-v2", "cpu")([prompts["b"]])[0]
    assert float(scores.pop().split()[0]) == pytest.approx((first + 2) / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("line", "lines", "message"),
    [
        (0, ["id,val"], "the header is ['id', 'val']"),
        (5, [], "row 5 is 'b_5' where 'b_4' belongs"),
        (385, [], "row 385 is 'a_1_1' where element 0 of another image belongs"),
        (5, ["b_4,1", "b_4,1"], "row 6 is 'b_4' where 'b_5' belongs"),
        (5, ["b_5,1"], "row 5 is 'b_5' where 'b_4' belongs"),
        (384, ["b_384,1"], "row 384 is 'b_384' where 'b_383' belongs"),
        (400, ["a_7_15,1"], "row 400 is 'a_7_15' where 'a_1_15' belongs"),
        (400, ["a_1_15,one"], "row 400 ('a_1_15') has 'one', no finite number"),
        (400, ["a_1_15,nan"], "row 400 ('a_1_15') has 'nan', no finite number"),
        (400, ["a_1_15,-inf"], "row 400 ('a_1_15') has '-inf', no finite number"),
        (400, ["a_1_15,"], "row 400 ('a_1_15') has '', no finite number"),
        (400, ["a_1_15,1,2"], "row 400 is 'a_1_15,1,2' where the name and the value of element 15 belong"),
        (400, ["garbage", "a_1_15,1"], "row 400 is 'garbage' where the name and the value of element 15 belong"),
        (400, ['"a_1_15,1'], "row 400 is 'a_1_15,1"),
        (1152, ['"c,_383"'], "row 1152 is '\"c,_383\"' where the name and the value of element 383 belong"),
        (1152, [], "ends after row 1151, where 'c,_383' belongs"),
        (1152, ['"c,_383",1', "d_0,1"], "ends after row 1153, where 'd_1' belongs"),
        (1152, ['"c,_383",1', *[f"b_{n},1" for n in range(384)]], "row 1153 is 'b_0' but 'b' has its vector from row"),
        (slice(385, 769), [f"a_1_{n},0" for n in range(384)], "rows 385 to 768, the vector of 'a_1', have norm 0"),
        (slice(1, None), [], "ends after row 0, where 'ID_0' belongs"),
        (slice(385, 769), [], "ends after row 768, and 1 of the 3 images of truth.csv are missing: 'a_1_0' belongs"),
        (slice(1, 385), [f"e_{n},1" for n in range(384)], "row 1 is of 'e', which truth.csv has not"),
    ],
)  # fmt: skip
def test_the_first_wrong_row_of_a_submission_is_named(submission, capfd, line, lines, message):
    shutil.copy("submission.csv", "truth.csv")
    text = Path("submission.csv").read_text().splitlines()
    text[line if isinstance(line, slice) else slice(line, line + 1)] = lines
    Path("submission.csv").write_text("\n".join(text) + "\n")
    assert run("score", "submission.csv", "truth.csv") == 1
    error = capfd.readouterr().err
    assert error.startswith("error: submission.csv: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imgId,prompt\nb,red\na_1\n", "row 3 (''): broken row"),
        ("imgId,prompt\nb,red\na_1, \n", "row 3 ('a_1'): no prompt"),
        ("imgId,prompt\nb,red\nb,blue\n", "row 3 ('b'): repeated id"),
        ("imgId,prompt\n,red\n", "row 2 (''): no id"),
        ("prompt\nred\n", "prompts without ids"),
        ("imgId,prompt\nb,red\na_1,blue\n", "row 769 is of 'c,', which truth.csv has not"),
    ],
)
def test_the_first_wrong_row_of_a_truth_is_named(submission, capfd, text, message):
    Path("truth.csv").write_text(text)
    assert run("score", "submission.csv", "truth.csv") == 1
    assert message in capfd.readouterr().err


def test_a_submission_of_many_blocks_is_read_as_it_was_written(tmp_path):
    ids, predicted = [f"image {n}" for n in range(500)], vectors(500)  # 4 MB: several of Arrow's blocks
    write_submission(tmp_path / "many.csv", ids, predicted)
    names, found = read_submission(tmp_path / "many.csv")
    assert names == ids
    np.testing.assert_array_equal(found.astype(np.float32), predicted)


def explained(capfd, *arguments):
    assert run("explain", *arguments) == 0
    return capfd.readouterr().out


def test_an_image_s_page_has_what_each_model_made_of_it(here, capfd):
    scores = pd.read_parquet("outputs/scores/cosines.parquet").set_index(["split", "id"])
    for split, name in (("train", "p007"), ("test", "p007")):
        page = explained(capfd, name, "--split", split, "--top", 1000)
        assert page.startswith(f"{split} image {name} of input/{split}")
        row = scores.loc[(split, name)]
        table = {line.split()[0]: line.split() for line in page.splitlines() if re.match(r"\w+ .* -?[\d.]{6}$", line)}
        for model in ("ensemble", "model_a", "linear", "ridge", "model_b", "constant"):
            assert table[model][-2] == f"{row[model]:.4f}"
        assert table["ensemble"][-1] == "1.0000"
        said = [line.split(None, 1) for line in page.splitlines()[-1002:] if line.startswith(("prompt ", "nearest "))]
        assert [name for name, _ in said] == ["prompt", "nearest"]
        # The shares of all neighbours by one kind of keys make 1, the nearest first.
        for part in page.split("\nmodel_b, ")[1:]:
            shares = [float(line.split()[1]) for line in part.splitlines() if line.startswith("  share")]
            assert sum(shares) == pytest.approx(1, abs=0.01)
            assert shares == sorted(shares, reverse=True)
    both = explained(capfd, "p007")
    assert "train image p007" in both
    assert "test image p007" in both


def test_what_explain_cannot_show_it_says(here, capfd):
    page = explained(capfd, "p003", "--split", "test")
    assert "cannot be read: every model answers with the constant" in page
    assert "share" not in page
    assert run("explain", "p0099") == 1
    assert re.search(r"error: no image 'p0099' in the last run; ids like it: p0\d9, ", capfd.readouterr().err)
    Path("outputs").unlink()
    assert run("explain", "p007") == 1
    assert "`dvc repro` makes it" in capfd.readouterr().err


def test_a_reader_may_have_seen_enough(here):
    command = [sys.executable, "-c", "from img2prompt.cli.main import main; main()", "score"]
    command += ["outputs/submission.csv", "outputs/prepare_test/test.parquet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"BrokenPipe" not in process.stderr.read()
    assert process.returncode == 1
