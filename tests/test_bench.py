"""The benchmarks' harness, and that the stages' own code and what it is held against do the same thing."""

import contextlib
import importlib
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from bench import harness
from bench.harness import FP32, Limits, Task, Work, measure
from bench.run import STAGES, Runs, arithmetic, draw, lines, machine, merged, run, table
from img2prompt.core import device


@pytest.fixture
def stage(monkeypatch):
    """A stage `made` with one task, where a variant says whether it found bfloat16 and another one cannot run."""

    def make(folder, rows):
        (folder / "rows").write_text(str(rows))
        return Work(operations=1e9 * rows)

    def load(folder, rows):
        return (min(rows, int((folder / "rows").read_text())),)

    def ours(rows):
        time.sleep(0.001 * rows)
        return device.has_bfloat16("cpu")

    variants = {"ours": ours, "theirs": ours, "absent": lambda rows: importlib.import_module("nothing_of_this_name")}
    task = Task("made", make, load, variants, lambda found, _: str(found), {"": 2}, warm=1, by_flag=("ours",))
    monkeypatch.setattr(harness, "tasks", lambda _: {"made": task})
    monkeypatch.setattr("img2prompt.core.device.has_bfloat16", lambda _: True)
    return task


def test_ours_runs_in_float32_too_where_the_processor_has_bfloat16(stage, tmp_path, monkeypatch):
    stage.make(tmp_path, 3)
    assert stage.runs == ["ours", FP32, "theirs", "absent"]
    found = {name: measure("made", "made", name, tmp_path, 3, True) for name in ("ours", FP32)}
    assert [run["identical"] for run in found.values()] == ["True", "False"]
    assert found["ours"]["seconds"][""] >= 0.003
    assert found["ours"]["peak_mb"] >= 0
    assert measure("made", "made", "ours", tmp_path, 3, False)["identical"] == ""
    assert stage.runs == ["ours", "theirs", "absent"]  # in this process there is none from now on


def test_rounds_leave_out_what_fails_and_what_the_time_will_not_do_for(stage, tmp_path, monkeypatch, capsys):
    calls = []

    def alone(function, *arguments):
        if function is harness.make:
            return stage.make(arguments[2], arguments[3]) if arguments[2].mkdir(parents=True) is None else None
        calls.append((arguments[2], arguments[4]))
        if arguments[2] == "absent":
            raise ModuleNotFoundError("No module named 'absent'")
        seconds = {"ours": 0.1, FP32: 0.1, "theirs": 30.0}[arguments[2]]
        return {"seconds": {"": seconds}, "peak_mb": 1.0, "identical": "yes"}

    monkeypatch.setattr("bench.run.alone", alone)
    now = time.monotonic()
    ran = {rows: of for rows, _, of in run("made", stage, [10, 20, 40], 2, tmp_path, iter([now + 50, now + 100, now]))}
    # On 20 rows theirs is expected to take four times its 30 seconds, and on 40 it is late for all but one of ours.
    assert {rows: {name: len(own.seconds) for name, own in of.items()} for rows, of in ran.items()} == {
        10: {"ours": 2, FP32: 2, "theirs": 2},
        20: {"ours": 2, FP32: 2},
        40: {"ours": 1},
    }
    assert calls.count(("absent", 10)) == 1
    assert "made: absent is left out: ModuleNotFoundError: No module named 'absent'" in capsys.readouterr().out
    assert not (tmp_path / "made/10").exists()


def test_ours_may_not_fail(stage, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.run.alone", lambda function, *_: Work() if function is harness.make else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(run("made", stage, [10], 1, tmp_path, iter([time.monotonic() + 9])))


def test_arithmetic_grows_each_part_by_its_own_power():
    assert arithmetic({"": 2.0}, {"": 2}, 3) == {"": 18.0}
    assert arithmetic({"": 5.0, "a": 1.0, "b": 2.0}, {"a": 1, "b": 2}, 10) == {"": 210.0, "a": 10.0, "b": 200.0}


LIMITS = Limits(float32=1e9, bfloat16=4e9, copied=1e9, written=1e9)


def frame_of(task, sizes=(10, 20)):
    """The lines of a task of which `theirs` was run on 10 rows alone."""
    first = {
        "ours": Runs([{"": 1.0}, {"": 2.0}, {"": 4.0}], 7.4, "yes"),
        FP32: Runs([{"": 20.0}], 7.4, "yes"),
        "theirs": Runs([{"": 6.0}], 90.0, "3 rows wrong"),
    }
    ran = {10: (Work(operations=4e9), first), 20: (Work(operations=16e9), {"ours": Runs([{"": 8.0}], 9.0, "yes")})}
    return pd.DataFrame(lines(task, ran, sizes, LIMITS)).assign(commit="c", processor="P", date="d")


def test_lines_have_medians_shares_and_marked_arithmetic(stage, tmp_path):
    found = merged(frame_of(stage), tmp_path / "bench.csv").set_index(["variant", "rows"])
    assert found.seconds.to_dict() == {
        ("ours", 10): 2.0, ("ours", 20): 8.0, (FP32, 10): 20.0, (FP32, 20): 80.0, ("theirs", 10): 6.0,
        ("theirs", 20): 24.0,
    }  # fmt: skip
    assert found.runs.tolist() == [3, 1, 1, 0, 1, 0]
    assert found.ratio.tolist() == [1, 1, 10, 10, 3, 3]
    # 4e9 operations take 1 s in bfloat16, and 4 s in float32.
    assert found.share_of_limit.dropna().round(3).tolist() == [0.5, 0.5, 0.2, 0.667]
    assert found.loc[("ours", 10), ["least", "most", "peak_mb"]].tolist() == [1.0, 4.0, 7.0]


def test_a_call_replaces_the_lines_of_its_stages_alone(stage, tmp_path):
    old = frame_of(stage).assign(stage=["dedup"] * 3 + ["knn: search"] * 3, commit="old")
    old = pd.concat([old, pd.DataFrame(machine([LIMITS]))])
    merged(old, tmp_path / "none").to_csv(tmp_path / "bench.csv", index=False)
    new = pd.concat([frame_of(stage).assign(stage="knn", commit="new"), pd.DataFrame(machine([LIMITS, LIMITS]))])
    found = merged(new, tmp_path / "bench.csv")
    assert found.stage.unique().tolist() == ["dedup", "knn", "machine"]
    assert found[found.stage == "dedup"].commit.tolist() == ["old"] * 3
    assert found[found.stage == "machine"].seconds.tolist() == [1000.0, 250.0, 1.0, 1.0]
    assert found[found.stage == "machine"].runs.tolist() == [2] * 4


def test_the_table_and_the_figure_are_made_of_the_lines(stage, tmp_path):
    # An own number of rows, as a task has that is run on few, stands beside the name.
    few = frame_of(stage, [20]).assign(stage="submit").replace({"rows": {10: 9}})
    both = pd.concat([frame_of(stage).assign(stage="knn"), few, pd.DataFrame(machine([LIMITS]))])
    frame = merged(both, tmp_path / "bench.csv")
    text = table(frame).splitlines()
    assert "| stage | variant | 20 rows | MB | of the limit | identical |" in text
    assert "| submit, run on 9 | theirs | ≈ 24 (3) | 90 | 67% | 3 rows wrong |" in text
    assert text[-1].endswith("(products in GFLOP, bytes in GB). Commit c; P; d.*")
    draw(frame, tmp_path / "a.png")
    draw(frame, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def results(name, folder, rows):
    """What is said of the results of a task's variants, but of those that need what only `make bench` installs."""
    stage = name.partition(":")[0]
    harness.make(stage, name, folder, rows)
    task, found = harness.tasks(stage)[name], {}
    for variant, act in task.variants.items():
        with contextlib.suppress(ModuleNotFoundError):
            found[variant] = task.check(act(*task.load(folder, rows)), folder)
    return found


EXACT = ["dedup", "knn", "ridge", "submit", "ensemble: 101 alphas", "ensemble: ten scores"]
SLOW = ["embed_prompts", "embed_images", "model_a: tower"]


@pytest.mark.parametrize("name", [*EXACT, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_ours_is_right_and_so_are_exact_peers(name, tmp_path):
    found = results(name, tmp_path / "inputs", 300)
    found.pop("semhash", None)
    limit = 1e-3 if name.startswith("embed") else 1e-5  # ours may be in bfloat16 there
    assert {variant: said for variant, said in found.items() if said != "yes" and float(said) > limit} == {}
    assert "ours" in found


SOUGHT = ["model_a: head", "model_a: head, from its start", "recipe"]


@pytest.mark.parametrize(
    "name", ["ensemble: weights", *(pytest.param(name, marks=pytest.mark.slow) for name in SOUGHT)]
)
def test_what_ours_seeks_it_finds_as_well_as_its_peers(name, tmp_path):
    found = results(name, tmp_path / "inputs", 500)
    scores = {variant: float(said.removeprefix("score ")) for variant, said in found.items()}
    assert scores["ours"] > max(scores.values()) - 0.005


def test_every_file_of_a_stage_has_tasks_that_begin_with_ours():
    for stage in STAGES:
        found = harness.tasks(stage)
        assert found
        for name, task in found.items():
            assert name.partition(":")[0] == stage
            assert next(iter(task.variants)) == "ours"


@pytest.mark.slow
def test_the_command_measures_in_processes_and_writes_the_lines(tmp_path):
    command = ["-m", "bench.run", "--stages", "submit", "--rows", "40", "80", "--runs", "1", "--out", tmp_path]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, capture_output=True)
    found = pd.read_csv(tmp_path / "bench.csv")
    own = found[found.stage == "submit"]
    assert own.variant.tolist() == np.repeat(["ours", "ours, read and checked", "pandas"], 2).tolist()
    assert own.identical.tolist() == ["yes"] * 6
    assert (own.seconds > 0).all()
    assert (own.share_of_limit > 0).all()
    assert {"float32", "copied", "written"} <= set(found[found.stage == "machine"].variant)
