"""Parts of JPEG files against the whole image of OpenCV, pixel for pixel."""

import cv2
import numpy as np
import pytest

from resjax.data import decode, jpeg

SUBSAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
    "grey": None,
}
FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
needs_library = pytest.mark.skipif(
    jpeg.turbojpeg() is None, reason="libjpeg-turbo 3 is not installed"
)


def encode(image, subsampling="4:2:0", progressive=False):
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    if SUBSAMPLINGS[subsampling] is None:
        image = image[:, :, 0]
    else:
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling]]
    return cv2.imencode(".jpg", image, options)[1].tobytes()


def noise(rng, height, width):
    return rng.randint(0, 256, (height, width, 3)).astype(np.uint8)


@needs_library
@pytest.mark.parametrize("reduce", FLAGS)
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_any_window_is_that_of_the_whole_image(subsampling, progressive, reduce):
    rng = np.random.RandomState(0)
    for _ in range(25):
        image = noise(rng, *rng.randint(1, 120, 2))
        encoded = encode(image, subsampling, progressive)
        whole = cv2.imdecode(np.frombuffer(encoded, np.uint8), FLAGS[reduce])[:, :, ::-1]
        top, left = (rng.randint(side) for side in whole.shape[:2])
        height = rng.randint(1, whole.shape[0] - top + 1)
        width = rng.randint(1, whole.shape[1] - left + 1)
        part = jpeg.decode_window(encoded, top, left, height, width, reduce)
        expected = whole[top : top + height, left : left + width]
        np.testing.assert_array_equal(part, expected, strict=True)


@needs_library
def test_damaged_files_give_what_opencv_gives(monkeypatch):
    # Bytes inside the entropy code, so that both have something to read.
    rng = np.random.RandomState(0)
    original = encode(noise(rng, 96, 128))
    for _ in range(40):
        damaged = bytearray(original)
        for at in rng.randint(700, len(damaged) - 2, 3):
            damaged[at] = rng.randint(256)
        results = []
        for library in (jpeg.turbojpeg(), None):
            monkeypatch.setattr(jpeg, "turbojpeg", lambda found=library: found)
            out = np.zeros((16, 16, 3), np.uint8)
            try:
                decode.decode_window(bytes(damaged), lambda h, w: (9, 17, 30, 40), out)
            except decode.DataError:
                out = None
            results.append(out)
            monkeypatch.undo()
        np.testing.assert_array_equal(*results)


def test_without_the_library_windows_are_the_same(monkeypatch):
    encoded = encode(noise(np.random.RandomState(1), 90, 120))
    for window in [(0, 0, 90, 120), (11, 23, 17, 31), (3, 50, 70, 70)]:
        crops = []
        for missing in (False, True):
            if missing:
                monkeypatch.setattr(jpeg, "turbojpeg", lambda: None)
            out = np.zeros((16, 16, 3), np.uint8)
            decode.decode_window(encoded, lambda h, w, window=window: window, out)
            crops.append(out)
            monkeypatch.undo()
        np.testing.assert_array_equal(*crops)


@needs_library
@pytest.mark.parametrize("encoded", [b"", b"no image", b"\xff\xd8\xff\xd9"])
def test_what_is_no_jpeg_is_left_to_others(encoded):
    assert jpeg.read_header(encoded) is None
    assert jpeg.decode_window(encoded, 0, 0, 1, 1, 1) is None


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(("subsampling", "components"), [("4:2:0", 3), ("grey", 1)])
def test_header_tells_the_size(subsampling, components, progressive):
    encoded = encode(noise(np.random.RandomState(0), 300, 517), subsampling, progressive)
    assert jpeg.read_header(encoded) == (300, 517, components, False, True)


def test_header_is_found_behind_other_segments():
    encoded = encode(noise(np.random.RandomState(0), 20, 31))
    thumbnail = encode(noise(np.random.RandomState(0), 8, 9))
    segment = b"Exif\0\0" + thumbnail
    length = (len(segment) + 2).to_bytes(2, "big")
    tagged = encoded[:2] + b"\xff\xff\xe1" + length + segment + encoded[2:]
    assert jpeg.read_header(tagged) == (20, 31, 3, True, True)
    # The end of the thumbnail is not that of the image.
    assert jpeg.read_header(tagged[:-2]) == (20, 31, 3, True, False)
    # Some cameras and phones append other things.
    assert jpeg.read_header(tagged + b"\xff\xda and more").complete


def test_header_that_is_cut_off_is_none():
    encoded = encode(noise(np.random.RandomState(0), 20, 31))
    start = encoded.index(b"\xff\xc0")
    assert all(jpeg.read_header(encoded[:n]) is None for n in range(start + 5))
