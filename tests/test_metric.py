import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from img2prompt.core.metric import bootstrap_interval, cosine, unit

rng = np.random.default_rng(0)


def test_cosine_by_hand():
    a = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]])
    b = np.array([[4.0, 3.0], [-2.0, 0.0], [0.0, 5.0]])
    # (12 + 12) / (5 * 5), -2 / (1 * 2), 5 / (sqrt(2) * 5)
    np.testing.assert_allclose(cosine(a, b), [0.96, -1, 2**-0.5], rtol=1e-15)


@settings(max_examples=25, deadline=None)
@given(arrays(np.float32, (3, 5), elements=st.floats(0.5, 100, width=32)), st.floats(0.01, 100))
def test_cosine_ignores_length_and_unit_has_norm_one(x, factor):
    np.testing.assert_allclose(np.linalg.norm(unit(x), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(cosine(x, x * factor), 1, atol=1e-6)


def test_unit_keeps_float32_and_takes_integers():
    assert unit(np.ones((2, 3), dtype=np.float32)).dtype == np.float32
    np.testing.assert_allclose(unit(np.array([[3, 4]])), [[0.6, 0.8]])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_row_without_direction_is_named(value):
    x = np.ones((4, 3), dtype=np.float32)
    x[2] = value
    with pytest.raises(ValueError, match="row 2 "):
        unit(x)
    with pytest.raises(ValueError, match="row 2 "):
        cosine(np.ones((4, 3)), x)


def test_cosine_does_not_broadcast():
    with pytest.raises(ValueError, match="shapes"):
        cosine(np.ones((4, 3)), np.ones((1, 3)))


def test_interval_has_the_width_of_the_mean_s_standard_error():
    values = rng.normal(0.5, 0.1, size=2000)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 2000**0.5, rel=0.1)
    assert (low, high) == bootstrap_interval(values)


def test_interval_draws_whole_groups():
    # 50 groups of 20 equal values are 50 observations, not 1000: the interval is sqrt(20) times as wide.
    of_groups = rng.normal(size=50)
    values, groups = np.repeat(of_groups, 20), np.repeat(np.arange(50), 20)
    assert bootstrap_interval(values, groups) == pytest.approx(bootstrap_interval(of_groups))
    narrow, wide = np.diff(bootstrap_interval(values)), np.diff(bootstrap_interval(values, groups))
    assert wide / narrow == pytest.approx(20**0.5, rel=0.15)


def test_interval_weighs_rows_not_groups():
    # One group of 98 ones among two zeros: the mean is 0.98, and 0 where the group is not drawn.
    low, high = bootstrap_interval(np.r_[np.ones(98), 0, 0], np.r_[np.zeros(98), 1, 2], n=500)
    assert low == 0
    assert high > 0.99


def test_interval_of_too_little():
    assert np.isnan(bootstrap_interval([1.0, 2.0], groups=["a", "a"])).all()
    with pytest.raises(ValueError, match="no values"):
        bootstrap_interval([])
