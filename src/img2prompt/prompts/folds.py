"""Folds that keep similar prompts together, so that no fold is scored on prompts it has seen in training."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from img2prompt.core.progress import progress
from img2prompt.prompts.dedup import FastCosines, check_rows, exact_cosines, max_cosine

STEP = 0.01  # by which the threshold rises: a coarse step stays the same after small changes of the data
FEW = 30  # rows whose mean cosine has a standard error of some 0.03: more than most ideas are worth
PENDING = 4_000_000  # edges held beside the forest: about 400 MB while they are reduced
LEVELS = 16  # cosines at which it is known which rows the forest joins: most pairs of many similar rows are no news


@dataclass(frozen=True, slots=True)
class Folds:
    """Which fold and which group of similar prompts each row belongs to."""

    fold: np.ndarray  # (n,) int64, of the ids asked for
    group: np.ndarray  # (n,) int64, numbered from 0 in order of first appearance
    group_threshold: float  # the cosine that groups were made at
    max_cross_fold_cosine: float  # the largest cosine between rows of different folds


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # i, j: (m,) int64, i > j; cosine: (m,) float64, above 0


def spanning_forest(n: int, parts: list[Edges]) -> Edges:
    """A maximum spanning forest, at most n - 1 edges, of a graph on n rows; `parts` hold its distinct edges."""
    i, j, cosine = map(np.concatenate, zip(*parts, strict=True))
    graph = coo_array((-cosine, (i, j)), (n, n)).tocsr()  # minimum of the negatives; 0 would mean "no edge"
    tree = minimum_spanning_tree(graph).tocoo()
    return tree.row, tree.col, -tree.data


def components(n: int, edges: Edges, threshold: float) -> np.ndarray:
    """(n,) int64: rows joined by edges of at least `threshold`, numbered in order of first appearance."""
    i, j, cosine = edges
    strong = cosine >= threshold
    graph = coo_array((strong[strong], (i[strong], j[strong])), (n, n))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def similarity_forest(
    embeddings: np.ndarray, threshold: float, highest: float, device: str | torch.device = "cpu"
) -> Edges:
    """A maximum spanning forest of the graph of all pairs with cosine >= threshold; cosines above `highest` become it.

    Two rows are joined by edges of at least t in the graph if and only if they are so in the forest, for any t from
    the threshold to the highest: one pass and O(n) memory serve every such t. `embeddings`: (n, d) float32 at norm 1.
    """
    n = len(embeddings)
    fast = FastCosines(device, embeddings)
    rows = fast.cast(embeddings)
    levels = np.linspace(threshold, highest, LEVELS)
    # By level, labels of rows: those of one label are joined by edges of at least the level.
    joined = np.tile(np.arange(n, dtype=np.int32), (LEVELS, 1))
    parts, held = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))], 0

    def news(i: np.ndarray, j: np.ndarray, score: np.ndarray) -> np.ndarray:
        """Which pairs are of rows that are not joined by edges as strong as this one can be."""
        level = np.searchsorted(levels[:-1], score + fast.margin)
        return np.flatnonzero(joined[level, i] != joined[level, j])

    def connect(i: np.ndarray, j: np.ndarray, score: np.ndarray) -> int:
        """Add the edges of these pairs, and say how many they are."""
        # No more than one pair above the highest is needed between a row and those of one label.
        sure = score - fast.margin >= highest
        _, one = np.unique(i[sure] * n + joined[-1, j[sure]], return_index=True)
        doubtful, sure = np.flatnonzero(~sure), np.flatnonzero(sure)[one]
        cosine = np.minimum(exact_cosines(embeddings, i[doubtful], embeddings, j[doubtful]), highest)
        cosine = np.concatenate([cosine, np.full(len(sure), highest)])
        edge = cosine >= threshold
        kept = np.concatenate([doubtful, sure])[edge]
        i, j, cosine = i[kept], j[kept], cosine[edge]
        parts.append((i, j, cosine))
        for own, at_least in zip(joined, levels, strict=True):
            strong = cosine >= at_least
            own[i[strong]] = own[j[strong]]
        return len(i)

    for start in progress(range(0, n, fast.block), "folds", unit="block"):
        stop = min(start + fast.block, n)
        for first in range(0, stop, fast.tile):
            i, j, score = fast.pairs(rows[start:stop], rows[first : min(first + fast.tile, stop)], threshold)
            i, j = start + i, first + j
            earlier = news(i, j, score)
            earlier = earlier[i[earlier] > j[earlier]]
            i, j, score = i[earlier], j[earlier], score[earlier]
            # The strongest of each row first: by it most of the others are no news.
            strongest = np.zeros(stop - start, dtype=np.float32)
            np.maximum.at(strongest, i - start, score)
            best = score == strongest[i - start]
            for part in (best, ~best):
                part = np.flatnonzero(part)
                part = part[news(i[part], j[part], score[part])]
                held += connect(i[part], j[part], score[part])
            if held > PENDING:
                parts, held = [spanning_forest(n, parts)], 0
                for own, at_least in zip(joined, levels, strict=True):
                    own[:] = components(n, parts[0], at_least)
    return spanning_forest(n, parts)


def make_folds(
    embeddings: np.ndarray,
    ids: Sequence[int],
    threshold: float,
    max_threshold: float,
    seed: int,
    given: np.ndarray | None = None,
    scored: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> Folds:
    """Rows with a cosine of at least `threshold`, directly or through others, share a fold.

    Folds are balanced by their scored rows, and where these are level by all rows. Groups can grow into a giant one.
    Then the threshold rises by 0.01 until the largest group has no more scored rows than a fold should have, but never
    above `max_threshold`: a giant group that is left there makes its fold larger. Groups go to folds the largest
    first, each to the smallest fold so far; `seed` orders groups of one size. (scikit-learn's GroupKFold balances
    either sizes or, shuffled, numbers of groups.)

    `embeddings`: (n, d) float32 at norm 1. `ids`: the folds' names, distinct. `given`: (n,) float64, the folds that
    rows came with, nan for those without; they are kept, even where they part a group, and the rest of such a group
    joins the fold that most of its given rows are in (of equals the first of `ids`). `scored`: (n,) bool, the rows that
    count in the scores; None: all.
    Raises ValueError for a given fold that is not among `ids`, an id that gets no scored row, rows that `check_rows`
    refuses, fewer than two ids or equal ones, a threshold of 0 or less, and fewer groups with scored rows than folds.
    """
    check_rows(embeddings)
    if len(set(ids)) < max(2, len(ids)):
        raise ValueError(f"folds.ids: give two or more distinct ids, not {list(ids)}")
    if threshold <= 0:
        raise ValueError(f"folds.threshold: give a cosine above 0, not {threshold}")

    n = len(embeddings)
    highest = max(threshold, max_threshold)
    forest = similarity_forest(embeddings, threshold, highest, device)
    group = components(n, forest, threshold)
    scored = np.ones(n, dtype=bool) if scored is None else scored
    while np.bincount(group[scored]).max() > scored.sum() / len(ids) and threshold < max_threshold:
        threshold = min(round(threshold + STEP, 6), max_threshold)
        group = components(n, forest, threshold)

    # Of each group the rows that are scored, and all.
    sizes = np.stack([np.bincount(group[scored], minlength=group.max() + 1), np.bincount(group)], axis=1)
    given = np.full(n, np.nan) if given is None else given
    fixed = ~np.isnan(given)
    count = (sizes[:, 0] > 0).sum()
    if count < len(ids) and not fixed.all():
        raise ValueError(
            f"folds.ids: {len(ids)} folds, but only {count} groups with scored prompts at a cosine below {threshold} "
            f"between them: give at most {count} ids, or raise folds.threshold"
        )
    if strange := sorted(set(given[fixed].astype(int).tolist()) - set(ids)):
        raise ValueError(f"folds.ids: {list(ids)} lacks the folds {strange[:10]} that the data come with: add them")
    # A group's rows by the folds they came with.
    votes = np.stack([np.bincount(group[given == fold_id], minlength=len(sizes)) for fold_id in ids], axis=1)
    fold_of_group = np.asarray(ids, dtype=np.int64)[votes.argmax(axis=1)]
    settled = np.where(fixed, given, np.where(votes.any(axis=1)[group], fold_of_group[group], np.nan))
    smallest = [(int((scored & (settled == i)).sum()), int((settled == i).sum()), p) for p, i in enumerate(ids)]
    heapq.heapify(smallest)
    for g in np.lexsort((np.random.default_rng(seed).permutation(len(sizes)), -sizes[:, 1], -sizes[:, 0])):
        if not votes[g].any():
            of_scored, of_all, place = smallest[0]
            heapq.heapreplace(smallest, (of_scored + int(sizes[g, 0]), of_all + int(sizes[g, 1]), place))
            fold_of_group[g] = ids[place]
    fold = np.where(fixed, given, fold_of_group[group]).astype(np.int64)
    if missing := sorted(set(ids) - set(fold.tolist())):
        raise ValueError(f"folds.ids: no row is in {missing}: take them out")
    if missing := sorted(set(ids) - set(fold[scored].tolist())):
        raise ValueError(
            f"folds.ids: no row that is scored is in {missing}: take them out, or raise folds.threshold, so that "
            "groups of similar prompts are smaller"
        )
    # Where the forest has edges between folds, the strongest pair of two folds is among them.
    i, j, cosine = forest
    strongest = cosine[fold[i] != fold[j]].max(initial=0.0)
    if not 0 < strongest < highest:
        strongest = max_cosine(embeddings, embeddings, fold, fold, device)
    return Folds(fold, group, threshold, float(strongest))


def few_scored(fold: np.ndarray) -> str:
    """What to say of folds with too few scored rows to mean anything, "" if none has; fold (s,): of the scored rows."""
    few = [held_out for held_out, count in zip(*np.unique(fold, return_counts=True), strict=True) if count < FEW]
    if not few:
        return ""
    return (
        f"folds {[int(held_out) for held_out in few]} have fewer than {FEW} scored rows: their scores mean little. "
        "Give fewer folds.ids, or raise folds.threshold, so that groups of similar prompts are smaller"
    )


def near_folds(
    texts: np.ndarray,
    embeddings: np.ndarray,
    fold: np.ndarray,
    ids: Sequence[int],
    threshold: float,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """(t, folds) bool: whether a text has a cosine of at least `threshold` with a row of each fold of `ids`.

    A model trained on such a text would be scored too well on the fold, as if it had seen the fold's own prompts.
    `texts`: (t, d), `embeddings`: (n, d), both float32 at norm 1. `fold`: (n,) int64.
    """
    near = np.zeros((len(texts), len(ids) + 1), dtype=bool)  # the last column is of rows in no fold of ids
    if not len(texts) or not len(embeddings):
        return near[:, :-1]
    column = np.full(len(fold), len(ids))
    for place, fold_id in enumerate(ids):
        column[fold == fold_id] = place
    fast = FastCosines(device, texts, embeddings)
    rows, limit = fast.cast(embeddings), threshold - 1e-6
    for start in progress(range(0, len(texts), fast.block), "texts", unit="block"):
        block = fast.cast(texts[start : start + fast.block])
        for first in range(0, len(rows), fast.tile):
            i, j, _ = fast.pairs(block, rows[first : first + fast.tile], limit)
            i, j = start + i, first + j
            news = ~near[i, column[j]]
            i, j = i[news], j[news]
            hit = exact_cosines(texts, i, embeddings, j) >= limit
            near[i[hit], column[j[hit]]] = True
    return near[:, :-1]
