from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.core.metric import unit
from img2prompt.predict import submission
from img2prompt.predict.submission import check_submission, write_submission

PATH = Path("submission.csv")
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def vectors(n, dim=384):
    return unit(rng.normal(size=(n, dim))).astype(np.float32)


def read(dim):
    frame = pd.read_csv(PATH, dtype={"val": np.float32, "imgId_eId": str})
    assert frame.columns.tolist() == ["imgId_eId", "val"]
    return frame["imgId_eId"].tolist(), frame["val"].to_numpy().reshape(-1, dim)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_rows_are_the_ids_in_order_and_values_come_back_bit_for_bit(monkeypatch, threads):
    monkeypatch.setenv("IMG2PROMPT_THREADS", threads)
    monkeypatch.setattr(submission, "CHUNK", 1)  # more chunks than may wait at a time
    ids, predictions = list("gacbfed"), vectors(7)
    write_submission(PATH, ids, predictions)
    names, values = read(384)
    assert names == [f"{name}_{i}" for name in ids for i in range(384)]
    assert values.tobytes() == predictions.tobytes()
    check_submission(PATH, ids)


def test_the_file_by_hand():
    write_submission(PATH, ["b", "a"], np.array([[0.6, -0.8], [1, 1e-7]]))
    assert PATH.read_bytes() == b"imgId_eId,val\nb_0,0.6\nb_1,-0.8\na_0,1\na_1,1e-7\n"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3))
def test_any_float32_survives(small):
    predictions = np.array([[1, *(np.float32(1e-5) * np.array(small, np.float32))]], dtype=np.float32)
    write_submission(PATH, ["x"], predictions)
    assert read(4)[1].tobytes() == predictions.tobytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.sampled_from('a,"é \n\r;_0'), min_size=1), min_size=1, max_size=4, unique=True))
def test_any_id_survives(ids):
    predictions = vectors(len(ids), 2)
    write_submission(PATH, ids, predictions)
    check_submission(PATH, ids, dim=2)
    assert read(2)[0] == [f"{name}_{i}" for name in ids for i in range(2)]


def test_only_ids_that_need_it_are_quoted():
    write_submission(PATH, ["a b"], vectors(1, 2))
    assert '"' not in PATH.read_text()
    write_submission(PATH, ['a,"b'], vectors(1, 2))
    assert PATH.read_text().splitlines()[1].startswith('"a,""b_0",')


def test_a_refused_submission_leaves_the_former_one():
    write_submission(PATH, ["a"], vectors(1))
    before = PATH.read_bytes()
    with pytest.raises(ValueError, match="'b'"):
        write_submission(PATH, ["a", "b"], vectors(2) * np.array([[1], [2]]))
    assert PATH.read_bytes() == before


@pytest.mark.parametrize(
    ("ids", "predictions", "message"),
    [
        (["a", "b", "a"], vectors(3), "'a' is given twice"),
        (["a", "b"], vectors(3), "2 ids for predictions"),
        (["a"], vectors(1) * 1.001, "'a' has norm 1.001"),
        (["a"], vectors(1) * np.nan, "'a' has norm nan"),
    ],
)
def test_what_is_not_written(ids, predictions, message):
    with pytest.raises(ValueError, match=message):
        write_submission(PATH, ids, predictions)
    assert not PATH.exists()


GOOD = ["imgId_eId,val", "a_0,0.6", "a_1,0.8", "b_0,1", "b_1,0"]


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (0, "id,val", "header is"),
        (1, "b_0,0.6", "row 1 is 'b_0' where 'a_0' belongs"),
        (2, "a_2,0.8", "row 2 is 'a_2' where 'a_1' belongs"),
        (3, "b_0,nan", r"row 3 \('b_0'\) has 'nan', no finite number"),
        (3, "b_0,1e99", "row 3 "),
        (3, "b_0,", r"row 3 \('b_0'\) has ''"),
        (4, "b_1,zero", r"row 4 \('b_1'\) has 'zero'"),
        (4, "b_1", "row 4 is 'b_1' where the name and the value of element 1 belong"),
        (4, "b_1,0.1", "'b' has norm 1.00"),
        (2, "a_1,0.9", "'a' has norm 1.08"),
    ],
)
def test_what_a_check_refuses(line, text, message):
    PATH.write_text("\n".join([*GOOD[:line], text, *GOOD[line + 1 :]]) + "\n")
    with pytest.raises(ValueError, match=message) as refusal:
        check_submission(PATH, ["a", "b"], dim=2)
    assert str(PATH) in str(refusal.value)


def test_a_check_counts_rows():
    PATH.write_text("\n".join(GOOD) + "\n")
    check_submission(PATH, ["a", "b"], dim=2)
    with pytest.raises(ValueError, match="ends after row 4 of 3 x 2"):
        check_submission(PATH, ["a", "b", "c"], dim=2)
    with pytest.raises(ValueError, match="more rows than 1 ids x 2"):
        check_submission(PATH, ["a"], dim=2)
    PATH.write_text("")
    with pytest.raises(ValueError, match="Empty CSV"):
        check_submission(PATH, ["a"], dim=2)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_a_check_streams_over_many_blocks(monkeypatch, threads):
    monkeypatch.setenv("IMG2PROMPT_THREADS", threads)
    ids, predictions = [f"image {i}" for i in range(500)], vectors(500)  # 4 MB: several of Arrow's blocks
    write_submission(PATH, ids, predictions)
    check_submission(PATH, ids)
    ids[498], ids[499] = ids[499], ids[498]
    with pytest.raises(ValueError, match="row 191233 is 'image 498_0' where 'image 499_0' belongs"):
        check_submission(PATH, ids)
