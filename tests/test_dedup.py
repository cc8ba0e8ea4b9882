import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.prompts import dedup, waves
from img2prompt.prompts.dedup import deduplicate, max_cosine, nearest_below
from img2prompt.prompts.waves import deduplicate_files

THRESHOLDS = (0.7, 0.8, 0.85, 0.9, 0.95, 0.99)


def unit(*angles):
    """Rows in the plane at these angles in degrees: the cosine of two is the cosine of their difference."""
    radians = np.deg2rad(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def clusters(n, d=24, seed=0, families=12):
    """Families around shared centres, of cosines from 0.5 to 1, some rows exactly equal."""
    rng = np.random.default_rng(seed)
    family = rng.integers(families, size=n)
    centre, spread = rng.standard_normal((families, d)), rng.uniform(0.05, 1, families)
    rows = centre[family] + spread[family, None] * rng.standard_normal((n, d))
    again = rng.random(n) < 0.1
    rows[again] = rows[rng.integers(n, size=again.sum())]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def naive(rows, threshold):
    """The definition, row by row in float64: who is kept, and the nearest kept row of every dropped one."""
    cosine = rows.astype(np.float64) @ rows.astype(np.float64).T
    kept, nearest = [], {}
    for row in range(len(rows)):
        near = cosine[row, kept]
        if kept and near.max() > threshold:
            nearest[row] = kept[int(near.argmax())], near.max()
        else:
            kept.append(row)
    return np.isin(np.arange(len(rows)), kept), nearest


def prefilter(monkeypatch, dtype):
    """Let the processor be one that is fast in this precision."""
    monkeypatch.setattr(dedup, "has_bfloat16", lambda _device: dtype == torch.bfloat16)


def test_of_equal_rows_exactly_the_first_survives():
    result = deduplicate(unit(40, 0, 40, 40, 90), 0.85)
    assert result.thresholds == (0.85,)
    assert result.kept.tolist() == [[True, True, False, False, True]]
    assert result.duplicates[["dropped", "kept"]].values.tolist() == [[2, 0], [3, 0]]
    np.testing.assert_allclose(result.duplicates["cosine"], 1, atol=1e-6)


def test_in_a_chain_only_a_kept_row_drops():
    # 25 degrees apart: cosine 0.906. B goes for A; C is near B alone, and stays.
    result = deduplicate(unit(0, 25, 50), 0.85)
    assert result.kept.tolist() == [[True, False, True]]
    assert result.duplicates.to_dict("list") == {
        "dropped": [1],
        "kept": [0],
        "cosine": pytest.approx([np.cos(np.deg2rad(25))]),
    }
    # A longer chain keeps every other row, in one block: row r waits for row r - 1.
    kept = deduplicate(unit(*range(0, 350, 25)), 0.85).kept[0]
    assert kept.tolist() == [row % 2 == 0 for row in range(14)]


def test_a_row_kept_at_a_higher_threshold_may_drop_one_that_a_lower_threshold_keeps():
    # A, B, C at 0, 35, 55 degrees: cos AB 0.819, BC 0.940, AC 0.574.
    result = deduplicate(unit(0, 35, 55), 0.8, also=[0.9])
    assert result.thresholds == (0.8, 0.9)
    assert result.kept.tolist() == [[True, False, True], [True, True, False]]


def test_a_dropped_row_names_the_nearest_kept_row_and_the_earliest_of_equals():
    result = deduplicate(unit(0, 50, 30, 25), 0.85)  # 2 is nearer to 1; 3 is as near to 0 as to 1
    assert result.duplicates["kept"].tolist()[0] == 1
    mirrored = np.array([[0.8, 0.6, 0], [0.8, -0.6, 0], [1, 0, 0]], dtype=np.float32)
    assert deduplicate(mirrored, 0.75).duplicates["kept"].tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("block", "tile"), [(512, 4096), (64, 128), (17, 50), (1, 1)])
def test_equals_the_definition_whatever_the_precision_and_the_blocks(monkeypatch, dtype, block, tile):
    prefilter(monkeypatch, dtype)
    monkeypatch.setattr(dedup, "BLOCK", block)
    monkeypatch.setattr(dedup, "TILE", tile)
    for seed in range(3):
        rows = clusters(80 if block == 1 else 700, seed=seed)
        result = deduplicate(rows, 0.85, also=THRESHOLDS)
        for threshold, kept in zip(result.thresholds, result.kept, strict=True):
            expected, nearest = naive(rows, threshold)
            np.testing.assert_array_equal(kept, expected)
            if threshold == 0.85:
                assert result.duplicates["dropped"].tolist() == sorted(nearest)
                found = result.duplicates.set_index("dropped")
                for row, (_, cosine) in nearest.items():
                    assert found.cosine[row] == pytest.approx(cosine, abs=1e-12)


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Rows in two files, for waves and blocks that end anywhere, and what one pass finds."""
    rows = clusters(331)
    for name, some in (("a", rows[:210]), ("b", rows[210:])):
        np.save(tmp_path / f"{name}.npy", some)
    monkeypatch.setattr(waves, "WAVE", 47)
    monkeypatch.setattr(dedup, "BLOCK", 16)
    monkeypatch.setattr(dedup, "TILE", 32)
    return [tmp_path / "a.npy", tmp_path / "b.npy"], deduplicate(rows, 0.85, THRESHOLDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_waves_find_what_one_pass_finds(parts, tmp_path, monkeypatch, dtype):
    prefilter(monkeypatch, dtype)
    files, expected = parts
    found = deduplicate_files(files, 0.85, THRESHOLDS, "cpu", tmp_path / "waves")
    assert found.thresholds == expected.thresholds
    assert np.array_equal(found.kept, expected.kept)
    assert 20 < len(expected.duplicates) < 300
    assert found.duplicates.equals(expected.duplicates)


def test_waves_that_a_killed_run_has_decided_are_not_decided_again(parts, tmp_path, monkeypatch):
    files, expected = parts
    decide, calls = waves._decide, []

    def killed(task, wave, *rest):
        calls.append((wave.start, wave.stop))
        if len(calls) == 4:
            raise KeyboardInterrupt
        decide(task, wave, *rest)

    monkeypatch.setattr(waves, "_decide", killed)
    with pytest.raises(KeyboardInterrupt):
        deduplicate_files(files, 0.85, THRESHOLDS, "cpu", tmp_path / "waves")
    found = deduplicate_files(files, 0.85, THRESHOLDS, "cpu", tmp_path / "waves")
    assert calls[3] == calls.pop(4)
    starts, stops = zip(*calls, strict=True)
    assert [*starts, 331] == [0, *stops]
    assert found.duplicates.equals(expected.duplicates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [1, 0.9995])
def test_equal_rows_in_waves_change_nothing(tmp_path, monkeypatch, dtype, norm):
    """They are of kept rows and of dropped ones; those of norm 0.9995 are not near themselves at the cosine 0.9995."""
    prefilter(monkeypatch, dtype)
    monkeypatch.setattr(waves, "WAVE", 23)
    monkeypatch.setattr(dedup, "BLOCK", 8)
    rng = np.random.default_rng(0)
    rows = clusters(120, d=384)[np.sort(rng.integers(120, size=700) * rng.integers(2, size=700))]
    rows = np.float32(norm) * rows[rng.permutation(700)]
    np.save(tmp_path / "rows.npy", rows)
    first, before = waves.equal_rows(rows, 0.9995)
    same = (rows[:, None] == rows).all(axis=2)
    assert (first.tolist() == same.argmax(axis=1).tolist()) == (norm == 1)
    assert ((before >= 0).sum() > 500) == (norm == 1)
    expected = deduplicate(rows, 0.85, [*THRESHOLDS, 0.9995])
    found = deduplicate_files([tmp_path / "rows.npy"], 0.85, [*THRESHOLDS, 0.9995], "cpu", tmp_path / "waves")
    assert np.array_equal(found.kept, expected.kept)
    assert found.duplicates.equals(expected.duplicates)
    of_copies = expected.duplicates.kept.to_numpy()[(expected.duplicates.cosine < 0.99).to_numpy()]
    assert len(of_copies) > 20


def test_rows_that_are_equal_to_a_kept_one_are_compared_with_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(waves, "WAVE", 40)
    made, greedy = [], waves.Task.greedy
    monkeypatch.setattr(waves.Task, "greedy", lambda task, rows: made.append(len(rows)) or greedy(task, rows))
    rows = np.tile(np.eye(40, dtype=np.float32), (9, 1))
    np.save(tmp_path / "rows.npy", rows)
    found = deduplicate_files([tmp_path / "rows.npy"], 0.85, [], "cpu", tmp_path / "waves")
    assert found.kept.sum() == 40
    assert found.duplicates.kept.tolist() == [*range(40)] * 8
    assert made == [40]


def test_survivors_are_apart_and_every_dropped_row_names_a_kept_earlier_one():
    rows = clusters(1500, seed=7)
    result = deduplicate(rows, 0.85)
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    kept = np.flatnonzero(result.kept[0])
    assert 0 < len(kept) < len(rows)
    assert np.triu(cosine[np.ix_(kept, kept)], k=1).max() <= 0.85
    dropped = result.duplicates
    assert sorted([*kept, *dropped["dropped"]]) == list(range(len(rows)))
    assert result.kept[0][dropped["kept"]].all()
    assert (dropped["kept"] < dropped["dropped"]).all()
    assert (dropped["cosine"] > 0.85).all()
    np.testing.assert_allclose(dropped["cosine"], cosine[dropped["dropped"], dropped["kept"]], atol=1e-12)


def test_one_pass_for_many_thresholds_equals_a_pass_for_each():
    rows = clusters(1200, seed=3)
    thresholds = [round(0.70 + 0.01 * step, 2) for step in range(30)]
    together = deduplicate(rows, 0.85, also=thresholds)
    assert together.thresholds == tuple(thresholds)
    for threshold, kept in zip(thresholds, together.kept, strict=True):
        np.testing.assert_array_equal(kept, deduplicate(rows, threshold).kept[0])
    assert together.duplicates.equals(deduplicate(rows, 0.85).duplicates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_a_hair_from_the_threshold_are_decided_exactly(monkeypatch, dtype):
    prefilter(monkeypatch, dtype)
    rng = np.random.default_rng(0)
    rows = []
    for offset in [sign * size for size in (1e-7, 3e-7, 1e-6, 1e-5) for sign in (-1, 1)] * 20:
        a, b = np.linalg.qr(rng.standard_normal((384, 2)))[0].T
        cosine = 0.85 + offset
        rows += [a, cosine * a + np.sqrt(1 - cosine**2) * b]
    rows = np.asarray(rows, dtype=np.float32)
    kept = deduplicate(rows, 0.85).kept[0]
    exact = np.einsum("nd,nd->n", rows[::2], rows[1::2], dtype=np.float64)
    assert kept[::2].all()
    np.testing.assert_array_equal(kept[1::2], exact <= 0.85)
    assert 0.3 < kept[1::2].mean() < 0.7


def test_a_cosine_equal_to_the_threshold_is_not_above_it():
    rows = np.array([[1, 0], [0.75, 0.6614378]], dtype=np.float32)  # 0.75 is exact in binary
    assert deduplicate(rows, 0.75).kept.all()
    assert not deduplicate(rows, np.nextafter(0.75, 0)).kept.all()


def test_a_cluster_larger_than_any_top_k_leaves_one_row():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(32) + 0.01 * rng.standard_normal((6000, 32))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    result = deduplicate(rows, 0.9)
    assert np.flatnonzero(result.kept[0]).tolist() == [0]
    assert (result.duplicates["kept"] == 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 359), min_size=1, max_size=40), st.sampled_from([0.3, 0.6, 0.85, 0.97]))
def test_any_rows_of_the_plane(angles, threshold):
    rows = unit(*angles)
    result = deduplicate(rows, threshold)
    expected, nearest = naive(rows, threshold)
    assert result.kept[0].tolist() == expected.tolist()
    assert result.duplicates["dropped"].tolist() == sorted(nearest)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (2 * unit(0, 10), "row 0 has norm 2"),
        (np.vstack([unit(0, 10), [[np.nan, 0]]]).astype(np.float32), "row 2 has norm nan"),
        (np.vstack([unit(0, 10), [[0, 0]]]).astype(np.float32), "row 2 has norm 0.*divide"),
        (unit(0, 10).astype(np.float64), "float32"),
        (unit(0)[0], "float32"),
        (unit(), "at least one"),
    ],
)
def test_bad_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        deduplicate(rows, 0.85)


@pytest.mark.parametrize(("threshold", "also"), [(0, ()), (1, ()), (0.85, (1.2,)), (0.5, np.linspace(0.1, 0.9, 70))])
def test_bad_thresholds_are_refused(threshold, also):
    with pytest.raises(ValueError, match=r"dedup\.threshold"):
        deduplicate(unit(0, 10), threshold, also)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [-0.3, 0.0, 0.4, 0.95])
def test_every_pair_above_a_limit_is_found_and_none_far_below(monkeypatch, dtype, limit):
    prefilter(monkeypatch, dtype)
    a, b = clusters(90, seed=1), clusters(70, seed=2)
    b[:20] = a[:20]
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    limits = limit + np.where(np.arange(90) % 2, 0.03, 0)
    fast = dedup.FastCosines("cpu", a, b)
    assert fast.dtype == dtype
    for asked in (limit, limits):
        i, j, score = fast.pairs(fast.cast(a), fast.cast(b), asked)
        found = np.zeros(exact.shape, dtype=bool)
        found[i, j] = True
        over = exact - np.broadcast_to(asked, 90)[:, None]
        assert 0 < len(i) == found.sum() < found.size
        assert found[over > 0].all()
        assert not found[over < -2 * fast.margin].any()
        assert np.abs(score - exact[i, j]).max() <= fast.margin
        assert all((np.diff(j[i == row]) > 0).all() for row in range(90))


def test_the_margin_covers_rows_that_lose_all_that_bfloat16_can_take(monkeypatch):
    prefilter(monkeypatch, torch.bfloat16)
    rows = np.full((1, 64), (1 + 2**-8) / 8, dtype=np.float32)  # halfway to the next number, to which none is rounded
    rows[0, 63] = np.sqrt(1 - np.square(rows[0, :63], dtype=np.float64).sum())
    fast = dedup.FastCosines("cpu", rows)
    i, _, score = fast.pairs(fast.cast(rows), fast.cast(rows), 0.999)
    assert i.tolist() == [0]
    assert 0.006 < 1 - score[0] < fast.margin < dedup.LOWEST


def test_pairs_that_cannot_matter_are_not_computed_exactly(monkeypatch):
    """Of a family that its first row drops, the others are compared with that one alone."""
    prefilter(monkeypatch, torch.bfloat16)
    monkeypatch.setattr(dedup, "BLOCK", 64)
    monkeypatch.setattr(dedup, "TILE", 128)
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(384) + 0.2 * rng.standard_normal((1500, 384))  # cosines of 0.96
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    looked, exact = [], dedup.exact_cosines
    monkeypatch.setattr(dedup, "exact_cosines", lambda a, i, b, j: looked.append(len(i)) or exact(a, i, b, j))
    found = deduplicate(rows, 0.85, also=[0.99])
    assert found.kept.sum(axis=1).tolist() == [1, 1500]
    assert sum(looked) < 5 * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_cosine_equals_brute_force(monkeypatch, dtype):
    prefilter(monkeypatch, dtype)
    monkeypatch.setattr(dedup, "BLOCK", 32)
    monkeypatch.setattr(dedup, "TILE", 100)
    a, b = clusters(300, seed=1), clusters(170, seed=2)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    assert max_cosine(a, b) == pytest.approx(exact.max(), abs=1e-12)
    groups_a, groups_b = np.arange(300) % 3, np.arange(170) % 4
    exact[groups_a[:, None] == groups_b] = -1
    assert max_cosine(a, b, groups_a, groups_b) == pytest.approx(exact.max(), abs=1e-12)
    assert max_cosine(b, a, groups_b, groups_a) == max_cosine(a, b, groups_a, groups_b)
    own = a.astype(np.float64) @ a.T.astype(np.float64)
    own[groups_a[:, None] == groups_a] = -1
    assert max_cosine(a, a, groups_a, groups_a) == pytest.approx(own.max(), abs=1e-12)


def test_max_cosine_without_a_pair_is_refused():
    with pytest.raises(ValueError, match="different groups"):
        max_cosine(unit(0, 10), unit(0, 10), np.zeros(2), np.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.7, 0.95])
def test_the_pairs_just_below_the_threshold_are_the_nearest_of_all(monkeypatch, dtype, threshold):
    prefilter(monkeypatch, dtype)
    rows = clusters(900)
    rows = rows[deduplicate(rows, threshold).kept[0]]
    i, j, cosine = nearest_below(rows, threshold, 20)
    every = np.tril(rows.astype(np.float64) @ rows.astype(np.float64).T, -1)[np.tril_indices(len(rows), -1)]
    np.testing.assert_allclose(cosine, np.sort(every)[::-1][:20], atol=1e-12)
    np.testing.assert_allclose(cosine, np.einsum("nd,nd->n", rows[i], rows[j], dtype=np.float64))
    assert (i > j).all()
    assert cosine.max() <= threshold


def test_of_few_rows_all_pairs_are_found_however_far():
    i, j, cosine = nearest_below(unit(0, 90, 180), 0.85, 20)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == [(1, 0), (2, 1), (2, 0)]
    np.testing.assert_allclose(cosine, [0, 0, -1], atol=1e-6)
    assert [len(part) for part in nearest_below(unit(0), 0.85, 20)] == [0, 0, 0]
