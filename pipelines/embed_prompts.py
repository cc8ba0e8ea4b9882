"""embed_prompts: the targets, one 384-d sentence embedding a prompt, and those of augmented prompts."""

from pathlib import Path

import numpy as np

from img2prompt.device import device
from img2prompt.encoder import Encoder
from img2prompt.params import Params
from img2prompt.prompt_augmentation import augment_prompt, thesaurus
from img2prompt.sources import read_rows
from img2prompt.storage import whole_folder
from pipelines import run


def main(params: Params) -> None:
    """Write train.npy (n, 384), test.npy (m, 384) or (0, 384) with prompts unknown, augmented.npy (copies, n, 384)."""
    section = params.embed_prompts
    train, test = (read_rows(Path(f"outputs/prepare/{split}.parquet")) for split in ("train", "test"))
    encode = Encoder(section.model, device())
    copies = []
    if section.augmented:
        source, synonyms = thesaurus()
        print(f"synonyms: {source}")
        for copy in range(section.augmented):
            rng = np.random.default_rng(copy)
            copies.append([augment_prompt(p, rng, synonyms, section.replace, section.shuffle) for p in train.prompt])
    with whole_folder(Path("outputs/embed_prompts")) as out:
        targets = encode(train.prompt)
        np.save(out / "train.npy", targets)
        np.save(out / "augmented.npy", np.array([encode(c) for c in copies]).reshape(-1, *targets.shape))
        np.save(out / "test.npy", encode(test.prompt if test.prompt.notna().all() else []))


if __name__ == "__main__":
    run(main)
