"""clip: one open_clip folder, whether from the sample, a hub or a disk."""

from pathlib import Path

import numpy as np

from img2prompt import sample_clip
from img2prompt.clip import materialise
from img2prompt.device import device
from img2prompt.encoder import Encoder
from img2prompt.params import Params
from img2prompt.pictures import open_picture
from img2prompt.sample import apart, draw
from img2prompt.sources import read_rows
from img2prompt.storage import whole_folder
from pipelines import run


def picture_size() -> int:
    """The median shorter side of the train pictures (of 99 of them), within what an ImageNet tower is good for."""
    pictures = read_rows(Path("outputs/prepare/train.parquet")).picture
    some = pictures.iloc[np.linspace(0, len(pictures) - 1, 99).astype(int)]
    return int(np.clip(np.median([min(open_picture(picture).size) for picture in some]), 128, 224))


def main(params: Params) -> None:
    """Write the CLIPs that every later stage loads: folders 0, 1, ... in the order of params.yaml."""
    section, where = params.clip, device()
    with whole_folder(Path("outputs/clip")) as out:
        samples: dict[Path, tuple[str, int]] = {}
        for number, (model, pretrained, image_size) in enumerate(section.models):
            folder = out / str(number)
            folder.mkdir()
            tower = sample_clip.variant(model)
            if tower is None:
                materialise(model, pretrained, image_size, folder)
            else:
                samples[folder] = tower, image_size or picture_size()
        if not samples:
            return
        # The sample's CLIPs learn from pictures of their own: none of a prompt near one to train or test on.
        near = [np.load(f"outputs/embed_prompts/{split}.npy") for split in ("train", "test")]
        encode, sample = Encoder(params.embed_prompts.model, where), section.sample
        pairs = apart(draw(sample.seed, stream=2), sample.pairs, near, encode, distinct=False)
        for folder, recall in sample_clip.build(pairs, samples, sample.epochs, sample.seed, where).items():
            print(f"clip {folder.name}, held-out pairs: {recall}")


if __name__ == "__main__":
    run(main)
