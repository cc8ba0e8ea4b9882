"""The search of Model B's settings, and its out-of-fold predictions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from img2prompt.core.blocks import Stack
from img2prompt.ensemble.weights import Cosines, search_weights
from img2prompt.model_b.bank import Bank, Choice, Setting
from img2prompt.model_b.neighbours import Neighbours, nearest
from img2prompt.model_b.regression import grid_scores, regress

# The grids are wide, because a best value at the edge of a grid may not be the optimum. With distance_dim 0 the
# prediction is the unweighted mean of the k neighbours' targets.
K_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
DISTANCE_DIM_GRID = (0, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Given a kind of keys, fold -> (m,) bool of the keys that are usable for its queries, and k: the queries' neighbours.
Search = Callable[[str, Mapping[int, np.ndarray], int], Neighbours]


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts without images, which are further `text` keys.

    keys (t, d), targets (t, 384), kept (t,) bool: may be a neighbour. near: fold -> (t,) bool: left out of that fold's
    bank, because a prompt of the fold is near.
    """

    keys: np.ndarray
    targets: np.ndarray
    kept: np.ndarray
    near: Mapping[int, np.ndarray]


@dataclass(frozen=True, slots=True)
class KnnResult:
    """Out-of-fold predictions with the choices and neighbours behind them, and the bank for all other images.

    oof (n, 384) float32, norm 1: each fold predicted under its own fold_choices entry, from the other folds' rows.
    search_table: keys, k, distance_dim, score (mean cosine out of fold, all scored rows).
    neighbours: kind of keys -> the neighbours behind oof, as row numbers of the train table followed by the texts.
    bank: all kept rows, under the choice made on all scored rows.
    """

    oof: np.ndarray
    fold_choices: dict[int, Choice]
    search_table: pd.DataFrame
    neighbours: dict[str, Neighbours]
    bank: Bank


def out_of_fold(
    queries: np.ndarray, keys: Stack, fold: np.ndarray, usable: Mapping[int, np.ndarray], k: int, device: str
) -> Neighbours:
    """The k neighbours (n, k) of every query among the keys (m, d) that are usable for its fold: fold -> (m,) bool."""
    index = np.empty((len(queries), k), dtype=np.int32)
    distance = np.empty((len(queries), k), dtype=np.float32)
    for held_out, mask in usable.items():
        rows, bank = np.flatnonzero(fold == held_out), np.flatnonzero(mask).astype(np.int32)
        found = nearest(Stack([queries], rows), keys.take(bank), k, device)
        index[rows], distance[rows] = bank[found.index], found.distance
    return Neighbours(index, distance)


def fit(
    queries: np.ndarray,
    bank: Mapping[str, np.ndarray],
    targets: np.ndarray,
    fold: np.ndarray,
    kept: np.ndarray,
    scored: np.ndarray,
    keys: str,
    k: int | str,
    distance_dim: float | str,
    eps: float,
    coef: float,
    device: str = "cpu",
    texts: Texts | None = None,
    search: Search | None = None,
) -> KnnResult:
    """Fit Model B to the train images, and predict them out of fold.

    queries (n, d): their CLIP image embeddings. bank: `text` and/or `image` -> the train
    rows' keys (n, d); texts: more `text` keys. targets (n, 384), norm 1. fold (n,) int. kept (n,) bool: may
    be a neighbour. scored (n,) bool: counts in choosing. keys: `text`, `image`, or `both`: the mix of the two
    predictions. k, distance_dim: `search`, or the number to use; a k beyond the smallest bank of keys becomes its size.
    search: what finds neighbours in place of `out_of_fold`, the same ones.

    The paper does not say how to choose. Here it is done as for the ensemble's weights: for each kind of keys, the k
    and distance_dim of the best mean cosine out of fold (of equals the smallest k, then the smallest
    distance_dim), then for `both` the image share. A held-out fold's predictions use the choice made on the other
    folds' rows. Those rows have neighbours in the held-out fold, as they must, but the cosines of the held-out
    fold's own rows play no part. Raises ValueError for unknown keys, numbers of rows that differ, fewer than two
    folds, or folds without kept or scored rows beside them.
    """
    kinds = {"text": ["text"], "image": ["image"], "both": ["text", "image"]}.get(keys)
    if kinds is None:
        raise ValueError(f"knn.keys is {keys!r}: choose text, image or both")
    parts = [queries, targets, fold, kept, scored, *(bank[kind] for kind in kinds)]
    if len({len(part) for part in parts}) > 1:
        raise ValueError(f"train rows differ: {[len(part) for part in parts]} in queries, targets, .., the bank")
    usable = {kind: {f: kept & (fold != f) for f in np.unique(fold).tolist()} for kind in kinds}
    rows = np.flatnonzero(kept)
    stacks = {kind: [bank[kind]] for kind in kinds}
    every = targets
    if texts is not None and len(texts.kept):
        every = np.concatenate([targets, texts.targets])
        if "text" in kinds:
            stacks["text"].append(texts.keys)
            more = {f: texts.kept & ~texts.near[f] for f in usable["text"]}
            usable["text"] = {f: np.concatenate([mask, more[f]]) for f, mask in usable["text"].items()}
            rows = np.flatnonzero(np.concatenate([kept, texts.kept]))
    bank_size = min(int(mask.sum()) for masks in usable.values() for mask in masks.values())
    if not bank_size:
        raise ValueError("a fold has no kept rows outside it to be neighbours: two folds or more need kept rows")
    wanted = K_GRID if k == "search" else (int(k),)
    ks = tuple(sorted({min(size, bank_size) for size in wanted}))
    dims = DISTANCE_DIM_GRID if distance_dim == "search" else (float(distance_dim),)
    # The rows that choose: for a held-out fold those of the others, for new images (None) all.
    judges = {held_out: scored & (fold != held_out) for held_out in np.unique(fold).tolist()} | {None: scored}
    if not all(mask.any() for mask in judges.values()):
        raise ValueError("no scored rows outside the held-out fold to choose k and distance_dim on")

    neighbours, table = {}, []
    settings: dict[int | None, dict[str, Setting]] = {held_out: {} for held_out in judges}
    for kind in kinds:
        if search is None:
            found = out_of_fold(queries, Stack(stacks[kind]), fold, usable[kind], ks[-1], device)
        else:
            found = search(kind, usable[kind], ks[-1])
        scores = grid_scores(found, every, targets, ks, dims, eps, coef, device, np.flatnonzero(scored))
        for held_out, mask in judges.items():
            mean = scores.mean(axis=0, dtype=np.float64, where=mask[scored, None, None])
            best_k, best_dim = np.unravel_index(mean.argmax(), mean.shape)
            settings[held_out][kind] = Setting(ks[best_k], dims[best_dim])
        table += [
            (kind, size, power, scores[:, i, j].mean(dtype=np.float64))
            for i, size in enumerate(ks)
            for j, power in enumerate(dims)
        ]
        longest = max(own[kind].k for own in settings.values())  # the rest, of many rows the most, has done its part
        neighbours[kind] = Neighbours(found.index[:, :longest].copy(), found.distance[:, :longest].copy())
        del found, scores

    @cache  # most folds agree on the setting
    def predict(kind: str, setting: Setting) -> np.ndarray:
        return regress(neighbours[kind], every, setting.k, setting.distance_dim, eps, coef, device)

    @cache
    def cosines(image: Setting, text: Setting) -> Cosines:
        return Cosines.between([predict("image", image), predict("text", text)], targets)

    def choose(held_out: int | None) -> Choice:
        own = settings[held_out]
        if keys != "both":
            return Choice(own, float(keys == "image"))
        shares = search_weights(cosines(own["image"], own["text"])[judges[held_out]])
        return Choice(own, float(shares[0]))

    oof, fold_choices = np.empty((len(queries), targets.shape[1]), dtype=np.float32), {}
    for held_out in np.unique(fold).tolist():
        own = fold == held_out
        choice = fold_choices[held_out] = choose(held_out)
        oof[own] = choice.mixed({kind: predict(kind, setting)[own] for kind, setting in choice.settings.items()})

    # Of the rows of the bank, those of train images come first: image keys are as many.
    stored = {kind: Stack(stacks[kind], rows if kind == "text" else np.flatnonzero(kept)) for kind in kinds}
    return KnnResult(
        oof,
        fold_choices,
        pd.DataFrame(table, columns=["keys", "k", "distance_dim", "score"]),
        neighbours,
        Bank(stored, every[rows], rows.astype(np.int32), choose(None), eps, coef),
    )
