"""The models of a run by name: of every CLIP Model A's family and Model B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from img2prompt.ensemble.params import EnsembleParams

MODEL_A = {"ridge": "start", "clip": "clip", "model_a": "model_a"}  # the family's models, and the names of their files
Predictions = tuple[np.ndarray, list[np.ndarray]]


def name_of(kind: str, clip: int) -> str:
    """A model's name: the first CLIP's are plain, those of a second one are ridge_1, clip_1, and so on."""
    return f"{kind}_{clip}" if clip else kind


def members_of(section: EnsembleParams, clips: int) -> list[str]:
    """The names of the models in the ensemble: the kinds that params.yaml names, of the CLIPs that it names."""
    wanted = range(clips) if section.clips == "all" else section.clips
    return [name_of(kind, clip) for kind in section.members for clip in wanted]


def read_models(outputs: Path, clips: int, fold: np.ndarray, ids: Sequence[int]) -> dict[str, Predictions]:
    """Of every CLIP Model A's family and Model B by name: out of fold (n, 384), and on test one or one a fold (m, 384).

    outputs: the stages' folder. fold (n,) int64; ids: the folds of params.yaml.
    """
    found = {}
    for clip in range(clips):
        for kind, files in MODEL_A.items():
            found[name_of(kind, clip)] = _read_model_a(outputs, files, clip, fold, ids)
        knn = outputs / f"knn/{clip}"
        found[name_of("model_b", clip)] = np.load(knn / "oof.npy"), [np.load(knn / "test.npy")]
    return found


def _read_model_a(outputs: Path, files: str, clip: int, fold: np.ndarray, ids: Sequence[int]) -> Predictions:
    # The folds are those of params.yaml, not of the disk: a fold that was removed leaves its files behind.
    folders = [outputs / f"model_a/fold_{held_out}/{clip}" for held_out in ids]
    parts = [np.load(folder / f"{files}_oof.npy") for folder in folders]
    oof = np.empty((len(fold), parts[0].shape[1]), np.float32)
    for held_out, part in zip(ids, parts, strict=True):
        oof[fold == held_out] = part
    return oof, [np.load(folder / f"{files}_test.npy", mmap_mode="r") for folder in folders]
