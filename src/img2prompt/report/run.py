"""A finished run, as the report reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from img2prompt.core.blocks import Stack
from img2prompt.core.rows import read_rows
from img2prompt.core.storage import read_json
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.members import CONSTANT, kind_of, read_oof
from img2prompt.ensemble.weights import mix


@dataclass(frozen=True)
class Run:
    """The outputs of the stages.

    train, texts, test: the tables of rows. fold, group (n,) int64, kept, scored (n,) bool: of the train rows. targets
    (n, 384), text_targets (t, 384), test_targets (k, 384) float32, norm 1, the last of the test rows whose prompt is
    known. cosines: of the scores stage; its first n rows are the train rows. models: their names, the constant first
    and the ensemble last. weights: of the ensemble stage, by member.
    """

    outputs: Path
    train: pd.DataFrame
    texts: pd.DataFrame
    test: pd.DataFrame
    fold: np.ndarray
    group: np.ndarray
    kept: np.ndarray
    scored: np.ndarray
    targets: np.ndarray
    text_targets: np.ndarray
    test_targets: np.ndarray
    cosines: pd.DataFrame
    models: list[str]
    weights: pd.DataFrame

    @classmethod
    def read(cls, outputs: Path) -> Run:
        """Read a folder of outputs; embeddings stay on disk."""
        folds = pd.read_parquet(outputs / "folds/folds.parquet")
        cosines = pd.read_parquet(outputs / "scores/cosines.parquet")
        return cls(
            outputs,
            read_rows(outputs / "prepare/train.parquet"),
            read_rows(outputs / "prepare/texts.parquet"),
            read_rows(outputs / "prepare_test/test.parquet"),
            folds.fold.to_numpy(),
            folds.group.to_numpy(),
            np.load(outputs / "dedup/kept.npy"),
            np.load(outputs / "dedup/scored.npy"),
            np.load(outputs / "embed_prompts/train.npy", mmap_mode="r"),
            np.load(outputs / "embed_prompts/texts.npy", mmap_mode="r"),
            np.load(outputs / "prepare_test/targets.npy"),
            cosines,
            cosines.columns[cosines.columns.get_loc("scored") + 1 :].tolist(),
            pd.read_csv(outputs / "ensemble/members.csv").set_index("member"),
        )

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """scores.json."""
        return read_json(self.outputs / "scores.json")

    @cached_property
    def oof(self) -> pd.DataFrame:
        """The cosines of the scored train rows, out of fold, with their `prompt`; the index counts train rows."""
        cosines = self.cosines[: len(self.train)].assign(prompt=self.train.prompt)
        return cosines[self.scored]

    @cached_property
    def on_test(self) -> pd.DataFrame:
        """The cosines of the test rows with a known prompt, with their `prompt`; the index counts test rows."""
        known = self.test[self.test.prompt.notna()]
        return self.cosines[len(self.train) :].set_index(known.index).assign(prompt=known.prompt)

    @property
    def leaders(self) -> list[str]:
        """The trained head and the Model B that weigh most; of equal ones Model A's, and that of the first CLIP."""
        found = []
        for kinds in (("model_a", "linear"), ("model_b",)):
            names = [name for kind in kinds for name in self.models if kind_of(name)[0] == kind]
            found.append(max(names, key=lambda name: self.weights.weight.get(name, 0)))
        return found

    @cached_property
    def _oof_predictions(self) -> dict[str, Stack]:
        means, _ = constant(self.targets, self.fold, np.unique(self.fold).tolist(), self.kept)
        return {CONSTANT: means, **read_oof(self.outputs, self.fold)}

    def member(self, model: str, test: bool) -> Stack:
        """A member's predictions of all test rows, or of all train rows out of fold; they stay on disk."""
        if not test:
            return self._oof_predictions[model]
        part = "knn" if kind_of(model)[0] == "model_b" else "model_a"
        return Stack([np.load(self.outputs / f"predict/{part}/{model}.npy", mmap_mode="r")])

    def ensemble(self, rows: np.ndarray, test: bool) -> np.ndarray:
        """The ensemble's predictions of rows (r,), as of `member`: (r, 384) float32, norm 1.

        Out of fold it has the weights that were found on the other folds.
        """
        if test:
            return np.load(self.outputs / "scores/test.npy", mmap_mode="r")[rows]
        found = np.empty((len(rows), self.targets.shape[1]), np.float32)
        for held_out in np.unique(self.fold[rows]):
            of_fold = self.fold[rows] == held_out
            members = [self.member(name, test)[rows[of_fold]] for name in self.weights.index]
            found[of_fold] = mix(members, self.weights[f"fold_{held_out}"].tolist())
        return found


def data_of(cosines: pd.DataFrame) -> str:
    """What the report and the documents call the data of a run: the last two parts of each train source's path.

    cosines: of the scores stage; its columns `split` and `source`.
    """
    sources = cosines.source[cosines.split == "train"].unique()
    return ", ".join("/".join(Path(source).parts[-2:]) for source in sources)
