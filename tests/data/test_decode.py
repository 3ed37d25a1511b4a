"""Decoding against known pixels; the geometry of crops against brute force."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
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
def test_unreadable_bytes_are_an_error_of_the_data(extension, cut):
    with pytest.raises(decode.DataError, match=f"{cut} bytes"):
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


def overlaps(old, new):
    """[new, old] shares of the old pixels in the new ones."""
    start = np.arange(new)[:, None] * old / new
    pixel = np.arange(old)
    shared = np.minimum(start + old / new, pixel + 1) - np.maximum(start, pixel)
    return np.maximum(shared, 0) * new / old


def test_center_crop_averages_the_area_of_each_pixel():
    image = noise(150, 101)
    height, width = round(150 * 64 / 101), 64
    whole = np.einsum(
        "yh,hwc,xw->yxc", overlaps(150, height), image.astype(float), overlaps(101, width)
    )
    top, left = (height - 56) // 2, (width - 56) // 2
    expected = whole[top : top + 56, left : left + 56]
    assert np.abs(decode.center_crop(image, 56) - expected).max() <= 1


# --- other kinds of files -----------------------------------------------------------


def saved(image, **options):
    """The file that Pillow writes."""
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def test_webp_is_read():
    image = noise(20, 30)
    encoded = saved(Image.fromarray(image), format="WEBP", lossless=True)
    np.testing.assert_array_equal(decode.decode(encoded), image)


def test_grey_jpeg_becomes_three_equal_channels():
    encoded = saved(Image.fromarray(noise(16, 24)[:, :, 0]), format="JPEG")
    grey = np.asarray(Image.open(io.BytesIO(encoded)))
    np.testing.assert_array_equal(decode.decode(encoded), np.dstack([grey] * 3))


def test_cmyk_jpeg_is_pillows_rgb():
    colours = Image.fromarray(gradient(64, 96) * 2).convert("CMYK")
    encoded = saved(colours, format="JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    assert np.abs(decode.decode(encoded) - expected).max() <= 2


def test_of_16_bits_the_upper_8_are_kept():
    values = np.random.RandomState(0).randint(0, 2**16, (9, 7, 3)).astype(np.uint16)
    decoded = decode.decode(cv2.imencode(".png", values[:, :, ::-1])[1].tobytes())
    np.testing.assert_array_equal(decoded, values >> 8)
    grey = decode.decode(cv2.imencode(".png", values[:, :, 0])[1].tobytes())
    np.testing.assert_array_equal(grey, np.dstack([values[:, :, 0] >> 8] * 3))


def test_palette_png_is_read():
    image = Image.fromarray(gradient(8, 8)).quantize(16)
    np.testing.assert_array_equal(
        decode.decode(saved(image, format="PNG")), np.asarray(image.convert("RGB"))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_if_asked(orientation):
    image = Image.fromarray(gradient(16, 24) * 5)
    exif = image.getexif()
    exif[0x0112] = orientation
    encoded = saved(image, format="JPEG", quality=95, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    decoded = decode.decode(encoded, rotate=True)
    assert np.abs(decoded.astype(int) - upright).max() <= 2
    assert decode.decode(encoded).shape == (16, 24, 3)


# --- windows ------------------------------------------------------------------------


def window_of(encoded, window, size, **options):
    out = np.zeros((size, size, 3), np.uint8)
    decode.decode_window(encoded, lambda height, width: window, out, **options)
    return out


def bilinear(image, size):
    """Sampled at the centres of the new pixels, in float64."""
    sides = [(np.arange(size) + 0.5) * n / size - 0.5 for n in image.shape[:2]]
    low = [np.floor(at).astype(int) for at in sides]
    (y, x), (ty, tx) = low, [at - n for at, n in zip(sides, low, strict=True)]
    rows, columns = (
        [np.clip(n + i, 0, side - 1) for i in (0, 1)]
        for n, side in zip((y, x), image.shape[:2], strict=True)
    )
    ty, tx = ty[:, None, None], tx[None, :, None]
    corner = {
        (i, j): image[rows[i]][:, columns[j]].astype(float) for i in (0, 1) for j in (0, 1)
    }
    top = corner[0, 0] * (1 - tx) + corner[0, 1] * tx
    bottom = corner[1, 0] * (1 - tx) + corner[1, 1] * tx
    return top * (1 - ty) + bottom * ty


@pytest.mark.parametrize(
    "window",
    [(0, 0, 60, 90), (7, 11, 31, 30), (20, 40, 16, 16), (59, 89, 1, 1), (3, 5, 9, 4)],
)
@pytest.mark.parametrize("extension", [".png", ".jpg"])
def test_window_is_its_pixels_bilinearly(extension, window):
    encoded = encode(noise(60, 90), extension)
    top, left, height, width = window
    part = decode.decode(encoded)[top : top + height, left : left + width]
    error = np.abs(window_of(encoded, window, 31) - bilinear(part, 31))
    assert error.max() <= 1.01


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_large_windows_of_a_jpeg_are_decoded_at_a_fraction(reduce):
    # Smooth, so that what is decoded small is what averages would be.
    image = np.add.outer(np.arange(300), np.arange(420)).astype(float)
    image = np.dstack([image / 3, 255 - image / 3, np.full_like(image, 90)])
    encoded = encode(image.round().astype(np.uint8), ".jpg")
    size = 224 // reduce
    top, left, height, width = 16, 24, 230, 300
    part = image[top : top + height, left : left + width]
    error = np.abs(
        window_of(encoded, (top, left, height, width), size) - bilinear(part, size)
    )
    # A window of the reduced image is of whole pixels of it.
    assert error.max() < 4 + reduce / 3


def test_window_of_a_rotated_photograph_is_in_the_upright_one():
    image = Image.fromarray(gradient(60, 90) * 2)
    exif = image.getexif()
    exif[0x0112] = 6
    encoded = saved(image, format="JPEG", quality=95, exif=exif)
    seen = []

    def window(height, width):
        seen.append((height, width))
        return 0, 0, 16, 16

    out = np.zeros((16, 16, 3), np.uint8)
    decode.decode_window(encoded, window, out, rotate=True)
    decode.decode_window(encoded, window, np.zeros_like(out))
    assert seen == [(90, 60), (60, 90)]
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    assert np.abs(out.astype(int) - upright[:16, :16]).max() <= 3


@pytest.mark.parametrize("cut", [0, 1, 3, 100, 2000])
def test_windows_of_unreadable_bytes_are_an_error_of_the_data(cut):
    encoded = encode(noise(60, 90), ".jpg")[:cut]
    with pytest.raises(decode.DataError, match=f"{cut} bytes"):
        window_of(encoded, (0, 0, 1, 1), 16)
