"""embed_images: CLIP's embeddings of pictures and prompts, and the image tower's features."""

import shutil
from pathlib import Path

from img2prompt import clip, images
from img2prompt.clip import embed_texts, load_clip
from img2prompt.device import device
from img2prompt.images import embed_pictures, stem
from img2prompt.params import Params
from img2prompt.sources import read_rows
from img2prompt.storage import RESUME, resume_folder, whole_folder
from pipelines import run

# What the results depend on, beside params: a killed run goes on only if none of it has changed.
DATA = ["prepare/train.parquet", "prepare/test.parquet", "prepare/texts.parquet"]
CODE = [Path(file) for file in (clip.__file__, images.__file__, __file__)]


def main(params: Params) -> None:
    """Of every CLIP write {train,texts}_text.npy and {train,test}_{image,pooled}.npy.

    With a tower to tune also {train,test}_frozen.npy; of the views that Model A averages, {train,test}_{view}_*.npy.
    """
    batch_size, where = params.embed_images.batch_size, device()
    # With augmentation the frozen layers see new pictures every epoch: nothing to keep.
    keep = 0 if params.model_a.augmentation.on else params.model_a.unfreeze
    numbers = range(len(params.clip.models))
    files = [Path("outputs", name) for name in DATA]
    files += [Path(f"outputs/clip/{number}/open_clip_model.safetensors") for number in numbers]
    resume = resume_folder("embed_images", f"{batch_size} {keep} {where}", *files, *CODE)
    found: dict[str, Path] = {}
    for number in numbers:
        model = load_clip(Path(f"outputs/clip/{number}"), where)
        for split in ("train", "test"):
            pictures = read_rows(Path(f"outputs/prepare/{split}.parquet"), ["picture"]).picture
            for view in ("plain", *params.model_a.tta):
                name = f"{number}/{stem(split, view)}"
                parts = embed_pictures(model, pictures, batch_size, where, resume / name, name, keep, view)
                found |= {f"{name}_{part}": file for part, file in parts.items()}
        for split in ("train", "texts"):
            prompts = read_rows(Path(f"outputs/prepare/{split}.parquet"), ["prompt"]).prompt
            name = f"{number}/{split}_text"
            found[name] = embed_texts(model, prompts, batch_size, where, resume / name)
    with whole_folder(Path("outputs/embed_images")) as out:
        for name, file in found.items():
            (out / name).parent.mkdir(exist_ok=True)
            file.rename(out / f"{name}.npy")
    shutil.rmtree(RESUME / "embed_images")


if __name__ == "__main__":
    run(main)
