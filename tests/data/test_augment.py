"""Augmentation against numpy: every image is one of the allowed versions of its input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.data.augment import augment, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.partial(jax.jit, static_argnames=["seed", "flip", "pad"])
def _augmented(images, positions, seed, flip, pad):
    # With these statistics, normalised pixels are the pixels themselves.
    return augment(images, positions, seed, (0,) * 3, (1 / 255,) * 3, flip, pad)


def run(images, positions, seed=3, flip=True, pad=2):
    """The augmented images as whole numbers, as the compiled step would see them."""
    return np.round(_augmented(images, positions, seed, flip, pad)).astype(int)


def noise(batch_size):
    shape = (batch_size, 6, 8, 3)
    return np.random.RandomState(0).randint(1, 256, shape).astype(np.uint8)


def positions(batch_size, start=0):
    return np.arange(start, start + batch_size, dtype=np.int32)


def versions(image, pad):
    """{(flipped, top, left): image}, every one that may come out, in numpy."""
    height, width, _ = image.shape
    found = {}
    for flipped in (False, True):
        whole = image[:, ::-1] if flipped else image
        padded = np.pad(whole, [(pad, pad), (pad, pad), (0, 0)])
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                crop = padded[top : top + height, left : left + width]
                found[flipped, top, left] = crop
    return found


def outcomes(images, augmented, pad=2):
    """Which of its `versions` each image became."""
    for image, result in zip(images, augmented, strict=True):
        matches = [k for k, v in versions(image, pad).items() if np.array_equal(v, result)]
        assert len(matches) == 1, "not one of the allowed versions of its input"
        yield matches[0]


def test_normalize_is_the_formula():
    images = noise(3)
    expected = (images.astype(np.float64) / 255 - MEAN) / STD
    actual = normalize(images, MEAN, STD)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_no_flip_and_no_shift_is_normalize():
    images = noise(5)
    actual = augment(images, positions(5), 0, MEAN, STD, flip=False, pad=0)
    np.testing.assert_array_equal(actual, normalize(images, MEAN, STD))


@pytest.mark.parametrize(("flip", "pad"), [(True, 0), (False, 1), (True, 1), (True, 2)])
def test_all_versions_come_out_equally_often(flip, pad):
    images = noise(900)
    seen = list(outcomes(images, run(images, positions(900), flip=flip, pad=pad), pad))
    allowed = [key for key in versions(images[0], pad) if flip or not key[0]]
    counts = np.array([seen.count(key) for key in allowed])
    assert counts.sum() == 900
    expected = 900 / len(allowed)
    np.testing.assert_allclose(counts, expected, atol=4 * np.sqrt(expected))


def test_pixels_shifted_in_have_the_mean_colour():
    images = np.full((32, 6, 8, 3), 255, np.uint8)
    shifted = augment(images, positions(32), 0, MEAN, STD, flip=False, pad=2)
    white = (1 - np.array(MEAN)) / STD
    is_white = np.isclose(shifted, white, rtol=1e-5)
    assert is_white.any() and (np.asarray(shifted)[~is_white] == 0).all()
    assert (~is_white).any()


def test_augmentation_does_not_depend_on_the_other_examples_of_the_batch():
    images, places = noise(12), positions(12, start=1000)
    whole = run(images, places)
    parts = [run(images[i : i + 4], places[i : i + 4]) for i in range(0, 12, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    alone = [run(images[i : i + 1], places[i : i + 1]) for i in range(12)]
    np.testing.assert_array_equal(np.concatenate(alone), whole)
    shuffled = np.random.RandomState(1).permutation(12)
    np.testing.assert_array_equal(run(images[shuffled], places[shuffled]), whole[shuffled])


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_positions_and_seeds_have_draws_of_their_own(seed):
    n = 400
    images = np.repeat(noise(1), n, axis=0)
    draws = list(outcomes(images, run(images, positions(n), seed)))
    assert len(set(draws)) == 50  # of one image at 400 positions
    others = run(images, positions(n, start=n), seed), run(images, positions(n), seed ^ 7)
    for other in others:
        agree = [a == b for a, b in zip(draws, outcomes(images, other), strict=True)]
        assert sum(agree) < 24  # independent draws: one in 50
