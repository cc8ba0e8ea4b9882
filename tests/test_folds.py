import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.prompts import dedup, folds
from img2prompt.prompts.folds import components, make_folds, near_folds, similarity_forest


def unit(*angles):
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def prompts(n, d=48, seed=0):
    """Small families of prompts, far from each other, and single ones."""
    rng = np.random.default_rng(seed)
    family = rng.integers(n // 2, size=n)
    centre, spread = rng.standard_normal((n // 2, d)), rng.uniform(0.1, 0.8, n // 2)
    rows = centre[family] + spread[family, None] * rng.standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def union_find(rows, threshold):
    """Components by first appearance, from all pairs."""
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    parent = list(range(len(rows)))

    def root(row):
        while parent[row] != row:
            row = parent[row]
        return row

    for i, j in np.argwhere(np.triu(cosine >= threshold, k=1)):
        a, b = sorted((root(i), root(j)))
        parent[b] = a
    roots = [root(row) for row in range(len(rows))]
    names = {}
    return np.array([names.setdefault(r, len(names)) for r in roots])


def test_groups_are_the_chains_of_similar_prompts():
    # 0, 40 and 80 degrees hang together by steps of cosine 0.766, though 0 and 80 are far apart.
    found = make_folds(unit(0, 200, 40, 120.5, 80, 290), [0, 1], 0.766, 0.85, seed=0)
    assert found.group.tolist() == [0, 1, 0, 2, 0, 3]
    assert found.group_threshold == 0.766
    assert np.bincount(found.fold).tolist() == [3, 3]


@pytest.mark.parametrize("seed", range(3))
def test_a_group_is_never_split_and_folds_are_balanced(seed):
    rows = prompts(900, seed=seed)
    found = make_folds(rows, [0, 1, 2, 3, 4], 0.7, 0.85, seed=seed)
    assert found.group_threshold == 0.7
    np.testing.assert_array_equal(found.group, union_find(rows, 0.7))
    assert all(len(set(found.fold[found.group == g])) == 1 for g in range(found.group.max() + 1))
    sizes = np.bincount(found.fold)
    assert sizes.max() - sizes.min() <= 1  # single prompts even the folds out
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    cosine[found.fold[:, None] == found.fold] = -1
    assert found.max_cross_fold_cosine == pytest.approx(cosine.max(), abs=1e-12)
    assert found.max_cross_fold_cosine < 0.7


def test_a_giant_chain_raises_the_threshold_as_far_as_needed():
    # Two chains: steps of 10 degrees (0.985), joined by one step of 38 (0.788), and single rows.
    chain = [*range(0, 60, 10), *range(88, 148, 10)]
    rows = unit(*chain, 200, 250, 300)
    found = make_folds(rows, [0, 1], 0.7, 0.95, seed=0)
    assert found.group_threshold == 0.79
    np.testing.assert_array_equal(found.group, union_find(rows, 0.79))
    assert found.max_cross_fold_cosine == pytest.approx(np.cos(np.deg2rad(38)), abs=1e-6)
    # Not above the given limit, even where the giant group then fills a fold of its own.
    capped = make_folds(rows, [0, 1], 0.7, 0.755, seed=0)
    assert capped.group_threshold == 0.755
    assert sorted(np.bincount(capped.fold)) == [3, 12]


@pytest.mark.parametrize("pending", [0, 1000, 10**6])
def test_the_forest_has_the_components_of_the_graph_at_every_threshold(monkeypatch, pending):
    monkeypatch.setattr(folds, "PENDING", pending)
    monkeypatch.setattr(dedup, "BLOCK", 50)
    monkeypatch.setattr(dedup, "TILE", 120)
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((400, 6))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    forest = similarity_forest(rows, 0.7, 0.95)
    assert len(forest[0]) < len(rows)
    assert forest[2].max() == 0.95
    for threshold in (0.7, 0.75, 0.8, 0.85, 0.9, 0.95):
        np.testing.assert_array_equal(components(len(rows), forest, threshold), union_find(rows, threshold))


def test_of_many_copies_few_pairs_are_looked_at(monkeypatch):
    monkeypatch.setattr(folds, "PENDING", 1000)
    monkeypatch.setattr(dedup, "BLOCK", 50)
    monkeypatch.setattr(dedup, "TILE", 120)
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((20, 384))[rng.integers(20, size=2000)]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    looked, exact = [], folds.exact_cosines
    monkeypatch.setattr(folds, "exact_cosines", lambda a, i, b, j: looked.append(len(i)) or exact(a, i, b, j))
    forest = similarity_forest(rows, 0.7, 0.95)
    np.testing.assert_array_equal(components(2000, forest, 0.95), union_find(rows, 0.95))
    # 2,000 rows have some 100,000 pairs of equals.
    assert sum(looked) == 0
    assert len(forest[0]) == 1980


@pytest.mark.parametrize("given", [False, True])
def test_the_largest_cosine_across_folds_where_the_threshold_rose(monkeypatch, given):
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((300, 4))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    passes, search = [], folds.max_cosine
    monkeypatch.setattr(folds, "max_cosine", lambda *args: passes.append(1) or search(*args))
    # Folds that the data come with part rows that are nearer than any threshold.
    wanted = np.arange(300) % 2 if given else np.full(300, np.nan)
    found = make_folds(rows, [0, 1], 0.7, 0.97, seed=0, given=wanted)
    assert found.group_threshold > 0.7
    cosine[found.fold[:, None] == found.fold] = -1
    assert found.max_cross_fold_cosine == pytest.approx(cosine.max(), abs=1e-12)
    assert len(passes) == given


def test_only_a_giant_group_makes_the_limit_matter():
    rows = prompts(300)
    low, high = (make_folds(rows, [0, 1, 2], 0.7, limit, seed=1) for limit in (0.75, 0.95))
    np.testing.assert_array_equal(low.fold, high.fold)


def test_the_seed_alone_decides_between_groups_of_one_size():
    rows = prompts(300)
    one, same, other = (make_folds(rows, [0, 1, 2], 0.7, 0.85, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.fold, same.fold)
    np.testing.assert_array_equal(one.group, other.group)
    assert (one.fold != other.fold).any()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(-5, 50), min_size=2, max_size=6, unique=True))
def test_any_distinct_ids(ids):
    found = make_folds(prompts(120), ids, 0.7, 0.85, seed=0)
    assert found.fold.dtype == found.group.dtype == np.int64
    assert sorted(set(found.fold.tolist())) == sorted(ids)


@pytest.mark.parametrize("ids", [[], [0], [1, 1, 2]])
def test_bad_ids_are_refused(ids):
    with pytest.raises(ValueError, match=r"folds\.ids"):
        make_folds(prompts(50), ids, 0.7, 0.85, seed=0)


def test_fewer_groups_than_folds_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"folds\.ids: 3 folds, but only 2 groups.*at most 2"):
        make_folds(unit(0, 1, 2, 180, 181), [0, 1, 2], 0.7, 0.85, seed=0)


def test_a_threshold_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"folds\.threshold"):
        make_folds(unit(0, 90, 180), [0, 1], 0.0, 0.85, seed=0)


def test_given_folds_are_kept_and_pull_their_groups_along():
    # Groups: {0, 1, 2} at 0 degrees, {3, 4} at 90, {5} at 180, {6} at 270.
    rows = unit(0, 1, 2, 90, 91, 180, 270)
    given = np.array([7, np.nan, np.nan, 3, 7, np.nan, np.nan])
    found = make_folds(rows, [3, 7], 0.7, 0.85, seed=0, given=given)
    assert found.fold[:5].tolist() == [7, 7, 7, 3, 7]  # rows 3 and 4 were parted by whoever gave them
    assert sorted(np.bincount(found.fold)[[3, 7]]) == [3, 4]
    assert found.group.tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert found.max_cross_fold_cosine == pytest.approx(np.cos(np.deg2rad(1)), abs=1e-6)


def test_all_folds_given():
    given = np.array([1.0, 0, 1, 0, 0])
    found = make_folds(unit(0, 0, 0, 0, 90), [0, 1], 0.7, 0.85, seed=0, given=given)
    assert found.fold.tolist() == given.tolist()


def test_without_given_folds_nothing_changes():
    rows = prompts(300)
    none = np.full(300, np.nan)
    plain, asked = (make_folds(rows, [0, 1, 2], 0.7, 0.85, seed=1, given=given) for given in (None, none))
    np.testing.assert_array_equal(plain.fold, asked.fold)


def test_given_folds_that_are_not_asked_for_are_refused():
    with pytest.raises(ValueError, match=r"folds\.ids: \[0, 1\] lacks the folds \[5\]"):
        make_folds(unit(0, 90, 180), [0, 1], 0.7, 0.85, seed=0, given=np.array([0.0, 5, np.nan]))
    with pytest.raises(ValueError, match=r"no row is in \[1\]"):
        make_folds(unit(0, 90), [0, 1], 0.7, 0.85, seed=0, given=np.array([0.0, 0]))


def test_texts_are_near_the_folds_that_hold_a_similar_prompt():
    rows, fold = unit(0, 90, 180), np.array([4, 9, 9])
    near = near_folds(unit(10, 45, 170, 260), rows, fold, [4, 9], 0.9)
    assert near.tolist() == [[True, False], [False, False], [False, True], [False, False]]
    assert near_folds(unit(45), rows, fold, [4, 9], 0.7).tolist() == [[True, True]]
    assert near_folds(rows[:0], rows, fold, [4, 9], 0.9).shape == (0, 2)


def test_folds_are_balanced_by_scored_rows_and_then_by_all():
    # A giant of 40 near-equal prompts, one of which is scored, and twenty single ones: 21 scored rows in three folds.
    rows = np.concatenate([np.tile(prompts(21, d=384)[:1], (40, 1)), prompts(21, d=384)[1:]])
    scored = np.arange(60) >= 39
    found = make_folds(rows, [0, 1, 2], 0.95, 0.95, seed=0, scored=scored)
    assert np.bincount(found.fold[scored]).tolist() == [7, 7, 7]
    assert len(set(found.fold[:40].tolist())) == 1
    # Groups of one scored row each: where these are level, the fold with fewer rows is next.
    sizes = [5, 4, 3, 2, 1, 1]
    rows = np.repeat(prompts(6, d=384, seed=4), sizes, axis=0)
    scored = np.isin(np.arange(16), np.cumsum([0, *sizes[:-1]]))
    found = make_folds(rows, [0, 1], 0.99, 0.99, seed=0, scored=scored)
    assert np.bincount(found.fold[scored]).tolist() == [3, 3]
    assert np.bincount(found.fold).tolist() == [8, 8]


def test_a_giant_with_few_scored_rows_needs_no_higher_threshold():
    rows = np.concatenate([unit(*np.zeros(30), *np.linspace(0, 40, 3)), unit(90, 180, 270, 135, 225)])
    scored = np.arange(len(rows)) >= 30
    assert make_folds(rows, [0, 1], 0.9, 0.99, seed=0, scored=scored).group_threshold == 0.9
    assert make_folds(rows, [0, 1], 0.9, 0.99, seed=0).group_threshold > 0.9


def test_an_impossible_balance_names_the_threshold():
    rows = unit(0, 1, 90, 180)
    scored = np.array([True, False, True, False])
    with pytest.raises(ValueError, match=r"3 folds, but only 2 groups with scored prompts.*raise folds\.threshold"):
        make_folds(rows, [0, 1, 2], 0.7, 0.85, seed=0, scored=scored)
    given = np.array([0.0, 0, 0, 1])
    with pytest.raises(ValueError, match=r"no row that is scored is in \[1\].*raise folds\.threshold"):
        make_folds(rows, [0, 1], 0.7, 0.85, seed=0, given=given, scored=scored)
