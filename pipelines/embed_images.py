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
    """Write train_text.npy, and {train,test}_{image,pooled}.npy; with a tower to tune, {train,test}_frozen.npy."""
    batch_size, where = params.embed_images.batch_size, device()
    clip = load_clip(Path("outputs/clip"), where)
    # With augmentation the frozen layers see new pictures every epoch: nothing to keep.
    keep = 0 if params.model_a.augmentation.on else params.model_a.unfreeze
    with whole_folder(Path("outputs/embed_images")) as out:
        for split in ("train", "test"):
            rows = read_rows(Path(f"outputs/prepare/{split}.parquet"))
            embed_pictures(clip, rows.picture, batch_size, where, out, split, keep)
            if split == "train":
                np.save(out / "train_text.npy", embed_texts(clip, rows.prompt, batch_size, where))


if __name__ == "__main__":
    run(main)
