"""embed_images: CLIP's embeddings of images and prompts, and the image tower's features."""

import shutil
from itertools import product
from pathlib import Path

from img2prompt.clip.features import image_features, text_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.params import ClipParams, EmbedImagesParams
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, resume_folder, room, whole_folder
from img2prompt.model_a.params import ModelAParams
from pipelines import run

CODE = [room("core"), room("clip"), Path(__file__)]


def main(embed_images: EmbedImagesParams, clip: ClipParams, model_a: ModelAParams) -> None:
    """Of every CLIP write {train,texts}_text.npy and {train,test}_{image,pooled}.npy.

    With a tower to tune also {train,test}_frozen.npy. Of views that Model A averages likewise, {split}_{view}_*.npy.
    """
    batch_size, where = embed_images.batch_size, device()
    # With augmentation the frozen layers see new images every epoch: nothing to keep.
    keep = [0 if model_a.augmentation.on else model_a.layers(c) for c in range(len(clip.models))]
    tables = {name: read_rows(Path(f"outputs/prepare/{name}.parquet")) for name in ("train", "test", "texts")}
    views = ("plain", *model_a.tta)
    files = [Path(f"outputs/prepare/{name}.parquet") for name in tables]
    files += sorted(Path("outputs/clip").rglob("*.*"))
    # What the results depend on: a killed run goes on only if none of it has changed.
    resume = resume_folder("embed_images", f"{batch_size} {keep} {where}", *files, *CODE)
    found: dict[str, Path] = {}
    for number, layers in enumerate(keep):
        model, folder = load_clip(Path(f"outputs/clip/{number}"), where), resume / str(number)
        for split, view in product(("train", "test"), views):
            for file in image_features(model, tables[split].image, batch_size, where, folder, split, layers, view):
                found[f"{number}/{file.name}"] = file
        for name in ("train", "texts"):
            file = text_features(model, tables[name].prompt, batch_size, where, folder / f"{name}_text")
            found[f"{number}/{name}_text.npy"] = file
    with whole_folder(Path("outputs/embed_images")) as out:
        for name, file in found.items():
            (out / name).parent.mkdir(exist_ok=True)
            file.rename(out / name)
    shutil.rmtree(RESUME / "embed_images")


if __name__ == "__main__":
    run(main)
