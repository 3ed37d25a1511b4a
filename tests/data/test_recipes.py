"""The named augmentations: the numbers of their sources, and what a batch goes through."""

import dataclasses

import numpy as np
import pytest

from resjax import build_data
from resjax.config import Config, DataConfig, UsageError
from resjax.data import crops
from resjax.data.datasets import DATASETS
from resjax.data.recipes import RECIPES, Recipe, get_recipe


@pytest.mark.parametrize(
    ("name", "window", "jitter", "lighting", "flip"),
    [
        # Goyal et al. 2017, section 5.1.
        ("goyal", crops.random_resized_window, 0, 0, True),
        # He et al. 2015, section 3.4; Krizhevsky et al. 2012, section 4.1.
        ("resnet", crops.scale_jitter_window, 0, 0.1, True),
        # fb.resnet.torch, datasets/imagenet.lua.
        ("fb_resnet_torch", crops.random_resized_window, 0.4, 0.1, True),
    ],
)
def test_recipes_of_imagenet_are_those_cited(name, window, jitter, lighting, flip):
    assert dataclasses.astuple(RECIPES[name]) == (window, jitter, lighting, flip, 0)


def test_recipes_of_small_images_shift_and_leave_digits_unmirrored():
    assert RECIPES["shift"] == Recipe(shift=1 / 8)
    assert RECIPES["cifar"] == Recipe(shift=4 / 32, flip=True)  # He et al. 2015, 4.2


@pytest.mark.parametrize("name", DATASETS)
def test_recipe_of_every_data_set_is_one(name):
    assert DATASETS[name].recipe in RECIPES


@pytest.mark.parametrize(
    ("typo", "nearest"), [("fb_resnet", "fb_resnet_torch"), ("cifar10", "cifar")]
)
def test_unknown_name_offers_the_nearest(typo, nearest):
    with pytest.raises(UsageError, match=f"config.data.recipe: .*{nearest}") as error:
        get_recipe(typo)
    assert "\n" not in str(error.value)


def transformed(recipe, data="digits"):
    """(training, evaluation) images [12, 8, 8, 3] of one batch, and the batch."""
    config = Config(data=DataConfig(name=data, recipe=recipe))
    image = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    batch = {"image": image, "position": np.arange(12, dtype=np.int32)}
    return [
        np.asarray(transform(batch)) for transform in build_data.build_transforms(config)
    ]


def test_recipe_none_trains_on_the_images_of_evaluation():
    train, evaluation = transformed("none")
    np.testing.assert_array_equal(train, evaluation)


@pytest.mark.parametrize(("data", "recipe"), [("digits", "shift"), ("cifar10", "cifar")])
def test_without_a_name_the_recipe_is_that_of_the_data_set(data, recipe):
    train, evaluation = transformed(None, data)
    np.testing.assert_array_equal(train, transformed(recipe, data)[0])
    assert not np.array_equal(train, evaluation)


def test_recipe_of_resnet_flips_and_adds_one_colour():
    train, evaluation = transformed("resnet", "imagenet2012")
    flips = 0
    for image, plain in zip(train, evaluation, strict=True):
        spreads = [
            np.ptp(image - version, axis=(0, 1)) for version in (plain, plain[:, ::-1])
        ]
        assert min(spread.max() for spread in spreads) < 1e-5
        flips += spreads[1].max() < 1e-5
        assert np.abs(image.mean(axis=(0, 1)) - plain.mean(axis=(0, 1))).max() > 1e-4
    assert 0 < flips < 12


def test_recipe_of_fb_resnet_torch_changes_contrast():
    train, evaluation = transformed("fb_resnet_torch", "imagenet2012")
    ratio = train.std(axis=(1, 2, 3)) / evaluation.std(axis=(1, 2, 3))
    assert ratio.min() < 0.9 and ratio.max() > 1.1


def test_unknown_recipe_of_a_config_is_an_error_of_usage():
    with pytest.raises(UsageError, match=r"config.data.recipe: there is no 'resnett'"):
        transformed("resnett")
