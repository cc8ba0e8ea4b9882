"""embed_images: CLIP's embeddings of the train images and of the prompts, and the image tower's pooled features."""

import shutil
from pathlib import Path

from img2prompt.clip.features import Embedder, image_features, text_features
from img2prompt.clip.model import load_clip
from img2prompt.clip.params import EmbedImagesParams
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, numbered, resume_folder, room, whole_folder
from img2prompt.model_a.params import ModelAParams
from pipelines import run


def main(embed_images: EmbedImagesParams, model_a: ModelAParams) -> None:
    """Of every CLIP write {train,texts}_text.npy, train_image.npy and train_pooled.npy.

    Of views that Model A averages also train_{view}_pooled.npy.
    """
    batch_size, where = embed_images.batch_size, device()
    clips = numbered(Path("outputs/clip"))
    tables = {name: read_rows(Path(f"outputs/prepare/{name}.parquet")) for name in ("train", "texts")}
    files = [*(Path(f"outputs/prepare/{name}.parquet") for name in tables), *clips]
    # What the results depend on: a killed run resumes only if none of it has changed.
    resume = resume_folder("embed_images", f"{batch_size} {where}", *files, room("core"), room("clip"), Path(__file__))
    found: dict[str, Path] = {}
    for path in clips:
        clip, folder = load_clip(path, where), resume / path.name
        for view in ("plain", *model_a.tta):
            embedder = Embedder(clip, where, 0, ("image", "pooled") if view == "plain" else ("pooled",))
            for file in image_features(clip, tables["train"].image, embedder, batch_size, folder, "train", view):
                found[f"{path.name}/{file.name}"] = file
        for name, table in tables.items():
            file = text_features(clip, table.prompt, batch_size, where, folder / f"{name}_text")
            found[f"{path.name}/{name}_text.npy"] = file
    with whole_folder(Path("outputs/embed_images")) as out:
        for name, file in found.items():
            (out / name).parent.mkdir(exist_ok=True)
            file.rename(out / name)
    shutil.rmtree(RESUME / "embed_images")


if __name__ == "__main__":
    run(main)
