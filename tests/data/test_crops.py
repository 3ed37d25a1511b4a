"""Windows of training crops: inside the image, and distributed as their papers define."""

import math

import numpy as np
import pytest
from scipy import stats

from resjax.data import crops

WINDOWS = [crops.random_resized_window, crops.scale_jitter_window]
SHAPES = [(4, 4), (32, 32), (375, 500), (61, 40), (500, 400)]
EXTREME = [(1, 1), (1, 2), (3, 3), (2, 3), (1, 1000), (1000, 1), (7, 20000)]


def draw(window, height, width, n, seed=0):
    """[n] tops, lefts, heights and widths of random windows."""
    uniforms = np.random.RandomState(seed).uniform(size=(n, 24))
    return np.array([window(height, width, 224, u) for u in uniforms]).T


def assert_is(sample, distribution):
    assert stats.kstest(sample, distribution.cdf).pvalue > 1e-3


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("height", "width"), SHAPES + EXTREME)
def test_window_lies_inside_the_image(window, height, width):
    top, left, h, w = draw(window, height, width, 200)
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("u", [0.0, 0.5, np.nextafter(1, 0)])
@pytest.mark.parametrize(("height", "width"), SHAPES + EXTREME)
def test_least_and_largest_numbers_stay_inside(window, height, width, u):
    top, left, h, w = window(height, width, 224, np.full(24, u))
    assert 0 <= top <= top + h - 1 < height and 0 <= left <= left + w - 1 < width


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [1, 32, 320])
def test_window_is_the_same_share_of_the_image_for_every_size_of_crop(window, size):
    uniforms = np.random.RandomState(1).uniform(size=(10, 24))
    for u in uniforms:
        assert window(300, 400, size, u) == window(300, 400, 224, u)


@pytest.mark.parametrize("window", WINDOWS)
def test_window_is_anywhere_with_equal_chance(window):
    top, left, h, w = draw(window, 2000, 3000, 2000)
    down, right = (top + 0.5) / (2000 - h + 1), (left + 0.5) / (3000 - w + 1)
    for share in (down, right):
        assert_is(share, stats.uniform)
    draws = [down, right, h]  # and in no relation to each other
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 4 / math.sqrt(2000)


@pytest.mark.parametrize("window", WINDOWS)
def test_every_pixel_is_as_likely_as_every_other(window):
    top, left, h, w = draw(window, 3, 3, 6000)
    single = (h == 1) & (w == 1)
    places = np.bincount(3 * top[single] + left[single], minlength=9)
    assert stats.chisquare(places).pvalue > 1e-3


# --- scale and aspect ratio ---------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_resized_window_is_as_large_and_as_wide_as_allowed(height, width):
    _, _, h, w = draw(crops.random_resized_window, height, width, 1000)
    # A side may be half a pixel off its exact value.
    assert ((h + 0.5) * (w + 0.5) >= 0.08 * height * width).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()


@pytest.fixture(scope="module")
def squares():
    """Heights and widths of windows in a large square."""
    return draw(crops.random_resized_window, 5000, 5000, 4000)[2:] / 5000


def test_resized_window_reaches_the_limits_of_area_and_ratio(squares):
    h, w = squares
    assert (h * w).min() < 0.085 and (h * w).max() > 0.95
    assert (w / h).min() < 0.76 and (w / h).max() > 1.32


def test_resized_window_area_is_uniform(squares):
    h, w = squares
    area = h * w
    # Below 75 % every window fits, so none of these was drawn again.
    assert_is(area[area < 0.74], stats.uniform(0.08, 0.74 - 0.08))


def test_resized_window_ratio_is_uniform_in_its_logarithm(squares):
    h, w = squares
    log_ratio = np.log(w / h)[h * w < 0.74]
    assert_is(log_ratio, stats.uniform(math.log(3 / 4), 2 * math.log(4 / 3)))


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(30, 3000, (0, 1480, 30, 40)), (3000, 30, (1480, 0, 40, 30)), (1, 99, (0, 49, 1, 1))],
)
def test_resized_window_of_an_extreme_image_is_its_middle(height, width, expected):
    # 8 % of the area is wider than any allowed window is high, so no attempt fits.
    found = draw(crops.random_resized_window, height, width, 20)
    assert {tuple(window) for window in found.T} == {expected}


@pytest.mark.parametrize("failures", [0, 1, 9])
def test_attempt_that_does_not_fit_is_followed_by_the_next(failures):
    uniforms = np.full(24, 0.99)  # almost the whole area, almost 4 to 3: too wide
    # 31 % of 20,000 pixels, a square: 78.7 pixels a side; the middle of 22 x 122 places.
    uniforms[2 * failures : 2 * failures + 2] = 0.25, 0.5
    uniforms[20:22] = 0.5
    assert crops.random_resized_window(100, 200, 224, uniforms) == (11, 61, 79, 79)


def test_ten_attempts_that_do_not_fit_give_the_middle():
    uniforms = np.full(24, 0.99)
    assert crops.random_resized_window(100, 200, 224, uniforms) == (0, 33, 100, 133)
    assert crops.random_resized_window(100, 110, 224, uniforms) == (0, 0, 100, 110)


# --- scale jitter -------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(20000, 20000), (20000, 31000)])
def test_shorter_side_of_scale_jitter_is_uniform(height, width):
    _, _, h, w = draw(crops.scale_jitter_window, height, width, 2000)
    np.testing.assert_array_equal(h, w)
    shorter_side = 224 / (h / 20000)  # of the image resized so that the window is 224
    assert shorter_side.min() > 255.9 and shorter_side.max() < 480.1
    assert_is(shorter_side, stats.uniform(256, 480 - 256))


@pytest.mark.parametrize(
    ("shape", "u", "side"),
    [
        ((256, 400), 0.0, 224),  # resized to 256: the image itself
        ((700, 512), 0.0, 448),
        ((480, 480), np.nextafter(1, 0), 224),  # resized to 480
        ((368, 999), 0.5, 224),
        ((375, 500), 0.25, 269),  # 375 * 224 / 312 = 269.2
    ],
)
def test_scale_jitter_shows_224_pixels_of_the_resized_image(shape, u, side):
    uniforms = np.full(24, 0.5)
    uniforms[0] = u
    height, width = shape
    top, left = int((height - side + 1) / 2), int((width - side + 1) / 2)
    assert crops.scale_jitter_window(*shape, 224, uniforms) == (top, left, side, side)
