"""submit: writing the submission against pandas, every value read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.harness import Task, Work
from img2prompt.predict.submission import check_submission, write_submission


def make(folder: Path, rows: int) -> Work:
    """ids.npy and predictions.npy. The work: the file's bytes, told from its first images."""
    rng = np.random.default_rng(0)
    predictions = rng.standard_normal((rows, 384), dtype=np.float32)
    predictions /= np.linalg.norm(predictions, axis=1, keepdims=True)
    np.save(folder / "ids.npy", [f"{number:08x}" for number in rng.permutation(rows)])
    np.save(folder / "predictions.npy", predictions)
    few = min(rows, 256)
    written = ours(*load(folder, few)).stat().st_size
    return Work(written=written * rows / few)


def load(folder: Path, rows: int) -> tuple[list[str], np.ndarray, Path]:
    ids, predictions = np.load(folder / "ids.npy")[:rows].tolist(), np.load(folder / "predictions.npy")[:rows]
    return ids, predictions, folder / "submission.csv"


def ours(ids: list[str], predictions: np.ndarray, path: Path) -> Path:
    write_submission(path, ids, predictions)
    return path


def ours_checked(ids: list[str], predictions: np.ndarray, path: Path) -> Path:
    ours(ids, predictions, path)
    check_submission(path, ids)
    return path


def pandas(ids: list[str], predictions: np.ndarray, path: Path) -> Path:
    import pandas as pd

    names = [f"{name}_{element}" for name in ids for element in range(predictions.shape[1])]
    pd.DataFrame({"imgId_eId": names, "val": predictions.ravel()}).to_csv(path, index=False)
    return path


def check(path: Path, folder: Path) -> str:
    """Bit by bit."""
    import pandas as pd

    values = pd.read_csv(path, usecols=["val"], dtype=np.float32).val.to_numpy()
    wrong = int((values.view(np.int32) != np.load(folder / "predictions.npy").ravel().view(np.int32)).sum())
    return f"{wrong} values wrong" if wrong else "yes"


TASKS = [
    Task(
        "submit",
        make,
        load,
        {"ours": ours, "ours, read and checked": ours_checked, "pandas": pandas},
        check,
        growth={"": 1},
    )
]
