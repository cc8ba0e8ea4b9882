"""The kernel's script: where it looks, what it writes when, and what it does without where time is short."""

import importlib.util
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from img2prompt import Predictor
from img2prompt.cli import export
from img2prompt.cli.main import main
from img2prompt.core.storage import read_json
from img2prompt.predict.submission import check_submission


@pytest.fixture(scope="module")
def home(made, tmp_path_factory):
    """A folder where the chain has run and a bundle with the kernel is in bundle/; nobody changes it."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("kernel") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(export, "add_wheels", lambda folder: wheel(folder / "told-1.0-py3-none-any.whl"))
        main(["export", "bundle", "--kaggle", "--owner", "somebody", "--slug", "my-bundle"])
    return folder


def wheel(path):
    """The least that pip installs: a module `told`."""
    about = "told-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("told.py", "WHERE = __file__\n")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: told\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")


@pytest.fixture
def infer(home, tmp_path, monkeypatch):
    """The script as a module, from a folder of its own, as Kaggle has it; without its wheels."""
    script = tmp_path / "src/infer.py"
    script.parent.mkdir()
    script.write_bytes((home / "bundle/kernel/infer.py").read_bytes())
    spec = importlib.util.spec_from_file_location("infer", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "install", lambda wheels: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IMG2PROMPT_DEVICE", "cpu")
    return module


IDS = ["c", "a", "g", "b", "d", "f", "e"]


def competition(folder, home, ids=IDS):
    """Seven images, of which `d` is broken, and a sample submission."""
    (folder / "images").mkdir(parents=True)
    for name, image in zip(sorted(IDS), sorted((home / "input/test/images").iterdir())[4:], strict=False):
        (folder / f"images/{name}.png").write_bytes(image.read_bytes())
    (folder / "images/d.png").write_bytes(b"broken")
    lines = [f"{name}_{element},0" for name in ids for element in range(384)]
    (folder / "sample_submission.csv").write_text("\n".join(["imgId_eId,val", *lines]) + "\n")
    return folder


def read(path, ids):
    check_submission(path, ids)
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=1, dtype=np.float32).reshape(-1, 384)


@pytest.mark.parametrize(
    ("bundle_at", "data_at"),
    [
        ("my-bundle", "stable-diffusion"),
        ("datasets/somebody/my-bundle", "competitions/stable-diffusion"),
        ("my-bundle", "competitions/stable-diffusion"),
        ("datasets/somebody/my-bundle", "stable-diffusion"),
    ],
)
def test_in_every_layout_the_submission_is_the_bundle_s_prediction(infer, home, tmp_path, capsys, bundle_at, data_at):
    root = tmp_path / "input"
    data = competition(root / data_at, home)
    (root / bundle_at).parent.mkdir(parents=True, exist_ok=True)
    (root / bundle_at).symlink_to(home / "bundle")
    infer.main(["--input", str(root)])
    values = read(Path("submission.csv"), IDS)
    readable = [name for name in IDS if name != "d"]
    expected = Predictor.load(home / "bundle", "cpu").predict([data / f"images/{name}.png" for name in readable])
    kept = [IDS.index(name) for name in readable]
    np.testing.assert_allclose(values[kept], expected.embeddings, atol=1e-6)
    np.testing.assert_array_equal(values[IDS.index("d")], np.load(home / "outputs/ensemble/constant.npy"))
    assert re.search(r"an image keeps the mean: .*/d\.png: Unidentified", capsys.readouterr().out)


@pytest.mark.parametrize("sample", ["other ids", "broken", "none"])
def test_ids_are_sorted_where_the_sample_submission_is_of_other_images(infer, home, tmp_path, capsys, sample):
    data = competition(tmp_path / "data", home, [*IDS, "z"])
    if sample == "broken":
        (data / "sample_submission.csv").write_text("id,value\n")
    elif sample == "none":
        (data / "sample_submission.csv").unlink()
    ids, images = infer.listed(data)
    assert ids == sorted(IDS)
    assert [path.stem for path in images] == ids
    said = {"other ids": "other ids", "broken": "imgId_eId", "none": "No such file"}[sample]
    assert re.search(rf"is not of the 7 images \(.*{said}.*\): ids are sorted", capsys.readouterr().out)


def test_the_mean_is_there_before_the_model_is_loaded(infer, home, tmp_path, monkeypatch):
    data, constant = competition(tmp_path / "data", home), np.load(home / "outputs/ensemble/constant.npy")
    (data / "my-bundle").symlink_to(home / "bundle")

    def load(folder):
        np.testing.assert_array_equal(read(Path("submission.csv"), IDS), np.tile(constant, (7, 1)))
        raise MemoryError("none left")

    monkeypatch.setattr(Predictor, "load", load)
    with pytest.raises(MemoryError, match="none left"):
        infer.main(["--input", str(data)])
    np.testing.assert_array_equal(read(Path("submission.csv"), IDS), np.tile(constant, (7, 1)))


def test_without_time_all_images_keep_the_mean(infer, home, tmp_path, capsys):
    data, constant = competition(tmp_path / "data", home), np.load(home / "outputs/ensemble/constant.npy")
    (data / "my-bundle").symlink_to(home / "bundle")
    infer.main(["--input", str(data), "--minutes", "0"])
    np.testing.assert_array_equal(read(Path("submission.csv"), IDS), np.tile(constant, (7, 1)))
    assert "no time left: 7 of 7 images keep the mean" in capsys.readouterr().out


class Clock:
    """A model that takes `each` seconds an image by a clock of its own, and answers `each`."""

    now = 0.0

    def __init__(self, *each):
        self.each = each

    def stream(self, images, size):
        for start in range(0, len(images), size):
            part = images[start : start + size]
            Clock.now += len(part) * self.each[0]
            yield SimpleNamespace(embeddings=np.full((len(part), 384), self.each[0]), errors=[None] * len(part))

    def cheaper(self):
        return (f"what takes {self.each[0] - self.each[1]:g} s", Clock(*self.each[1:])) if self.each[1:] else None


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        (400, {1.0: 300}),  # in time
        (200, {1.0: 32, 0.5: 268}),  # 168 s left for 268 images
        (100, {1.0: 32, 0.5: 32, 0.25: 160, 0.0: 76}),  # 12 s left, and the next 64 take 16 s
        (5, {1.0: 8, 0.0: 292}),
    ],
)
def test_less_of_the_model_is_used_where_time_is_short(infer, monkeypatch, capsys, seconds, rows):
    monkeypatch.setattr(Clock, "now", 0.0)
    monkeypatch.setattr(infer, "time", SimpleNamespace(monotonic=lambda: Clock.now))
    predictions = np.zeros((300, 384))
    done = infer.fill(predictions, Clock(1.0, 0.5, 0.25), [Path("x.png")] * 300, seconds)
    values = predictions[:, 0].tolist()
    assert {value: values.count(value) for value in dict.fromkeys(values)} == rows
    assert done == 300 - rows.get(0.0, 0)
    assert capsys.readouterr().out.count("from here on without") == len(set(rows) - {0.0}) - 1


def test_what_is_not_there_or_there_twice_is_named(infer, home, tmp_path):
    data = competition(tmp_path / "input/data", home)
    with pytest.raises(SystemExit, match="0 folders look like the bundle"):
        infer.main(["--input", str(data.parent)])
    for name in ("one", "two"):
        (data.parent / name).mkdir()
        (data.parent / name / "manifest.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"2 folders look like the bundle \(.*one, .*two\)"):
        infer.main(["--input", str(data.parent)])


def test_wheels_are_installed_for_this_process_without_a_network(home, monkeypatch):
    spec = importlib.util.spec_from_file_location("infer", home / "bundle/infer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module.install(sorted((home / "bundle").glob("*.whl")))
    told = importlib.import_module("told")
    assert told.WHERE.startswith(sys.path[0])
    del sys.modules["told"]


def test_until_it_has_installed_them_the_script_needs_python_alone(home):
    import ast

    tree = ast.parse((home / "bundle/infer.py").read_text())
    top = {name.split(".")[0] for node in tree.body for name in imported(node)}
    assert top <= set(sys.stdlib_module_names)


def imported(node):
    import ast

    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def test_the_metadata_are_what_kaggle_s_commands_take(home):
    folder = home / "bundle"
    dataset, kernel = read_json(folder / "dataset-metadata.json"), read_json(folder / "kernel/kernel-metadata.json")
    assert dataset["id"] == "somebody/my-bundle"
    assert 6 <= len(dataset["title"]) <= 50
    assert kernel["id"] == f"somebody/{kernel['title'].lower().replace(' ', '-')}"
    assert (folder / "kernel" / kernel["code_file"]).read_bytes() == (folder / "infer.py").read_bytes()
    assert (kernel["enable_gpu"], kernel["enable_internet"], kernel["machine_shape"]) == (True, False, "NvidiaTeslaT4")
    assert kernel["dataset_sources"] == [dataset["id"]]
    json.dumps(kernel, allow_nan=False)
