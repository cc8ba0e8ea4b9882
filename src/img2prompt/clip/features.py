"""CLIP on images and prompts: image and text embeddings, pooled features, and the outputs of frozen layers."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.model import convert_weights_to_lp
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from img2prompt.clip.model import Clip, load_clip, view
from img2prompt.clip.params import FreezeParams
from img2prompt.clip.towers import frozen, is_cut, project, tower
from img2prompt.core.blocks import blocks
from img2prompt.core.device import autocast, has_bfloat16, off, on_cuda, onto
from img2prompt.core.engine import grown
from img2prompt.core.images import open_image
from img2prompt.core.progress import progress
from img2prompt.core.storage import resume_folder, room


class Images(Dataset):
    """The rows' images as CLIP's input, (3, size, size) float32; a row without an image gets a mid-grey one.

    Args:
        references: for each row, where its image is (as `open_image` takes it), or None.
        transform: CLIP's own, of an RGB image; or what gives a list of such inputs, and then a batch is one too.
    """

    def __init__(
        self, references: Sequence[str | None], transform: Callable[[Image.Image], Tensor | list[Tensor]]
    ) -> None:
        self._references, self._transform = list(references), transform

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor | list[Tensor]:
        """The transformed image of `(row, epoch)`: (3, size, size) float32, or a list of such."""
        return self._transform(self.look(*key))

    def look(self, row: int, epoch: int | None) -> Image.Image:
        """The RGB image of a row, the same in every epoch."""
        reference = self._references[row]
        return Image.new("RGB", (64, 64), (128, 128, 128)) if reference is None else open_image(reference)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._references)

    def batches(self, rows: list[np.ndarray], epoch: int | None = None) -> Iterator[Any]:
        """Yield (b, 3, size, size) float32, or a list of such, for each batch of row numbers; processes read ahead."""
        yield from read_ahead(self, [[(int(row), epoch) for row in batch] for batch in rows])


def read_ahead(
    items: Dataset, batches: Sequence[Sequence], collate: Callable[[list], object] | None = None
) -> Iterator[Any]:
    """Yield a dataset's items batch by batch, in order; of more than 256 items worker processes read ahead.

    Args:
        items: by key.
        batches: of each the keys.
        collate: makes a batch of its items; None: as torch does, which stacks tensors.
    """
    workers = min(torch.get_num_threads(), 16) if sum(map(len, batches)) > 256 else 0
    # A generator of its own: to seed the workers it would draw from torch's, and dropout would be another.
    own = torch.Generator()
    yield from DataLoader(items, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=own)


def stem(split: str, seen: str) -> str:
    """The prefix of a split's file names: `train` for the plain view, and for another view, say, `train_flip`."""
    return split if seen == "plain" else f"{split}_{seen}"


class Fixed:
    """Layers of an image tower that do not train, in the precision in which the device runs them fastest.

    On CUDA that is mixed precision with half. A CPU that multiplies matrices in bfloat16 does so, three to five times
    as fast; features then have cosine deviations of 1e-4 and less. Not so towers with batch norm, which are of
    convolutions: EfficientNet-lite0 is 1.4 times as fast, and 4e-3 off. They stay in float32.

    Args:
        layers: in evaluation mode; they are moved to the device and else left as they are.
        device: a torch device.
    """

    def __init__(self, layers: nn.Module, device: str) -> None:
        layers = layers.to(device).eval()
        convolutional = any(isinstance(part, nn.BatchNorm2d) for part in layers.modules())
        self._device, self._bfloat16 = device, not on_cuda(device) and has_bfloat16(device) and not convolutional
        if self._bfloat16:
            layers = copy.deepcopy(layers)
            convert_weights_to_lp(layers, torch.bfloat16)  # once: autocast alone would do so for each batch
        self._layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        """The layers' output for images (b, 3, side, side) or for what layers before them gave."""
        low = torch.autocast("cpu", torch.bfloat16) if self._bfloat16 else autocast(self._device, torch.float16)
        # no_grad and not inference_mode: under autocast the latter casts attention layers' weights in every call.
        with torch.no_grad(), low:
            return self._layers(x.to(memory_format=torch.channels_last) if x.ndim == 4 else x)


class Embedder:
    """One pass of an image through CLIP's tower.

    Args:
        clip: on the device.
        device: a torch device.
        keep: the number of last layers whose input is wanted too.
        wanted: of `image`, `pooled` and `frozen`; what is not wanted is not computed.
        views: of the images, as `clip.model.view` names them; `image` is of the plain one alone.

    Raises:
        ValueError: the tower has fewer than `keep` layers, or no such view.
    """

    def __init__(
        self,
        clip: Clip,
        device: str,
        keep: int,
        wanted: Sequence[str] = ("image", "pooled", "frozen"),
        views: Sequence[str] = ("plain",),
    ) -> None:
        layers = tower(clip.model.visual)
        before = frozen(layers, keep)
        self._visual, self.device, self._wanted = clip.model.visual, device, {*wanted, "within"}
        self._frozen, self._last = Fixed(before, device), Fixed(layers[len(before) :], device)
        self.views = {name: view(clip, name) for name in views}
        self._made_of = clip.folder, device, keep

    def __reduce__(self) -> tuple[Callable[..., Embedder], tuple]:
        """Pickled as what it is loaded from."""
        return _load, (*self._made_of, tuple(self._wanted - {"within"}), tuple(self.views))

    def only(self, wanted: Sequence[str], views: Sequence[str]) -> Embedder:
        """The same layers, of which less is wanted."""
        found = object.__new__(Embedder)
        vars(found).update(vars(self))
        found._wanted, found.views = {*wanted, "within"}, {name: self.views[name] for name in views}
        return found

    def __call__(self, x: Tensor, seen: str = "plain") -> dict[str, Tensor]:
        """Of a batch (b, 3, size, size) float32 of a view, what is wanted, on the device.

        `image` (b, embed_dim) float32, CLIP's projected embeddings I(x), rows of norm 1; `pooled` (b, d) float32, the
        tower's pooled output V(x), not normalised; `frozen` (b, ...) float16, the input of the last layers.

        Raises:
            ValueError: the input of the last layers is beyond half precision.
        """
        found = self.launch(x.to(self.device), seen)
        within_half(found.pop("within"))
        return found

    def launch(self, x: Tensor, seen: str = "plain") -> dict[str, Tensor]:
        """As a call, but of a batch on the device, for whose results nobody waits yet.

        `within` () bool is for `within_half`.
        """
        wanted = self._wanted if seen == "plain" else self._wanted - {"image"}
        with torch.no_grad():
            inputs = self._frozen(x)
            found = {"within": torch.ones((), dtype=torch.bool, device=x.device)}
            if "frozen" in wanted:
                found["frozen"] = inputs.half()
                found["within"] = found["frozen"].isfinite().all()
            if wanted & {"image", "pooled"}:
                found["pooled"] = self._last(inputs).float()
            if "image" in wanted:
                found["image"] = functional.normalize(project(self._visual, found["pooled"]))
        return {name: found[name] for name in ("image", "pooled", "frozen", "within") if name in wanted}


def _load(folder: Path, device: str, *rest: Any) -> Embedder:  # noqa: ANN401
    return Embedder(load_clip(folder, device), device, *rest)


def within_half(within: Tensor) -> None:
    """Check the flag that all outputs of frozen layers were finite in half precision.

    Raises:
        ValueError: some were not.
    """
    if not within:
        raise ValueError("model_a.unfreeze: what the frozen layers give is beyond half precision: take another number")


def image_features(
    embedders: Mapping[str, Embedder], references: Sequence[str | None], batch_size: int, folder: Path, split: str
) -> dict[str, Path]:
    """Embed all views of the images by several CLIPs; a killed run resumes from what is in `folder`.

    Each image is read and decoded once.

    Args:
        embedders: by CLIP; on one device.
        references: for each row, where its image is, or None.
        batch_size: images that go through the towers together.
        folder: for the files; use one folder for the same arguments only.
        split: of the images, for the files' names.

    Returns:
        The .npy files by name, one for each output of an embedder: `{clip}/{split}_image`, `{clip}/{split}_pooled`,
        `{clip}/{split}_frozen`; for another view than the plain one `{clip}/{split}_{view}_pooled` and so on.

    Raises:
        ValueError: an image cannot be decoded, or as `Embedder`.
    """
    for clip in embedders:
        (folder / clip).mkdir(parents=True, exist_ok=True)
    (device,) = {embedder.device for embedder in embedders.values()}
    rows, what = list(references), f"CLIP on {split} images"
    batches = [rows[part] for part in blocks(len(rows), batch_size)]
    run = partial(_embed, embedders, split, what)
    return grown(folder, batches, run, what, "image", on_cuda(device))


def _embed(
    embedders: Mapping[str, Embedder], split: str, what: str, left: Sequence[Sequence[str | None]]
) -> Iterator[dict[str, np.ndarray]]:
    """Of each batch of references what `image_features` writes."""
    passes = [(clip, embedder, seen) for clip, embedder in embedders.items() for seen in embedder.views]
    references = list(chain.from_iterable(left))
    images = Images(references, lambda image: [embedder.views[seen](image) for _, embedder, seen in passes])
    ends = np.cumsum([0, *map(len, left)])
    rows = [np.arange(*pair) for pair in pairwise(ends)]
    (device,) = {embedder.device for embedder in embedders.values()}

    def launch(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        found = {}
        for (clip, embedder, seen), x in zip(passes, inputs, strict=True):
            outputs = embedder.launch(x, seen)
            found |= {f"{clip}/{stem(split, seen)}_{name}": value for name, value in outputs.items()}
        return found

    batches = progress(images.batches(rows), what, len(left), "batch")
    every = onto(chain.from_iterable(batches), device, torch.float16)
    inputs = zip(*[every] * len(passes), strict=True)  # one batch's views at a time
    for found in off(map(launch, inputs), device):
        for name in [name for name in found if name.endswith("_within")]:
            within_half(found.pop(name))
        yield {name: value.numpy() for name, value in found.items()}


def is_stored(
    clip: Clip, keep: int, count: int, views: Sequence[str], freeze: FreezeParams, folder: Path, name: str
) -> bool:
    """Whether the output of a tower's frozen layers is stored, so that they run once and not in every epoch.

    It prints how much there is to store. `folder`: where the files grow; what is there of them takes no more space.

    Args:
        keep: the number of last layers that train; 0: there is nothing to store.
        count: of the images.
        views: of the images, each stored.
        freeze: what params.yaml says.
        name: of the CLIP and of the images, to be printed.

    Raises:
        ValueError: there is more to store than space on the disk.
    """
    layers = tower(clip.model.visual)
    if keep and not is_cut(layers):
        print(f"{name}: this tower cannot be cut into layers, so its frozen ones run in every epoch")
    if not keep or not is_cut(layers):
        return False
    grey, before = Image.new("RGB", (64, 64), (128, 128, 128)), frozen(layers, keep)
    where = next(clip.model.parameters()).device
    with torch.no_grad():
        each = sum(2 * before(view(clip, seen)(grey)[None].to(where)).numel() for seen in views)
    size, limit = each * count, freeze.limit * 1e9
    stored = size <= limit if freeze.store == "auto" else freeze.store
    choice = "stored" if stored else "not stored, so they run in every epoch (freeze.store, freeze.limit)"
    print(f"{name}: frozen layers give {_amount(size)}, {_amount(each)} for each of {count} images: {choice}")
    there = sum(path.stat().st_size for path in folder.rglob("*_frozen.npy"))
    free = shutil.disk_usage(folder).free + there
    if stored and free < size:
        raise ValueError(
            f"freeze.store: {_amount(size)} to store, and {_amount(free)} free for {folder}: "
            "free some, or set it to false"
        )
    return stored


def _amount(size: float) -> str:
    unit, scale = next(((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6)) if size >= scale), ("KB", 1e3))
    return f"{size / scale:.3g} {unit}"


def ahead_folder(
    train: Path, clips: Sequence[Path], keep: Sequence[int], freeze: FreezeParams, batch_size: int, device: str
) -> Path:
    """Where embed_images, whose pass through the tower is longer, leaves what freeze would compute.

    train: the table of train images. clips: the CLIPs' folders. keep: of each the number of layers that train.
    """
    return resume_folder(
        "freeze", f"{list(keep)} {freeze} {batch_size} {device}", train, *clips, room("core"), room("clip")
    )


def text_features(clip: Clip, prompts: Sequence[str], batch_size: int, device: str, folder: Path) -> Path:
    """CLIP text embeddings C(p), in bfloat16 where the device has it; a killed run resumes from what is in `folder`.

    Returns the path of the .npy file: (n, embed_dim) float32, rows of norm 1.
    """
    prompts = list(prompts)
    parts = [prompts[rows] for rows in blocks(len(prompts), 8 * batch_size)]  # of which texts of a length go together
    run = partial(_embed_texts, clip, batch_size, device)
    if parts:
        return grown(folder, parts, run, "CLIP on prompts", "prompt", on_cuda(device))["text"]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "text.npy", next(run([["no prompt"]]))["text"][:0])
    return folder / "text.npy"


def _embed_texts(
    clip: Clip, batch_size: int, device: str, left: Sequence[Sequence[str]]
) -> Iterator[dict[str, np.ndarray]]:
    """Of each batch of prompts `text`: (b, embed_dim) float32, rows of norm 1."""
    # Around all batches, as autocast keeps the weights that it has cast for as long as it lasts.
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bfloat16(device)):
        for part in progress(left, "CLIP on prompts", unit="batch"):
            tokens = clip.tokenizer(list(part))
            ends = tokens.shape[1] - (tokens != 0).flip(1).int().argmax(1)  # behind them all is padding
            order = ends.argsort(stable=True)
            batches = [(tokens[rows].to(device), int(ends[rows].max())) for rows in order.split(batch_size)]
            found = [_embedded(clip.model, *batch) for batch in batches]
            yield {"text": functional.normalize(torch.cat(found).float())[order.argsort()].cpu().numpy()}


def _embedded(model: nn.Module, tokens: Tensor, length: int) -> Tensor:
    """Text embeddings (b, embed_dim) of tokens (b, context) int64, which are padding from `length` on."""
    tower, name = (model.text, "text.") if hasattr(model, "text") else (model, "")
    mask, pool = getattr(tower, "attn_mask", None), getattr(tower, "pool_type", getattr(tower, "text_pool_type", None))
    if mask is None or pool not in ("argmax", "eos") or getattr(tower, "cls_emb", None) is not None:
        return model.encode_text(tokens)
    # In a causal tower nothing behind a text's last token, which is the one it takes, has a part in its embedding.
    shorter = {"positional_embedding": tower.positional_embedding[:length], "attn_mask": mask[:length, :length]}
    weights = {name + key: value for key, value in shorter.items()}
    return functional_call(model, weights, kwargs={"text": tokens[:, :length]})[1]
