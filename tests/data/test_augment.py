"""Augmentation against numpy: every image is one of the allowed versions of its input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from resjax.data.augment import augment, normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOTHING = {"jitter": 0.0, "lighting": 0.0, "flip": False, "pad": 0}
COLOURS = {"jitter": 0.4, "lighting": 0.1}
EVERYTHING = {**COLOURS, "flip": True, "pad": 2}


@functools.partial(
    jax.jit, static_argnames=["mean", "std", "jitter", "lighting", "flip", "pad"]
)
def _augmented(images, positions, seed, **kwargs):
    return augment(images, positions, seed, **kwargs)


def recolour(images, positions, seed=3, mean=(0,) * 3, std=(1 / 255,) * 3, **kwargs):
    """The augmented images, as the compiled step would see them; normally from 0 to 255."""
    kwargs = {**NOTHING, "mean": mean, "std": std, **kwargs}
    return np.asarray(_augmented(images, positions, np.uint32(seed), **kwargs))


def run(images, positions, seed=3, flip=True, pad=2):
    """Images flipped and shifted alone, as whole numbers."""
    return np.round(recolour(images, positions, seed, flip=flip, pad=pad)).astype(int)


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


def test_nothing_asked_for_is_normalize():
    images = noise(5)
    actual = augment(images, positions(5), 0, MEAN, STD, **NOTHING)
    np.testing.assert_array_equal(actual, normalize(images, MEAN, STD))


@pytest.mark.parametrize(("flip", "pad"), [(True, 0), (False, 1), (True, 2)])
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
    shifted = recolour(images, positions(32), mean=MEAN, std=STD, pad=2)
    white = (1 - np.array(MEAN)) / STD
    is_white = np.isclose(shifted, white, rtol=1e-5)
    assert is_white.any() and (shifted[~is_white] == 0).all()
    assert (~is_white).any()


def test_augmentation_does_not_depend_on_the_other_examples_of_the_batch():
    images, places = noise(12), positions(12, start=1000)
    whole = recolour(images, places, **EVERYTHING)
    shuffled = np.random.RandomState(1).permutation(12)
    permuted = recolour(images[shuffled], places[shuffled], **EVERYTHING)
    np.testing.assert_array_equal(permuted, whole[shuffled])
    alone = [
        recolour(images[i : i + 1], places[i : i + 1], **EVERYTHING)[0] for i in range(12)
    ]
    # The compiler may sum the mean grey in another order.
    np.testing.assert_allclose(alone, whole, atol=1e-3)


@pytest.mark.parametrize("seed", [2**32 - 1])
def test_positions_and_seeds_have_draws_of_their_own(seed):
    n = 400
    images = np.repeat(noise(1), n, axis=0)
    draws = list(outcomes(images, run(images, positions(n), seed)))
    assert len(set(draws)) == 50  # of one image at 400 positions
    others = run(images, positions(n, start=n), seed), run(images, positions(n), seed ^ 7)
    for other in others:
        agree = [a == b for a, b in zip(draws, outcomes(images, other), strict=True)]
        assert sum(agree) < 24  # independent draws: one in 50


def flips_and_places(seed, position):
    """What random streams gave when flips and shifts were all there was."""
    domain = jax.random.fold_in(jax.random.key(seed), 1)
    flip_key, shift_key = jax.random.split(jax.random.fold_in(domain, position))
    return jax.random.bernoulli(flip_key), jax.random.randint(shift_key, (2,), 0, 5)


@pytest.mark.parametrize("colours", [pytest.param({}, marks=pytest.mark.slow), COLOURS])
def test_flips_and_shifts_are_those_of_runs_before_there_were_colours(colours):
    images, places = noise(12), positions(12, start=1430)
    draw = jax.jit(jax.vmap(flips_and_places, (None, 0)))
    for seed in (0, 5):
        plain, expected = recolour(images, places, seed, **colours), []
        for i, (flip, (top, left)) in enumerate(zip(*draw(seed, places), strict=True)):
            image = plain[i, :, ::-1] if flip else plain[i]
            padded = np.pad(image, [(2, 2), (2, 2), (0, 0)])
            expected.append(padded[top : top + 6, left : left + 8])
        actual = recolour(images, places, seed, **{**colours, "flip": True, "pad": 2})
        np.testing.assert_allclose(actual, expected, atol=1e-3)


# --- colours ------------------------------------------------------------------------

GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
NUM_DRAWS = 2000  # jaxlib 0.10.2 compiled sums wrongly from 2**15 elements (jax#39103)
# Of datasets/imagenet.lua in fb.resnet.torch.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)


def brightness(images, factors):
    return factors * images


def contrast(images, factors):
    means = (images @ GREY).mean(axis=(1, 2))
    return factors * images + (1 - factors) * means[:, None, None, None]


def saturation(images, factors):
    return factors * images + (1 - factors) * (images @ GREY)[..., None]


@pytest.fixture(scope="module")
def image():
    """[6, 8, 3] uint8 with a black and a white pixel."""
    image = noise(1)[0]
    image[0, 0], image[5, 7] = 0, 255
    return image


@pytest.fixture(scope="module")
def jittered(image):
    """The image with the jitter 0.4 at `NUM_DRAWS` positions."""
    images = np.repeat(image[None], NUM_DRAWS, axis=0)
    return recolour(images, positions(NUM_DRAWS), jitter=0.4)


@pytest.fixture(scope="module")
def factors(image, jittered):
    """[3, `NUM_DRAWS`] of brightness, contrast and saturation, from what they did.

    The outcome is a sum of the image, its grey version and a constant; the shares of the
    three tell the factors.
    """
    grey = image @ GREY
    parts = [image, np.repeat(grey[..., None], 3, axis=-1), np.ones(image.shape)]
    basis = np.stack([part.ravel() for part in parts], axis=1)
    outcomes = jittered.reshape(NUM_DRAWS, -1).T.astype(np.float64)
    own, of_grey, constant = np.linalg.lstsq(basis, outcomes)[0]
    both = own + of_grey  # brightness times contrast
    factor = both + constant / grey.mean()
    return np.array([factor, both / factor, own / both])


@pytest.fixture(scope="module")
def alphas(image):
    """[3, `NUM_DRAWS`] draws of the lighting 0.1, from the colours that it added."""
    images = np.repeat(image[None], NUM_DRAWS, axis=0)
    lit = recolour(images, positions(NUM_DRAWS), lighting=0.1)
    added = (lit - images.astype(np.float64)).reshape(NUM_DRAWS, -1, 3) / 255
    np.testing.assert_allclose(added, added[:, :1].repeat(48, 1), atol=1e-6)  # everywhere
    return np.linalg.solve(EIGENVECTORS, added.mean(axis=1).T) / EIGENVALUES[:, None]


@pytest.mark.parametrize("order", list(itertools.permutations([0, 1, 2])))
def test_jitter_is_brightness_contrast_and_saturation_in_any_order(
    image, jittered, factors, order
):
    changes = brightness, contrast, saturation
    expected = np.repeat(image[None].astype(np.float64), NUM_DRAWS, axis=0)
    for i in order:
        expected = changes[i](expected, factors[i][:, None, None, None])
    np.testing.assert_allclose(jittered, expected, atol=1e-3)


def test_factors_of_the_jitter_are_uniform(factors):
    assert factors.min() > 0.6 - 1e-4 and factors.max() < 1.4 + 1e-4
    for factor in factors:
        assert stats.kstest(factor, stats.uniform(0.6, 0.8).cdf).pvalue > 1e-3


def test_draws_of_the_lighting_are_normal(alphas):
    for alpha in alphas:
        assert stats.kstest(alpha, stats.norm(0, 0.1).cdf).pvalue > 1e-3


def test_colours_are_not_clipped(jittered):
    assert jittered.min() < -20 and jittered.max() > 300


def test_draws_of_an_example_have_nothing_to_do_with_each_other(image, factors, alphas):
    images = np.repeat(image[None], NUM_DRAWS, axis=0)
    flipped = recolour(images, positions(NUM_DRAWS), flip=True)[:, 0, 0, 0] != 0
    assert stats.binomtest(int(flipped.sum()), NUM_DRAWS).pvalue > 1e-3
    draws = np.stack([*factors, *alphas, flipped])
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 4 / np.sqrt(NUM_DRAWS)


def test_every_position_and_seed_has_colours_of_its_own(factors):
    # Two of 2,000 real numbers may be as near as these are exact.
    assert all(len(np.unique(np.round(f, 6))) > NUM_DRAWS - 20 for f in factors)
    images, places = noise(12), positions(12)
    one, other = (recolour(images, places, seed, **COLOURS) for seed in (3, 4))
    assert (np.abs(one - other).max(axis=(1, 2, 3)) > 0.01).all()


def test_colours_change_before_normalisation_and_what_is_shifted_in_is_the_mean():
    images, places = noise(12), positions(12)
    plain = recolour(images, places, **EVERYTHING)
    shifted_in = plain == 0
    assert shifted_in.any() and not shifted_in.all()
    actual = recolour(images, places, mean=MEAN, std=STD, **EVERYTHING)
    expected = np.where(shifted_in, 0, (plain / 255 - MEAN) / STD)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_every_device_draws_the_same():
    images, places = noise(12), positions(12)
    first = recolour(images, places, **EVERYTHING)
    there = jax.device_put((images, places), jax.devices()[-1])
    np.testing.assert_array_equal(recolour(*there, **EVERYTHING), first)
