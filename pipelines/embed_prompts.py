"""embed_prompts: the targets, one 384-d sentence embedding a prompt, and those of augmented prompts.

Of the sample it also draws the test prompts: they follow from the train prompts, which they must not resemble.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import RESUME, resume_folder, room, whole_folder
from img2prompt.prompts.augmentation import augment_prompt, thesaurus
from img2prompt.prompts.encoder import Encoder
from img2prompt.prompts.params import EmbedPromptsParams
from img2prompt.sample.distinct import apart
from img2prompt.sample.scenes import PromptedScene, scene_to_json
from img2prompt.sample.wording import draw, generate
from img2prompt.sources.params import PrepareParams
from pipelines import run


def main(embed_prompts: EmbedPromptsParams, prepare: PrepareParams) -> None:
    """Write train.npy (n, 384), texts.npy (t, 384), augmented.npy (copies, n, 384): float32, rows of norm 1.

    sample_test.parquet (prompt, scene) and sample_test.npy are the sample's test prompts and their embeddings; without
    the sample among the train sources they have no rows.
    """
    section, where = embed_prompts, device()
    train, texts = (read_rows(Path(f"outputs/prepare/{name}.parquet")) for name in ("train", "texts"))
    encode = Encoder(section.model, where)
    copies = []
    if section.augmented:
        synonyms = thesaurus(section.thesaurus)
        for copy in range(section.augmented):
            rng = np.random.default_rng(copy)
            copies.append([augment_prompt(p, rng, synonyms, section.replace, section.shuffle) for p in train.prompt])
    parts = {"train": train.prompt, "texts": texts.prompt}
    parts |= {f"copy {number}": copy for number, copy in enumerate(copies)}
    key = [section.model, where, room("core"), room("prompts"), *("\0".join(prompts) for prompts in parts.values())]
    resume = resume_folder("embed_prompts", *key)
    found = {name: encode(parts[name], resume=resume / name) for name in ("train", "texts")}
    test: list[PromptedScene] = []
    test_targets = found["train"][:0]
    if (train.source == "sample").any():
        sample = prepare.sample
        # No test prompt may be nearly a train prompt, nor may what of it can be seen.
        seen = {row.visible for row in generate(sample.n_train, sample.seed)} - set(train.prompt)
        near = [found["train"], found["texts"], encode(sorted(seen), resume=resume / "visible")]
        test, test_targets = apart(draw(sample.seed, stream=1), sample.n_test, near, encode)
    with whole_folder(Path("outputs/embed_prompts")) as out:
        np.save(out / "train.npy", found["train"])
        np.save(out / "texts.npy", found["texts"])
        # Copy by copy, on disk: each is as large as the targets.
        augmented = np.lib.format.open_memmap(
            out / "augmented.npy", "w+", np.float32, (len(copies), *found["train"].shape)
        )
        for number, copy in enumerate(copies):
            augmented[number] = encode(copy, resume=resume / f"copy {number}")
        table = {"prompt": [row.prompt for row in test], "scene": [scene_to_json(row.scene) for row in test]}
        pd.DataFrame(table, dtype=object).to_parquet(out / "sample_test.parquet", index=False)
        np.save(out / "sample_test.npy", test_targets)
    shutil.rmtree(RESUME / "embed_prompts")


if __name__ == "__main__":
    run(main)
