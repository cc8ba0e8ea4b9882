"""freeze: the output of every CLIP's frozen layers for the train images, the input of the layers that train."""

import shutil
from pathlib import Path

from img2prompt.clip.features import Embedder, ahead_folder, image_features, is_stored, stem
from img2prompt.clip.model import load_clip
from img2prompt.clip.params import EmbedImagesParams, FreezeParams
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, numbered, whole_folder
from img2prompt.model_a.params import ModelAParams
from pipelines import run

TRAIN = Path("outputs/prepare/train.parquet")


def main(embed_images: EmbedImagesParams, freeze: FreezeParams, model_a: ModelAParams) -> None:
    """Of every CLIP write train_frozen.npy (n, ...) float16, and train_{view}_frozen.npy of views that are averaged.

    A CLIP whose tower does not train, or cannot be cut into layers, has an empty folder. So has one of which nothing is
    to be stored, and every CLIP with augmentation: frozen layers then run in every epoch, with it on other images.
    """
    batch_size, where, clips = embed_images.batch_size, device(), numbered(Path("outputs/clip"))
    keep = [model_a.stored(int(path.name)) for path in clips]
    ahead = ahead_folder(TRAIN, clips, keep, freeze, batch_size, where)
    images, views = read_rows(TRAIN, ["image"]).image, ("plain", *model_a.tta)
    files, embedders = {}, {}
    for path, layers in zip(clips, keep, strict=True):
        names = [f"{path.name}/{stem('train', seen)}_frozen" for seen in views if layers]
        found = {name: ahead / f"{name}.npy" for name in names}
        if all(file.is_file() for file in found.values()):
            files |= found
            continue
        clip = load_clip(path, where)
        if is_stored(clip, layers, len(images), views, freeze, RESUME, f"clip {path.name}, train images"):
            embedders[path.name] = Embedder(clip, where, layers, ["frozen"], views)
    if embedders:
        files |= image_features(embedders, images, batch_size, ahead / "-".join(embedders) / "here", "train")
    with whole_folder(Path("outputs/freeze")) as out:
        for path in clips:
            (out / path.name).mkdir()
        for name, file in files.items():
            file.rename(out / f"{name}.npy")
    shutil.rmtree(RESUME / "freeze")


if __name__ == "__main__":
    run(main)
