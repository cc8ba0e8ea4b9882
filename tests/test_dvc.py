"""dvc.yaml against the code: one name per stage, dependencies that are the real imports, whole params sections."""

import ast
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DVC = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
PARAMS = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
STAGES = DVC["stages"]


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
                        if file.is_file() and file not in found:
                            found.add(file)
                            left.append(file)
    return found


def code_of(stage: str) -> set[str]:
    script = REPOSITORY / f"pipelines/{stage}.py"
    return {str(file.relative_to(REPOSITORY)) for file in {script} | imported(script)}


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_are_the_real_imports(stage):
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert listed == code_of(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_files_that_code_reads_are_dependencies(stage):
    """A stage reads outputs and data files only of what it declares, and writes only what it declares."""
    text = (REPOSITORY / f"pipelines/{stage}.py").read_text()
    declared = [*STAGES[stage]["deps"], *outputs(stage)]
    for other in STAGES:
        if f"outputs/{other}" in text and other != stage:
            assert any(path.startswith(f"outputs/{other}") for path in declared), f"{stage} reads {other}"
    code = code_of(stage)
    for module, data in {"sample": "sample_words.yaml", "prompt_augmentation": "thesaurus.txt"}.items():
        assert (f"src/img2prompt/{module}.py" in code) == (f"src/img2prompt/{data}" in declared)


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
    if stage in PARAMS:
        assert stage in STAGES[stage]["params"], "the whole section, so that an unknown key reruns the stage"


def test_every_script_is_a_stage_or_said_not_to_be():
    scripts = {path.stem for path in (REPOSITORY / "pipelines").glob("*.py")}
    assert scripts - {"__init__", "__main__", "search", "compare", "table"} == set(STAGES)
    assert set(PARAMS) <= set(STAGES)


def test_training_is_a_matrix_over_the_fold_ids():
    assert STAGES["model_a"]["matrix"] == {"fold": "${folds.ids}"}
