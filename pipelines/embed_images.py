"""embed_images: CLIP's embeddings of pictures and prompts, and the image tower's features."""

import shutil
from pathlib import Path

from img2prompt import clip, images
from img2prompt.clip import embed_texts, load_clip
from img2prompt.device import device
from img2prompt.images import embed_pictures
from img2prompt.params import Params
from img2prompt.sources import read_rows
from img2prompt.storage import RESUME, resume_folder, whole_folder
from pipelines import run

# What the results depend on, beside params: a killed run goes on only if none of it has changed.
DATA = ["prepare/train.parquet", "prepare/test.parquet", "prepare/texts.parquet", "clip/open_clip_model.safetensors"]
CODE = [Path(file) for file in (clip.__file__, images.__file__, __file__)]


def main(params: Params) -> None:
    """Write {train,texts}_text.npy and {train,test}_{image,pooled}.npy.

    With a tower to tune also {train,test}_frozen.npy.
    """
    batch_size, where = params.embed_images.batch_size, device()
    model = load_clip(Path("outputs/clip"), where)
    # With augmentation the frozen layers see new pictures every epoch: nothing to keep.
    keep = 0 if params.model_a.augmentation.on else params.model_a.unfreeze
    files = (Path("outputs", name) for name in DATA)
    resume = resume_folder("embed_images", f"{batch_size} {keep} {where}", *files, *CODE)
    found: dict[str, Path] = {}
    for split in ("train", "test"):
        pictures = read_rows(Path(f"outputs/prepare/{split}.parquet"), ["picture"]).picture
        parts = embed_pictures(model, pictures, batch_size, where, resume / split, f"{split} pictures", keep)
        found |= {f"{split}_{name}": file for name, file in parts.items()}
    for split in ("train", "texts"):
        prompts = read_rows(Path(f"outputs/prepare/{split}.parquet"), ["prompt"]).prompt
        found[f"{split}_text"] = embed_texts(model, prompts, batch_size, where, resume / f"{split}_text")
    with whole_folder(Path("outputs/embed_images")) as out:
        for name, file in found.items():
            file.rename(out / f"{name}.npy")
    shutil.rmtree(RESUME / "embed_images")


if __name__ == "__main__":
    run(main)
