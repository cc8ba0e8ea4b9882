"""words: what puts embeddings into words: the prompts, their phrases, and a map to their commonest words."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from img2prompt.core.blocks import Stack, save_rows
from img2prompt.core.device import device
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import resume_folder, room, whole_folder, write_json
from img2prompt.ensemble.members import read_oof
from img2prompt.ensemble.mixture import Mixture
from img2prompt.prompts.encoder import Encoder
from img2prompt.prompts.params import EmbedPromptsParams
from img2prompt.words.fit import fit
from img2prompt.words.phrases import Phrases, mine
from pipelines import run

OUTPUTS = Path("outputs")


def main(embed_prompts: EmbedPromptsParams) -> None:
    """Write words.json, and as .parquet with .npy: prompts, phrases and vocabulary.

    The prompts are all distinct ones, of the train images and without; prompts.npy (n, 384) float32, norm 1. words.json
    names the encoder as `Encoder` takes it, or its folder relative to this one.
    """
    name, where, out = embed_prompts.model, device(), OUTPUTS / "words"
    prompts = pd.concat(
        [read_rows(OUTPUTS / f"prepare/{part}.parquet", ["prompt"]).prompt for part in ("train", "texts")]
    )
    code, distinct = pd.factorize(prompts)
    first = np.unique(code, return_index=True)[1]
    targets = [np.load(OUTPUTS / f"embed_prompts/{part}.npy", mmap_mode="r") for part in ("train", "texts")]
    embeddings = Stack(targets, first)

    fold = pd.read_parquet(OUTPUTS / "folds/folds.parquet").fold.to_numpy()
    ids, fold = np.unique(fold, return_inverse=True)
    scored, mixture = np.flatnonzero(np.load(OUTPUTS / "dedup/scored.npy")), Mixture.load(OUTPUTS / "ensemble")
    unseen = np.concatenate([fold[:, None] == np.arange(len(ids)), np.load(OUTPUTS / "folds/texts_near.npy")])[first]
    oof = read_oof(OUTPUTS, ids[fold])
    predictions = mixture({name: oof[name][scored] for name in mixture.weights}, np.ones(len(scored), dtype=bool))
    vocabulary = fit(distinct, embeddings, unseen, predictions, code[scored], fold[scored])

    mined = mine(distinct)
    texts = [phrase.text for phrase, _ in mined]
    # It stays for the next run: another ensemble has the same phrases.
    resume = resume_folder("words", name, where, room("prompts"), room("core"), "\0".join(texts))
    embedded = Encoder(name, where, exact=False)(texts, resume=resume)
    phrases = Phrases([phrase for phrase, _ in mined], [count for _, count in mined], embedded)
    with whole_folder(out) as folder:
        pq.write_table(pa.table({"prompt": pa.array(distinct, pa.string())}), folder / "prompts.parquet")
        save_rows(folder / "prompts.npy", embeddings)
        phrases.save(folder)
        vocabulary.save(folder)
        local = Path(name).is_dir() and not Path(name).is_absolute()
        write_json(folder / "words.json", {"encoder": os.path.relpath(name, out) if local else name})
    print(f"{len(distinct)} prompts, {len(mined)} phrases, {len(vocabulary.words)} words")


if __name__ == "__main__":
    run(main)
