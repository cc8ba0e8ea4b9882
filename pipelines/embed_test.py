"""embed_test: the test side of embed_images and freeze, parted by what the parts of predict look at."""

import shutil
from pathlib import Path

from img2prompt.clip.features import Embedder, image_features, is_stored
from img2prompt.clip.model import load_clip
from img2prompt.clip.params import EmbedImagesParams, FreezeParams
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, numbered, resume_folder, room, whole_folder
from img2prompt.model_a.params import ModelAParams
from pipelines import run

TEST = Path("outputs/prepare_test/test.parquet")


def main(embed_images: EmbedImagesParams, freeze: FreezeParams, model_a: ModelAParams) -> None:
    """Of every CLIP write knn/N/test_image.npy, model_a/N/test_pooled.npy and model_a/N/test_frozen.npy.

    Of views that Model A averages also test_{view}_pooled.npy and test_{view}_frozen.npy. A CLIP whose tower does not
    train, or of which frozen layers' output is not stored, has no test_frozen.npy.
    """
    batch_size, where = embed_images.batch_size, device()
    clips = numbered(Path("outputs/clip"))
    keep = [model_a.layers(int(path.name)) for path in clips]
    key = f"{batch_size} {keep} {model_a.tta} {freeze} {where}"
    resume = resume_folder("embed_test", key, TEST, *clips, room("core"), room("clip"), Path(__file__))
    images, views, embedders = read_rows(TEST, ["image"]).image, ("plain", *model_a.tta), {}
    for path, layers in zip(clips, keep, strict=True):
        clip = load_clip(path, where)
        stored = is_stored(clip, layers, len(images), views, freeze, RESUME, f"clip {path.name}, test images")
        wanted = ["image", "pooled", *["frozen"] * stored]
        embedders[path.name] = Embedder(clip, where, layers if stored else 0, wanted, views)
    files = image_features(embedders, images, batch_size, resume, "test")
    home = Path("outputs/embed_test")
    with whole_folder(home / "knn") as knn, whole_folder(home / "model_a") as heads:
        for name, file in files.items():
            path = (knn if name.endswith("_image") else heads) / f"{name}.npy"
            path.parent.mkdir(exist_ok=True)
            file.rename(path)
    shutil.rmtree(RESUME / "embed_test")


if __name__ == "__main__":
    run(main)
