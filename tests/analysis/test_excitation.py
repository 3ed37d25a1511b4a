"""Gradient ascent against its formula in numpy, on scores whose best image is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from flax import linen as nn
from patch_net import patch_net

from resjax.analysis import excitation
from resjax.config import UsageError
from resjax.models.resnet import create_model

SIZE, KEY = 12, jax.random.key(0)
WEIGHTS = np.random.RandomState(0).randn(SIZE, SIZE, 3, 3).astype(np.float32)


class Linear(nn.Module):
    """Logits are sums of the image, weighted; [H, W, channels, classes]."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, *, train=False):
        return jnp.einsum("bhwc,hwck->bk", x, jnp.asarray(WEIGHTS), precision="highest")


def excite(units=(0, 2), **options):
    found = excitation.exciting_images(
        Linear(), {}, np.array(units), KEY, image_size=SIZE, **options
    )
    return np.asarray(found.images), found.scores


def unit(weights):
    """With a root mean square of 1."""
    weights = np.asarray(weights, np.float64)
    return weights / np.sqrt(np.square(weights).mean())


def correlation(one, other):
    return np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]


def roughness(images):
    return sum(np.square(np.diff(images, axis=axis)).mean() for axis in (-3, -2))


def test_the_image_of_a_linear_score_grows_along_its_weights():
    start, _ = excite(steps=0)
    images, scores = excite(steps=20, step_size=0.3, jitter=0, smoothness=0, l2=0)
    for image, before, k in zip(images, start, (0, 2), strict=True):
        expected = before + 20 * 0.3 * unit(WEIGHTS[..., k])
        np.testing.assert_allclose(image, expected, rtol=1e-4, atol=1e-4)
        assert correlation(image, WEIGHTS[..., k]) > 0.99
    # A step raises the score by its length times the weights' root mean square and number.
    rates = [0.3 * np.sqrt(np.square(WEIGHTS[..., k]).mean()) * SIZE**2 * 3 for k in (0, 2)]
    np.testing.assert_allclose(np.diff(scores, axis=0), [rates] * 20, rtol=1e-3)
    expected = [(images[i] * WEIGHTS[..., k]).sum() for i, k in enumerate((0, 2))]
    np.testing.assert_allclose(scores[-1], expected, rtol=1e-4)
    expected = [(start[i] * WEIGHTS[..., k]).sum() for i, k in enumerate((0, 2))]
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-3)


def test_a_grey_image_grows_along_the_mean_of_the_channels():
    start, _ = excite(steps=0, grey=True)
    images, _ = excite(steps=20, jitter=0, smoothness=0, l2=0, grey=True)
    assert (start == start[..., :1]).all()
    expected = start[0, ..., 0] + 20 * 0.1 * unit(WEIGHTS[..., 0].mean(axis=-1))
    for channel in range(3):
        np.testing.assert_allclose(images[0, ..., channel], expected, rtol=1e-4, atol=1e-4)


def test_priors_pull_as_their_formula_says():
    """Each pixel towards the mean of its neighbours inside the image, and towards 0."""
    start, _ = excite(steps=0)
    options = {"step_size": 0.2, "smoothness": 0.7, "l2": 0.4}
    images, _ = excite(steps=6, jitter=0, **options)
    expected = np.float64(start[1])
    for _ in range(6):
        pull = np.zeros_like(expected)
        for row in range(SIZE):
            for column in range(SIZE):
                for y, x in [(-1, 0), (1, 0), (0, -1), (0, 1)]:
                    y, x = row + y, column + x
                    if 0 <= y < SIZE and 0 <= x < SIZE:
                        pull[row, column] += expected[y, x] - expected[row, column]
        step = unit(WEIGHTS[..., 2]) + 0.7 * pull - 0.4 * expected
        expected = expected + 0.2 * step
    np.testing.assert_allclose(images[1], expected, rtol=1e-4, atol=1e-4)


def test_the_smoothness_prior_makes_smoother_images():
    options = {"steps": 40, "jitter": 0, "l2": 0.1}
    rough, smooth, smoother = (
        excite(smoothness=weight, **options)[0] for weight in (0, 0.2, 1)
    )
    # In their own contrast: the prior does not only shrink the image.
    measured = [roughness(x) / x.var() for x in (rough, smooth, smoother)]
    assert measured[0] > 1.5 * measured[1] > 2 * measured[2]
    # It is still the class's image.
    assert correlation(smooth[0], WEIGHTS[..., 0]) > 0.5


def test_l2_holds_the_image_near_the_mean_colour():
    free, held = (excite(steps=200, smoothness=0, jitter=0, l2=w)[0] for w in (0, 0.5))
    # Where the gradient, of size 1, and 0.5 * image are equal.
    for image, k in zip(held, (0, 2), strict=True):
        np.testing.assert_allclose(image, unit(WEIGHTS[..., k]) / 0.5, rtol=1e-3, atol=1e-3)
    assert np.square(free).mean() > 10 * np.square(held).mean()


def test_jitter_rolls_back_exactly():
    """The score sees the image moved; what it gets is the weights moved the other way."""
    start, _ = excite(steps=0)
    images, scores = excite(units=(0,), steps=1, step_size=1, jitter=3, smoothness=0, l2=0)
    step = images[0] - start[0]
    moved = {
        (y, x): np.roll(unit(WEIGHTS[..., 0]), (-y, -x), axis=(0, 1))
        for y in range(-3, 4)
        for x in range(-3, 4)
    }
    near = {shift: np.abs(step - weights).max() for shift, weights in moved.items()}
    shift = min(near, key=near.get)
    assert near[shift] < 1e-5
    assert sorted(near.values())[1] > 1
    # And the score told is that of the moved image.
    seen = (np.roll(start[0], shift, axis=(0, 1)) * WEIGHTS[..., 0]).sum()
    assert scores[0, 0] == pytest.approx(seen, rel=1e-4)


def test_jitter_moves_every_way_and_no_further():
    shifts = set()
    for seed in range(60):
        found = excitation.exciting_images(
            Linear(),
            {},
            0,
            jax.random.key(seed),
            image_size=SIZE,
            steps=1,
            step_size=100.0,
            jitter=1,
            smoothness=0,
            l2=0,
        )
        step = np.asarray(found.images)[0]
        shifts.add(
            max(
                ((y, x) for y in range(-2, 3) for x in range(-2, 3)),
                key=lambda s: correlation(step, np.roll(WEIGHTS[..., 0], s, axis=(0, 1))),
            )
        )
    assert shifts == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_images_keep_within_bounds():
    low, high = np.array([-1, -0.5, -2]), np.array([0.5, 1, 1])
    images, _ = excite(steps=200, smoothness=0, l2=0, bounds=(low, high))
    assert (images >= low.astype(np.float32)).all()
    assert (images <= high.astype(np.float32)).all()
    # Most pixels of a linear score lie at one of them.
    at_end = (images == low.astype(np.float32)) | (images == high.astype(np.float32))
    assert at_end.mean() > 0.8


def test_an_image_is_its_own_whatever_stands_beside_it_and_a_key_gives_it_again():
    model = create_model("cifar_preact_resnet110", stage_sizes=(1,), width=8)
    variables = random_variables(model)
    options = {"image_size": 8, "steps": 5}
    three = excitation.exciting_images(model, variables, [4, 1, 7], KEY, **options)
    one = excitation.exciting_images(model, variables, 7, KEY, **options)
    np.testing.assert_allclose(one.images[0], three.images[2], rtol=1e-3, atol=1e-4)
    again = excitation.exciting_images(model, variables, 7, KEY, **options)
    np.testing.assert_array_equal(one.images, again.images)
    other = excitation.exciting_images(model, variables, 7, jax.random.key(1), **options)
    assert np.abs(one.images - other.images).max() > 0.01


@pytest.mark.parametrize(
    "name, layer, units, options",
    [
        ("cifar_resnext29_4x24d", "head", (2, 5), {"width": 16}),
        ("cifar_resnet20", "stage1/block1", (2, 0), {"width": 8, "remat": "blocks"}),
        ("preact_resnet18", "stage1", (2, 5), {"width": 8, "dtype": jnp.bfloat16}),
    ],
)
def test_scores_rise_and_are_those_of_the_image(name, layer, units, options):
    model = create_model(name, stage_sizes=(1,), num_classes=10, **options)
    variables = random_variables(model)
    found = excitation.exciting_images(
        model, variables, units, KEY, image_size=16, layer=layer, steps=15, jitter=0
    )
    apply = jax.jit(partial(model.apply, train=False, return_stages=True))
    logits, stages = apply(variables, found.images)
    means = np.float32(stages["stage1"]).mean(axis=(1, 2))  # of its only block, too
    outputs = np.asarray(logits if layer == "head" else means)
    tolerance = 0.02 if model.dtype == jnp.bfloat16 else 1e-4
    np.testing.assert_allclose(
        found.scores[-1], outputs[[0, 1], units], atol=tolerance * np.abs(outputs).max()
    )
    assert (found.scores[-1] > found.scores[0] + 0.1 * np.abs(outputs).max()).all()


def test_what_excites_the_detector_of_a_patch_is_bright():
    """Near the mean colour its ReLU is shut, and there is nothing to climb."""
    model, variables = patch_net()
    options = {"image_size": 8, "layer": "stem", "jitter": 0, "smoothness": 0, "l2": 0}
    silent = excitation.exciting_images(model, variables, 0, KEY, steps=3, **options)
    start = excitation.exciting_images(model, variables, 0, KEY, steps=0, **options)
    np.testing.assert_array_equal(silent.images, start.images)
    bright = excitation.exciting_images(
        model, variables, 0, KEY, steps=10, bounds=(0.99, 5.0), **options
    )
    # All pixels are in some patch, those inside in nine.
    image = np.asarray(bright.images)[0].mean(axis=-1)
    assert bright.scores[-1, 0] > bright.scores[0, 0] + 5
    assert image[2:6, 2:6].min() > image[0, 0] + 0.5


def test_pixels_are_what_normalisation_took():
    pixels = np.random.RandomState(0).uniform(0, 1, (2, 4, 4, 3)).astype(np.float32)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    found = excitation.to_pixels((pixels - mean) / std, mean, std)
    np.testing.assert_allclose(found, pixels, atol=1e-6)
    assert found.dtype == np.float32
    far = np.stack([np.full((4, 4, 3), -9.0), np.full((4, 4, 3), 9.0)])
    assert [x.tolist() for x in np.unique(excitation.to_pixels(far, mean, std))] == [0, 1]


@pytest.mark.parametrize(
    "options, told",
    [
        ({"units": (0, 3)}, "units: 3 is not one of 0 to 2"),
        ({"units": ((0, 1),)}, r"units: int64 of shape \(1, 2\)"),
        ({"units": (0.5,)}, "units: float64"),
        ({"steps": -1}, "steps: -1 is not 0 or more"),
        ({"step_size": 0.0}, "step_size: 0.0 is not greater than 0"),
        ({"step_size": 1.0, "smoothness": 0.5}, r"step_size: 1.0 .* up to 0.476"),
        ({"jitter": -1}, "jitter: -1 is not 0 or more"),
        ({"smoothness": -1.0}, "smoothness: -1.0 is not 0 or more"),
        ({"l2": float("nan")}, "l2: nan is not 0 or more"),
        ({"bounds": (1.0, 0.0)}, "bounds: 1.0 to 0.0 leaves no values"),
    ],
)
def test_wrong_numbers_are_named(options, told):
    with pytest.raises(UsageError, match=told):
        excite(**options)


def test_wrong_layers_units_and_sizes_are_named():
    model, variables = patch_net()
    find = excitation.exciting_images
    for layer, told in [("stage2", "did you mean .*stage1"), ("heads", "mean head")]:
        with pytest.raises(UsageError, match=told):
            find(model, variables, 0, KEY, image_size=8, layer=layer)
    with pytest.raises(UsageError, match="units: 4 is not one of 0 to 3"):
        find(model, variables, 4, KEY, image_size=8, layer="stage1/block1")
    with pytest.raises(UsageError, match="image_size: 0 is no whole number from 1"):
        find(model, variables, 0, KEY, image_size=0)
    with pytest.raises(UsageError, match="num_classes=0"):
        find(model.clone(num_classes=0), variables, 0, KEY, image_size=8)
