from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from img2prompt.core.metric import cosine, unit
from img2prompt.ensemble.weights import Cosines, mix, search_weights
from img2prompt.model_b import neighbours, parts
from img2prompt.model_b.bank import Bank, Setting
from img2prompt.model_b.choice import DISTANCE_DIM_GRID, Texts, fit
from img2prompt.model_b.neighbours import Neighbours, nearest
from img2prompt.model_b.parts import Rows, nearest_by_parts
from img2prompt.model_b.regression import grid_scores, regress, weights


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small gain nothing from threads, and lose on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def directions(n, dim, seed):
    return unit(np.random.default_rng(seed).normal(size=(n, dim))).astype(np.float32)


def brute_force(queries, keys, k):
    """All distances in float64, ordered by (distance, index)."""
    queries, keys = unit(queries).astype(np.float64), unit(keys).astype(np.float64)
    distance = np.linalg.norm(queries[:, None] - keys, axis=2)
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return index, np.take_along_axis(distance, index, axis=1)


@contextmanager
def small_blocks(half=False):
    """Blocks so small that a few rows cross every seam, of keys that are not held; products in bfloat16 or float32."""
    sizes = {"QUERY_BLOCK": 7, "KEY_BLOCK": 23, "SWEEP": 2, "GATHERED": 500, "SLACK": 2, "HELD": 0, "HALF": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, size in sizes.items():
            patch.setattr(neighbours, name, size)
        patch.setattr(neighbours, "has_bfloat16", lambda device: half)
        yield


@pytest.mark.parametrize("half", [False, True])
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 90), st.integers(2, 20), st.floats(0, 3), st.data())
def test_nearest_is_brute_force(half, n, m, dim, shared, data):
    k = data.draw(st.integers(1, m))
    queries, keys = directions(n, dim, 1) + shared, directions(m, dim, 2) + shared
    index, distance = brute_force(queries, keys, k)
    with small_blocks(half):
        found = nearest(queries, keys, k)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-7)
    assert (found.index.dtype, found.distance.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("apart", [0, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("k", [1, 5, 60, 100])
def test_equal_and_nearly_equal_keys(k, apart, half):
    # 100 keys of 4 directions: every distance is shared by some 25 keys, far more than the slack. Apart by less than
    # a product can tell, or equal, in which case the index decides.
    rng = np.random.default_rng(0)
    keys, queries = directions(4, 64, 3)[rng.integers(4, size=100)], directions(20, 64, 4)
    keys = (keys + apart * rng.normal(size=keys.shape) * rng.integers(2, size=(100, 1))).astype(np.float32)
    index, distance = brute_force(queries, keys, k)
    with small_blocks(half):
        found = nearest(queries, keys, k)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-7)


@pytest.mark.parametrize(("half", "wider"), [(False, 1e-5), (True, 0.03)])
def test_a_shortlist_leaves_out_no_key_that_might_be_nearer(half, wider):
    queries, keys = (unit(directions(n, 64, n) + 0.1).astype(np.float32) for n in (20, 500))
    exact = queries.astype(np.float64) @ keys.T.astype(np.float64)
    with small_blocks(half):
        rows, bank = torch.from_numpy(queries), neighbours.UnitRows(keys, "cpu")
        lists = [*neighbours._shortlists(rows, bank, 40, half, torch.empty(10_000))]
    assert np.concatenate([np.arange(20)[rows] for rows, _, _ in lists]).tolist() == [*range(20)]
    highest, listed = (np.concatenate(parts) for parts in list(zip(*lists, strict=True))[1:])
    of_listed = np.take_along_axis(exact, listed, axis=1)
    assert ((of_listed <= highest) & (highest <= of_listed + wider)).all()
    np.put_along_axis(exact, listed, -1, axis=1)
    assert (exact.max(axis=1) <= highest[:, -1]).all()


def test_a_shortlist_counts_the_rounding_of_its_products():
    # Factors that bfloat16 holds, and a mean of 0: their products alone are rounded.
    queries, keys = (torch.from_numpy(directions(n, 64, n)).bfloat16().float() for n in (20, 500))
    keys = torch.stack([keys, -keys], dim=1).flatten(0, 1)
    [(_, highest, listed)] = neighbours._shortlists(queries, keys, 40, True, torch.empty(100_000))
    assert (np.take_along_axis((queries.double() @ keys.T.double()).numpy(), listed, axis=1) <= highest).all()


def test_both_precisions_find_the_same_bytes():
    queries, keys = directions(2100, 96, 20), directions(5000, 96, 21)
    keys[4000:] = keys[:1000]
    found = []
    for half in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(neighbours, "has_bfloat16", lambda device: half)  # noqa: B023
            found.append(nearest(queries, keys, 30))
    np.testing.assert_array_equal(found[0].index, found[1].index)
    np.testing.assert_array_equal(found[0].distance, found[1].distance)


@pytest.fixture
def in_files(tmp_path, monkeypatch):
    """Queries and some rows of keys in files, equal keys in several blocks of these, and what one search finds."""
    queries, keys, chosen = directions(30, 16, 8), directions(100, 16, 9), np.arange(100)[np.arange(100) % 7 > 0]
    keys[60:90] = keys[:30]
    for name, rows in (("queries", queries), ("a", keys[:70]), ("b", keys[70:]), ("chosen", chosen)):
        np.save(tmp_path / f"{name}.npy", rows)
    monkeypatch.setattr(parts, "QUERIES", 11)
    monkeypatch.setattr(parts, "KEYS", 17)
    files = tuple(tmp_path / f"{name}.npy" for name in "ab")
    rows = Rows.every(tmp_path / "queries.npy"), Rows(files, len(chosen), tmp_path / "chosen.npy")
    return *rows, {k: nearest(queries, keys[chosen], k) for k in (1, 5, 25, len(chosen))}


def test_parts_find_what_one_search_finds(in_files, tmp_path):
    queries, keys, expected = in_files
    for k, whole in expected.items():
        found = nearest_by_parts(queries, keys, k, "cpu", tmp_path / str(k), "neighbours")
        np.testing.assert_array_equal(found.index, whole.index)
        np.testing.assert_array_equal(found.distance, whole.distance)
        assert (found.index.dtype, found.distance.dtype) == (np.int32, np.float32)
        assert not list((tmp_path / str(k)).rglob("*.safetensors"))
    with pytest.raises(ValueError, match="85 keys"):
        nearest_by_parts(queries, keys, 86, "cpu", tmp_path, "neighbours")


def test_lists_that_a_killed_run_has_left_are_not_made_again(in_files, tmp_path, monkeypatch):
    queries, keys, expected = in_files
    listed, calls = parts._listed, []

    def killed(queries, keys, rows, columns, *rest):
        calls.append((rows.start, columns.start))
        if len(calls) == 8:
            raise KeyboardInterrupt
        listed(queries, keys, rows, columns, *rest)

    monkeypatch.setattr(parts, "_listed", killed)
    with pytest.raises(KeyboardInterrupt):
        nearest_by_parts(queries, keys, 5, "cpu", tmp_path / "found", "neighbours")
    found = nearest_by_parts(queries, keys, 5, "cpu", tmp_path / "found", "neighbours")
    np.testing.assert_array_equal(found.index, expected[5].index)
    assert len(calls) == 16
    assert len(set(calls)) == 15


def test_a_query_among_the_keys_is_at_distance_zero():
    keys = directions(50, 512, 5)
    keys[30] = keys[20]
    close = keys.copy()
    close[:, 0] += 1e-5
    found = nearest(keys, keys, 2)
    np.testing.assert_array_equal(found.distance[:, 0], 0)
    assert found.index[20].tolist() == found.index[30].tolist() == [20, 30]
    # 2 - 2*dot in fp32 would be wrong in the first digit here.
    np.testing.assert_allclose(nearest(close, keys, 1).distance, brute_force(close, keys, 1)[1], rtol=1e-7)


def test_lengths_of_queries_and_keys_do_not_matter():
    queries, keys = directions(10, 6, 6), directions(40, 6, 7)
    longer = nearest(4 * queries, keys * np.arange(1, 41)[:, None], 9)
    np.testing.assert_array_equal(longer.index, nearest(queries, keys, 9).index)


@pytest.mark.parametrize("k", [0, 4])
def test_nearest_refuses_a_k_that_the_bank_cannot_serve(k):
    with pytest.raises(ValueError, match="3 keys"):
        nearest(directions(2, 4, 0), directions(3, 4, 0), k)


def test_weights_by_hand():
    # w = 1 / (d**2 + 0.5): 1/0.75, 1/1.5, 1/4.5 = 12/9, 6/9, 2/9; of their sum 20/9: 0.6, 0.3, 0.1
    distance = np.array([[0.5, 1.0, 2.0]], dtype=np.float32)
    np.testing.assert_allclose(weights(distance, 2, 0.5, 1), [[0.6, 0.3, 0.1]])
    np.testing.assert_allclose(weights(distance, 0, 0.5, 1), [[1 / 3, 1 / 3, 1 / 3]])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0, 2, width=32), min_size=1, max_size=6),
    st.floats(0, 64),
    st.floats(1e-300, 1),
    st.floats(1e-300, 1e300),
)
def test_coef_cancels_and_weights_stay_finite(distances, distance_dim, eps, coef):
    distance = np.array([sorted(distances)], dtype=np.float32)
    share = weights(distance, distance_dim, eps, coef)
    np.testing.assert_allclose(share, weights(distance, distance_dim, eps, 1), rtol=1e-9, atol=1e-300)
    assert share.sum() == pytest.approx(1)
    assert (np.diff(share) <= 1e-12).all()


def test_large_powers_neither_overflow_nor_vanish():
    # 0.001**400 is no float64; the ratio of the two weights, 2**400 / 1, is.
    share = weights(np.array([[1e-3, 2e-3]]), 400, 1e-300, 1)
    np.testing.assert_allclose(share, [[0.5, 0.5]])  # both powers are far below eps, which levels them
    share = weights(np.array([[0.25, 0.5]]), 400, 1e-300, 1)
    np.testing.assert_allclose(share, [[1, 2.0**-400]], rtol=1e-9)


def test_an_exact_match_counts_by_eps():
    share = weights(np.array([[0.0, 0.5]]), 2, 1e-3, 1)
    np.testing.assert_allclose(share[0, 0] / share[0, 1], (0.25 + 1e-3) / 1e-3)
    np.testing.assert_allclose(weights(np.array([[0.0, 0.0, 1.0]]), 1, 1e-12, 1), [[0.5, 0.5, 0]], atol=1e-9)


@pytest.mark.parametrize(("distance_dim", "eps", "coef"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, np.nan)])
def test_weights_refuses(distance_dim, eps, coef):
    with pytest.raises(ValueError, match="eps"):
        weights(np.ones((1, 2)), distance_dim, eps, coef)


def test_regress_by_hand():
    # Weights 0.6 and 0.3 (see above; the third neighbour is beyond k) of (1, 0) and (0, 1): (2, 1) / sqrt(5).
    neighbours = Neighbours(np.array([[2, 0, 1]]), np.array([[0.5, 1.0, 2.0]], dtype=np.float32))
    targets = np.array([[0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    predicted = regress(neighbours, targets, k=2, distance_dim=2, eps=0.5, coef=7)
    np.testing.assert_allclose(predicted, np.array([[2, 1]]) / 5**0.5, rtol=1e-6)
    assert predicted.dtype == np.float32
    with pytest.raises(ValueError, match="3 neighbours were searched"):
        regress(neighbours, targets, k=4, distance_dim=2, eps=0.5, coef=1)


def test_the_grid_s_scores_are_those_of_regress():
    targets, own = directions(80, 12, 8), directions(25, 12, 9)
    neighbours = nearest(directions(25, 6, 10), directions(80, 6, 11), 50)
    ks, dims = (1, 2, 7, 40), (0, 1.5, 8, 64)
    with small_blocks():
        scores = grid_scores(neighbours, targets, 3 * own, ks, dims, 1e-12, 2.0)
    for i, k in enumerate(ks):
        for j, distance_dim in enumerate(dims):
            direct = cosine(regress(neighbours, targets, k, distance_dim, 1e-12, 2.0), own)
            np.testing.assert_allclose(scores[:, i, j], direct, atol=1e-6)
    some = np.array([3, 4, 17])
    again = grid_scores(neighbours, targets, own, ks, dims, 1e-12, 2.0, rows=some)
    np.testing.assert_allclose(again, scores[some], atol=1e-6)


N, M = 240, 20


@pytest.fixture(scope="module")
def data():
    """Images, prompts and targets that share a 4-d meaning; text keys are noisier than image keys."""
    rng = np.random.default_rng(12)
    meaning, _ = rng.normal(size=(N, 4)), rng.normal(size=(M, 4))
    to_clip, to_target = rng.normal(size=(4, 8)), rng.normal(size=(4, 12))
    return {
        "queries": meaning @ to_clip + 0.3 * rng.normal(size=(N, 8)),
        "bank": {
            "text": meaning @ to_clip + 0.8 * rng.normal(size=(N, 8)),
            "image": meaning @ to_clip + 0.3 * rng.normal(size=(N, 8)),
        },
        "targets": unit(meaning @ to_target).astype(np.float32),
        "fold": np.arange(N) % 4,
        "kept": rng.random(N) < 0.9,
        "scored": rng.random(N) < 0.8,
        "keys": "both",
        "k": "search",
        "distance_dim": "search",
        "eps": 1e-9,
        "coef": 1.0,
    }


@pytest.fixture(scope="module")
def on_test():
    return directions(M, 8, 17)


@pytest.fixture(scope="module")
def result(data):
    return fit(**data)


def test_neighbours_come_from_kept_rows_of_other_folds(data, result):
    for kind in ("text", "image"):
        found = result.neighbours[kind]
        assert data["kept"][found.index].all()
        assert (data["fold"][found.index] != data["fold"][:, None]).all()
    assert data["kept"][result.bank.rows].all()
    assert len(result.bank.rows) == data["kept"].sum()
    # A row's nearest kept row of another fold, by hand.
    rows = np.flatnonzero(data["kept"] & (data["fold"] != data["fold"][5]))
    best = rows[cosine(np.tile(data["queries"][5], (len(rows), 1)), data["bank"]["image"][rows]).argmax()]
    assert result.neighbours["image"].index[5, 0] == best


def test_the_choice_is_the_best_of_the_table_and_predicts_other_images(data, result, on_test):
    args = data["eps"], data["coef"]
    for kind, setting in result.bank.choice.settings.items():
        table = result.search_table.query("keys == @kind")
        best = table.loc[table["score"].idxmax()]
        assert (setting.k, setting.distance_dim) == (best["k"], best["distance_dim"])
        direct = regress(result.neighbours[kind], data["targets"], setting.k, setting.distance_dim, *args)
        scored = data["scored"]
        assert best["score"] == pytest.approx(cosine(direct[scored], data["targets"][scored]).mean(), abs=1e-6)
    predicted, neighbours = result.bank.predict(on_test)
    by_kind = {
        kind: regress(found, data["targets"][data["kept"]], setting.k, setting.distance_dim, *args)
        for kind, found in neighbours.items()
        for setting in [result.bank.choice.settings[kind]]
    }
    share = result.bank.choice.image_share
    expected = mix([by_kind["image"], by_kind["text"]], [share, 1 - share])
    np.testing.assert_array_equal(predicted, expected)
    assert predicted.dtype == result.oof.dtype == np.float32


def test_a_fold_is_predicted_under_its_own_choice(data, result):
    for held_out, choice in result.fold_choices.items():
        rows = data["fold"] == held_out
        image, text = (
            regress(result.neighbours[kind], data["targets"], s.k, s.distance_dim, data["eps"], data["coef"])
            for kind, s in (("image", choice.settings["image"]), ("text", choice.settings["text"]))
        )
        shares = [choice.image_share, 1 - choice.image_share]
        np.testing.assert_array_equal(result.oof[rows], mix([image[rows], text[rows]], shares))
        others = data["scored"] & ~rows
        found = search_weights(Cosines.between([image[others], text[others]], data["targets"][others]))
        assert shares[0] == pytest.approx(found[0], rel=1e-9)  # blocks of rows are others, and so are roundings


def test_both_kinds_of_keys_beat_one(data, result):
    scored = data["scored"]
    for keys in ("text", "image"):
        alone = fit(**{**data, "keys": keys})
        assert set(alone.bank.choice.settings) == set(alone.neighbours) == {keys}
        assert alone.bank.choice.image_share == float(keys == "image")
        assert alone.bank.choice.settings[keys] == result.bank.choice.settings[keys]
        both = cosine(result.oof[scored], data["targets"][scored]).mean()
        assert both > cosine(alone.oof[scored], data["targets"][scored]).mean()


def test_a_fold_s_own_scores_do_not_move_its_choice(data):
    # Without kept rows fold 2 is nobody's neighbour: its targets and images can matter only as scores.
    kept = data["kept"] & (data["fold"] != 2)
    before = fit(**{**data, "kept": kept})
    rows = data["fold"] == 2
    targets, queries = data["targets"].copy(), data["queries"].copy()
    targets[rows], queries[rows] = directions(rows.sum(), 12, 13), directions(rows.sum(), 8, 14)
    after = fit(**{**data, "kept": kept, "targets": targets, "queries": queries})
    assert after.fold_choices[2] == before.fold_choices[2]
    assert after.bank.choice != before.bank.choice


def test_rows_that_are_not_scored_choose_nothing(data, result):
    queries = data["queries"].copy()
    queries[~data["scored"]] = directions((~data["scored"]).sum(), 8, 15)
    after = fit(**{**data, "queries": queries})
    assert after.bank.choice == result.bank.choice
    assert after.fold_choices == result.fold_choices


def test_a_prediction_depends_on_its_own_image_alone(result, on_test):
    order = np.random.default_rng(16).permutation(M)[:7]
    together = result.bank.predict(on_test)[0]
    np.testing.assert_allclose(result.bank.predict(on_test[order])[0], together[order], atol=1e-6)


def test_a_bank_is_stored_and_loaded(result, on_test, tmp_path):
    result.bank.save(tmp_path)
    loaded = Bank.load(tmp_path)
    assert loaded.choice == result.bank.choice
    np.testing.assert_array_equal(loaded.rows, result.bank.rows)
    np.testing.assert_array_equal(loaded.predict(on_test)[0], result.bank.predict(on_test)[0])


def test_numbers_in_params_are_used_as_they_are(data):
    fixed = fit(**{**data, "k": 10, "distance_dim": 3.0})
    for choice in (fixed.bank.choice, *fixed.fold_choices.values()):
        assert choice.settings == {"text": Setting(10, 3.0), "image": Setting(10, 3.0)}
    half = fit(**{**data, "k": 10})
    assert half.bank.choice.settings["image"].k == 10
    assert half.search_table["distance_dim"].nunique() == len(DISTANCE_DIM_GRID)


def test_k_is_capped_by_the_smallest_bank(data):
    kept = np.arange(N) < 12  # three kept rows a fold: nine outside each
    assert fit(**{**data, "kept": kept, "k": 100}).bank.choice.settings["text"].k == 9
    assert fit(**{**data, "kept": kept}).search_table["k"].max() == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": "images"}, "choose text, image or both"),
        ({"fold": np.zeros(N, dtype=int)}, "two folds"),
        ({"kept": np.arange(N) % 4 == 1}, "two folds or more need kept rows"),
        ({"scored": np.arange(N) % 4 == 1}, "no scored rows"),
        ({"targets": np.ones((N - 1, 12))}, "train rows differ"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_fit_refuses(data, change, message):
    with pytest.raises(ValueError, match=message):
        fit(**{**data, **change})


def test_texts_are_more_text_keys_but_not_for_folds_that_they_are_near(data, result, on_test):
    rng = np.random.default_rng(5)
    # The texts are the queries themselves: nearest of all, where they may be used.
    texts = Texts(
        data["queries"][:40].astype(np.float32), data["targets"][:40], rng.random(40) < 0.8,
        {f: rng.random(40) < 0.5 for f in range(4)},
    )  # fmt: skip
    found = fit(**data, texts=texts)
    index = found.neighbours["text"].index
    assert (index >= N).any()
    for row in range(N):
        used = index[row][index[row] >= N] - N
        assert texts.kept[used].all()
        assert not texts.near[data["fold"][row]][used].any()
        if row < 40 and texts.kept[row] and not texts.near[data["fold"][row]][row]:
            assert index[row, 0] == N + row
    assert (found.neighbours["image"].index == result.neighbours["image"].index).all()
    # In the bank the images' rows come first, for image keys are there of these alone.
    assert found.bank.rows.tolist() == [*np.flatnonzero(data["kept"]), *(N + np.flatnonzero(texts.kept))]
    assert len(found.bank.keys["image"]) == data["kept"].sum()
    assert len(found.bank.keys["text"]) == len(found.bank.targets) == data["kept"].sum() + texts.kept.sum()
    no_rows = np.empty(0, bool)
    none = Texts(np.empty((0, 8), np.float32), data["targets"][:0], no_rows, dict.fromkeys(range(4), no_rows))
    np.testing.assert_array_equal(fit(**data, texts=none).bank.predict(on_test)[0], result.bank.predict(on_test)[0])
