"""What only a GPU shows; skipped where there is none."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import pipelines  # noqa: F401 - sets what deterministic matrix products need before CUDA starts
from img2prompt.clip.features import Embedder, image_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.towers import frozen, tower, unfrozen
from img2prompt.core.device import device, float32_only, off, onto
from img2prompt.model_a.heads import LinearHead
from img2prompt.model_a.inputs import Drawn, Stored
from img2prompt.model_a.prediction import predict
from img2prompt.model_a.ridge import refit, ridge
from img2prompt.model_a.training import Schedule, fit
from img2prompt.model_a.validation import Validation
from img2prompt.model_b.neighbours import nearest
from img2prompt.prompts.dedup import deduplicate
from img2prompt.prompts.folds import make_folds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")

rng = np.random.default_rng(0)


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.delenv("IMG2PROMPT_DEVICE", raising=False)
    yield device()
    torch.use_deterministic_algorithms(False)


def test_copies_are_in_order_and_whole(cuda):
    batches = [torch.from_numpy(rng.normal(size=(1 + n % 3, 5000)).astype(np.float16)) for n in range(40)]
    there = list(onto(iter(batches), cuda))
    assert all(x.is_cuda and x.dtype == torch.float32 for x in there)
    assert all(torch.equal(x.cpu(), batch.float()) for x, batch in zip(there, batches, strict=True))
    back = list(off(({"double": 2 * x, "sum": x.sum(1)} for x in onto(iter(batches), cuda)), cuda))
    assert all(torch.equal(x["double"], 2 * batch.float()) for x, batch in zip(back, batches, strict=True))
    assert list(onto(iter([]), cuda)) == []
    assert list(off(iter([]), cuda)) == []


def learned(kind, device, resume, count=2, checkpoints=False, stored=True):
    """Train the last blocks of a small vision transformer of timm's and predict."""
    torch.manual_seed(0)
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=4, img_size=64, class_token=True).eval()
    layers = tower(SimpleNamespace(trunk=trunk))
    images = torch.randn(200, 3, 64, 64, generator=torch.Generator().manual_seed(1)).half().float()
    targets = nn.functional.normalize(torch.randn(200, 384, generator=torch.Generator().manual_seed(2)), dim=1)
    with torch.no_grad():
        pooled = layers(images)
    store = Drawn(
        SimpleNamespace(batches=lambda rows, epoch: (images[batch] for batch in rows)), frozen(layers, count), device
    )
    if stored:
        with torch.no_grad():
            found = torch.cat(list(store.batches([np.arange(200)], None))).half().cpu().numpy()
        store = Stored(found, device)
    start, parts = ridge(pooled, targets), np.arange(200) % 3
    head = LinearHead(start, 0.2, 0, refit(start, pooled, targets, [parts == part for part in range(3)]))
    rows, watch = np.arange(160), np.arange(160, 200)
    validation = Validation(store, watch, targets[watch].numpy(), watch, -9.0, 64, device)
    plan = Schedule(
        epochs=2, lr_tower=1e-4, lr_head=1e-4, layer_decay=0.9, mse=0.0, pull=1.0, ema=0.0, batch_size=32, accumulate=2,
        weight_decay=0.1, warmup=0.1, clip_grad=1.0, grad_checkpointing=checkpoints, seed=(0,),
    )  # fmt: skip
    last = unfrozen(layers, count)
    fit(last, head, store, targets.numpy()[None], rows, plan, device, resume / f"{kind}.file", validation, kind, parts)
    return predict(last, head, [store], np.arange(200), 64, device)


def test_training_with_attention_repeats_byte_for_byte(cuda, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a kernel that may give other bytes
        found = [learned(f"run {n}", cuda, tmp_path, checkpoints=n == 2) for n in range(3)]
    assert np.array_equal(found[0], found[1])
    assert np.allclose(found[0], found[2], atol=2e-3)


def test_training_is_near_the_cpus_and_needs_no_store(cuda, tmp_path):
    found = {name: learned(name, where, tmp_path, stored=stored) for name, where, stored in (
        ("gpu", cuda, True), ("drawn", cuda, False), ("cpu", "cpu", True),
    )}  # fmt: skip
    assert np.abs(found["gpu"] - found["drawn"]).max() < 1e-3
    assert (found["gpu"] * found["cpu"]).sum(1).min() > 0.99


def test_features_are_near_the_cpus(cuda, tiny_clip, tmp_path):
    references = []
    for number in range(9):
        references.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(references[-1])
    clips = {where: load_clip(tiny_clip, where) for where in ("cpu", cuda)}
    with float32_only():
        embedders = {where: Embedder(clip, where, 2) for where, clip in clips.items()}
    files = {
        where: image_features({"0": embedder}, references, 4, tmp_path / where, "train")
        for where, embedder in embedders.items()
    }
    for name in files["cpu"]:
        a, b = (np.load(found[name]).astype(np.float32) for found in files.values())
        assert a.shape == b.shape
        assert np.abs(a - b).max() < 2e-2


def test_cut_attention_is_the_whole_tower_on_the_gpu_too(cuda):
    trunk = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3, img_size=64).eval().to(cuda)
    images = torch.randn(4, 3, 64, 64, device=cuda)
    with torch.no_grad():
        assert torch.allclose(tower(SimpleNamespace(trunk=copy.deepcopy(trunk)))(images), trunk(images), atol=1e-4)


def test_neighbours_filter_and_groups_are_the_cpus(cuda):
    rows = rng.normal(size=(3000, 32)).astype(np.float32)
    rows = np.concatenate([rows, rows[:500] + rng.normal(scale=0.15, size=(500, 32)).astype(np.float32)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    here, there = (nearest(rows[:200], rows, 10, where) for where in ("cpu", cuda))
    assert np.allclose(here.distance, there.distance, atol=1e-5)
    assert (here.index == there.index).mean() > 0.999  # but for ties
    kept = [deduplicate(rows, 0.9, device=where).kept for where in ("cpu", cuda)]
    assert 3000 <= kept[0].sum() < 3400  # both sides of the threshold
    assert np.array_equal(*kept)
    groups = [make_folds(rows, [0, 1, 2], 0.8, 0.9, 0, device=where).group for where in ("cpu", cuda)]
    assert np.array_equal(*groups)
