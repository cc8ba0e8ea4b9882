"""embed_images: CLIP's embeddings of pictures and prompts, and the image tower's features."""

from pathlib import Path

import numpy as np

from img2prompt.clip import embed_texts, load_clip
from img2prompt.device import device
from img2prompt.images import embed_pictures
from img2prompt.params import Params
from img2prompt.sources import read_rows
from img2prompt.storage import whole_folder
from pipelines import run


def main(params: Params) -> None:
    """Of every CLIP write train_text.npy, and {train,test}_{image,pooled}.npy; with a tower to tune, also _frozen.npy.

    Of the views that Model A averages likewise, as {train,test}_{view}_*.npy.
    """
    batch_size, where = params.embed_images.batch_size, device()
    # With augmentation the frozen layers see new pictures every epoch: nothing to keep.
    keep = 0 if params.model_a.augmentation.on else params.model_a.unfreeze
    tables = {split: read_rows(Path(f"outputs/prepare/{split}.parquet")) for split in ("train", "test")}
    with whole_folder(Path("outputs/embed_images")) as out:
        for number in range(len(params.clip.models)):
            clip, folder = load_clip(Path(f"outputs/clip/{number}"), where), out / str(number)
            folder.mkdir()
            for split, rows in tables.items():
                for view in ("plain", *params.model_a.tta):
                    embed_pictures(clip, rows.picture, batch_size, where, folder, split, keep, view)
            np.save(folder / "train_text.npy", embed_texts(clip, tables["train"].prompt, batch_size, where))


if __name__ == "__main__":
    run(main)
