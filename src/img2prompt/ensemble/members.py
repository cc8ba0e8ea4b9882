"""The models of a run by name: Model A's family and Model B, for every CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from img2prompt.ensemble.params import EnsembleParams

MODEL_A = ("ridge", "linear", "model_a")  # Model A's family
Predictions = tuple[np.ndarray, list[np.ndarray]]


def name_of(kind: str, clip: int) -> str:
    """A model's name: its kind alone for the first CLIP, ridge_1, linear_1 and so on for the second."""
    return f"{kind}_{clip}" if clip else kind


def members_of(section: EnsembleParams, clips: int) -> list[str]:
    """The names of the ensemble's members: the kinds that params.yaml lists, for the CLIPs that it lists."""
    wanted = range(clips) if section.clips == "all" else section.clips
    return [name_of(kind, clip) for kind in section.members for clip in wanted]


def read_models(outputs: Path, clips: int, fold: np.ndarray, ids: Sequence[int]) -> dict[str, Predictions]:
    """The predictions of Model A's family and Model B for every CLIP, by name: out of fold (n, 384), and on test.

    Those on test are a list of (m, 384) arrays: one for each fold's model, or a single one for Model B. All are float32
    with rows of norm 1. outputs: the folder of the stages' outputs. fold (n,) int64; ids: the folds of params.yaml.
    Raises FileNotFoundError where a stage has not run.
    """
    found = {}
    for clip in range(clips):
        for kind in MODEL_A:
            found[name_of(kind, clip)] = _read_model_a(outputs, kind, clip, fold, ids)
        knn = outputs / f"knn/{clip}"
        found[name_of("model_b", clip)] = np.load(knn / "oof.npy"), [np.load(knn / "test.npy")]
    return found


def _read_model_a(outputs: Path, kind: str, clip: int, fold: np.ndarray, ids: Sequence[int]) -> Predictions:
    # The folds are those of params.yaml, not those on disk: a fold that was removed leaves its files behind.
    folders = [outputs / f"model_a/fold_{held_out}/{clip}" for held_out in ids]
    parts = [np.load(folder / f"{kind}_oof.npy") for folder in folders]
    oof = np.empty((len(fold), parts[0].shape[1]), np.float32)
    for held_out, part in zip(ids, parts, strict=True):
        oof[fold == held_out] = part
    return oof, [np.load(folder / f"{kind}_test.npy", mmap_mode="r") for folder in folders]
