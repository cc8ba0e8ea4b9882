"""Model B as a whole: the out-of-fold search of its settings, and its predictions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from img2prompt.ensemble.weights import Cosines, mix, search_weights
from img2prompt.model_b.neighbours import Neighbours, nearest
from img2prompt.model_b.regression import grid_scores, regress

# The grids are wide, because a best value at the edge of a grid may not be the optimum. With distance_dim 0 the
# prediction is the unweighted mean of the k neighbours' targets.
K_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
DISTANCE_DIM_GRID = (0, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Setting:
    """The number of neighbours and the power of their distance (eq. 4), for one kind of keys."""

    k: int
    distance_dim: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting for each kind of keys in use; image_share is the weight of the image keys' prediction in `mix`."""

    settings: dict[str, Setting]
    image_share: float


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
    """Predictions (float32, norm 1) with the choices and neighbours behind them.

    oof (n, 384): each fold predicted under its own fold_choices entry, from the other folds' rows.
    test (m, 384): under `choice`, made on all scored rows, from all kept rows.
    search_table: keys, k, distance_dim, score (mean cosine out of fold, all scored rows).
    neighbours, test_neighbours: kind of keys -> the neighbours behind oof and test, as row numbers of the
    train table followed by the texts.
    """

    oof: np.ndarray
    test: np.ndarray
    choice: Choice
    fold_choices: dict[int, Choice]
    search_table: pd.DataFrame
    neighbours: dict[str, Neighbours]
    test_neighbours: dict[str, Neighbours]


def _out_of_fold(
    queries: np.ndarray, keys: np.ndarray, fold: np.ndarray, usable: Mapping[int, np.ndarray], k: int, device: str
) -> Neighbours:
    """The k neighbours (n, k) of every query among the keys (m, d) that are usable for its fold: fold -> (m,) bool."""
    index = np.empty((len(queries), k), dtype=np.int64)
    distance = np.empty((len(queries), k), dtype=np.float32)
    for held_out, mask in usable.items():
        rows, bank = np.flatnonzero(fold == held_out), np.flatnonzero(mask)
        found = nearest(queries[rows], keys[bank], k, device)
        index[rows], distance[rows] = bank[found.index], found.distance
    return Neighbours(index, distance)


def fit_predict(
    queries: np.ndarray,
    bank: Mapping[str, np.ndarray],
    targets: np.ndarray,
    fold: np.ndarray,
    kept: np.ndarray,
    scored: np.ndarray,
    test_queries: np.ndarray,
    keys: str,
    k: int | str,
    distance_dim: float | str,
    eps: float,
    coef: float,
    device: str = "cpu",
    texts: Texts | None = None,
) -> KnnResult:
    """Model B for the train images, out of fold, and for the test images.

    queries (n, d), test_queries (m, d): CLIP's image embeddings. bank: `text` and/or `image` -> the train
    rows' keys (n, d); texts: more `text` keys. targets (n, 384), norm 1. fold (n,) int. kept (n,) bool: may
    be a neighbour. scored (n,) bool: counts in choosing. keys: `text`, `image`, or `both`: the mix of the two
    predictions. k, distance_dim: `search`, or the number to use; a k beyond the smallest bank of keys becomes its size.

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
    test_usable = dict.fromkeys(kinds, kept)
    if texts is not None and "text" in kinds:
        bank = {**bank, "text": np.concatenate([bank["text"], texts.keys])}
        more = {f: texts.kept & ~texts.near[f] for f in usable["text"]}
        usable["text"] = {f: np.concatenate([mask, more[f]]) for f, mask in usable["text"].items()}
        test_usable["text"] = np.concatenate([kept, texts.kept])
    every = targets if texts is None else np.concatenate([targets, texts.targets])
    bank_size = min(int(mask.sum()) for masks in usable.values() for mask in masks.values())
    if not bank_size:
        raise ValueError("a fold has no kept rows outside it to be neighbours: two folds or more need kept rows")
    wanted = K_GRID if k == "search" else (int(k),)
    ks = tuple(sorted({min(size, bank_size) for size in wanted}))
    dims = DISTANCE_DIM_GRID if distance_dim == "search" else (float(distance_dim),)

    neighbours = {kind: _out_of_fold(queries, bank[kind], fold, usable[kind], ks[-1], device) for kind in kinds}
    scores = {kind: grid_scores(neighbours[kind], every, targets, ks, dims, eps, coef, device) for kind in kinds}
    predicted: dict[tuple[str, Setting], np.ndarray] = {}  # most folds agree on the setting

    def predict(kind: str, setting: Setting) -> np.ndarray:
        if (kind, setting) not in predicted:
            predicted[kind, setting] = regress(
                neighbours[kind], every, setting.k, setting.distance_dim, eps, coef, device
            )
        return predicted[kind, setting]

    def choose(rows: np.ndarray) -> Choice:
        if not rows.any():
            raise ValueError("no scored rows outside the held-out fold to choose k and distance_dim on")
        settings = {}
        for kind in kinds:
            mean = scores[kind][rows].mean(axis=0, dtype=np.float64)
            best_k, best_dim = np.unravel_index(mean.argmax(), mean.shape)
            settings[kind] = Setting(ks[best_k], dims[best_dim])
        if keys != "both":
            return Choice(settings, float(keys == "image"))
        image, text = predict("image", settings["image"]), predict("text", settings["text"])
        shares = search_weights(Cosines.between([image[rows], text[rows]], targets[rows]))
        return Choice(settings, float(shares[0]))

    def combine(by_kind: dict[str, np.ndarray], image_share: float) -> np.ndarray:
        if keys != "both":
            return by_kind[keys]
        return mix([by_kind["image"], by_kind["text"]], [image_share, 1 - image_share])

    oof, fold_choices = np.empty((len(queries), targets.shape[1]), dtype=np.float32), {}
    for held_out in np.unique(fold).tolist():
        rows = fold == held_out
        choice = fold_choices[held_out] = choose(scored & ~rows)
        by_kind = {kind: predict(kind, setting)[rows] for kind, setting in choice.settings.items()}
        oof[rows] = combine(by_kind, choice.image_share)

    choice = choose(scored)
    test_neighbours, by_kind = {}, {}
    for kind, setting in choice.settings.items():
        rows = np.flatnonzero(test_usable[kind])
        found = nearest(test_queries, bank[kind][rows], setting.k, device)
        test_neighbours[kind] = Neighbours(rows[found.index], found.distance)
        by_kind[kind] = regress(test_neighbours[kind], every, setting.k, setting.distance_dim, eps, coef, device)
    table = [
        (kind, size, power, scores[kind][scored, i, j].mean(dtype=np.float64))
        for kind in kinds
        for i, size in enumerate(ks)
        for j, power in enumerate(dims)
    ]
    return KnnResult(
        oof,
        combine(by_kind, choice.image_share),
        choice,
        fold_choices,
        pd.DataFrame(table, columns=["keys", "k", "distance_dim", "score"]),
        neighbours,
        test_neighbours,
    )
