"""embed_images: CLIP's embeddings of the train images and of the prompts, and the image tower's pooled features."""

import shutil
from pathlib import Path

from img2prompt.clip.features import Embedder, ahead_folder, image_features, is_stored, text_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.params import EmbedImagesParams, FreezeParams
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, numbered, resume_folder, room, whole_folder
from img2prompt.model_a.params import ModelAParams
from pipelines import run

TRAIN, TEXTS = Path("outputs/prepare/train.parquet"), Path("outputs/prepare/texts.parquet")


def main(embed_images: EmbedImagesParams, freeze: FreezeParams, model_a: ModelAParams) -> None:
    """Of every CLIP write {train,texts}_text.npy, train_image.npy and train_pooled.npy.

    Of views that Model A averages also train_{view}_pooled.npy.
    """
    batch_size, where, clips = embed_images.batch_size, device(), numbered(Path("outputs/clip"))
    keep = [model_a.stored(int(path.name)) for path in clips]
    # What the results depend on: a killed run resumes only if none of it has changed.
    key = f"{batch_size} {keep} {model_a.tta} {freeze} {where}"
    resume = resume_folder("embed_images", key, TRAIN, TEXTS, *clips, room("core"), room("clip"), Path(__file__))
    # No output here depends on model_a.unfreeze or `freeze`: frozen layers run anyway, and `freeze` need not run them.
    ahead = ahead_folder(TRAIN, clips, keep, freeze, batch_size, where)
    images, views = read_rows(TRAIN, ["image"]).image, ("plain", *model_a.tta)
    loaded, embedders = {path.name: load_clip(path, where) for path in clips}, {}
    for (name, clip), layers in zip(loaded.items(), keep, strict=True):
        (ahead / name).mkdir(exist_ok=True)
        stored = is_stored(clip, layers, len(images), views, freeze, RESUME, f"clip {name}, train images")
        wanted = ["image", "pooled", *["frozen"] * stored]
        embedders[name] = Embedder(clip, where, layers if stored else 0, wanted, views)
    files = image_features(embedders, images, batch_size, resume / "images", "train")
    for name, clip in loaded.items():
        for split, table in (("train", TRAIN), ("texts", TEXTS)):
            prompts, folder = read_rows(table, ["prompt"]).prompt, resume / name / f"{split}_text"
            files[f"{name}/{split}_text"] = text_features(clip, prompts, batch_size, where, folder)
    with whole_folder(Path("outputs/embed_images")) as out:
        for name, file in files.items():
            path = (ahead if name.endswith("_frozen") else out) / f"{name}.npy"
            path.parent.mkdir(exist_ok=True)
            file.replace(path)
    shutil.rmtree(RESUME / "embed_images")


if __name__ == "__main__":
    run(main)
