import numpy as np
import pytest
import torch
from PIL import Image

from img2prompt.clip.features import Embedder, Images, image_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.towers import tower
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


def test_embeddings_agree_with_clip_itself(references, tiny_clip, tmp_path):
    clip = load_clip(tiny_clip, "cpu")
    embedder = Embedder(clip, "cpu", 2)
    files = {path.stem: path for path in image_features(clip, references, embedder, 4, tmp_path, "train")}
    image, pooled, frozen = (np.load(files[f"train_{name}"]) for name in ("image", "pooled", "frozen"))
    assert (image.shape, pooled.shape, frozen.shape) == ((6, 16), (6, 32), (6, 5, 32))
    assert (image.dtype, pooled.dtype, frozen.dtype) == (np.float32, np.float32, np.float16)
    images = torch.stack([clip.transform(Image.open(path).convert("RGB")) for path in references[:5]])
    with torch.no_grad():
        assert np.allclose(image[:5], clip.model.encode_image(images, normalize=True), atol=1e-5)
        last = tower(clip.model.visual)[-2:]
        assert np.allclose(pooled, last(torch.from_numpy(frozen).float()), atol=2e-2)


def test_what_is_not_wanted_is_not_given_and_the_rest_is_the_same(references, tiny_clip):
    clip = load_clip(tiny_clip, "cpu")
    images = torch.stack([clip.transform(Image.open(path).convert("RGB")) for path in references[:5]])
    whole = Embedder(clip, "cpu", 2)(images)
    assert list(whole) == ["image", "pooled", "frozen"]
    for wanted in (["frozen"], ["pooled"], ["image", "pooled"]):
        found = Embedder(clip, "cpu", 2, wanted)(images)
        assert list(found) == wanted
        assert all(torch.equal(found[name], whole[name]) for name in wanted)


def test_what_half_precision_cannot_hold_is_refused(references, tiny_clip):
    clip = load_clip(tiny_clip, "cpu")
    images = torch.stack([clip.transform(Image.open(path).convert("RGB")) for path in references[:5]])
    with torch.no_grad():
        clip.model.visual.ln_pre.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"model_a\.unfreeze: .* beyond half precision"):
        Embedder(clip, "cpu", 2)(images)


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


def test_augmented_inputs_run_through_the_frozen_layers(references, tiny_clip):
    clip = load_clip(tiny_clip, "cpu")
    layers = tower(clip.model.visual)
    settings = Augmentation(crop=0.3, rotation=0.0, flip=0.0)
    images = Augmented(references, clip.transform, settings, seed=0)
    inputs = Drawn(images, layers[:-2], "cpu")
    (plain,) = inputs.batches([np.array([1, 0])], None)
    with torch.no_grad():
        expected = layers[:-2](torch.stack([images[(1, None)], images[(0, None)]])).half().float()
    assert torch.allclose(plain, expected, atol=1e-3, rtol=1e-3)
    (augmented,) = inputs.batches([np.array([1, 0])], 0)
    assert not torch.allclose(augmented, expected, atol=1e-3)


def test_reading_images_leaves_dropouts_random_numbers_alone(references, tiny_clip):
    images = Images(references, load_clip(tiny_clip, "cpu").transform)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(images.batches([np.array([0, 1])]))
    assert torch.equal(torch.rand(3), expected)
