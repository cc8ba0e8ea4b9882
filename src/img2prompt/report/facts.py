"""What to know of the data beside the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.storage import read_json
from img2prompt.prompts.dedup import max_cosine
from img2prompt.prompts.folds import near_folds


def facts(outputs: Path, rows: pd.DataFrame, targets: np.ndarray, near: float) -> dict[str, dict[str, object]]:
    """Folds, dedup, test prompts and the quarantine of a run in numbers, as `scores.json` has them.

    outputs: the stages' folder. rows: the test rows. targets (k, 384) float32, norm 1: of those whose prompt is known;
    they are counted where a train prompt, or a pair that the sample's CLIP has learned from, is at a cosine of `near`
    or more.
    """
    kept = np.load(outputs / "dedup/kept.npy")
    found: dict[str, dict[str, object]] = {
        "folds": read_json(outputs / "folds/folds.json"),
        "dedup": {"raw": len(kept), "kept": int(kept.sum())},
        "test": {"images": len(rows), "unreadable": int(rows.image.isna().sum()), "prompts_known": len(targets)},
    }
    if len(targets):
        prompts, pairs = outputs / "embed_prompts", outputs / "clip/pairs.npy"
        parts = [np.load(prompts / f"{name}.npy", mmap_mode="r") for name in ("train", "texts")]
        seen = {"train": np.concatenate(parts)}
        if pairs.is_file():
            seen["clip_pair"] = np.load(pairs)
        found["test"]["max_train_cosine"] = max_cosine(targets, seen["train"])
        for name, others in seen.items():
            found["test"][f"near_a_{name}"] = int(near_folds(targets, others, np.zeros(len(others)), [0], near).sum())
    quarantines = [outputs / stage / "quarantine.csv" for stage in ("prepare", "prepare_test")]
    reasons = pd.concat(pd.read_csv(file, usecols=["reason"]) for file in quarantines).reason.value_counts()
    return found | {"prepare": {"quarantined": int(reasons.sum()), **reasons.sort_index().to_dict()}}
