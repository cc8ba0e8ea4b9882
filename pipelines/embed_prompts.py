"""embed_prompts: the targets, one 384-d sentence embedding a prompt, and those of augmented prompts."""

import shutil
from pathlib import Path

import numpy as np

from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, resume_folder, room, whole_folder
from img2prompt.prompts.augmentation import augment_prompt, thesaurus
from img2prompt.prompts.encoder import Encoder
from img2prompt.prompts.params import EmbedPromptsParams
from pipelines import run


def main(embed_prompts: EmbedPromptsParams) -> None:
    """Write train.npy (n, 384), test.npy (m, 384) or (0, 384) with prompts unknown, augmented.npy (copies, n, 384).

    texts.npy (t, 384) is of the prompts without images.
    """
    section, where = embed_prompts, device()
    train, test, texts = (
        read_rows(Path(f"outputs/prepare/{name}.parquet"), ["prompt"]).prompt for name in ("train", "test", "texts")
    )
    encode = Encoder(section.model, where)
    copies = []
    if section.augmented:
        source, synonyms = thesaurus()
        print(f"synonyms: {source}")
        for copy in range(section.augmented):
            rng = np.random.default_rng(copy)
            copies.append([augment_prompt(p, rng, synonyms, section.replace, section.shuffle) for p in train])
    parts = {"train": train, "test": test if test.notna().all() else [], "texts": texts}
    parts |= {f"copy {number}": copy for number, copy in enumerate(copies)}
    key = [section.model, where, room("core"), room("prompts"), *("\0".join(prompts) for prompts in parts.values())]
    resume = resume_folder("embed_prompts", *key)
    found = {name: encode(prompts, resume=resume / name) for name, prompts in parts.items()}
    with whole_folder(Path("outputs/embed_prompts")) as out:
        for name in ("train", "test", "texts"):
            np.save(out / f"{name}.npy", found[name])
        augmented = np.array([found[f"copy {number}"] for number in range(len(copies))], np.float32)
        np.save(out / "augmented.npy", augmented.reshape(-1, *found["train"].shape))
    shutil.rmtree(RESUME / "embed_prompts")


if __name__ == "__main__":
    run(main)
