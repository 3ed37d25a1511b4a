"""Reading a whole split: in order, in constant memory; what it says: test___main__.py."""

import cv2
import numpy as np
import pytest
from tiny_tfds import encode, pixels

from resjax.data import describe


@pytest.mark.parametrize(
    ("kind", "encoded"),
    [
        ("JPEG", encode(pixels(0, 9, 8), ".jpg")),
        ("JPEG, grey", cv2.imencode(".jpg", pixels(0, 9, 8)[:, :, 0])[1].tobytes()),
        ("PNG", encode(pixels(0, 9, 8), ".png")),
        ("PNG, grey", cv2.imencode(".png", pixels(0, 9, 8)[:, :, 0])[1].tobytes()),
        ("WebP", encode(pixels(0, 9, 8), ".webp")),
        ("other images", encode(pixels(0, 9, 8), ".bmp")),
        ("other images", b""),
    ],
)
def test_kind_is_read_off_the_first_bytes(kind, encoded):
    assert describe.kind_of(encoded) == kind


@pytest.mark.parametrize(("num_examples", "count"), [(10, 3), (7, 7), (5, 9), (1000, 1)])
def test_sample_is_spaced_evenly(num_examples, count):
    chosen = describe.evenly_spaced(num_examples, count)
    assert len(chosen) == min(num_examples, count)
    gaps = np.diff([*chosen, num_examples])
    assert gaps.max() - gaps.min() <= 1 and chosen[0] == 0
