import importlib
import inspect
import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import open_clip
import pytest
import timm
import torch
import yaml
from hypothesis import settings
from PIL import Image

from img2prompt.cli import compare
from img2prompt.cli.check import load_params
from img2prompt.cli.main import main
from img2prompt.core.storage import digest

REPOSITORY = Path(__file__).resolve().parent.parent

# The head of a program that has no more than prediction needs.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
GONE = ("pandas", "psutil", "matplotlib", "dvc", "nltk", "albumentations")
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in GONE else super().find_spec(name, *where)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""

settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("long", max_examples=500, deadline=None)
settings.load_profile("quick")

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _same_numbers(request, monkeypatch):
    """A test draws the same random numbers from its module's `rng`, whatever ran before it."""
    if hasattr(request.module, "rng"):
        monkeypatch.setattr(request.module, "rng", np.random.default_rng(0))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with an untrained vision transformer CLIP of 16 dimensions, in open_clip's layout."""
    return untrained_clip(tmp_path_factory.mktemp("clip"), "tiny-vit", TINY)


def untrained_clip(folder, name, config):
    from img2prompt.clip.model import materialise

    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model(name).state_dict(), folder / "weights.pt")
    out = folder / "out"
    out.mkdir()
    materialise(name, str(folder / "weights.pt"), None, out)
    return out


def tiny_swin(pretrained=False, num_classes=1000, **_):
    """A model for timm's registry: a tower that `clip.towers` does not cut, in four groups with the patches' own."""
    trunk = timm.models.SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 2),
        num_classes=num_classes,
    )  # fmt: skip
    trunk.default_cfg = {}
    return trunk


@pytest.fixture(scope="session")
def uncut_clip(tmp_path_factory):
    """A folder as tiny_clip's, of a CLIP whose tower cannot be cut into layers."""
    timm.models.register_model(tiny_swin)
    tower = {"timm_model_name": "tiny_swin", "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}
    return untrained_clip(tmp_path_factory.mktemp("clip"), "tiny-swin", TINY | {"vision_cfg": tower})


@pytest.fixture
def competition(tmp_path):
    """A folder in Kaggle layout: 60 images of one colour each, of several sizes, and prompts that name the colour."""
    return write_competition(tmp_path / "competition", 60, seed=0)


SIZES = [(32, 32), (20, 50), (64, 40)]  # height and width in pixels


def write_competition(folder: Path, n: int, seed: int) -> Path:
    colours = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (128, 128, 128)}
    things = ["house", "river", "cat", "tree", "mountain", "ship", "flower", "road", "lamp", "bridge"]
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = ["imgId,prompt"]
    for number in range(n):
        colour = sorted(colours)[number % 4]
        pixels = np.clip(np.array(colours[colour]) + rng.normal(0, 25, (*SIZES[number % 3], 3)), 0, 255).astype(
            np.uint8
        )
        Image.fromarray(pixels).save(folder / f"images/p{number:03d}.png")
        lines.append(f'p{number:03d},"a {colour} {things[number // 4 % 10]}, {things[number * 7 % 10]} {number}"')
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder


LEARN = [
    "fetch", "prepare", "embed_prompts", "dedup", "folds", "clip", "embed_images", "freeze", "model_a", "knn",
    "ensemble", "words",
]  # fmt: skip
APPLY = ["prepare_test", "embed_test", "predict", "scores", "submit", "report"]
STAGES = [*LEARN, *APPLY]


def stage(name, *arguments):
    """Run one stage of the current folder, as `python -m pipelines.NAME` does."""
    run, params = importlib.import_module(f"pipelines.{name}").main, load_params()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        run(**{section: getattr(params, section) for section in inspect.signature(run).parameters})


def chain(stages=STAGES):
    for name in stages:
        if name == "model_a":
            for fold in load_params().folds.ids:
                stage(name, str(fold))
        elif name == "predict":
            for part in ("model_a", "knn"):
                stage(name, part)
        else:
            stage(name)


def change(**sections):
    values = yaml.safe_load(Path("params.yaml").read_text())
    for section, changes in sections.items():
        values[section] |= changes
    Path("params.yaml").write_text(yaml.safe_dump(values))


def made_chain(folder: Path, clip: Path) -> Path:
    """Run the chain on 60 train and 12 test images, one of the latter broken, in two folds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_competition(Path("input/train"), 60, seed=0)
        test = write_competition(Path("input/test"), 12, seed=1)
        (test / "images/p003.png").write_bytes(b"broken")
        ids = [f"p{number:03d}" for number in reversed(range(12))]
        lines = [f"{name}_{element},0" for name in ids for element in range(384)]
        (test / "sample_submission.csv").write_text("\n".join(["imgId_eId,val", *lines]) + "\n")
        Path("params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
        change(
            prepare={"train": ["input/train"], "test": "input/test"},
            folds={"ids": [3, 7]},
            clip={"model": str(clip)},
            embed_images={"batch_size": 16},
            model_a={"heads": ["linear", "model_a"], "unfreeze": 2, "epochs": 2, "steps": 4},
            ensemble={"members": ["model_a", "linear", "ridge", "model_b", "constant"]},
        )
        chain()
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory, tiny_clip):
    """A folder where the chain has run; nobody changes it."""
    folder = made_chain(tmp_path_factory.mktemp("chain"), tiny_clip)
    before = digest(folder)
    yield folder
    assert digest(folder) == before, "a test changed the folder that all of them share"


@pytest.fixture(scope="session")
def compared(made, tmp_path_factory):
    """A folder where an idea of two seeds and another experiment were compared with the run; nobody changes it."""
    folder, rng = tmp_path_factory.mktemp("compared"), np.random.default_rng(0)
    for path in (made / "outputs").iterdir():
        (folder / "outputs").mkdir(exist_ok=True)
        (folder / "outputs" / path.name).symlink_to(path)
    for path in (made / "input", made / "params.yaml"):
        (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cosines, params = compare.read_run("workspace")
        models = cosines.columns[cosines.columns.get_loc("scored") + 1 :]
        runs = {"workspace": (cosines, params)}
        for name, gain, more in (
            ("idea", 0.02, {"knn.k": 5}),
            ("idea-s1", 0.02, {"knn.k": 5, "model_a.seed": 1}),
            ("a<b>", 0, {}),
        ):
            table = cosines[models] + rng.normal(gain, 0.05, (len(cosines), len(models)))
            runs[name] = cosines.assign(**table), params | more
        patch.setattr(compare, "read_run", runs.get)
        main(["compare", "workspace", "idea,idea-s1", "a<b>"])
    return folder


@pytest.fixture
def home(made, monkeypatch):
    """The folder where the chain has run, to look at, as the current one."""
    monkeypatch.chdir(made)


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """A copy of it, to change."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


@pytest.fixture(scope="session")
def answers(made):
    """What the page's server answers with, by the chain's model; its images are read from where the chain has run."""
    from img2prompt import Predictor
    from img2prompt.app.answers import Answers, Gallery

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        return Answers(Predictor.load("outputs", "cpu"), Gallery.load(made / "outputs"))


@contextmanager
def running(answers, hosts=(), memory=None, **limits):
    """The port of a server with these answers, and the server."""
    from img2prompt.app.batching import Batcher
    from img2prompt.app.server import application, listen, server
    from img2prompt.app.uploads import Memory

    batches = Batcher(answers, **limits)
    started = server(application(answers, "tiny", batches, memory or Memory()), hosts)
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        bound.listen()
        thread = Thread(target=started.run, args=([bound],))
        thread.start()
        try:
            yield port, started
        finally:
            started.should_exit = True
            thread.join(20)
    assert not thread.is_alive()
