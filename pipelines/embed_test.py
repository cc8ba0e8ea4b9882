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
PARTS = {"image": "knn", "pooled": "model_a", "frozen": "model_a"}  # who looks at what


def main(embed_images: EmbedImagesParams, freeze: FreezeParams, model_a: ModelAParams) -> None:
    """Of every CLIP write knn/N/test_image.npy, model_a/N/test_pooled.npy and model_a/N/test_frozen.npy.

    Of views that Model A averages also test_{view}_pooled.npy and test_{view}_frozen.npy. A CLIP whose tower does not
    train, or of which frozen layers' output is not stored, has no test_frozen.npy.
    """
    batch_size, where = embed_images.batch_size, device()
    clips = numbered(Path("outputs/clip"))
    keep = [model_a.layers(int(path.name)) for path in clips]
    key = f"{batch_size} {keep} {freeze} {where}"
    resume = resume_folder("embed_test", key, TEST, *clips, room("core"), room("clip"), Path(__file__))
    references = read_rows(TEST, ["image"]).image
    found: dict[tuple[str, str], list[Path]] = {}
    for path, layers in zip(clips, keep, strict=True):
        clip, views, name = load_clip(path, where), ("plain", *model_a.tta), f"clip {path.name}, test images"
        layers = layers if is_stored(clip, layers, len(references), views, freeze, RESUME, name) else 0
        for view in views:
            wanted = [*["image"] * (view == "plain"), "pooled", *["frozen"] * (layers > 0)]
            embedder = Embedder(clip, where, layers, wanted)
            files = image_features(clip, references, embedder, batch_size, resume / path.name, "test", view)
            for name, file in zip(wanted, files, strict=True):
                found.setdefault((PARTS[name], path.name), []).append(file)
    home = Path("outputs/embed_test")
    with whole_folder(home / "knn") as knn, whole_folder(home / "model_a") as heads:
        out = {"knn": knn, "model_a": heads}
        for (part, name), files in found.items():
            (out[part] / name).mkdir(exist_ok=True)
            for file in files:
                file.rename(out[part] / name / file.name)
    shutil.rmtree(RESUME / "embed_test")


if __name__ == "__main__":
    run(main)
