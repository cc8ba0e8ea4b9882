"""The package: what its wheel holds, that it runs by itself, and that a copy of the project runs its own library."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from img2prompt.cli.export import LACKING, add_wheels

REPOSITORY = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lend_torch(empty, folder):
    """Let an environment see this one's torch, through links: a second copy with CUDA's packages would be 5 GB."""
    folder.mkdir()
    for part in metadata.distributions():
        if part.name.startswith(("torch", "triton", "nvidia-", "cuda-")):
            for top in {file.parts[0] for file in part.files} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(part.locate_file(top))
    (site,) = empty.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(str(folder))


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment(tmp_path):
    """With no more than what it asks for itself; the pins are where its ranges were tested."""
    add_wheels(tmp_path)
    assert {path.name.split("-")[0] for path in tmp_path.glob("*.whl")} == {"img2prompt", *LACKING}
    (wheel,) = tmp_path.glob("img2prompt-*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("img2prompt/")}
    library = REPOSITORY / "src/img2prompt"
    wanted = {
        f"img2prompt/{path.relative_to(library)}"
        for suffix in ("py", "css", "html", "js", "txt", "yaml")
        for path in library.rglob(f"*.{suffix}")
    }
    assert files == wanted
    run(sys.executable, "-m", "venv", "empty", cwd=tmp_path)
    lend_torch(tmp_path / "empty", tmp_path / "lent")
    bin = tmp_path / "empty/bin"
    constraints = [part for name in ("requirements.txt", "constraints.txt") for part in ("-c", REPOSITORY / name)]
    run(bin / "pip", "install", "--quiet", wheel, *constraints, cwd=tmp_path)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    run(bin / "img2prompt", "check", cwd=tmp_path, PYTHONPATH="")
    assert "compare" in run(bin / "img2prompt", "--help", cwd=tmp_path, PYTHONPATH="")
    shutil.rmtree(tmp_path / "empty")


WHERE = '''"""where: a stage that says which library it runs."""

from pathlib import Path

import img2prompt.core.storage
from pipelines import run


def main() -> None:
    """Write the path of the library."""
    Path("where.txt").write_text(img2prompt.core.storage.__file__)


if __name__ == "__main__":
    run(main)
'''
DVC_YAML = """
stages:
  where:
    cmd: python -m pipelines.where
    deps: [params.yaml]
    outs: [where.txt]
"""


def test_an_experiment_beside_the_workspace_runs_its_own_library(tmp_path):
    """Whatever library is installed: `dvc exp run --temp` copies the project, and the copy's stages run the copy."""
    home = tmp_path / "home"
    shutil.copytree(REPOSITORY / "src", home / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    (home / "pipelines").mkdir()
    shutil.copy(REPOSITORY / "pipelines/__init__.py", home / "pipelines")
    shutil.copy(REPOSITORY / "params.yaml", home)
    (home / "pipelines/where.py").write_text(WHERE)
    (home / "dvc.yaml").write_text(DVC_YAML)
    (home / ".gitignore").write_text("__pycache__/\n/where.txt\n/outputs/\n")
    who = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    who |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run("sh", "-c", "git init -q && dvc init -q && git add . && git commit -qm first", cwd=home, **who)
    run("dvc", "exp", "run", "--temp", "--name", "there", "-S", "knn.k=7", cwd=home, **who)
    assert not (home / "where.txt").exists()
    run("dvc", "exp", "apply", "there", cwd=home, **who)
    library = (home / "where.txt").read_text()
    assert library.startswith(f"{home}/.dvc/tmp/exps/")
    assert library.endswith("/src/img2prompt/core/storage.py")
