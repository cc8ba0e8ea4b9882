"""The door to machines: in this process, and on a Ray cluster of two small nodes on this machine."""

import ast
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from img2prompt.core import engine, process, shards
from img2prompt.core.engine import Piece, grown, run
from img2prompt.core.storage import digest
from img2prompt.sources import reading
from img2prompt.sources.params import Source

REPOSITORY = Path(__file__).resolve().parent.parent
BATCHES = [list(range(start, min(start + 3, 40))) for start in range(0, 40, 3)]


class Squares:
    """Results that note who made them, in a folder: a file for each process that loaded it, and one for each batch."""

    def __init__(self, notes, deadly=None, pause=0.0):
        self.notes, self.deadly, self.pause = notes, deadly, pause
        (notes / f"loaded-{time.monotonic_ns()}-{os.getpid()}").touch()

    def __reduce__(self):
        return Squares, (self.notes, self.deadly, self.pause)

    def __call__(self, left):
        for batch in left:
            time.sleep(self.pause)
            if batch[0] == self.deadly and not (self.notes / "died").exists():
                (self.notes / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            (self.notes / f"made-{batch[0]}-{time.monotonic_ns()}-{os.getpid()}").touch()
            rows = np.array(batch, np.float32)
            # Behind one another in memory are the values of a column, as a tower with channels last has its own.
            yield {"one": rows**2, "sub/two": np.stack([rows, -rows]).T.astype(np.float16)}


def noted(notes, what):
    return sorted(path.name.split("-")[1:] for path in notes.glob(f"{what}-*"))


def squares(folder, results, batches=BATCHES):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    found = grown(folder, batches, results, "squares", "row")
    assert not (folder / "shards").exists()
    return {name: path.read_bytes() for name, path in found.items()}


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture
def expected(tmp_path):
    (tmp_path / "aside").mkdir()
    return squares(tmp_path / "local", Squares(tmp_path / "aside"))


def write(what, path):
    path.write_text(what)


def refuse(path):
    raise OSError("no space")


def test_pieces_in_this_process(tmp_path):
    pieces = [Piece(name, partial(write, name), tmp_path / name) for name in "abc"]
    pieces[1].file.write_text("there already")
    assert list(run(pieces, "pieces")) == [digest(piece.file) for piece in pieces]
    assert [piece.file.read_text() for piece in pieces] == ["a", "there already", "c"]
    with pytest.raises(OSError, match="no space"):
        list(run([Piece("d", refuse, tmp_path / "d")], "pieces"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setenv("IMG2PROMPT_ENGINE", "spark")
    with pytest.raises(ValueError, match="IMG2PROMPT_ENGINE: 'spark' is no engine; choose from local, ray"):
        engine.engine()


def test_without_ray_its_engine_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("IMG2PROMPT_ENGINE", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"requirements-ray\.txt"):
        list(run([Piece("a", partial(write, "a"), tmp_path / "a")], "pieces"))


def test_nothing_else_imports_ray():
    for path in [*REPOSITORY.glob("src/**/*.py"), *REPOSITORY.glob("pipelines/*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert path.name == "engine.py" or "ray" not in names, path


def test_what_differs_between_machines_is_said():
    assert engine._differences({"numpy": "2.4"}, {"numpy": "2.4"}) == ""
    flags = {f"processor flag {n}": "yes" for n in range(7)}
    assert engine._differences({"numpy": "2.4"}, {"numpy": "2.3"}) == "numpy 2.3 and not 2.4"
    assert engine._differences(flags, {}).endswith("processor flag 4 missing and not yes and 2 more")


# --- on a cluster ---


@pytest.fixture(scope="module")
def bucket():
    """An empty bucket of an S3 server on this machine. The environment has what machines in a cloud know of theirs."""
    server = pytest.importorskip("moto.server", reason="moto is not installed: requirements-ray.txt")
    import s3fs

    started = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    started.start()
    host, port = started.get_host_and_port()
    names = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | dict.fromkeys(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), "none")).items():
            patch.setenv(f"AWS_{name}", value)
        files = s3fs.S3FileSystem(use_listings_cache=False)
        files.mkdir("bucket")
        yield files
    started.stop()


@pytest.fixture(scope="module")
def two_nodes(bucket):
    """A cluster of two nodes, each with the cores of one task."""
    pytest.importorskip("ray", reason="Ray is not installed: requirements-ray.txt")
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": process.threads(), "object_store_memory": 2**27}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else what runs beside the tests would hold them up
        started = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
        started.add_node(**node)
        yield started, node
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def cluster(two_nodes, monkeypatch):
    """The two nodes as the engine's; shards are of two or three batches."""
    monkeypatch.setenv("IMG2PROMPT_ENGINE", "ray")
    monkeypatch.setenv("RAY_ADDRESS", two_nodes[0].address)
    monkeypatch.setattr(engine, "ROWS", 8)
    return two_nodes


def test_shards_of_two_nodes_are_what_one_process_makes(cluster, tmp_path, notes, expected):
    assert squares(tmp_path / "ray", Squares(notes, pause=0.1)) == expected
    workers = {worker for *_, worker in noted(notes, "made")} - {str(os.getpid())}
    loaded = [worker for *_, worker in noted(notes, "loaded") if worker != str(os.getpid())]
    assert len(workers) >= 2
    assert sorted(loaded) == sorted(workers)  # each once, for whatever many shards


@pytest.mark.parametrize("where", ["elsewhere", "s3://bucket/of squares/"])
def test_shards_that_lie_elsewhere(cluster, bucket, tmp_path, notes, expected, monkeypatch, where):
    """Those that an interrupted run has left are not made again, and in the end there are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMG2PROMPT_SHARDS", where)
    folder, grow = shards.RESUME / "stage/digest", engine.grow

    def interrupted(folder, batches, results, saved):
        def some(left):
            yield from islice(results(left), 4)
            raise KeyboardInterrupt

        return grow(folder, batches, some, saved=saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "grow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            squares(folder, Squares(notes))
    assert not list(folder.rglob("*.safetensors"))
    there = len(list(Path("elsewhere").rglob("*.safetensors"))) + len(bucket.find("bucket"))
    before = len(noted(notes, "made"))
    assert squares(folder, Squares(notes)) == expected
    assert there >= 2
    assert len(noted(notes, "made")) < before + len(BATCHES)
    assert not list(Path("elsewhere").rglob("*.safetensors"))
    assert bucket.find("bucket") == []


def test_a_killed_worker_s_shard_is_made_again_and_no_other(cluster, tmp_path, notes, expected):
    assert squares(tmp_path / "ray", Squares(notes, deadly=21, pause=0.05)) == expected
    assert (notes / "died").exists()
    made = [int(first) for first, *_ in noted(notes, "made")]
    assert [first for first in set(made) if made.count(first) > 1] == [18]  # what its shard had before


def test_a_node_that_goes_takes_nothing_with_it(cluster, tmp_path, notes, expected):
    started, node = cluster
    third = started.add_node(**node)
    results, left = Squares(notes, pause=0.15), [third]

    def gone(folder, batches, results, saved):
        def watched(rest):
            for found in results(rest):
                if left:
                    started.remove_node(left.pop(), allow_graceful=False)
                yield found

        return grow(folder, batches, watched, saved=saved)

    grow = engine.grow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "grow", gone)
        assert squares(tmp_path / "ray", results) == expected
    assert not left


def test_what_fails_is_named_with_its_node(cluster, tmp_path):
    pieces = [Piece("a", partial(write, "a"), tmp_path / "a"), Piece("piece 7", refuse, tmp_path / "b")]
    with pytest.raises(ValueError, match=r"piece 7, on node \w{8} \(.+\): no space"):
        list(run(pieces, "pieces"))
    assert not list(tmp_path.glob("b*"))


def test_a_node_that_would_compute_other_bytes_is_refused_by_name(cluster, tmp_path, monkeypatch):
    about = engine._about(False)
    monkeypatch.setattr(engine, "_about", lambda gpu: about | {"torch": "0.1"})
    with pytest.raises(ValueError, match=rf"node \w{{8}} .* computes other bytes .*torch {about['torch']} and not 0.1"):
        list(run([Piece("a", partial(write, "a"), tmp_path / "a")], "pieces"))


def test_a_task_larger_than_every_node_is_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("IMG2PROMPT_THREADS", "999")
    with pytest.raises(ValueError, match="IMG2PROMPT_THREADS: a task wants 999 cores"):
        list(run([Piece("a", partial(write, "a"), tmp_path / "a")], "pieces"))


def test_who_asks_for_no_more_cancels_what_still_runs(cluster, tmp_path):
    pieces = [Piece(str(n), partial(sleep, 600 * (n > 0)), tmp_path / str(n)) for n in range(4)]
    found = run(pieces, "pieces")
    next(found)
    until(lambda: list(tmp_path.glob("pid-*")))
    pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    found.close()  # as an exception, such as Ctrl-C's, does
    until(lambda: not any(map(psutil.pid_exists, pids)))


def sleep(seconds, path):
    if seconds:
        (path.parent / f"pid-{os.getpid()}").touch()
    time.sleep(seconds)
    path.write_text("")


def until(reached, seconds=20):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


DRIVER = """
import sys
from pathlib import Path
from test_engine import BATCHES, Squares
from img2prompt.core import engine
engine.ROWS = 8
folder = Path(sys.argv[1])
engine.grown(folder, BATCHES, Squares(Path(sys.argv[2]), pause=0.25), "squares", "row")
"""


def test_a_killed_driver_s_work_goes_on(cluster, tmp_path, notes, expected):
    (tmp_path / "ray/sub").mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "ray"), str(notes)], env=environment, stderr=subprocess.DEVNULL
    )
    until(lambda: list((tmp_path / "ray/shards").glob("*.safetensors")), 60)
    driver.kill()
    driver.wait()
    before = len(noted(notes, "made"))
    assert squares(tmp_path / "ray", Squares(notes)) == expected
    made = [int(first) for first, *_ in noted(notes, "made")]
    assert set(made) == {batch[0] for batch in BATCHES}
    assert len(made) < before + len(BATCHES)  # some were not made again


def test_rows_are_read_as_in_one_process(cluster, tmp_path, monkeypatch):
    from conftest import write_competition

    folder = write_competition(tmp_path / "input", 70, seed=0)
    (folder / "images/p003.png").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "PIECE", reading.CHUNK)
    found = list(reading.read(Source(path="input"), "train"))
    monkeypatch.setenv("IMG2PROMPT_ENGINE", "local")
    assert found == list(reading.read(Source(path="input"), "train"))
    assert [len(batch.rows) for batch in found] == [63, 6]


@pytest.mark.parametrize("where", ["", "s3://bucket/chain"])
def test_the_whole_chain_is_the_local_one_byte_for_byte(cluster, bucket, made, tmp_path, monkeypatch, where):
    """Pictures in shards of 16, prompts for dedup in waves of 20, neighbours in blocks of 13 queries and 17 keys; the
    first fold's stage trains both folds.
    """
    from conftest import chain  # not above: workers import this file, and need not wait for what conftest imports

    by_ray, tasks, elsewhere = engine._by_ray, Counter(), set()

    def counted(pieces, *rest):
        pieces = list(pieces)
        tasks.update(piece.name.partition(",")[0] for piece in pieces)
        for sha in by_ray(pieces, *rest):
            elsewhere.update(file.split("/")[3] for file in bucket.find("bucket"))
            yield sha

    monkeypatch.setenv("IMG2PROMPT_SHARDS", where)
    monkeypatch.setattr(engine, "_by_ray", counted)
    monkeypatch.setattr("img2prompt.prompts.waves.WAVE", 20)
    monkeypatch.setattr("img2prompt.model_b.parts.QUERIES", 13)
    monkeypatch.setattr("img2prompt.model_b.parts.KEYS", 17)
    for name in ("input", "params.yaml"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    chain()
    files = [path.relative_to(made) for path in made.rglob("*") if path.is_file() and ".resume" not in path.parts]
    outputs = [path for path in files if path.parts[0] == "outputs" and path.name not in ("run.js", ".lock")]
    assert len(outputs) > 40
    assert [path for path in outputs if path.read_bytes() != (made / path).read_bytes()] == []
    assert not list(Path("outputs/.resume").rglob("*shards*"))
    assert bucket.find("bucket") == []
    assert set(tasks) == {
        "input/train", "input/test", "embedding prompts", "dedup", "CLIP on train images", "CLIP on test images",
        "CLIP on prompts", "fold 3", "fold 7", "Model A on clip 0", "Model B on clip 0",
        "text neighbours on clip 0", "image neighbours on clip 0",
    }  # fmt: skip
    assert tasks["CLIP on train images"] >= 4
    stages = {"reading", "embed_prompts", "dedup", "embed_images", "model_a", "knn_0", "embed_test", "predict"}
    assert elsewhere - {"freeze", "words"} == (stages if where else set())


def test_a_search_by_two_nodes_finds_the_same(cluster, copy, monkeypatch):
    from conftest import chain, change

    from img2prompt.cli.main import main

    tables = []
    for name in ("local", "ray"):
        monkeypatch.setenv("IMG2PROMPT_ENGINE", name)
        if not tables:
            change(folds={"ids": [3, 7, 9]})
            chain(["folds"])
        main(["search", "pull", "tta", "--folds", "3", "7", "--heads", "model_a"])
        tables.append(pd.read_csv("outputs/search.csv").drop(columns="seconds"))
        assert len(tables[0]) >= 4
    assert tables[0].equals(tables[1])
    assert not Path("outputs/.resume/search").exists()
