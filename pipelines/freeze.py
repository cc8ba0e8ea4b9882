"""freeze: the output of every CLIP's frozen layers for the train images, the input of the layers that train."""

import shutil
from pathlib import Path

from img2prompt.clip.features import Embedder, image_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.params import EmbedImagesParams
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, numbered, resume_folder, room, whole_folder
from img2prompt.model_a.params import ModelAParams
from pipelines import run

TRAIN = Path("outputs/prepare/train.parquet")


def main(embed_images: EmbedImagesParams, model_a: ModelAParams) -> None:
    """Of every CLIP write train_frozen.npy (n, ...) float16, and train_{view}_frozen.npy of views that are averaged.

    A CLIP whose tower does not train has an empty folder. So has every CLIP with augmentation: the frozen layers then
    run in every epoch, on other images.
    """
    batch_size, where = embed_images.batch_size, device()
    clips = numbered(Path("outputs/clip"))
    keep = [0 if model_a.augmentation.on else model_a.layers(int(path.name)) for path in clips]
    key = f"{batch_size} {keep} {where}"
    resume = resume_folder("freeze", key, TRAIN, *clips, room("core"), room("clip"), Path(__file__))
    references = read_rows(TRAIN, ["image"]).image
    found: list[tuple[str, Path]] = []
    for path, layers in zip(clips, keep, strict=True):
        if layers:
            clip = load_clip(path, where)
            embedder = Embedder(clip, where, layers, ("frozen",))
            for view in ("plain", *model_a.tta):
                files = image_features(clip, references, embedder, batch_size, resume / path.name, "train", view)
                found += [(path.name, file) for file in files]
    with whole_folder(Path("outputs/freeze")) as out:
        for path in clips:
            (out / path.name).mkdir()
        for name, file in found:
            file.rename(out / name / file.name)
    shutil.rmtree(RESUME / "freeze")


if __name__ == "__main__":
    run(main)
