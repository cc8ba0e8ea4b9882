"""dvc.yaml against the code: one name per stage, dependencies that are the real imports, a stage's own params."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = REPOSITORY / "src/img2prompt"
DVC = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
PARAMS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
STAGES = DVC["stages"]
# Not followed: it judges every section of params.yaml, but hands a stage its own, whose schemas that stage imports.
JUDGE = REPOSITORY / "pipelines/__init__.py"


def imported(path: Path) -> set[Path]:
    """Every file of ours that a file imports, at its top or inside a function, and what those import."""
    found: set[Path] = set()
    left = [path]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [f"{node.module}.{a.name}" for a in node.names] if names else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                parts = name.split(".")
                for root in (REPOSITORY, REPOSITORY / "src"):
                    for file in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
                        if file.is_file() and file not in found | {JUDGE}:
                            found.add(file)
                            left.append(file)
    return found


def code_of(stage: str) -> set[Path]:
    script = REPOSITORY / f"pipelines/{stage}.py"
    return {script, LIBRARY / "core/process.py"} | imported(script)


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_are_the_real_imports(stage):
    """Each file that a stage imports is listed, or its room is; nothing is listed of which it imports nothing."""
    listed = [REPOSITORY / dep for dep in STAGES[stage]["deps"] if not dep.startswith(("outputs/", "input/"))]
    code = code_of(stage)
    assert [file for file in code if not any(file == dep or dep in file.parents for dep in listed)] == []
    assert [dep for dep in listed if not any(file == dep or dep in file.parents for file in code)] == []


def test_rooms_stand_on_one_another_without_a_circle():
    """The graph of rooms by their imports; nothing but cli/ knows argparse or DVC."""
    rooms = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    stands_on = {
        room: {file.parent.name for path in (LIBRARY / room).glob("*.py") for file in imported(path)} - {room}
        for room in rooms
    }
    assert {room: below for room, below in stands_on.items() if any(room in stands_on[b] for b in below)} == {}
    assert stands_on["core"] == set()
    for path in LIBRARY.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert path.parent.name == "cli" or not names & {"argparse", "dvc"}, path


@pytest.mark.parametrize("stage", STAGES)
def test_files_that_code_reads_are_dependencies(stage):
    """A stage reads outputs only of what it declares, and writes only what it declares."""
    text = (REPOSITORY / f"pipelines/{stage}.py").read_text()
    declared = [*STAGES[stage]["deps"], *outputs(stage)]
    for other in STAGES:
        if f"outputs/{other}" in text and other != stage:
            assert any(path.startswith(f"outputs/{other}") for path in declared), f"{stage} reads {other}"


def outputs(stage: str) -> list[str]:
    entries = [*STAGES[stage].get("outs", []), *STAGES[stage].get("metrics", [])]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


@pytest.mark.parametrize("stage", list(STAGES)[1:])
def test_no_stage_needs_a_file_within_a_folder_that_dvc_tracks_as_one(stage):
    """In a clone whose cache has not what dvc.lock says, `dvc exp run --temp` then fails at the stage that needs it.

    But for files of the first stage: DVC first asks what a folder holds when that stage is done.
    """
    folders = tuple(path for path in outputs(stage) if path.endswith("/"))
    needed = [dep for other in STAGES for dep in STAGES[other]["deps"] if dep not in folders]
    assert not [dep for dep in needed if dep.startswith(folders)]


@pytest.mark.parametrize("stage", STAGES)
def test_one_name_everywhere(stage):
    assert (REPOSITORY / f"pipelines/{stage}.py").is_file()
    assert STAGES[stage]["cmd"].startswith(f"python -m pipelines.{stage}")
    assert any(path.startswith(f"outputs/{stage}") or stage == "submit" for path in outputs(stage))
    if stage in PARAMS and stage != "prepare":
        assert stage in STAGES[stage]["params"], "the whole section, so that an unknown key reruns the stage"


def test_prepare_s_section_is_shared_by_its_two_stages_key_by_key():
    keys = {
        key for stage in ("prepare", "prepare_test") for key in STAGES[stage]["params"] if key.startswith("prepare.")
    }
    assert keys == {f"prepare.{key}" for key in PARAMS["prepare"]}


def test_nothing_that_learns_depends_on_what_is_predicted():
    """Neither on `prepare.test` nor, through any number of stages, on what a stage makes of it."""
    made_by = {path: stage for stage in STAGES for path in outputs(stage)}
    apply = {"prepare_test", "embed_test", "predict", "scores", "submit", "report"}
    for stage in set(STAGES) - apply:
        assert "prepare.test" not in STAGES[stage].get("params", [])
        sources = {owner for dep in STAGES[stage]["deps"] for path, owner in made_by.items() if path.startswith(dep)}
        assert not sources & apply, stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_given_the_sections_that_it_declares(stage):
    given = set(inspect.signature(importlib.import_module(f"pipelines.{stage}").main).parameters)
    declared = {param.split(".")[0] for param in STAGES[stage].get("params", [])}
    # No output of embed_images depends on `freeze`: it says what that stage will want, and need not compute again.
    assert given == declared | ({"freeze"} if stage == "embed_images" else set())


def test_every_script_is_a_stage():
    assert {path.stem for path in (REPOSITORY / "pipelines").glob("*.py")} - {"__init__"} == set(STAGES)
    assert set(PARAMS) <= set(STAGES)


def test_training_is_a_matrix_over_the_fold_ids():
    assert STAGES["model_a"]["matrix"] == {"fold": "${folds.ids}"}
