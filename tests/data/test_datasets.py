"""Every row of the table of data sets: crops, splits, statistics."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from resjax.config import UsageError
from resjax.data import crops
from resjax.data.datasets import DATASETS, get_dataset
from resjax.data.recipes import RECIPES


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("size", [7, 8, 32])
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (21, 35), (50, 33), (1, 9)])
def test_crop_of_evaluation_has_the_size_asked_for(name, size, shape):
    crop = DATASETS[name].eval_crop(np.full((*shape, 3), 77, np.uint8), size)
    assert (crop.shape, crop.dtype) == ((size, size, 3), np.uint8)
    assert (crop == 77).all()


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_small_images_are_left_whole(name):
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    assert RECIPES[DATASETS[name].recipe].window is None
    np.testing.assert_array_equal(DATASETS[name].eval_crop(image, 32), image)


@pytest.mark.parametrize("name", ["imagenet2012", "folder"])
def test_photos_are_cropped_at_random_in_training_and_in_the_middle_in_evaluation(name):
    assert RECIPES[DATASETS[name].recipe].window is crops.random_resized_window
    columns = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    crop = DATASETS[name].eval_crop(columns, 56)
    np.testing.assert_array_equal(crop, columns[4:60, 4:60])


def test_mirrored_where_the_mirror_image_is_of_the_same_class():
    flipped = {name for name, dataset in DATASETS.items() if RECIPES[dataset.recipe].flip}
    assert flipped == {"cifar10", "imagenet2012", "folder"}


def test_peoples_own_photos_are_turned_upright_and_those_of_the_papers_as_stored():
    assert {name for name, dataset in DATASETS.items() if dataset.rotates} == {"folder"}


@pytest.mark.parametrize("name", DATASETS)
def test_every_row_has_both_splits_and_statistics_of_pixels_from_0_to_1(name):
    dataset = DATASETS[name]
    assert set(dataset.splits) == {"train", "test"}
    assert len(dataset.mean) == len(dataset.std) == 3
    assert all(0 < value < 1 for value in (*dataset.mean, *dataset.std))


def test_statistics_of_digits_are_those_of_the_data():
    images = load_digits().images / 16
    np.testing.assert_allclose(DATASETS["digits"].mean, images.mean(), atol=5e-3)
    np.testing.assert_allclose(DATASETS["digits"].std, images.std(), atol=5e-3)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        # fb.resnet.torch, datasets/cifar10.lua, of pixels from 0 to 255.
        ("cifar10", (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
        # fb.resnet.torch, datasets/imagenet.lua, times 255.
        ("imagenet2012", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        ("folder", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    ],
)
def test_statistics_are_those_cited(name, mean, std):
    np.testing.assert_allclose(255 * np.array(DATASETS[name].mean), mean, rtol=1e-6)
    np.testing.assert_allclose(255 * np.array(DATASETS[name].std), std, rtol=1e-6)


def test_evaluation_of_imagenet_is_on_its_validation_split():
    assert DATASETS["imagenet2012"].splits["test"] == "validation"


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_line_that_prepares_is_a_command_of_ours(name):
    line = DATASETS[name].prepare
    assert f"pip install tensorflow && python -m resjax.data {name} --data_dir=DIR" in line


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("digit", "digits"),
        ("cifar_10", "cifar10"),
        ("imagenet", "imagenet2012"),
        ("folders", "folder"),
    ],
)
def test_unknown_name_offers_the_nearest(typo, nearest):
    with pytest.raises(UsageError, match=f"'{typo}'; did you mean {nearest}") as error:
        get_dataset(typo)
    assert "\n" not in str(error.value)
