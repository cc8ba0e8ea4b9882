"""Write the trained model of outputs/ as one flat folder, a bundle, which loads wherever img2prompt is installed.

With --kaggle the folder is also ready to be uploaded as a dataset: it gets the wheels that Kaggle's image lacks and
infer.py, and kernel/ has what makes a submission of it; see docs/kaggle.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from img2prompt.cli.check import load_params
from img2prompt.core.process import turn
from img2prompt.core.storage import whole_folder, write_json

# What prediction needs and Kaggle's image has not (Kaggle/docker-python, kaggle_requirements.txt, on Colab's image).
LACKING = ("open_clip_torch", "ftfy", "wcwidth")
# What that image is: Linux on x86-64, with this Python.
KAGGLE = ("--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64", "--python-version", "3.12")
SOURCE = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "src")  # what our own wheel is built from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: where to write, and what to leave out or add."""
    parser.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder, or a bundle to be replaced")
    parser.add_argument("--float32", action="store_true", help="single precision: twice as large, the same last digits")
    parser.add_argument("--no-thumbnails", action="store_true", help="leave out small copies of the train images")
    parser.add_argument("--kaggle", action="store_true", help="add what a Kaggle kernel without internet needs")
    kaggle = parser.add_argument_group("with --kaggle")
    kaggle.add_argument("--owner", metavar="NAME", default="INSERT_USERNAME", help="your Kaggle user name")
    kaggle.add_argument("--slug", default="img2prompt-bundle", help="the dataset's name in URLs (default: %(default)s)")
    kaggle.add_argument(
        "--competition", default="stable-diffusion-image-to-prompts", help="its name in URLs (default: %(default)s)"
    )


def main(options: argparse.Namespace) -> None:
    """Export, when no other process writes to outputs/."""
    with turn("export"):
        run(options)


def run(options: argparse.Namespace) -> None:
    """Write the bundle, whole or not at all, and say what is in it.

    Raises:
        OSError, ValueError: DIR holds something else, the run is not complete, or a wheel cannot be had.
    """
    from img2prompt.predict.bundle import is_bundle
    from img2prompt.predict.export import export

    folder = options.folder.resolve()
    if folder.exists() and not is_bundle(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{options.folder}: not empty, and no bundle to replace: name another folder")
    clips = [name for name, *_ in load_params().clip.models]
    with whole_folder(folder) as out:
        if options.kaggle:  # first, for what cannot be had
            add_kernel(out, options.owner, options.slug, options.competition)
        said = export(Path("outputs"), out, clips, not options.float32, not options.no_thumbnails)
        size = sum(path.stat().st_size for path in out.rglob("*"))
    print(f"{options.folder}: {size / 1e6:.1f} MB", *said, sep="\n  ")


def add_kernel(folder: Path, owner: str, slug: str, competition: str) -> None:
    """Add wheels, infer.py and dataset-metadata.json to a bundle's folder, and kernel/ with the script that runs there.

    Raises:
        ValueError: the source tree is not here, or pip cannot get or build a wheel.
    """
    script = Path(__file__).with_name("infer.py")
    shutil.copyfile(script, folder / script.name)
    add_wheels(folder)
    title = slug.replace("-", " ")
    write_json(
        folder / "dataset-metadata.json", {"id": f"{owner}/{slug}", "title": title, "licenses": [{"name": "other"}]}
    )
    kernel = folder / "kernel"
    kernel.mkdir()
    shutil.copyfile(script, kernel / script.name)
    about = {
        "id": f"{owner}/{slug}-infer",
        "title": f"{title} infer",  # Kaggle derives the kernel's name in URLs from it
        "code_file": script.name,
        "language": "python",
        "kernel_type": "script",
        "is_private": True,
        "enable_gpu": True,
        "machine_shape": "NvidiaTeslaT4",
        "enable_internet": False,
        "dataset_sources": [f"{owner}/{slug}"],
        "competition_sources": [competition],
        "kernel_sources": [],
        "model_sources": [],
    }
    write_json(kernel / "kernel-metadata.json", about)


def add_wheels(folder: Path) -> None:
    """Build our own wheel into a folder, and get those of LACKING in the versions that are installed here."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "pyproject.toml").is_file():
        raise ValueError("--kaggle: our own wheel is built from the source tree: run it in a clone, after `make setup`")
    with TemporaryDirectory() as copy:  # building leaves files beside the source
        for name in SOURCE:
            if (root / name).is_dir():
                shutil.copytree(root / name, Path(copy) / name, ignore=shutil.ignore_patterns("*.egg-info", "*.pyc"))
            else:
                shutil.copyfile(root / name, Path(copy) / name)
        _pip("wheel", "--no-deps", "--wheel-dir", folder, copy)
    wanted = [f"{name}=={metadata.version(name)}" for name in LACKING]
    _pip("download", "--no-deps", "--only-binary=:all:", *KAGGLE, "--dest", folder, *wanted)


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--kaggle: `{' '.join(command[2:])}` failed: {done.stderr.strip()}")
