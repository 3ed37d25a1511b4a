"""Crops and colours against torchvision's: the same numbers or the same distribution."""

import itertools
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

from resjax.data import crops
from resjax.data.augment import random_flip, random_jitter

pytestmark = pytest.mark.peers
LIMITS = {"scale": [0.08, 1], "ratio": [3 / 4, 4 / 3]}


@pytest.fixture(scope="module")
def transforms():
    """torchvision.transforms."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_torch_golden

    _operators = make_torch_golden.declare_torchvision_operators()
    from torchvision import transforms

    return transforms


def keys(n):
    return jax.random.split(jax.random.key(0), n)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_jitter_is_torchvisions_in_any_order_where_nothing_is_clipped(transforms, order):
    import torch

    # Within [0.36, 0.6] no factor from 0.6 to 1.4 leads out of [0, 1].
    images = np.random.RandomState(0).uniform(0.36, 0.6, (16, 12, 10, 3)).astype(np.float32)
    actual = random_jitter(keys(16), images, 0.4)
    draw = jax.vmap(lambda key: jax.random.uniform(key, (3,), minval=0.6, maxval=1.4))
    changes = (
        transforms.functional.adjust_brightness,
        transforms.functional.adjust_contrast,
        transforms.functional.adjust_saturation,
    )
    for image, factors, ours in zip(
        images, np.asarray(draw(keys(16))), actual, strict=True
    ):
        theirs = torch.from_numpy(image).permute(2, 0, 1)
        for i in order:
            theirs = changes[i](theirs, float(factors[i]))
        # Their weight of red is 0.2989.
        np.testing.assert_allclose(ours, theirs.permute(1, 2, 0), atol=2e-4)


def test_flip_is_torchvisions(transforms):
    import torch

    images = np.random.RandomState(0).uniform(size=(32, 5, 6, 3)).astype(np.float32)
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2)
    theirs = transforms.functional.hflip(tensors).permute(0, 2, 3, 1).numpy()
    actual = np.asarray(random_flip(keys(32), images))
    flipped = (actual == theirs).all(axis=(1, 2, 3))
    assert 0 < flipped.sum() < 32
    np.testing.assert_array_equal(actual[~flipped], images[~flipped])


def windows(transforms, height, width, n):
    """[2, n, 4]: ours, then torchvision's."""
    import torch

    torch.manual_seed(0)
    empty = torch.empty(3, 1, 1).expand(3, height, width)
    uniforms = np.random.RandomState(0).uniform(size=(n, 24))
    ours = [crops.random_resized_window(height, width, 224, u) for u in uniforms]
    get_params = transforms.RandomResizedCrop.get_params
    return np.array([ours, [get_params(empty, **LIMITS) for _ in range(n)]])


@pytest.mark.parametrize("shape", [(375, 500), (500, 500), (700, 300), (32, 32)])
def test_random_resized_windows_are_distributed_as_torchvisions(transforms, shape):
    ours, theirs = windows(transforms, *shape, 3000)
    parts = [(ours[:, i], theirs[:, i]) for i in range(4)]
    parts.append((ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]))  # area
    parts.append((ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]))  # aspect ratio
    for one, other in parts:
        assert stats.ks_2samp(one, other).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(30, 3000), (3000, 30), (1, 99)])
def test_last_resort_is_torchvisions(transforms, shape):
    ours, theirs = windows(transforms, *shape, 20)
    np.testing.assert_array_equal(ours, theirs)
