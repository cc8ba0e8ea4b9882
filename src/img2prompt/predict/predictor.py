"""The trained model as one object: from images to embeddings of their prompts, and to words."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from open_clip.transform import PreprocessCfg
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from img2prompt.clip.features import Embedder, read_ahead, within_half
from img2prompt.clip.model import Clip, load_clip
from img2prompt.core.blocks import blocks
from img2prompt.core.device import device as default_device
from img2prompt.core.device import off, onto
from img2prompt.core.images import decode, open_image, to_rgb
from img2prompt.core.storage import digest, numbered
from img2prompt.ensemble.members import kind_of, name_of
from img2prompt.ensemble.mixture import Mixture
from img2prompt.model_a.trained import Trained
from img2prompt.model_b.bank import Bank
from img2prompt.predict.bundle import MANIFEST, Bundle, Links, is_bundle

if TYPE_CHECKING:
    from img2prompt.words.words import Words

Source = str | Path | bytes | Image.Image | None
Error = OSError | ValueError
PARTS = ("clip", "model_a", "knn", "ensemble", "words")  # the stages' folders that are the trained model


@dataclass(frozen=True)
class Prediction:
    """Of m images, in their order.

    embeddings (m, 384) float32, norm 1: the ensemble's. members: by name, each model's (m, 384) float32. errors: for
    each image why it could not be read, or None. What could not be read has the constant answer.
    """

    embeddings: np.ndarray
    members: dict[str, np.ndarray]
    errors: list[Error | None]


@dataclass(frozen=True)
class _OneClip:
    """What a CLIP and the models in use that were trained on it make of a batch of images."""

    number: int
    clip: Clip
    embedder: Embedder
    trained: Trained
    bank: Bank | None
    device: str

    @classmethod
    def load(
        cls, folder: Path, number: int, folds: Sequence[int], device: str, kinds: Collection[str] | None
    ) -> _OneClip:
        """Load the models of some kinds; None: of all that there are."""
        clip = load_clip(folder / f"clip/{number}", device)
        trained = Trained.load([folder / f"model_a/fold_{k}/{number}" for k in folds], clip, device, kinds)
        bank = Bank.load(folder / f"knn/{number}").on(device) if kinds is None or "model_b" in kinds else None
        embedder = Embedder(clip, device, trained.unfreeze, _wanted(trained, bank), trained.views)
        return cls(number, clip, embedder, trained, bank, device)

    def only(self, kinds: Collection[str], views: int | None = None) -> _OneClip:
        """Some of its models; of Model A's family the first views or, by default, all of them."""
        trained, bank = self.trained.only(kinds, views), self.bank if "model_b" in kinds else None
        return replace(
            self, embedder=self.embedder.only(_wanted(trained, bank), trained.views), trained=trained, bank=bank
        )

    def name(self, kind: str) -> str:
        return name_of(kind, self.number)

    def launch(self, views: Iterable[Tensor]) -> dict[str, Tensor]:
        """Model A's family on a batch's views, and what `finish` needs; nobody waits for the device yet."""
        seen = [self.embedder.launch(x, name) for name, x in zip(self.trained.views, views, strict=True)]
        pooled = [found.get("pooled") for found in seen]
        found = self.trained(pooled, [found.get("frozen", found.get("pooled")) for found in seen])
        found["within"] = torch.stack([one["within"] for one in seen]).all()
        if self.bank:
            found["image"] = seen[0]["image"]
        return {self.name(kind): value for kind, value in found.items()}

    def finish(self, found: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """All models' predictions by name, of what `launch` found, now on the CPU."""
        within_half(found[self.name("within")])
        members = {self.name(kind): found[self.name(kind)].numpy() for kind in self.trained.models}
        if self.bank:
            members[self.name("model_b")], _ = self.bank.predict(found[self.name("image")].numpy(), self.device)
        return members


class Predictor:
    """A trained model: CLIPs, the models of all folds on them, their banks of neighbours, and the mix.

    An image's prediction is a function of the image and the model, whatever else is predicted with it.

    >>> from img2prompt import Predictor
    >>> Predictor.load("bundle").predict(["a.png", "b.png"]).embeddings.shape
    (2, 384)
    """

    def __init__(self, clips: Sequence[_OneClip], mixture: Mixture, folder: Path, device: str) -> None:
        self._clips, self._mixture, self._folder, self._device = list(clips), mixture, folder, device
        self._links: Links | None = None  # where the folder is of a bundle's, it lasts as long as they do

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> Predictor:
        """Load a trained model.

        folder: a bundle, or what has clip/N (open_clip folders), model_a/fold_K/N (safetensors), knn/N (keys, targets,
        choice) and ensemble/ (weights.json, constant.npy), as the pipeline's outputs do. Of a bundle the digest of
        every file and the vectors of its canaries are checked. device: a torch device; None: CUDA where it is, else
        the CPU.

        Raises:
            OSError, ValueError: something is missing, damaged, or the parts do not go together.
        """
        folder, device = Path(folder), device or default_device()
        if not is_bundle(folder) and not (folder / "ensemble/weights.json").is_file():
            raise FileNotFoundError(f"{folder}: no trained model: a bundle has {MANIFEST}, outputs have ensemble/")
        if not is_bundle(folder):
            return cls._read(folder, device)
        bundle = Bundle.read(folder)
        found = cls.of_files(bundle.files, device, bundle.manifest["members"])
        found.identity = bundle.manifest["sha256"]
        bundle.check(found.predict(bundle.canaries).embeddings)
        return found

    @classmethod
    def of_files(cls, files: Mapping[str, Path], device: str, members: Collection[str]) -> Predictor:
        """Load some members of a trained model, from files by their places in the pipeline's outputs."""
        links = Links(files)
        found = cls._read(links.folder, device, members)
        found._links = links
        return found

    @classmethod
    def _read(cls, folder: Path, device: str, members: Collection[str] | None = None) -> Predictor:
        mixture = Mixture.load(folder / "ensemble")
        clips = []
        for number in (int(path.name) for path in numbered(folder / "clip")):
            kinds = _kinds(members, number) if members else None
            clips.append(_OneClip.load(folder, number, mixture.folds, device, kinds))
        return cls(clips, mixture, folder, device)

    @cached_property
    def identity(self) -> str:
        """A digest of the files that the model consists of, in hex."""
        return digest(*(self._folder / part for part in PARTS if (self._folder / part).is_dir()))

    @cached_property
    def words(self) -> Words:
        """What says predicted embeddings in words.

        Raises:
            OSError, ValueError: the model has no words, or they cannot be loaded.
        """
        from img2prompt.words.words import Words  # loads a sentence encoder, which vectors alone do not need

        folder = self._folder / "words"
        if not folder.is_dir() and self._links:
            raise ValueError("words: the run that the bundle was exported from had none; there are vectors only")
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder: `dvc repro words` makes it; without it there are vectors only")
        return Words.load(folder, self._device)

    @property
    def weights(self) -> Mapping[str, float]:
        """The members' weights in the ensemble, by name; they sum to 1, beside the constant's."""
        return self._mixture.weights

    @property
    def preprocessing(self) -> dict[str, Any]:
        """By a CLIP's number, how it takes an image, and of which views its models average the predictions."""
        found = {}
        for clip in self._clips:
            preprocess = asdict(PreprocessCfg(**clip.clip.model.visual.preprocess_cfg))
            found[str(clip.number)] = {**preprocess, "views": list(clip.trained.views)}
        return found

    def cheaper(self) -> tuple[str, Predictor] | None:
        """What of the model to do without next where time is short, and the model without it; None: nothing.

        First every view but the plain one, then the member of least weight, as long as another one is left.
        """
        left = self._mixture.members
        if views := {name for clip in self._clips for name in clip.trained.views[1:]}:
            less = f"the views {', '.join(sorted(views))}"
        elif len(left) > 1:
            less = min(left, key=self._mixture.weights.__getitem__)
            left = [name for name in left if name != less]
        else:
            return None
        clips = [clip.only(kinds, 1) for clip in self._clips if (kinds := _kinds(left, clip.number))]
        found = Predictor(clips, self._mixture.only(left), self._folder, self._device)
        found._links = self._links
        return less, found

    def predict(self, images: Sequence[Source], batch_size: int = 64) -> Prediction:
        """Predict images: paths or references (as `open_image` takes them), bytes of files, or PIL images.

        None stands for an image that cannot be read: it gets the constant answer.

        Raises:
            OSError, ValueError: naming the image that is missing or cannot be decoded.
        """
        parts: list[Prediction] = []
        for part in self.stream(images, batch_size):
            if error := next(filter(None, part.errors), None):
                raise error
            parts.append(part)
        names = parts[0].members if parts else ()
        members = {name: np.concatenate([part.members[name] for part in parts]) for name in names}
        embeddings = np.concatenate([self._mixture.constant[None][:0], *(part.embeddings for part in parts)])
        return Prediction(embeddings, members, [None] * len(images))

    def stream(self, images: Sequence[Source], batch_size: int = 64) -> Iterator[Prediction]:
        """Predict images as `predict` does, batch by batch; of many, the next ones are read by worker processes.

        An image that is missing or cannot be decoded has its error among the batch's `errors`.
        """
        pictures = _Pictures(images, [view for clip in self._clips for view in clip.embedder.views.values()])
        waiting: deque[list[Error | None]] = deque()

        def views() -> Iterator[Tensor]:
            batches = [range(len(images))[part] for part in blocks(len(images), batch_size)]
            for seen, errors in read_ahead(pictures, batches, _together):
                waiting.append(errors)
                yield from seen

        every = onto(views(), self._device, torch.float16)
        launched = map(self._launch, zip(*[every] * pictures.views, strict=True))  # one batch's views at a time
        start = 0
        for found in off(launched, self._device):
            errors = waiting.popleft()
            given = [image is not None for image in images[start : start + len(errors)]]
            readable = np.array(given) & [error is None for error in errors]
            members = {name: value for clip in self._clips for name, value in clip.finish(found).items()}
            for value in members.values():
                value[~readable] = self._mixture.constant
            yield Prediction(self._mixture(members, readable), members, errors)
            start += len(errors)

    def _launch(self, views: Sequence[Tensor]) -> dict[str, Tensor]:
        left, found = iter(views), {}
        for clip in self._clips:
            found |= clip.launch(islice(left, len(clip.trained.views)))
        return found


class _Pictures(Dataset):
    """Images as all CLIPs' views take them, each with its error or None; what cannot be read is a mid-grey one."""

    def __init__(self, images: Sequence[Source], transforms: Sequence[Callable[[Image.Image], Tensor]]) -> None:
        self._images, self._transforms = images, transforms
        self.views = len(transforms)

    def __getitem__(self, row: int) -> tuple[list[Tensor], Error | None]:
        source, error = self._images[row], None
        image = Image.new("RGB", (64, 64), (128, 128, 128))
        try:
            image = image if source is None else _rgb(source)
        except (OSError, ValueError) as found:
            error = found
        return [transform(image) for transform in self._transforms], error


def _together(items: Sequence[tuple[list[Tensor], Error | None]]) -> tuple[list[Tensor], list[Error | None]]:
    """A batch: of every view (b, 3, size, size) float32, and the errors."""
    seen, errors = zip(*items, strict=True)
    return [torch.stack(of_view) for of_view in zip(*seen, strict=True)], list(errors)


def _wanted(trained: Trained, bank: Bank | None) -> list[str]:
    """What an `Embedder` is asked for."""
    pooled = "ridge" in trained.models or not trained.unfreeze
    return ["image"] * (bank is not None) + ["pooled"] * pooled + ["frozen"] * (trained.unfreeze > 0)


def _kinds(members: Collection[str], number: int) -> set[str]:
    """Of members by name, the kinds of those of one CLIP."""
    return {kind for kind, of in map(kind_of, members) if of == number}


def _rgb(image: Source) -> Image.Image:
    if isinstance(image, bytes):
        return decode(image)
    return to_rgb(image) if isinstance(image, Image.Image) else open_image(str(image))
