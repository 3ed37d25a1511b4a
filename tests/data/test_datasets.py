"""Every row of the table of data sets: crops, splits, statistics."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from resjax.config import UsageError
from resjax.data.datasets import DATASETS, get_dataset


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("size", [7, 8, 32])
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (21, 35), (50, 33), (1, 9)])
def test_crops_have_the_size_asked_for(name, size, shape):
    dataset, image = DATASETS[name], np.full((*shape, 3), 77, np.uint8)
    crops = [dataset.eval_crop(image, size)]
    if dataset.train_crop is not None:
        crops.append(dataset.train_crop(image, size, np.random.RandomState(0)))
    for crop in crops:
        assert (crop.shape, crop.dtype) == ((size, size, 3), np.uint8)
        assert (crop == 77).all()


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_small_images_are_left_whole(name):
    image = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    assert DATASETS[name].train_crop is None
    np.testing.assert_array_equal(DATASETS[name].eval_crop(image, 32), image)


def test_pixels_of_the_papers_shift():
    assert 8 * DATASETS["digits"].shift == 1
    assert 32 * DATASETS["cifar10"].shift == 4  # He et al. 2015, section 4.2
    assert DATASETS["imagenet2012"].shift == 0


def test_mirrored_where_the_mirror_image_is_of_the_same_class():
    flipped = {name for name, dataset in DATASETS.items() if dataset.flip}
    assert flipped == {"cifar10", "imagenet2012"}


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
    ],
)
def test_statistics_are_those_cited(name, mean, std):
    np.testing.assert_allclose(255 * np.array(DATASETS[name].mean), mean, rtol=1e-6)
    np.testing.assert_allclose(255 * np.array(DATASETS[name].std), std, rtol=1e-6)


def test_evaluation_of_imagenet_is_on_its_validation_split():
    assert DATASETS["imagenet2012"].splits["test"] == "validation"


def test_imagenet_is_cropped_at_random_in_training_and_in_the_middle_in_evaluation():
    columns = np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    dataset = DATASETS["imagenet2012"]
    crops = {
        dataset.train_crop(columns, 56, np.random.RandomState(i)).tobytes()
        for i in range(10)
    }
    assert len(crops) == 10
    np.testing.assert_array_equal(dataset.eval_crop(columns, 56), columns[4:60, 4:60])


@pytest.mark.parametrize("name", [n for n in DATASETS if DATASETS[n].prepare])
def test_line_that_prepares_names_the_data_set_and_a_format_read_at_random(name):
    line = DATASETS[name].prepare
    assert f"tfds.builder('{name}'" in line
    assert "file_format='array_record'" in line and "data_dir='DIR'" in line


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("digit", "digits"), ("cifar_10", "cifar10"), ("imagenet", "imagenet2012")],
)
def test_unknown_name_offers_the_nearest(typo, nearest):
    with pytest.raises(UsageError, match=f"'{typo}'; did you mean {nearest}") as error:
        get_dataset(typo)
    assert "\n" not in str(error.value)
