"""clip: one open_clip folder, whether from the sample, a hub or a disk."""

import shutil
from pathlib import Path

import numpy as np

from img2prompt import render, sample_clip
from img2prompt.clip import materialise
from img2prompt.device import device
from img2prompt.encoder import Encoder
from img2prompt.params import Params
from img2prompt.pictures import open_picture
from img2prompt.sample import apart, draw
from img2prompt.sources import read_rows
from img2prompt.storage import RESUME, resume_folder, whole_folder
from pipelines import run


def picture_size() -> int:
    """The median shorter side of the train pictures (of 99 of them), within what an ImageNet tower is good for."""
    pictures = read_rows(Path("outputs/prepare/train.parquet")).picture
    some = pictures.iloc[np.linspace(0, len(pictures) - 1, 99).astype(int)]
    return int(np.clip(np.median([min(open_picture(picture).size) for picture in some]), 128, 224))


def main(params: Params) -> None:
    """Write the CLIP that every later stage loads."""
    section = params.clip
    with whole_folder(Path("outputs/clip")) as out:
        if section.model != "sample":
            materialise(section.model, section.pretrained, section.image_size, out)
            return
        sample, where = section.sample, device()
        # The sample's CLIP learns from pictures of its own: none of a prompt near one to train or test on.
        near = [np.load(f"outputs/embed_prompts/{split}.npy") for split in ("train", "test")]
        encode = Encoder(params.embed_prompts.model, where)
        pairs = apart(draw(sample.seed, stream=2), sample.pairs, near, encode, distinct=False)
        size = section.image_size or picture_size()
        code = [Path(file) for file in (sample_clip.__file__, render.__file__)]
        scenes = "\n".join(map(repr, pairs))
        resume = resume_folder("clip", sample.model_dump_json(), f"{size} {where}", scenes, *code)
        recall = sample_clip.build(pairs, size, sample.epochs, sample.seed, where, out, resume)
    shutil.rmtree(RESUME / "clip")
    print(f"held-out pairs: {recall}")


if __name__ == "__main__":
    run(main)
