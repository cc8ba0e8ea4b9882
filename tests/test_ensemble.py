import numpy as np
import pytest

from img2prompt.ensemble import (
    constant,
    cross_fitted,
    fold_scores,
    member_cosines,
    mix,
    mixed_scores,
    scores_table,
    search_alpha,
)
from img2prompt.metric import cosine, mean_cosine, unit

N, DIM = 300, 16
rng = np.random.default_rng(0)


def directions(n=N, dim=DIM):
    return unit(rng.normal(size=(n, dim))).astype(np.float32)


@pytest.fixture
def members():
    """Two members with independent errors of different size around the same targets."""
    targets = directions()
    a = unit(targets + 0.15 * rng.normal(size=targets.shape)).astype(np.float32)
    b = unit(targets + 0.25 * rng.normal(size=targets.shape)).astype(np.float32)
    return a, b, targets


def test_mix_by_hand():
    # (1, 0) and (0, 1) after scaling: 0.6*(1, 0) + 0.4*(0, 1) = (0.6, 0.4), of norm sqrt(0.52)
    mixed = mix(np.array([[5.0, 0.0]]), np.array([[0.0, 0.1]]), 0.6)
    np.testing.assert_allclose(mixed, np.array([[0.6, 0.4]]) / 0.52**0.5)


def test_scaling_one_member_changes_nothing(members):
    a, b, targets = members
    np.testing.assert_allclose(mix(10 * a, b, 0.7), mix(a, b, 0.7), atol=1e-6)
    assert search_alpha(10 * a, b, targets).alpha == pytest.approx(search_alpha(a, b, targets).alpha, abs=1e-5)


def test_the_curve_is_the_score_of_the_mix(members):
    a, b, targets = members
    search = search_alpha(a, b, targets)
    assert search.curve["alpha"].tolist() == [i / 100 for i in range(101)]
    direct = [mean_cosine(mix(a, b, alpha), targets) for alpha in search.curve["alpha"]]
    np.testing.assert_allclose(search.curve["score"], direct, atol=1e-7)
    assert search.score == pytest.approx(mean_cosine(mix(a, b, search.alpha), targets), abs=1e-7)
    assert search.score >= search.curve["score"].max()


def test_a_planted_alpha_is_recovered():
    a, b = directions(), directions()
    targets = mix(a, b, 0.6372)
    search = search_alpha(a, b, targets)
    assert search.alpha == pytest.approx(0.6372, abs=1e-4)
    assert search.score == pytest.approx(1)


def test_alpha_at_the_ends():
    a, b = directions(), directions()
    assert search_alpha(a, b, a).alpha == 1
    assert search_alpha(a, b, b).alpha == 0


def test_equal_members_count_alike():
    a, targets = directions(), directions()
    assert search_alpha(a, a, targets).alpha == 0.5


def test_opposite_members_do_not_break_the_search():
    a = directions()
    search = search_alpha(a, -a, a)
    assert search.score == pytest.approx(1)
    assert search.alpha > 0.5
    assert np.isfinite(search.curve["score"]).all()


def test_rows_limit_the_search(members):
    a, b, targets = members
    rows = np.arange(N) % 2 == 0
    expected = search_alpha(a[rows], b[rows], targets[rows])
    assert search_alpha(a, b, targets, rows).alpha == expected.alpha
    assert search_alpha(a, b, targets, np.flatnonzero(rows)).score == expected.score
    with pytest.raises(ValueError, match="no rows"):
        search_alpha(a, b, targets, np.zeros(N, dtype=bool))


def test_grams_score_any_number_of_members(members):
    a, b, targets = members
    c, shares = directions(), np.array([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])
    scores = mixed_scores(shares, *member_cosines([a, b, c], targets))
    direct = [mean_cosine(w[0] * a + w[1] * b + w[2] * c, targets) for w in shares]
    np.testing.assert_allclose(scores, direct, atol=1e-7)


def test_a_fold_s_alpha_comes_from_the_other_folds(members):
    a, b, targets = members
    fold, scored = np.arange(N) % 3, rng.random(N) < 0.9
    mixed, alphas = cross_fitted(a, b, targets, fold, scored)
    assert set(alphas) == {0, 1, 2}
    for held_out, alpha in alphas.items():
        assert alpha == search_alpha(a, b, targets, scored & (fold != held_out)).alpha
        rows = fold == held_out
        np.testing.assert_array_equal(mixed[rows], mix(a[rows], b[rows], alpha))

    changed = targets.copy()
    changed[fold == 1] = b[fold == 1]
    after = cross_fitted(a, b, changed, fold, scored)[1]
    assert after[1] == alphas[1]
    assert after[0] != alphas[0]

    changed = targets.copy()
    changed[~scored] = b[~scored]
    assert cross_fitted(a, b, changed, fold, scored)[1] == alphas


def test_constant_by_hand():
    targets = np.array([[1, 0], [0, 1], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    fold, kept = np.array([7, 7, 9, 9, 9]), np.array([True, True, True, True, False])
    predictions, on_test = constant(targets, fold, [7, 9], kept)
    # Each fold is told the other's mean, (0.5, 0.5) both times; the dropped last row counts nowhere.
    np.testing.assert_allclose(predictions, np.full((5, 2), 0.5**0.5), rtol=1e-6)
    np.testing.assert_allclose(on_test, [0.5**0.5, 0.5**0.5], rtol=1e-6)

    changed = targets.copy()
    changed[fold == 7] = [0.6, 0.8]
    np.testing.assert_array_equal(constant(changed, fold, [7, 9], kept)[0][:2], predictions[:2])


def test_constant_beats_other_constants():
    targets = unit(directions() + 0.5)
    _, on_test = constant(targets, np.arange(N) % 2, [0, 1], np.ones(N, dtype=bool))
    score = cosine(np.tile(on_test, (N, 1)), targets).mean()
    for other in directions(50):
        assert cosine(np.tile(on_test + 0.1 * other, (N, 1)), targets).mean() < score


def test_fold_scores_by_hand():
    targets = np.tile(np.array([[1.0, 0.0]]), (5, 1))
    predictions = np.array([[1, 0], [0, 1], [3, 4], [1, 0], [-1, 0]])  # cosines 1, 0, 0.6, 1, (unscored) -1
    fold, scored = np.array([0, 0, 2, 2, 2]), np.array([True, True, True, True, False])
    scores = fold_scores(predictions, targets, fold, [0, 2], scored)
    assert scores == pytest.approx({"fold_0": 0.5, "fold_2": 0.8, "mean": 0.65, "std": 0.15, "oof": 0.65})
    with pytest.raises(ValueError, match=r"\[1\]"):
        fold_scores(predictions, targets, fold, [0, 1, 2], scored)


def test_scores_table(members):
    a, b, targets = members
    fold, scored = np.arange(N) % 3, np.ones(N, dtype=bool)
    oof = {"model_a": a, "model_b": b}
    table = scores_table(oof, targets, fold, [0, 1, 2], scored, groups=np.arange(N) // 3)
    header, rule, first, second = table.splitlines()
    assert header == "| model | fold_0 | fold_1 | fold_2 | mean | std | oof [95%] |"
    assert header.count("|") == rule.count("|") == first.count("|")
    scores = fold_scores(a, targets, fold, [0, 1, 2], scored)
    assert first.startswith(f"| model_a | {scores['fold_0']:.4f} | ")
    assert f" {scores['oof']:.4f} [0." in first
    assert second.startswith("| model_b ")

    with_test = scores_table(oof, targets, fold, [0, 1, 2], scored, np.arange(N), oof, targets)
    assert with_test.splitlines()[0].endswith("| oof [95%] | test [95%] |")
    assert with_test.splitlines()[2].count(f"{scores['oof']:.4f} [") == 2


def test_agreement_finds_the_alpha_for_a_mean_of_models():
    # Five models that share a direction and each err on their own, and another member; 5,000 pictures, 64-d.
    rng = np.random.default_rng(0)
    targets = unit(rng.normal(size=(5000, 64)))
    shared = targets + 0.12 * rng.normal(size=(5000, 64))
    models = [unit(shared + 0.08 * rng.normal(size=(5000, 64))) for _ in range(5)]
    other = unit(targets + 0.16 * rng.normal(size=(5000, 64)))
    mean = np.mean(models, axis=0)
    agreement = float(np.linalg.norm(mean, axis=1).mean())
    wanted = search_alpha(unit(mean), other, targets).alpha
    assert search_alpha(models[0], other, targets, agreement=(agreement, 1.0)).alpha == pytest.approx(wanted, abs=0.01)
    assert abs(search_alpha(models[0], other, targets).alpha - wanted) > 0.05
