"""Writing a bundle of a finished run."""

from __future__ import annotations

import io
import platform
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from img2prompt.clip.model import image_only
from img2prompt.clip.params import sample_tower
from img2prompt.core.blocks import blocks
from img2prompt.core.device import float32_only
from img2prompt.core.images import open_image
from img2prompt.core.process import threads
from img2prompt.core.progress import progress
from img2prompt.core.storage import read_json, write_json
from img2prompt.ensemble.members import kind_of
from img2prompt.ensemble.mixture import Mixture
from img2prompt.predict.bundle import FORMAT, Bundle, digest_of, file_of
from img2prompt.predict.predictor import Predictor
from img2prompt.prompts.encoder import EMBEDDED, folder_of

# What is tried to store in half precision, the most first. A tower's errors add up over its layers, the heads' do not.
HALVES = (("clip", "model_a", "knn"), ("model_a", "knn"), ())
MOVED = 2.5e-4  # an element of a canary's vector, at most: then other images' move by less than 1e-3
THUMBNAIL = 128  # pixels of the longer side
CANARIES = [f"canaries/{number}.png" for number in range(3)]
VECTORS = "canaries/vectors.npy"


@dataclass
class _Files:
    """The files of a bundle that is being written, by place; `half` names the parts stored in half precision."""

    folder: Path
    half: Collection[str] = ()
    found: dict[str, Path] = field(default_factory=dict)

    def at(self, place: str) -> Path:
        """The file to write for a place."""
        self.found[place] = self.folder / file_of(place)
        return self.found[place]

    def copy(self, source: Path, place: str) -> None:
        shutil.copyfile(source, self.at(place))

    def tensors(self, weights: dict[str, Tensor], place: str, settings: dict[str, str] | None = None) -> None:
        if place.partition("/")[0] in self.half:  # but for norms and biases, which are small
            weights = {name: x.half() if x.is_floating_point() and x.ndim > 1 else x for name, x in weights.items()}
        self.at(place).write_bytes(save(weights, settings))  # `save_file` would keep it from other users

    def array(self, source: Path, place: str) -> None:
        values = np.load(source, mmap_mode="r")
        np.save(self.at(place), values.astype(np.float16) if place.partition("/")[0] in self.half else values)


def export(outputs: Path, folder: Path, clips: Sequence[str], half: bool = True, thumbnails: bool = True) -> list[str]:
    """Write the trained model of a run as a bundle; the same run gives the same bytes.

    Args:
        outputs: the run's, as the pipeline leaves them; the images of its train table are read for thumbnails.
        folder: an empty one.
        clips: the names of the CLIPs in the order of their numbers, for the licences.
        half: store weights, keys and targets in half precision where the canaries' vectors allow it.
        thumbnails: write them too.

    Returns:
        What there is to say about it, in lines.

    Raises:
        OSError, ValueError: the run is not complete, or an image of the train table is gone.
    """
    mixture = Mixture.load(outputs / "ensemble")
    members = mixture.members
    gone = [name for name in mixture.weights if name not in members]
    files = _Files(folder)
    for place, image in zip(CANARIES, draw_canaries(), strict=True):
        image.save(files.at(place))
    images = [files.found[place] for place in CANARIES]
    with float32_only():  # half precision moves the vectors by less than bfloat16 does
        whole = Predictor.load(outputs, "cpu")
        known = whole.predict(images).embeddings
        for parts in HALVES if half else HALVES[-1:]:
            files.half = parts
            _model(outputs, files, mixture.only(members))
            try:
                vectors = Predictor.of_files(files.found, "cpu", members).predict(images).embeddings
            except ValueError:  # something is beyond half precision
                if not parts:
                    raise
                continue
            moved = float(np.abs(vectors - known).max())
            if moved < MOVED:
                break
    np.save(files.at(VECTORS), vectors)
    _words(outputs / "words", files)
    _prompts(outputs / "prepare", files.at("prompts.parquet"))
    if thumbnails:
        _thumbnails(outputs / "prepare/train.parquet", files.at("thumbnails.parquet"))
    licences = _licences(outputs, clips, thumbnails)
    for name in ("LICENSE", "NOTICE"):
        files.at(name).write_text(_text("img2prompt", name), encoding="utf-8")
    files.at("LICENSE-Apache-2.0").write_text(_text("sentence-transformers", "LICENSE"), encoding="utf-8")
    said = [
        f"members: {', '.join(members)}" + (f"; left out, for their weight is 0: {', '.join(gone)}" if gone else ""),
        f"half precision: {', '.join(files.half) or 'nothing'}; it moves the canaries' vectors by {moved:.1g}",
        "words: yes" if (outputs / "words").is_dir() else "words: none, for there is no outputs/words",
        f"thumbnails: {'yes' if thumbnails else 'none, as asked for'}",
    ]
    files.at("README.md").write_text(_card(outputs, said, licences), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "versions": versions(),
        "precision": {part: "float16" if part in files.half else "float32" for part in HALVES[0]},
        "members": {name: mixture.weights[name] for name in members},
        "preprocessing": {str(number): whole.preprocessing[str(number)] for number in _clips(members)},
        "canaries": {"images": CANARIES, "vectors": VECTORS},
        "scores": read_json(outputs / "scores.json") if (outputs / "scores.json").is_file() else None,
        "licences": licences,
        "files": {place: {"file": file.name, "sha256": digest_of(file)} for place, file in sorted(files.found.items())},
    }
    Bundle(folder, manifest).write()
    Predictor.load(folder, "cpu")  # as whoever gets it will
    return said


def draw_canaries() -> list[Image.Image]:
    """Three images, always the same: a disc before a sky, stripes with a window, and coarse noise."""
    y, x = np.mgrid[:180, :240]
    sky = np.stack([255 - y, 120 + y // 3, 60 + x // 2], axis=-1)
    sky[(x - 150) ** 2 + (y - 70) ** 2 < 45**2] = (250, 220, 90)
    stripes = np.stack([(x + y) // 12 % 2 * 200, x // 20 % 2 * 120 + 60, y // 9 % 3 * 80], axis=-1)
    stripes[40:130, 70:160] = (30, 90, 200)
    noise = np.random.default_rng(0).integers(0, 256, (15, 20, 3)).repeat(12, axis=0).repeat(12, axis=1)
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in (sky, stripes, noise)]


def _model(outputs: Path, files: _Files, mixture: Mixture) -> None:
    """What prediction needs of the run, in the files' precision."""
    mixture.save_weights(files.at("ensemble/weights.json"))
    files.copy(outputs / "ensemble/constant.npy", "ensemble/constant.npy")
    for number in _clips(mixture.weights):
        config, weights = image_only(outputs / f"clip/{number}")
        write_json(files.at(f"clip/{number}/open_clip_config.json"), config)
        files.tensors(weights, f"clip/{number}/open_clip_model.safetensors")
    for kind, number in map(kind_of, mixture.weights):
        if kind == "model_b":
            bank = outputs / f"knn/{number}"
            for name in ("choice.json", "rows.npy"):
                files.copy(bank / name, f"knn/{number}/{name}")
            for name in ("targets", *(f"{kind}_keys" for kind in read_json(bank / "choice.json")["settings"])):
                files.array(bank / f"{name}.npy", f"knn/{number}/{name}.npy")
            continue
        for fold in mixture.folds:
            place = f"model_a/fold_{fold}/{number}/{kind}.safetensors"
            with safe_open(outputs / place, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                files.tensors(weights, place, file.metadata())


def _clips(members: Collection[str]) -> list[int]:
    """The numbers of the CLIPs that these members are on."""
    return sorted({number for _, number in map(kind_of, members)})


def _words(folder: Path, files: _Files) -> None:
    """What says vectors in words, with the text encoder's folder."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        files.copy(path, f"words/{path.name}")
    told = read_json(folder / "words.json")
    encoder = folder / told["encoder"]
    encoder = encoder if encoder.is_dir() else folder_of(told["encoder"])
    if not (encoder / "model.safetensors").is_file():
        raise ValueError(f"{encoder}: no model.safetensors: a bundle holds no weights in other formats")
    for path in sorted(encoder.rglob("*")):
        if path.suffix in (".json", ".md", ".model", ".safetensors", ".txt"):
            files.copy(path, f"words/encoder/{path.relative_to(encoder)}")
    write_json(files.at("words/words.json"), told | {"encoder": "encoder"})


def _prompts(prepared: Path, target: Path) -> None:
    """Write `id` and `prompt` of the train rows and, after them, of prompts without images: what knn's rows count."""
    tables = [pq.read_table(prepared / f"{name}.parquet", columns=["id", "prompt"]) for name in ("train", "texts")]
    pq.write_table(pa.concat_tables(tables), target)


def thumbnail(reference: str) -> bytes:
    """A small copy of an image, as JPEG.

    Raises:
        OSError, ValueError: as `open_image`.
    """
    image, buffer = open_image(reference), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _thumbnails(table: Path, target: Path) -> None:
    """Write the train table's images as a parquet file with the column `image`: JPEG, row by row in its order."""

    references = pq.read_table(table, columns=["image"])["image"].to_pylist()
    schema = pa.schema({"image": pa.binary()})
    try:
        with (
            pq.ParquetWriter(target, schema, compression="none") as writer,
            ThreadPoolExecutor(threads()) as pool,
            progress(None, "thumbnails", len(references), "image") as bar,
        ):
            for rows in blocks(len(references), 1024):
                writer.write_table(pa.table([list(pool.map(thumbnail, references[rows]))], schema=schema))
                bar.update(rows.stop - rows.start)
    except (OSError, ValueError) as error:
        raise ValueError(f"thumbnails: {error}; --no-thumbnails does without the train images") from error


def versions() -> dict[str, str]:
    """Of Python, of this package and of what it needs for prediction: the versions at work here."""
    needed = [found for found in metadata.requires("img2prompt") or [] if "extra ==" not in found]
    names = ["img2prompt", *(re.match(r"[\w.-]+", found)[0] for found in needed)]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _text(package: str, name: str) -> str:
    """A licence file of an installed package."""
    # A source tree that is in the path may have metadata of its own, without licences.
    texts = (found.read_text(f"licenses/{name}") for found in metadata.distributions(name=package))
    text = next(filter(None, texts), None)
    if text is None:
        raise ValueError(f"{package} is installed without its {name}: install it again")
    return text


def _licences(outputs: Path, clips: Sequence[str], thumbnails: bool) -> dict[str, str]:
    """What in the bundle is under which licence."""
    apache = "Apache-2.0 (LICENSE-Apache-2.0)"
    sample = "sample" in pq.read_table(outputs / "prepare/train.parquet", columns=["source"])["source"].to_pylist()
    found = {"img2prompt's own code, texts and heads": "MIT (LICENSE)"}
    for number, name in enumerate("of a local folder" if Path(name).is_dir() else name for name in clips):
        of_sample = f"{apache}; EfficientNet-Lite, changed: trained further, last layers of each fold again"
        found[f"CLIP {number}, {name}"] = of_sample if sample_tower(name) else "the one that its publisher names"
    if (outputs / "words/words.json").is_file():
        encoder = read_json(outputs / "words/words.json")["encoder"]
        found[f"text encoder, {Path(encoder).name}"] = (
            f"{apache}; unchanged" if encoder == EMBEDDED else "the one that its publisher names"
        )
    if thumbnails:
        of_sample = "CC-BY-SA-4.0 where they show the sample's images: see NOTICE" if sample else ""
        found["thumbnails"] = of_sample or "that of the train images"
    return found


def _card(outputs: Path, said: Sequence[str], licences: dict[str, str]) -> str:
    """The model card, in Markdown."""
    table = outputs / "scores/scores.md"
    scores = table.read_text(encoding="utf-8") if table.is_file() else "Not scored.\n"
    return f"""# From images to the embeddings of their prompts

A bundle of img2prompt: the trained model of one run, in one folder. For an image it predicts the 384-d sentence
embedding (norm 1) of the prompt that the image was made from, and says it in words.

    pip install img2prompt-*.whl
    img2prompt predict --bundle . PICTURE...

    from img2prompt import Predictor
    Predictor.load(".").predict(["a.png", "b.png"]).embeddings    # (2, 384), norm 1

Loading checks the SHA-256 of every file, and that the three canaries are predicted as they were where the bundle was
written. It needs no network and no pickle.

{_list(said)}

## Scores

Mean cosine to the true embedding, by the run that the model is from: `oof` out of fold, `test` on its test images.

{scores}
## Meant for

Images of the kind that it was trained on. What it says of others is a guess, and a prompt that it composes is put
together from training prompts. It does not tell who made an image, nor of whom or what it is.

## Licences

{_list(f"{what}: {licence}" for what, licence in licences.items())}

manifest.json says which file is what, how images are prepared, and which versions wrote it.
"""


def _list(lines: Sequence[str] | Iterator[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
