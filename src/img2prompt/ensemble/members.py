"""The models of a run by name: of every CLIP Model A's family and Model B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from img2prompt.core.storage import numbered
from img2prompt.ensemble.params import EnsembleParams

MODEL_A = ("ridge", "linear", "model_a")  # the models of Model A's family


def name_of(kind: str, clip: int) -> str:
    """A model's name: those of the first CLIP are plain, those of a second one are ridge_1, linear_1, and so on."""
    return f"{kind}_{clip}" if clip else kind


def kind_of(name: str) -> tuple[str, int]:
    """The kind and the CLIP's number of a model's name: the reverse of `name_of`."""
    kind, _, clip = name.rpartition("_")
    return (kind, int(clip)) if clip.isdigit() else (name, 0)


def members_of(section: EnsembleParams, clips: int) -> list[str]:
    """The names of the models in the ensemble: the kinds that params.yaml names, of the CLIPs that it names."""
    wanted = range(clips) if section.clips == "all" else section.clips
    return [name_of(kind, clip) for kind in section.members for clip in wanted]


def read_oof(outputs: Path, fold: np.ndarray) -> dict[str, np.ndarray]:
    """Every model's out-of-fold predictions by name, (n, 384) float32, norm 1, of every CLIP in a folder of outputs.

    fold (n,) int64. Only the folds that it names are read: one that was removed leaves its files behind.
    """
    found = {}
    for clip in range(len(numbered(outputs / "knn"))):
        for kind in MODEL_A:
            found[name_of(kind, clip)] = _joined(outputs, f"{clip}/{kind}_oof.npy", fold, np.unique(fold).tolist())
        found[name_of("model_b", clip)] = np.load(outputs / f"knn/{clip}/oof.npy")
    return found


def _joined(outputs: Path, file: str, fold: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    parts = [np.load(outputs / f"model_a/fold_{held_out}" / file) for held_out in ids]
    oof = np.empty((len(fold), parts[0].shape[1]), np.float32)
    for held_out, part in zip(ids, parts, strict=True):
        oof[fold == held_out] = part
    return oof
