"""Decoding against known pixels; the geometry of crops against brute force."""

import math

import cv2
import numpy as np
import pytest
from tiny_tfds import encode

from resjax.data import decode


def gradient(height, width):
    """Red is the column, green the row, so that pixels say where they come from."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0] = np.arange(width)
    image[:, :, 1] = np.arange(height)[:, None]
    return image


def noise(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_png_keeps_every_pixel_in_rgb_order():
    image = noise(5, 7)
    image[0, 0] = 255, 0, 0
    decoded = decode.decode(encode(image, ".png"))
    assert decoded.dtype == np.uint8
    assert tuple(decoded[0, 0]) == (255, 0, 0)
    np.testing.assert_array_equal(decoded, image)


def test_grey_becomes_three_equal_channels():
    grey = noise(6, 4)[:, :, 0]
    decoded = decode.decode(cv2.imencode(".png", grey)[1].tobytes())
    np.testing.assert_array_equal(decoded, np.repeat(grey[:, :, None], 3, axis=2))


def test_alpha_is_dropped():
    image = np.dstack([noise(6, 4), np.full((6, 4), 255, np.uint8)])
    decoded = decode.decode(cv2.imencode(".png", image)[1].tobytes())
    np.testing.assert_array_equal(decoded, image[:, :, 2::-1])


def test_jpeg_is_close_to_its_image_in_rgb_order():
    image = np.empty((20, 30, 3), np.uint8)
    image[:] = 200, 100, 30
    np.testing.assert_allclose(decode.decode(encode(image, ".jpg")), image, atol=4)


@pytest.mark.parametrize("cut", [0, 1, 3, 100])
@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_unreadable_bytes_are_a_value_error(extension, cut):
    with pytest.raises(ValueError, match=f"{cut} bytes"):
        decode.decode(encode(noise(20, 20), extension)[:cut])


def test_exif_orientation_is_ignored():
    # One TIFF tag, orientation (0x0112) = 6: to be turned by a quarter when shown.
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    jpeg = encode(gradient(16, 24), ".jpg")
    length = (len(segment) + 2).to_bytes(2, "big")
    tagged = jpeg[:2] + b"\xff\xe1" + length + segment + jpeg[2:]
    turned = cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR)
    assert turned.shape == (24, 16, 3)  # the tag is one that OpenCV obeys
    np.testing.assert_array_equal(decode.decode(tagged), decode.decode(jpeg))


def test_shrinking_by_two_averages_blocks():
    image = noise(8, 12)
    blocks = image.reshape(4, 2, 6, 2, 3).astype(np.float64).mean(axis=(1, 3))
    np.testing.assert_allclose(decode.resize(image, 4, 6), blocks, atol=0.51)


def test_growing_interpolates():
    grown = decode.resize(gradient(20, 20) * 10, 40, 40)[8:-8, 8:-8]
    expected = ((np.arange(40) + 0.5) / 2 - 0.5)[8:-8] * 10
    np.testing.assert_allclose(grown[0, :, 0], expected, atol=1)
    np.testing.assert_allclose(grown[:, 0, 1], expected, atol=1)


def test_same_size_keeps_every_pixel():
    image = noise(9, 9)
    np.testing.assert_array_equal(decode.whole(image, 9), image)


def assert_shows(crop, rows, columns, atol):
    """`crop` of a `gradient` shows these (fractional) rows and columns of it."""
    np.testing.assert_allclose(crop[:, :, 0], np.tile(columns, (len(rows), 1)), atol=atol)
    np.testing.assert_allclose(crop[:, :, 1].T, np.tile(rows, (len(columns), 1)), atol=atol)


@pytest.mark.parametrize(("height", "width"), [(200, 90), (33, 64), (30, 9), (11, 14)])
def test_whole_squeezes_all_of_the_image_into_the_square(height, width):
    crop = decode.whole(gradient(height, width), 16).astype(float)
    assert crop.shape == (16, 16, 3)
    rows, columns = ((np.arange(16) + 0.5) / 16 * side - 0.5 for side in (height, width))
    assert_shows(crop, rows, columns, atol=1)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 101), (98, 64), (65, 64)])
def test_center_crop_of_an_image_of_the_right_size_is_its_middle(height, width):
    image = noise(height, width)
    top, left = (height - 56) // 2, (width - 56) // 2
    expected = image[top : top + 56, left : left + 56]
    np.testing.assert_array_equal(decode.center_crop(image, 56), expected)


SIZES = [(100, 150), (151, 101), (64, 250), (128, 128), (253, 99), (37, 53), (21, 20)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_center_crop_is_seven_eighths_of_the_shorter_side_about_the_middle(height, width):
    crop = decode.center_crop(gradient(height, width), 56).astype(float)
    assert crop.shape == (56, 56, 3)
    step = min(height, width) / 64  # old pixels per new one
    offsets = (np.arange(56) + 0.5 - 28) * step - 0.5
    # The resized longer side and the place of the crop are whole pixels.
    assert_shows(crop, height / 2 + offsets, width / 2 + offsets, atol=0.75 * step + 1)


@pytest.mark.parametrize("size", [1, 8, 32, 33, 224])
def test_center_crop_has_the_size_asked_for(size):
    assert decode.center_crop(noise(40, 61), size).shape == (size, size, 3)


def windows(height, width, n, seed=0):
    """[n] tops, lefts, heights and widths of random windows."""
    rng = np.random.RandomState(seed)
    return np.array([decode.random_window(height, width, rng) for _ in range(n)]).T


SHAPES = [(4, 4), (32, 32), (375, 500), (61, 40), (500, 400)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_random_window_lies_inside_and_is_as_large_and_as_wide_as_allowed(height, width):
    top, left, h, w = windows(height, width, 1000)
    assert (top >= 0).all() and (left >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    # A side may be half a pixel off its exact value.
    assert ((h + 0.5) * (w + 0.5) >= 0.08 * height * width).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3).all()


def test_random_window_reaches_the_limits_of_area_and_ratio():
    _, _, h, w = windows(1000, 1000, 4000)
    assert (h * w / 1e6).min() < 0.085 and (h * w / 1e6).max() > 0.95
    assert (w / h).min() < 0.76 and (w / h).max() > 1.32


def test_random_window_area_is_uniform():
    _, _, h, w = windows(1000, 1000, 4000)
    area = h * w / 1e6
    # Below 75 % every window fits, so none of these was drawn again.
    counts, _ = np.histogram(area, [0.08, 0.245, 0.41, 0.575, 0.74])
    np.testing.assert_allclose(counts / counts.sum(), 1 / 4, atol=0.035)


def test_random_window_ratio_is_uniform_in_its_logarithm():
    _, _, h, w = windows(1000, 1000, 4000)
    log_ratio = np.log(w / h)[h * w < 0.74e6]
    counts, _ = np.histogram(log_ratio, np.linspace(-1, 1, 5) * math.log(1.34))
    np.testing.assert_allclose(counts / counts.sum(), 1 / 4, atol=0.035)


def test_random_window_is_anywhere_with_equal_chance():
    top, left, h, w = windows(3, 3, 6000)
    single = (h == 1) & (w == 1)
    places = np.bincount(3 * top[single] + left[single], minlength=9)
    np.testing.assert_allclose(places / single.sum(), 1 / 9, atol=0.03)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(30, 3000, (0, 1480, 30, 40)), (3000, 30, (1480, 0, 40, 30)), (1, 99, (0, 49, 1, 1))],
)
def test_random_window_of_an_extreme_image_is_its_middle(height, width, expected):
    # 8 % of the area is wider than any allowed window is high, so no attempt fits.
    assert {tuple(window) for window in windows(height, width, 20).T} == {expected}


@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_random_resized_crop_shows_its_window(height, width):
    image = gradient(height, width)[:256, :256]
    crop = decode.random_resized_crop(image, 16, np.random.RandomState(5))
    window = decode.random_window(*image.shape[:2], np.random.RandomState(5))
    top, left, h, w = window
    rows = top + (np.arange(16) + 0.5) / 16 * h - 0.5
    columns = left + (np.arange(16) + 0.5) / 16 * w - 0.5
    assert crop.shape == (16, 16, 3)
    assert_shows(crop.astype(float), rows, columns, atol=1)


def test_random_resized_crop_depends_on_its_random_stream_alone():
    image = noise(50, 70)

    def crop(seed):
        return decode.random_resized_crop(image, 24, np.random.RandomState(seed)).tobytes()

    assert crop(1) == crop(1)
    assert len({crop(seed) for seed in range(20)}) == 20
