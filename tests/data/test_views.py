"""Views against crops written out, sizes found by trying; plans hold each example once."""

from fractions import Fraction

import numpy as np
import pytest

from resjax.data import decode, views


def noise(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 101), (98, 64), (65, 64)])
def test_five_crops_of_an_image_of_the_right_size_are_its_corners_and_its_middle(
    height, width
):
    image = noise(height, width)  # 64 is 56 * 256 / 224
    expected = [
        image[:56, :56],
        image[:56, -56:],
        image[-56:, :56],
        image[-56:, -56:],
        decode.center_crop(image, 56),
    ]
    crops = views.five_crops(image, (5, 56, 56, 3))
    np.testing.assert_array_equal(crops, expected)


@pytest.mark.parametrize(("height", "width"), [(200, 128), (151, 333)])
def test_five_crops_are_of_the_image_resized_for_its_crop(height, width):
    crops = views.five_crops(noise(height, width), (5, 56, 56, 3))
    scale = 64 / min(height, width)
    whole = decode.resize(noise(height, width), round(height * scale), round(width * scale))
    assert min(whole.shape[:2]) == 64
    np.testing.assert_array_equal(crops[1], whole[:56, -56:])
    np.testing.assert_array_equal(crops[2], whole[-56:, :56])


@pytest.mark.parametrize(("height", "width"), [(3, 2), (1, 700), (30, 20)])
def test_five_crops_of_small_images_and_strips_have_the_size_asked_for(height, width):
    assert views.five_crops(noise(height, width), (5, 8, 8, 3)).shape == (5, 8, 8, 3)


CASES = [(375, 500), (500, 375), (64, 64), (81, 44), (100, 799), (100, 800), (9, 10)]


@pytest.mark.parametrize("stride", [4, 32])
@pytest.mark.parametrize("scale", [32, 100, 224, 256, 640])
@pytest.mark.parametrize(("height", "width"), CASES)
def test_scaled_shape_has_the_nearest_multiple_of_the_stride(height, width, scale, stride):
    shape = views.scaled_shape(height, width, scale, stride)
    assert shape == (*views.scaled_shape(width, height, scale, stride)[1::-1], 3)
    longer = max(shape[:2])
    assert min(shape[:2]) == scale
    assert (shape[0] - shape[1]) * (height - width) >= 0
    exact = Fraction(scale * max(height, width), min(height, width))
    allowed = [n for n in range(stride, 6000, stride) if n >= scale] + [scale]
    multiples = [abs(n - exact) for n in range(stride, 6000, stride)]
    assert longer in allowed
    assert longer == scale or abs(longer - exact) == min(multiples)
    # The side is cut short only where the nearest multiple is below the scale.
    if longer == scale and scale % stride:
        assert exact - scale <= Fraction(stride, 2)


def test_of_a_strip_the_middle_is_taken():
    assert views.scaled_shape(2, 900, 32, 32) == (32, 256, 3)
    image = np.zeros((2, 900, 3), np.uint8)
    image[:, 442:458] = 255
    assert views.resized(image, (32, 256, 3)).min() == 255


def test_a_resized_image_is_whole():
    image = noise(40, 60)
    blocks = image.reshape(20, 2, 30, 2, 3).astype(float).mean(axis=(1, 3))
    np.testing.assert_allclose(views.resized(image, (20, 30, 3)), blocks, atol=0.51)


def test_groups_hold_each_example_once_the_largest_shapes_first():
    sizes = [(4, 4), (4, 8), None, (8, 4), (4, 8), (4, 4), (4, 8)]
    shapes = [size and (*size, 3) for size in sizes]
    plan = views.group_by_shape(shapes, lambda shape: 32 // shape[0] // shape[1] + 1)
    found = [(group.shape, list(group.indices), group.batch_size) for group in plan]
    assert found == [
        ((4, 8, 3), [1, 4, 6], 2),
        ((8, 4, 3), [3], 1),  # there are no more of them
        ((4, 4, 3), [0, 5], 2),
    ]
