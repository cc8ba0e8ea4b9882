"""The models of a run by name: of every CLIP Model A's family and Model B, and the constant."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from img2prompt.core.blocks import Stack
from img2prompt.core.storage import numbered
from img2prompt.ensemble.params import EnsembleParams

MODEL_A = ("ridge", "linear", "model_a")  # the models of Model A's family
CONSTANT = "constant"  # the one model that is of no CLIP


def name_of(kind: str, clip: int) -> str:
    """A model's name: those of the first CLIP are plain, those of a second one are ridge_1, linear_1, and so on."""
    return f"{kind}_{clip}" if clip else kind


def kind_of(name: str) -> tuple[str, int]:
    """The kind and the CLIP's number of a model's name: the reverse of `name_of`."""
    kind, _, clip = name.rpartition("_")
    return (kind, int(clip)) if clip.isdigit() else (name, 0)


def members_of(section: EnsembleParams, clips: int) -> list[str]:
    """The names of the models in the ensemble: the kinds that params.yaml names, of the CLIPs that it names.

    The constant, if it is one of them, is the last.
    """
    wanted = range(clips) if section.clips == "all" else section.clips
    found = [name_of(kind, clip) for kind in section.members if kind != CONSTANT for clip in wanted]
    return found + [CONSTANT] * (CONSTANT in section.members)


def in_family(names: Iterable[str]) -> np.ndarray:
    """Which of these models are of Model A's family, on whatever CLIP: (m,) bool."""
    return np.array([kind_of(name)[0] in MODEL_A for name in names])


def read_oof(outputs: Path, fold: np.ndarray) -> dict[str, Stack]:
    """Every model's out-of-fold predictions by name, (n, 384) float32, norm 1, of every CLIP in a folder of outputs.

    They stay on disk. Of the heads there are those that were trained. fold (n,) int64. Only the folds that it names
    are read: one that was removed leaves its files behind.
    """
    rows = np.empty(len(fold), dtype=np.int64)  # where a row is in the folds' predictions, one below the other
    rows[np.argsort(fold, kind="stable")] = np.arange(len(fold))
    folders, found = [outputs / f"model_a/fold_{held_out}" for held_out in np.unique(fold)], {}
    for clip in range(len(numbered(outputs / "knn"))):
        for kind in MODEL_A:
            if not (folders[0] / f"{clip}/{kind}_oof.npy").is_file():
                continue
            parts = [np.load(folder / f"{clip}/{kind}_oof.npy", mmap_mode="r") for folder in folders]
            found[name_of(kind, clip)] = Stack(parts, rows)
        found[name_of("model_b", clip)] = Stack([np.load(outputs / f"knn/{clip}/oof.npy", mmap_mode="r")])
    return found
