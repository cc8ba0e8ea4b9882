"""Nothing of a held-out fold reaches its predictions but its own images: shown on the whole chain, byte by byte."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, chain, change, stage, write_competition
from PIL import Image

from img2prompt.cli.main import main
from img2prompt.model_a.validation import Gain
from img2prompt.prompts import encoder

IDS, HELD_OUT = [3, 7, 9], 3
STAGES = ["prepare", "embed_prompts", "dedup", "folds", "clip", "embed_images", "freeze"]


def write(prompts, texts):
    """The competition's prompts, with the folds that they came with, and prompts without images."""
    with Path("input/train/prompts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["imgId", "prompt", "fold"])
        rows.writerows([f"p{number:03d}", prompt, IDS[number % 3]] for number, prompt in enumerate(prompts))
    Path("input/more.txt").write_text("\n".join(texts) + "\n")


def learn():
    """What predicts the held-out fold, and the search beside it."""
    with pytest.MonkeyPatch.context() as patch:
        # On a tower without knowledge training does no good, and the start would be kept: the point is chosen that has
        # moved the validation rows' scores most, up or down.
        patch.setattr(Gain, "sure", property(lambda gain: abs(gain.mean)))
        stage("model_a", str(HELD_OUT))
        stage("knn")
        main(["search", "pull", "--folds", str(HELD_OUT), "--heads", "model_a"])


def weights():
    return {path.name: path.read_bytes() for path in Path(f"outputs/model_a/fold_{HELD_OUT}/0").glob("*.safetensors")}


def near_texts():
    """Which prompts without images are near a prompt of the held-out fold: they tell as much of it."""
    return np.load("outputs/folds/texts_near.npy")[:, IDS.index(HELD_OUT)]


def predictions():
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    found = {path.name: path.read_bytes() for path in Path(f"outputs/model_a/fold_{HELD_OUT}/0").glob("*_oof.npy")}
    return found | {"model_b": np.load("outputs/knn/0/oof.npy")[fold == HELD_OUT].tobytes()}


def searched():
    return pd.read_csv("outputs/search.csv").drop(columns="seconds")


@pytest.fixture(scope="module", autouse=True)
def alone():
    """Each text is a batch of its own: the last digits of its embedding depend on what shares its batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "ON_CPU", 1)
        yield


@pytest.fixture(scope="module")
def learned(alone, tmp_path_factory, tiny_clip):
    """A folder where the chain has learned, with every guard in use; the prompts, and those without images."""
    folder = tmp_path_factory.mktemp("leaks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prompts = pd.read_csv(write_competition(Path("input/train"), 60, seed=0) / "prompts.csv").prompt.tolist()
        # Rows of one prompt in two folds, of which the first, that trains, is not in the held-out one.
        for number in range(1, 55, 6):
            prompts[number + 2] = prompts[number]
        texts = [f"{prompt}, by a {who}" for who in ("child", "machine") for prompt in dict.fromkeys(prompts)]
        write(prompts, texts)
        Path("params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
        rates = {"epochs": 2}
        change(
            prepare={"train": ["input/train", "input/more.txt"], "test": "input/train"},
            folds={"ids": IDS},
            clip={"model": str(tiny_clip)},
            embed_images={"batch_size": 1},
            model_a={
                "unfreeze": 2,
                "pretrain": True,
                "steps": 4,
                "any_image": True,
                "linear": rates | {"lr_head": 1e-3, "lr_tower": 1e-3},
                **rates,
            },
            knn={"keys": "image", "k": 5, "distance_dim": 2.0},
        )
        chain(STAGES)
        learn()
    return folder, prompts, texts


@pytest.fixture
def copy(learned, tmp_path, monkeypatch):
    """A copy of it, to change."""
    shutil.copytree(learned[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return learned[1:]


def again():
    """Learn anew from what was changed, with dedup, folds and CLIP as they are."""
    chain(["prepare", "embed_prompts", "embed_images", "freeze"])
    learn()


def test_the_guards_have_something_to_guard(learned, monkeypatch):
    monkeypatch.chdir(learned[0])
    texts_kept = np.load("outputs/dedup/texts_kept.npy")
    assert (texts_kept & near_texts()).any()
    assert (texts_kept & ~near_texts()).any()
    fold = pd.read_parquet("outputs/folds/folds.parquet").fold.to_numpy()
    prompts = pd.read_parquet("outputs/prepare/train.parquet").prompt
    trains = np.load("outputs/dedup/kept.npy") & (fold != HELD_OUT)
    assert set(prompts[trains]) & set(prompts[fold == HELD_OUT])
    # Training has moved the heads, and rows that it had not seen have chosen how far.
    choices = pd.read_csv(f"outputs/model_a/fold_{HELD_OUT}/0/choices.csv")
    assert (choices.share > 0).all()
    assert (choices.validation > 1).all()


def test_other_prompts_of_the_held_out_fold_change_none_of_its_predictions(copy):
    before, shown = predictions() | weights(), searched()
    prompts, texts = copy
    write(
        [f"{prompt}, and {number} owls" if number % 3 == 0 else prompt for number, prompt in enumerate(prompts)],
        [f"{text}, and an owl" if near else text for text, near in zip(texts, near_texts(), strict=True)],
    )
    targets = np.load("outputs/embed_prompts/train.npy")
    again()
    assert not np.array_equal(np.load("outputs/embed_prompts/train.npy"), targets)
    assert predictions() | weights() == before
    pd.testing.assert_frame_equal(searched(), shown)


def test_other_images_of_the_held_out_fold_change_nothing_that_was_trained_without_it(copy):
    before, shown, predicted = weights(), searched(), predictions()
    for number in range(0, 60, 3):
        path = Path(f"input/train/images/p{number:03d}.png")
        Image.open(path).rotate(90).point(lambda value: 255 - value).save(path)
    again()
    assert weights() == before
    assert predictions() != predicted
    pd.testing.assert_frame_equal(searched(), shown)
