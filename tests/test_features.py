from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from img2prompt.clip.features import Embedder, Fixed, Images, image_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.towers import frozen, tower
from img2prompt.core.images import open_image
from img2prompt.core.storage import grow
from img2prompt.model_a.inputs import Augmented, Drawn
from img2prompt.model_a.params import Augmentation


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(5):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (40, 50 + number, 3), np.uint8)).save(path)
        paths.append(str(path))
    return [*paths, None]


def drawn(references, clip, epoch, row=0, **amount):
    settings = Augmentation(**{"crop": 0.0, "rotation": 0.0, "flip": 0.0} | amount)
    return Augmented(references, clip.transform, settings, seed=0)[(row, epoch)]


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bfloat16(request, monkeypatch):
    """Both kinds of processor."""
    monkeypatch.setattr("img2prompt.clip.features.has_bfloat16", lambda device: request.param)
    return request.param


def inputs(references, clip):
    return torch.stack([clip.transform(Image.open(path).convert("RGB")) for path in references[:5]])


def test_embeddings_agree_with_clip_itself(references, tiny_clip, tmp_path, bfloat16):
    clip = load_clip(tiny_clip, "cpu")
    files = image_features({"0": Embedder(clip, "cpu", 2)}, references, 4, tmp_path, "train")
    image, pooled, frozen = (np.load(files[f"0/train_{name}"]) for name in ("image", "pooled", "frozen"))
    assert (image.shape, pooled.shape, frozen.shape) == ((6, 16), (6, 32), (6, 5, 32))
    assert (image.dtype, pooled.dtype, frozen.dtype) == (np.float32, np.float32, np.float16)
    with torch.no_grad():
        expected = clip.model.encode_image(inputs(references, clip), normalize=True).numpy()
        last = tower(clip.model.visual)[-2:](torch.from_numpy(frozen).float()).numpy()
    assert 1 - (image[:5] * expected).sum(1).min() < (1e-3 if bfloat16 else 1e-6)
    assert np.allclose(np.linalg.norm(image, axis=1), 1, atol=1e-6)
    assert np.allclose(pooled, last, atol=5e-2 if bfloat16 else 2e-2)


def test_each_image_is_decoded_once_for_all_clips_and_views(references, tiny_clip, tmp_path, monkeypatch, bfloat16):
    clips, views = {name: load_clip(tiny_clip, "cpu") for name in ("0", "1")}, ("plain", "flip", "larger")
    embedders = {name: Embedder(clip, "cpu", 2 - int(name), views=views) for name, clip in clips.items()}
    opened = []
    monkeypatch.setattr("img2prompt.clip.features.open_image", lambda path: opened.append(path) or open_image(path))
    files = image_features(embedders, references, 6, tmp_path, "test")
    assert opened == references[:5]
    assert set(files) == {
        f"{name}/test{seen}_{what}"
        for name in clips for seen in ("", "_flip", "_larger") for what in ("image", "pooled", "frozen")
        if what != "image" or not seen
    }  # fmt: skip
    found = {name: np.load(file) for name, file in files.items()}
    for seen in ("", "_flip", "_larger"):  # whatever layers come last
        assert np.array_equal(found[f"0/test{seen}_pooled"], found[f"1/test{seen}_pooled"])
    for seen in views[1:]:
        alone = Embedder(clips["1"], "cpu", 1, ["pooled"], [seen])
        x = torch.stack([alone.views[seen](Images(references, lambda image: image)[(row, None)]) for row in range(6)])
        assert np.array_equal(alone(x, seen)["pooled"].numpy(), found[f"1/test_{seen}_pooled"])


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(references, tiny_clip, tmp_path, monkeypatch):
    embedders = {"0": Embedder(load_clip(tiny_clip, "cpu"), "cpu", 2, views=("plain", "flip"))}
    monkeypatch.setattr("img2prompt.core.engine.grow", partial(grow, seconds=-1))
    expected = image_features(embedders, references, 2, tmp_path / "whole", "train")
    opened = []

    def killed(path):
        opened.append(path)
        if len(opened) == 4:
            raise KeyboardInterrupt
        return open_image(path)

    monkeypatch.setattr("img2prompt.clip.features.open_image", killed)
    with pytest.raises(KeyboardInterrupt):
        image_features(embedders, references, 2, tmp_path / "killed", "train")
    found = image_features(embedders, references, 2, tmp_path / "killed", "train")
    assert opened == [*references[:4], *references[2:5]]
    assert found.keys() == expected.keys()
    assert all(found[name].read_bytes() == expected[name].read_bytes() for name in expected)


def test_what_is_not_wanted_is_not_given_and_the_rest_is_the_same(references, tiny_clip, bfloat16):
    clip = load_clip(tiny_clip, "cpu")
    images = inputs(references, clip)
    embedder = Embedder(clip, "cpu", 2)
    whole = embedder(images)
    assert list(whole) == ["image", "pooled", "frozen"]
    for wanted in (["frozen"], ["pooled"], ["image", "pooled"]):
        for less in (Embedder(clip, "cpu", 2, wanted), embedder.only(wanted, ["plain"])):
            found = less(images)
            assert list(found) == wanted
            assert all(torch.equal(found[name], whole[name]) for name in wanted)
    assert list(embedder(images)) == ["image", "pooled", "frozen"]


def test_what_half_precision_cannot_hold_is_refused(references, tiny_clip, bfloat16):
    clip = load_clip(tiny_clip, "cpu")
    with torch.no_grad():
        clip.model.visual.ln_pre.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"model_a\.unfreeze: .* beyond half precision"):
        Embedder(clip, "cpu", 2)(inputs(references, clip))


def test_layers_that_are_fixed_leave_the_tower_as_it_is(tiny_clip, bfloat16):
    layers = tower(load_clip(tiny_clip, "cpu").model.visual)
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    assert Fixed(layers, "cpu")(torch.randn(2, 3, 32, 32)).dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())


def test_what_is_drawn_is_what_is_stored(references, tiny_clip, bfloat16):
    clip = load_clip(tiny_clip, "cpu")
    images = Images(references, clip.transform)
    (drawn,) = Drawn(images, frozen(tower(clip.model.visual), 2), "cpu").batches([np.arange(6)], None)
    x = torch.stack([images[(row, None)] for row in range(6)])
    assert torch.equal(drawn, Embedder(clip, "cpu", 2, ["frozen"])(x)["frozen"].float())


def test_a_missing_image_is_grey(references, tiny_clip):
    clip = load_clip(tiny_clip, "cpu")
    grey = clip.transform(Image.new("RGB", (64, 64), (128, 128, 128)))
    assert torch.equal(Images(references, clip.transform)[(5, None)], grey)


@pytest.mark.parametrize("amount", [{"crop": 0.5}, {"rotation": 30.0}, {"flip": 0.5}])
def test_augmented_views_differ_and_repeat_by_epoch(references, tiny_clip, amount):
    clip = load_clip(tiny_clip, "cpu")
    plain = drawn(references, clip, None, **amount)
    views = [drawn(references, clip, epoch, **amount) for epoch in range(6)]
    assert any(not torch.equal(view, plain) for view in views)
    assert any(not torch.equal(view, views[0]) for view in views)
    assert all(torch.equal(view, drawn(references, clip, epoch, **amount)) for epoch, view in enumerate(views))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_no_flip_without_asking(tmp_path, tiny_clip, flip):
    """ "left of" and "right of" are told apart by the image's sides."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :20] = 255
    Image.fromarray(image).save(tmp_path / "half.png")
    clip = load_clip(tiny_clip, "cpu")
    for epoch in range(20):
        seen = drawn([str(tmp_path / "half.png")], clip, epoch, crop=0.3, rotation=10.0, flip=flip)
        left, right = seen[..., :8].mean(), seen[..., -8:].mean()
        assert (left > right) == (flip == 0)


def test_augmented_inputs_run_through_the_frozen_layers(references, tiny_clip, bfloat16):
    clip = load_clip(tiny_clip, "cpu")
    before = frozen(tower(clip.model.visual), 2)
    settings = Augmentation(crop=0.3, rotation=0.0, flip=0.0)
    images = Augmented(references, clip.transform, settings, seed=0)
    inputs = Drawn(images, before, "cpu")
    (plain,) = inputs.batches([np.array([1, 0])], None)
    with torch.no_grad():
        expected = before(torch.stack([images[(1, None)], images[(0, None)]])).half().float()
    near = dict(atol=3e-2, rtol=3e-2) if bfloat16 else dict(atol=1e-3, rtol=1e-3)
    assert torch.allclose(plain, expected, **near)
    (augmented,) = inputs.batches([np.array([1, 0])], 0)
    assert not torch.allclose(augmented, expected, **near)


def test_reading_images_leaves_dropouts_random_numbers_alone(references, tiny_clip):
    images = Images(references, load_clip(tiny_clip, "cpu").transform)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(images.batches([np.array([0, 1])]))
    assert torch.equal(torch.rand(3), expected)
