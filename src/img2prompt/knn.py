"""Model B: the weighted mean of the prompts of a picture's nearest neighbours in CLIP space (eq. 4-5)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from img2prompt.ensemble import Cosines, mix, search_weights
from img2prompt.metric import unit
from img2prompt.progress import progress

# Wide on purpose: a best value at the edge of a grid is no optimum. distance_dim 0 is the plain mean of k
# prompts.
K_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
DISTANCE_DIM_GRID = (0, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

QUERY_BLOCK, KEY_BLOCK = 1024, 32_768  # a tile of similarities: 128 MB
GATHERED = 2**20  # floats of neighbours' rows looked at at once: few enough for the cache
SLACK = 16  # keys beyond k that the fp32 search keeps for the float64 distances to choose from


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The k nearest rows of a bank of keys for each of n queries, nearest first, of equal keys the first.

    index (n, k) int64: rows of the bank. distance (n, k) float32, ascending.
    """

    index: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True, slots=True)
class Setting:
    """How one kind of keys is used."""

    k: int
    distance_dim: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting for each kind of keys in use; image_share weighs the prediction from image keys in `mix`."""

    settings: dict[str, Setting]
    image_share: float


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts without pictures, further `text` keys.

    keys (t, d), targets (t, 384), kept (t,) bool: may be a neighbour. near: fold -> (t,) bool, of no use to that fold,
    because a prompt of it is near.
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
    neighbours, test_neighbours: kind of keys -> the neighbours behind oof and test, as rows of the train
    table, after its last row of the texts.
    """

    oof: np.ndarray
    test: np.ndarray
    choice: Choice
    fold_choices: dict[int, Choice]
    search_table: pd.DataFrame
    neighbours: dict[str, Neighbours]
    test_neighbours: dict[str, Neighbours]


def nearest(queries: np.ndarray, keys: np.ndarray, k: int, device: str = "cpu") -> Neighbours:
    """The k keys (m, d) nearest to each query (n, d) by the Euclidean distance of their directions.

    Exact for the rows at norm 1 in float32: float64 distances decide, and between equal ones the index.
    Memory is bounded by a tile of QUERY_BLOCK x KEY_BLOCK similarities whatever n and m are.
    Raises ValueError for k outside 1..m, and for a row that is all zeros or not finite.
    """
    if not 1 <= k <= len(keys):
        raise ValueError(f"k={k} neighbours of {len(keys)} keys: choose k between 1 and the number of keys")
    query_rows, key_rows = _on_device(unit(queries), device), _on_device(unit(keys), device)
    index = np.empty((len(queries), k), dtype=np.int64)
    distance = np.empty((len(queries), k), dtype=np.float32)
    # Allocated once: fresh pages for every tile cost a quarter of the matrix product.
    width = min(len(keys), KEY_BLOCK)
    tile = key_rows.new_empty(min(len(queries), QUERY_BLOCK) * (width + int(width**0.5)))
    for start in progress(range(0, len(queries), QUERY_BLOCK), "nearest"):
        rows = slice(start, start + QUERY_BLOCK)
        block_index, block_distance = _nearest(query_rows[rows], key_rows, k, SLACK, tile)
        index[rows], distance[rows] = block_index.cpu(), block_distance.cpu()
    return Neighbours(index, distance)


def _on_device(x: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device)


def _nearest(
    queries: torch.Tensor, keys: torch.Tensor, k: int, slack: int, tile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shortlist k + slack keys by one matrix product, then decide on their accurate distances."""
    size = min(k + slack, len(keys))
    similarity, index = _most_similar(queries, keys, size, tile)
    index = index.sort(dim=1).values  # so that the stable sort below leaves ties in the order of the bank
    distance, order = _distances(queries, keys, index).sort(dim=1, stable=True)
    index, distance = index.gather(1, order)[:, :k], distance[:, :k]
    if size < len(keys):
        # The product of unit rows is off by at most d * 2**-24, their norms by a little. Where the last of
        # the shortlist is not clearly farther than the k-th neighbour (many equal pictures), a key left out
        # might belong in: search with a longer list.
        error = (queries.shape[1] + 8) * 2.0**-24
        doubtful = (similarity[:, k - 1] - similarity[:, -1] <= 2 * error).nonzero().flatten()
        if len(doubtful):
            index[doubtful], distance[doubtful] = _nearest(queries[doubtful], keys, k, 4 * slack, tile)
    return index, distance


def _most_similar(
    queries: torch.Tensor, keys: torch.Tensor, size: int, tile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest dot products (n, size) of each query with the keys, descending, and their rows."""
    best, index = None, None
    for start in range(0, len(keys), KEY_BLOCK):
        block = keys[start : start + KEY_BLOCK]
        values, columns = _topk(queries, block, min(size, len(block)), tile)
        columns += start
        if best is not None:
            values, columns = torch.cat([best, values], dim=1), torch.cat([index, columns], dim=1)
            values, order = values.topk(min(size, values.shape[1]), dim=1)
            columns = columns.gather(1, order)
        best, index = values, columns
    return best, index


def _topk(
    queries: torch.Tensor, keys: torch.Tensor, size: int, tile: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(queries @ keys.T).topk(size)` with the product in tile, and a faster search of its long rows.

    The columns are dealt into groups of g: column c to group c % groups. The `size` largest values lie in the
    `size` groups with the largest maxima, so two short searches replace the long one: over m/g maxima and
    over size*g values.
    """
    g = max(1, int((len(keys) / size) ** 0.5))
    groups = -(-len(keys) // g)
    similarity = tile[: len(queries) * g * groups].view(len(queries), g * groups)
    torch.mm(queries, keys.T, out=similarity[:, : len(keys)])
    similarity[:, len(keys) :] = -torch.inf
    top = similarity.view(-1, g, groups).amax(dim=1).topk(size, dim=1, sorted=False).indices
    columns = (top[:, None] + groups * torch.arange(g, device=top.device)[:, None]).flatten(1)
    values, order = similarity.gather(1, columns).topk(size, dim=1)
    return values, columns.gather(1, order)


def _distances(queries: torch.Tensor, keys: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Distances (n, k), float64 by differences, of queries (n, d) from keys[index].

    Equal keys get equal distances to the last bit, and what is close to 0 keeps its digits, unlike 2 - 2*dot.
    """
    distance = queries.new_empty(index.shape, dtype=torch.float64)
    step = max(1, GATHERED // (index.shape[1] * keys.shape[1]))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        distance[rows] = torch.cdist(
            queries[rows, None].double(),
            keys[index[rows]].double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )[:, 0]
    return distance


def _relative_weights(distance: torch.Tensor, distance_dim: torch.Tensor, eps: float, coef: float) -> torch.Tensor:
    """Eq. 4 divided by the largest weight of each row: in (0, 1], whatever the power. (..., k) float64.

    In logarithms, because d**64 of close neighbours is far below what even float64 can hold.
    """
    log_power = torch.xlogy(distance_dim, distance.double())  # 0 for distance_dim 0, even where d is 0
    log_eps = torch.tensor(eps, dtype=torch.float64, device=distance.device).log()
    log_weight = np.log(coef) - torch.logaddexp(log_power, log_eps)
    return (log_weight - log_weight.amax(dim=-1, keepdim=True)).exp()


def weights(distance: np.ndarray, distance_dim: float, eps: float, coef: float) -> np.ndarray:
    """w_i = coef / (d_i**distance_dim + eps), eq. 4, scaled as in eq. 5 to sum to 1: (n, k) float64.

    distance: (n, k). coef cancels. eps keeps the weight of an exact match (d = 0) finite: such a neighbour
    counts d**distance_dim / eps times as much as one at distance d. It also levels: where d**distance_dim is
    far below eps, all neighbours count alike, so a large power of small distances asks for a tiny eps. With
    distance_dim 0 all do. Raises ValueError unless distance_dim >= 0, eps > 0 and coef > 0.
    """
    _check_formula(distance_dim, eps, coef)
    power = torch.tensor(distance_dim, dtype=torch.float64)
    relative = _relative_weights(torch.as_tensor(distance), power, eps, coef)
    return (relative / relative.sum(dim=-1, keepdim=True)).numpy()


def _check_formula(distance_dim: float, eps: float, coef: float) -> None:
    if not (distance_dim >= 0 and eps > 0 and coef > 0):
        raise ValueError(f"{distance_dim=}, {eps=}, {coef=}: need distance_dim >= 0, eps > 0 and coef > 0")


def regress(
    neighbours: Neighbours,
    targets: np.ndarray,
    k: int,
    distance_dim: float,
    eps: float,
    coef: float,
    device: str = "cpu",
) -> np.ndarray:
    """B = sum w_i T_i / sum w_i over the first k neighbours, eq. 5, then norm 1: (n, 384) float32.

    targets: (m, 384), the rows that neighbours.index speaks of.
    Raises ValueError where fewer than k neighbours are given, or the weighted targets of a row cancel.
    """
    if not 1 <= k <= neighbours.index.shape[1]:
        raise ValueError(f"k={k}, but {neighbours.index.shape[1]} neighbours were searched")
    share = weights(neighbours.distance[:, :k], distance_dim, eps, coef)
    # embedding_bag sums the weighted rows as it reads them: targets[index] alone would be n * k * 384 floats.
    return unit(
        F.embedding_bag(
            torch.from_numpy(neighbours.index[:, :k]).to(device),
            _on_device(targets, device),
            mode="sum",
            per_sample_weights=_on_device(share, device),
        )
        .cpu()
        .numpy()
    )


def grid_scores(
    neighbours: Neighbours,
    targets: np.ndarray,
    own: np.ndarray,
    ks: tuple[int, ...],
    distance_dims: tuple[float, ...],
    eps: float,
    coef: float,
    device: str = "cpu",
) -> np.ndarray:
    """Cosine with own (n, 384) of what `regress` predicts for each k and distance_dim: (n, ks, dims) float32.

    ks ascending. A row's neighbours are fetched once; one small matrix product per step from k to the next k
    extends the weighted sums of all powers.
    """
    for distance_dim in distance_dims:
        _check_formula(distance_dim, eps, coef)
    targets, own = _on_device(targets, device), _on_device(unit(own), device)
    powers = torch.tensor(distance_dims, dtype=torch.float64, device=device)[:, None]
    scores = np.empty((len(own), len(ks), len(distance_dims)), dtype=np.float32)
    step = max(1, 4 * GATHERED // (ks[-1] * targets.shape[1]))
    for start in progress(range(0, len(own), step), "search k and distance_dim"):
        rows = slice(start, start + step)
        index = torch.from_numpy(neighbours.index[rows, : ks[-1]]).to(device)
        distance = torch.from_numpy(neighbours.distance[rows, : ks[-1]]).to(device)
        gathered = targets[index]  # (step, k, 384)
        weight = _relative_weights(distance[:, None], powers, eps, coef).float()  # (step, dims, k)
        total = targets.new_zeros(len(index), len(distance_dims), targets.shape[1])
        for column, (low, high) in enumerate(zip((0, *ks), ks, strict=False)):
            total.baddbmm_(weight[:, :, low:high], gathered[:, low:high])
            scores[rows, column] = F.cosine_similarity(total, own[rows, None], dim=2).cpu()
    return scores


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
    """Model B for the train pictures, out of fold, and for the test pictures.

    queries (n, d), test_queries (m, d): pictures' CLIP embeddings. bank: `text` and/or `image` -> the train
    rows' keys (n, d); texts: more `text` keys. targets (n, 384), norm 1. fold (n,) int. kept (n,) bool: may
    be a neighbour. scored (n,) bool: counts in choosing. keys: `text`, `image`, or `both`: the mix of the two
    predictions. k, distance_dim: `search`, or the number to use; a k beyond the smallest bank of keys becomes its size.

    What is searched is chosen like the ensemble's weights, with the paper silent: for each kind of keys the k
    and distance_dim of the best mean cosine out of fold (of equals the smallest k, then the smallest
    distance_dim), then for `both` the image share. A fold's own predictions use the choice made on the other
    folds' rows; those rows do have neighbours in the fold, as they must, but the cosines that the fold is
    scored by play no part. Raises ValueError for unknown keys, numbers of rows that differ, fewer than two
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
            raise ValueError("no scored rows to choose k and distance_dim on, outside the fold in question")
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
