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
    # What the results depend on: a killed run resumes only if none of it has changed.
    key = [f"{batch_size} {where}", TRAIN, TEXTS, *clips, room("core"), room("clip"), Path(__file__)]
    resume = resume_folder("embed_images", *key)
    # No output here depends on model_a.unfreeze or `freeze`: frozen layers run anyway, and `freeze` need not run them.
    keep = [model_a.stored(int(path.name)) for path in clips]
    ahead = ahead_folder(TRAIN, clips, keep, freeze, batch_size, where)
    images = read_rows(TRAIN, ["image"]).image
    found: list[tuple[str, Path]] = []
    for path, layers in zip(clips, keep, strict=True):
        clip, folder = load_clip(path, where), resume / path.name
        views, name = ("plain", *model_a.tta), f"clip {path.name}, train images"
        (ahead / path.name).mkdir(exist_ok=True)
        layers = layers if is_stored(clip, layers, len(images), views, freeze, RESUME, name) else 0
        for view in views:
            wanted = [*["image"] * (view == "plain"), "pooled", *["frozen"] * (layers > 0)]
            embedder = Embedder(clip, where, layers, wanted)
            files = image_features(clip, images, embedder, batch_size, folder / str(layers), "train", view)
            found += [(f"{path.name}/{file.name}", file) for file in files if not file.stem.endswith("frozen")]
            for file in files:
                if file.stem.endswith("frozen"):
                    file.replace(ahead / path.name / file.name)
        for name, table in (("train", TRAIN), ("texts", TEXTS)):
            prompts = read_rows(table, ["prompt"]).prompt
            file = text_features(clip, prompts, batch_size, where, folder / f"{name}_text")
            found.append((f"{path.name}/{name}_text.npy", file))
    with whole_folder(Path("outputs/embed_images")) as out:
        for name, file in found:
            (out / name).parent.mkdir(exist_ok=True)
            file.rename(out / name)
    shutil.rmtree(RESUME / "embed_images")


if __name__ == "__main__":
    run(main)
