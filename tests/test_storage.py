import numpy as np
import pytest

from img2prompt.storage import digest, whole, whole_folder, write_json


def test_file_appears_only_when_whole(tmp_path):
    target = tmp_path / "a.txt"
    with whole(target) as path:
        path.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"


def test_interruption_leaves_the_former_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole(target) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"


def test_folder_is_replaced_as_one(tmp_path):
    target = tmp_path / "stage"
    for names in (["a", "b"], ["c"]):
        with whole_folder(target) as folder:
            for name in names:
                (folder / name).write_text(name)
    assert [path.name for path in target.iterdir()] == ["c"]


def test_leftovers_of_a_killed_run_do_not_get_in(tmp_path):
    target = tmp_path / "stage"
    leftover = tmp_path / "stage.partial"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with whole_folder(target) as folder:
        (folder / "a").write_text("a")
    assert [path.name for path in target.iterdir()] == ["a"]


def test_digest_tells_content_apart(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    before = digest(path)
    path.write_bytes(b"abd")
    assert digest(path) != before
    row = np.zeros(4, np.float32)
    assert len({digest(row), digest(row.reshape(2, 2)), digest(row.astype(np.float64)), digest(row.tobytes())}) == 4
    assert digest("ab", "c") != digest("a", "bc")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
