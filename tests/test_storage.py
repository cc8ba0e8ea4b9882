import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from img2prompt.core import shards
from img2prompt.core.storage import digest, grow, resume_folder, whole, whole_folder, write_json


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


def arrays(calls, left):
    for batch in left:
        calls.append(list(batch))
        yield {
            "a": np.array(batch, np.float32)[:, None] * [1.0, 2.0],
            "b": np.array(batch, np.float16),
            "text": "".join(f"{n}: {'x' * n}\n" for n in batch if n > 2).encode(),
        }


@pytest.mark.parametrize("killed_after", range(5))
def test_arrays_grow_on_after_a_kill(tmp_path, killed_after):
    batches = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    whole_run = grow(tmp_path / "whole", batches, lambda left: arrays([], left))
    assert np.load(whole_run["a"]).tolist() == [[n, 2 * n] for n in range(10)]
    assert whole_run["text"].read_text() == "".join(f"{n}: {'x' * n}\n" for n in range(3, 10))
    calls = []

    def killed(left):
        for number, result in enumerate(arrays(calls, left)):
            if number == killed_after:
                raise KeyboardInterrupt
            yield result

    if killed_after < 4:
        with pytest.raises(KeyboardInterrupt):
            grow(tmp_path / "again", batches, killed, seconds=-1)
        for file in [*(tmp_path / "again").glob("*.npy"), *(tmp_path / "again").glob("text")]:
            with file.open("ab") as open_file:
                open_file.write(b"half a batch")
    else:
        grow(tmp_path / "again", batches, killed, seconds=-1)
    calls.clear()
    files = grow(tmp_path / "again", batches, lambda left: arrays(calls, left))
    assert calls == batches[killed_after:]
    assert {name: file.read_bytes() for name, file in files.items()} == {
        name: file.read_bytes() for name, file in whole_run.items()
    }


def test_what_was_taken_away_is_computed_again(tmp_path):
    batches = [[0, 1], [2]]
    files = grow(tmp_path, batches, lambda left: arrays([], left))
    files["b"].unlink()
    calls = []
    grow(tmp_path, batches, lambda left: arrays(calls, left))
    assert calls == batches
    assert np.load(files["b"]).tolist() == [0, 1, 2]


def test_resume_folders_of_other_inputs_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("img2prompt.core.storage.RESUME", tmp_path)
    first = resume_folder("stage", "a")
    (first / "file").write_text("x")
    assert resume_folder("stage", "a") == first
    assert (first / "file").exists()
    resume_folder("other", "a")
    resume_folder("stage", "b")
    assert not first.exists()
    assert (tmp_path / "other").exists()


def test_shards_of_other_inputs_are_removed_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMG2PROMPT_SHARDS", "elsewhere")
    first = resume_folder("stage", "a") / "shard"
    with whole(shards.folder(first)) as path:
        path.write_text("x")
    resume_folder("stage", "a")
    resume_folder("other", "a")
    assert shards.there(first)
    assert not first.exists()
    resume_folder("stage", "b")
    assert not shards.there(first)


def test_a_file_system_that_is_not_installed_is_said(monkeypatch):
    def missing(url, **_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    monkeypatch.setenv("IMG2PROMPT_SHARDS", "s3://bucket/never made")
    with pytest.raises(ValueError, match=r"IMG2PROMPT_SHARDS: Install s3fs .* requirements-ray\.txt"):
        shards.there(shards.RESUME / "stage/shard")


def test_copies_of_a_project_share_no_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("IMG2PROMPT_SHARDS", str(tmp_path / "elsewhere"))
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.append(shards.folder(shards.RESUME / "stage/shard"))
    assert found[0] != found[1]
    assert all(path.is_relative_to(tmp_path / "elsewhere") for path in found)


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from img2prompt.core.storage import grow, whole_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    if sys.argv[1] == "whole":
        with whole_folder(Path("stage")) as out:
            (out / "small").write_bytes(b"x" * 10)
            (out / "large").write_bytes(b"x" * 200_000)
    else:
        grow(Path("grown"), [range(10)] * 100, lambda left: ({"a": np.zeros((10, 50))} for _ in left), seconds=-1)
except OSError as error:
    sys.exit(f"error: {error}")
"""


def test_a_full_disk_leaves_no_half_output(tmp_path):
    (tmp_path / "full.py").write_text(FULL)
    source = Path(__file__).resolve().parent.parent / "src"
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/former").write_text("former")
    for what in ("whole", "grow"):
        done = subprocess.run(
            [sys.executable, "full.py", what],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(source)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1
        assert "error: [Errno 27]" in done.stderr
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["former"]
    assert not (tmp_path / "stage.partial").exists()
    # With space again, what had grown goes on.
    files = grow(tmp_path / "grown", [range(10)] * 100, lambda left: ({"a": np.zeros((10, 50))} for _ in left))
    assert np.load(files["a"]).shape == (1000, 50)


def test_interruption_removes_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as path:
        (path / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
