import itertools

import numpy as np
import pandas as pd
import pytest

from img2prompt.core.metric import bootstrap_interval, cosine, unit
from img2prompt.ensemble.constant import constant
from img2prompt.ensemble.mixture import Mixture
from img2prompt.ensemble.weights import Cosines, alpha_curve, cross_fitted, mix, models_spread, search_weights
from img2prompt.report.scores import fold_scores, gain_over_best_member, over_start, scores_of, scores_table

N, DIM = 300, 16
rng = np.random.default_rng(0)


def directions(n=N, dim=DIM):
    return unit(rng.normal(size=(n, dim))).astype(np.float32)


@pytest.fixture
def members():
    """Three members with errors of different size around the same targets; the first two err alike in part."""
    targets = directions()
    shared = 0.1 * rng.normal(size=targets.shape)
    a = unit(targets + shared + 0.1 * rng.normal(size=targets.shape)).astype(np.float32)
    b = unit(targets + shared + 0.2 * rng.normal(size=targets.shape)).astype(np.float32)
    c = unit(targets + 0.25 * rng.normal(size=targets.shape)).astype(np.float32)
    return [a, b, c], targets


def simplex(m, steps):
    """Every point of the simplex whose weights are multiples of 1 / steps."""
    for cuts in itertools.combinations(range(steps + m - 1), m - 1):
        yield np.diff([-1, *cuts, steps + m - 1]) / steps - 1 / steps


def test_mix_by_hand():
    # (1, 0) and (0, 1) after scaling: 0.6*(1, 0) + 0.4*(0, 1) = (0.6, 0.4), of norm sqrt(0.52)
    mixed = mix([np.array([[5.0, 0.0]]), np.array([[0.0, 0.1]])], [0.6, 0.4])
    np.testing.assert_allclose(mixed, np.array([[0.6, 0.4]]) / 0.52**0.5)


def test_a_member_of_weight_zero_is_not_looked_at(members):
    (a, b, _), _ = members
    mixed = mix([a, None, b], np.array([0.5, 0.0, 0.5]))
    np.testing.assert_array_equal(mixed, mix([a, b], [0.5, 0.5]))
    assert mixed.dtype == np.float32


def test_scaling_one_member_changes_nothing(members):
    (a, b, _), targets = members
    np.testing.assert_allclose(mix([10 * a, b], [0.7, 0.3]), mix([a, b], [0.7, 0.3]), atol=1e-6)
    scaled, plain = (search_weights(Cosines.between([x, b], targets)) for x in (10 * a, a))
    np.testing.assert_allclose(scaled, plain, atol=1e-5)


def test_cosines_score_the_mix(members):
    three, targets = members
    cosines = Cosines.between(three, targets)
    for weights in ([0.5, 0.3, 0.2], [0.0, 1.0, 0.0]):
        np.testing.assert_allclose(cosines.of_mix(np.array(weights)), cosine(mix(three, weights), targets), atol=1e-6)


def test_the_gradient_is_that_of_the_loss(members):
    cosines = Cosines.between(*members)
    weights, step = np.array([0.5, 0.2, 0.3]), 1e-6
    nudged = [(cosines.loss(weights + step * e)[0] - cosines.loss(weights - step * e)[0]) / 2 / step for e in np.eye(3)]
    np.testing.assert_allclose(cosines.loss(weights)[1], nudged, atol=1e-8)
    assert cosines.loss(weights)[0] == pytest.approx(-cosines.of_mix(weights).mean(), rel=1e-12)


@pytest.mark.parametrize("m", [2, 3])
def test_no_point_of_a_fine_grid_is_better(members, m):
    cosines = Cosines.between(members[0][-m:], members[1])
    weights = search_weights(cosines)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)
    grid = np.array(list(simplex(m, 200 if m == 2 else 100)))
    scores = [cosines.of_mix(point).mean() for point in grid]
    assert cosines.of_mix(weights).mean() >= max(scores)
    np.testing.assert_allclose(weights, grid[np.argmax(scores)], atol=0.01)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 6])
def test_planted_weights_are_found(m):
    for seed in range(5):
        planted = np.random.default_rng(seed).dirichlet(np.ones(m))
        three = [directions(500, 64) for _ in range(m)]
        found = search_weights(Cosines.between(three, mix(three, planted)))
        np.testing.assert_allclose(found, planted, atol=1e-4)


def test_weights_at_the_corners():
    three = [directions() for _ in range(3)]
    for place in range(3):
        assert search_weights(Cosines.between(three, three[place])).tolist() == np.eye(3)[place].tolist()


def test_equal_members_count_alike():
    a, targets = directions(), directions()
    np.testing.assert_allclose(search_weights(Cosines.between([a, a, a], targets)), 1 / 3)


def test_opposite_members_do_not_break_the_search():
    a = directions()
    cosines = Cosines.between([a, -a], a)
    weights = search_weights(cosines)
    assert cosines.of_mix(weights).mean() == pytest.approx(1)
    assert np.isfinite(alpha_curve(cosines, np.array([True, False]), np.zeros(len(a), int))["score"]).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_given_alpha_is_the_share_of_the_family(members, alpha):
    cosines, family = Cosines.between(*members), np.array([True, True, False])
    weights = search_weights(cosines, family, alpha)
    assert weights[family].sum() == pytest.approx(alpha)
    assert weights.sum() == pytest.approx(1)
    scores = [cosines.of_mix(np.array([alpha * s, alpha * (1 - s), 1 - alpha])).mean() for s in np.arange(101) / 100]
    assert cosines.of_mix(weights).mean() >= max(scores) - 1e-12


def test_two_members_of_a_given_alpha_leave_nothing_to_search(members):
    cosines = Cosines.between(members[0][:2], members[1])
    assert search_weights(cosines, np.array([True, False]), 0.6).tolist() == [0.6, 0.4]
    assert search_weights(cosines, np.array([True, False]), 1.0).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"alpha is 0\.6"):
        search_weights(cosines, np.array([True, True]), 0.6)


def shrunk(seed=0):
    """Two members that answer near the mean target, each for half the images more so; the mean; and the targets."""
    rng = np.random.default_rng(seed)
    mean = unit(np.ones((1, DIM)))
    targets = unit(mean + 0.3 * rng.normal(size=(N, DIM)))
    known = np.where(np.arange(N) % 2, 0.2, 0.6)[:, None]
    two = [
        unit(share * targets + (1 - share) * mean + 0.05 * rng.normal(size=(N, DIM))) for share in (known, known[::-1])
    ]
    return [*two, np.broadcast_to(mean, (N, DIM))], targets


def test_a_free_member_s_weight_may_be_negative():
    members, targets = shrunk()
    cosines, free = Cosines.between(members, targets), np.array([False, False, True])
    weights = search_weights(cosines, free=free)
    assert weights[~free].sum() == pytest.approx(1)
    assert (weights[~free] >= 0).all()
    grid = np.array([[a, 1 - a, c] for a in np.arange(51) / 50 for c in np.arange(-50, 51) / 50])
    scores = [cosines.of_mix(point).mean() for point in grid]
    assert cosines.of_mix(weights).mean() >= max(scores)
    np.testing.assert_allclose(weights, grid[np.argmax(scores)], atol=0.02)
    assert weights[2] < -0.2
    on_simplex = cosines.of_mix(search_weights(cosines)).mean()
    assert cosines.of_mix(weights).mean() > on_simplex + 0.01

    alone = search_weights(cosines, np.array([True, False, False]), 1.0, free)
    assert alone[:2].tolist() == [1.0, 0.0]
    assert alone[2] < -0.1
    shared = search_weights(cosines, np.array([True, False, False]), 0.3, free)
    np.testing.assert_allclose(shared[:2], [0.3, 0.7])
    assert cosines.of_mix(shared).mean() == pytest.approx(
        max(cosines.of_mix(np.array([0.3, 0.7, c])).mean() for c in np.arange(-1000, 1001) / 1000), abs=1e-6
    )


def test_a_free_member_that_does_not_help_weighs_nothing():
    a = directions()
    cosines = Cosines.between([a, np.broadcast_to(unit(np.ones((1, DIM))), a.shape)], a)
    assert search_weights(cosines, free=np.array([False, True])) == pytest.approx([1.0, 0.0], abs=1e-6)


def test_the_mixture_is_that_of_its_members_and_the_constant(tmp_path):
    (a, b, mean), _ = shrunk()
    mixture = Mixture({"model_a": 0.75, "model_b": 0.25}, mean[0].astype(np.float32), (0, 1), -0.4)
    mixture.save(tmp_path)
    readable = np.arange(N) != 3
    found = Mixture.load(tmp_path)({"model_a": a, "model_b": b}, readable)
    np.testing.assert_allclose(found[readable], unit(0.75 * a + 0.25 * b - 0.4 * mean)[readable], atol=1e-6)
    np.testing.assert_allclose(found[3], mean[3], atol=1e-6)
    assert Mixture.load(tmp_path).members == ["model_a", "model_b"]
    alone = mixture.only(["model_b"])
    np.testing.assert_allclose(alone({"model_b": b}, readable)[0], unit(b - 0.4 * mean)[0], atol=1e-6)


def test_the_curve_has_the_best_score_at_each_alpha(members):
    cosines, family = Cosines.between(*members), np.array([True, True, False])
    fold = np.arange(len(members[1])) % 3
    curve = alpha_curve(cosines, family, fold)
    assert curve["alpha"].tolist() == [i / 100 for i in range(101)]
    for alpha in (0.0, 0.25, 0.8, 1.0):
        best = cosines.of_mix(search_weights(cosines, family, alpha)).mean()
        assert curve["score"][round(100 * alpha)] == pytest.approx(best, abs=1e-9)
    of_folds = curve[["fold_0", "fold_1", "fold_2"]] @ (np.bincount(fold) / len(fold))
    assert np.allclose(of_folds, curve["score"], atol=1e-12)
    top = search_weights(cosines)
    assert curve["score"].max() <= cosines.of_mix(top).mean() + 1e-12
    assert curve["alpha"][curve["score"].argmax()] == pytest.approx(top[family].sum(), abs=0.01)


def test_a_fold_s_weights_come_from_the_other_folds(members):
    three, targets = members
    fold, scored = np.arange(N) % 3, rng.random(N) < 0.9
    cosines = Cosines.between(three, targets)
    found, weights = cross_fitted(cosines, fold, scored)
    assert set(weights) == {0, 1, 2}
    for held_out, own in weights.items():
        np.testing.assert_array_equal(own, search_weights(cosines[scored & (fold != held_out)]))
        rows = fold == held_out
        np.testing.assert_allclose(found[rows], cosine(mix([x[rows] for x in three], own), targets[rows]), atol=1e-6)

    changed = targets.copy()
    changed[fold == 1] = three[1][fold == 1]
    after = cross_fitted(Cosines.between(three, changed), fold, scored)[1]
    np.testing.assert_array_equal(after[1], weights[1])
    assert abs(after[0] - weights[0]).max() > 0.01

    changed = targets.copy()
    changed[~scored] = three[1][~scored]
    after = cross_fitted(Cosines.between(three, changed), fold, scored)[1]
    assert all((after[held_out] == weights[held_out]).all() for held_out in weights)

    with pytest.raises(ValueError, match="no rows"):
        cross_fitted(cosines, fold, fold == 0)


def test_means_of_models_are_nearer_to_the_target_and_to_each_other():
    # One image: two members at cosine 0.6 with the target and 0.5 with each other. The means of their models have a
    # squared norm of 0.64 and 1: dot products with the target stay, so the first's cosine grows to 0.6 / 0.8.
    cosines = Cosines(np.array([[0.6], [0.6]]), np.array([[0.5]]))
    found = cosines.averaged(np.array([0.36, 0.0]))
    np.testing.assert_allclose(found.to_target, [[0.75], [0.6]])
    np.testing.assert_allclose(found.to_each_other, [[0.625]])


def test_pairs_of_models_tell_the_weights_for_means_of_them():
    # Two heads of five models each, whose errors are in part their own each time, and one model; 5,000 images, 64-d.
    rng = np.random.default_rng(0)
    targets = unit(rng.normal(size=(5000, 64)))

    def noise(size):
        return size * rng.normal(size=targets.shape)

    shared = noise(0.1)
    first, second = ([unit(targets + shared + noise(0.08)) for _ in range(5)] for _ in range(2))
    other = unit(targets + noise(0.14))
    wanted = search_weights(Cosines.between([np.mean(first, axis=0), np.mean(second, axis=0), other], targets))
    single = Cosines.between([first[0], second[0], other], targets)
    spread = models_spread(first[0], second[0], 5)
    assert spread == pytest.approx(1 - np.square(np.linalg.norm(np.mean(first, axis=0), axis=1)).mean(), rel=0.05)
    found = search_weights(single.averaged(np.array([spread, spread, 0])))
    assert abs(found[2] - wanted[2]) < 0.01
    assert abs(search_weights(single)[2] - wanted[2]) > 0.03


def test_constant_by_hand():
    targets = np.array([[1, 0], [0, 1], [0, 1], [1, 0], [1, 0]], dtype=np.float32)
    fold, kept = np.array([7, 7, 9, 9, 9]), np.array([True, True, True, True, False])
    predictions, on_test = constant(targets, fold, [7, 9], kept)
    # Each fold is told the other's mean, (0.5, 0.5) both times; the dropped last row counts nowhere.
    np.testing.assert_allclose(predictions[:], np.full((5, 2), 0.5**0.5), rtol=1e-6)
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
    cosines, fold = np.array([1, 0, 0.6, 1]), np.array([0, 0, 2, 2])
    scores = fold_scores(cosines, fold)
    assert scores == pytest.approx({"fold_0": 0.5, "fold_2": 0.8, "mean": 0.65, "std": 0.15, "oof": 0.65})


def test_a_fold_without_scored_rows_is_named():
    cosines = pd.DataFrame({"split": "train", "fold": [0, 0, 1], "scored": [True, True, False], "ridge": [0.5, 1, 1]})
    assert scores_of(cosines[:2], ["ridge"])["ridge"]["oof"] == 0.75
    with pytest.raises(ValueError, match=r"folds \[1\] have no scored row"):
        scores_of(cosines, ["ridge"])


def test_scores_table(members):
    (a, b, _), targets = members
    cosines = pd.DataFrame({"split": "train", "fold": np.arange(N) % 3, "group": np.arange(N) // 3, "scored": True})
    cosines = cosines.assign(model_a=cosine(a, targets), model_b=cosine(b, targets))
    cosines.loc[0, ["scored", "model_a"]] = False, -1.0
    table = scores_table(cosines, ["model_a", "model_b"])
    header, rule, first, second = table.splitlines()
    assert header == "| model | fold_0 | fold_1 | fold_2 | mean | std | oof [95%] |"
    assert header.count("|") == rule.count("|") == first.count("|")
    scores = fold_scores(cosines.model_a[1:].to_numpy(), cosines.fold[1:].to_numpy())
    low, high = bootstrap_interval(cosines.model_a[1:], cosines.group[1:])
    assert first.startswith(f"| model_a | {scores['fold_0']:.4f} | ")
    assert first.endswith(f" | {scores['oof']:.4f} [{low:.4f}, {high:.4f}] |")
    assert second.startswith("| model_b ")

    test = cosines.assign(split="test", fold=-1, scored=True)
    with_test = scores_table(pd.concat([cosines, test]), ["model_b"])
    assert with_test.splitlines()[0].endswith("| oof [95%] | test [95%] |")
    assert f"| {cosine(b, targets).mean():.4f} [" in with_test.splitlines()[2]


def test_the_gain_is_over_the_best_member_of_each_split():
    cosines = pd.DataFrame({"split": ["train"] * 4 + ["test"] * 2, "group": range(6), "scored": [1, 1, 1, 0, 1, 1]})
    cosines = cosines.astype({"scored": bool}).assign(
        model_a=[0.5, 0.5, 0.5, 9, 0.1, 0.3],
        model_b=[0.1, 0.2, 0.3, 0, 0.4, 0.4],
        ensemble=[0.6, 0.6, 0.6, 0, 0.4, 0.2],
    )
    assert gain_over_best_member(cosines, ["model_a", "model_b"]) == (
        "ensemble minus its best member: +0.1000 [+0.1000, +0.1000] out of fold (model_a), "
        "-0.1000 [-0.2000, +0.0000] on test (model_b)\n"
    )


def test_a_head_that_ends_below_its_start_is_named():
    rng = np.random.default_rng(0)
    ridge = rng.uniform(0.3, 0.6, 60)
    cosines = pd.DataFrame({"split": ["train"] * 50 + ["test"] * 10, "scored": True, "group": np.arange(60)}).assign(
        ridge=ridge, linear=ridge - 0.02 + rng.normal(0, 0.01, 60), model_a=ridge + rng.normal(0, 0.01, 60)
    )
    choices = pd.DataFrame({"fold": [0, 0, 1, 1], "head": ["linear", "model_a"] * 2, "share": [0.4, 0, 1, 0.2]})
    linear, model_a = over_start(cosines, choices).splitlines()
    gain = (cosines.linear - cosines.ridge)[:50].mean()
    assert linear.startswith(f"linear minus its start, ridge: {gain:+.4f} [")
    assert "the validation rows went 0.4, 1.0 of the way" in linear
    assert "ENDS BELOW ITS START" in linear
    assert "on test; by fold, the validation rows went 0.0, 0.2 of the way" in model_a
    assert "BELOW" not in model_a
