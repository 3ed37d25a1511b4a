"""The data sets: what their images are and how each is cropped, in one table.

To add a data set, add a row to `DATASETS`; tfds must know how to prepare it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from resjax.config import unknown_name
from resjax.data import decode

TrainCrop = Callable[[np.ndarray, int, np.random.RandomState], np.ndarray]
EvalCrop = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a data set becomes batches.

    Attributes:
      splits: our split name -> its name in tfds.
      mean: per channel, of pixels from 0 to 1.
      std: per channel.
      train_crop: decoded [H, W, 3] uint8, size and a random stream -> [size, size, 3];
        None = as `eval_crop`.
      eval_crop: decoded [H, W, 3] uint8 and size -> [size, size, 3].
      flip: mirror half of the training images, on the device.
      shift: shift training images by up to this share of their side, on the device.
      prepare: how a user makes it, a line of shell; None = made at the first use.
    """

    splits: dict[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    train_crop: TrainCrop | None
    eval_crop: EvalCrop
    flip: bool
    shift: float
    prepare: str | None


def _prepare_command(name: str) -> str:
    return (
        'pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='DIR', file_format='array_record')"
        '.download_and_prepare()"'
    )


DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        splits={"train": "train", "test": "test"},
        mean=(0.305,) * 3,
        std=(0.376,) * 3,
        train_crop=None,
        eval_crop=decode.whole,
        flip=False,
        shift=1 / 8,
        prepare=None,
    ),
    # Mean and deviation of fb.resnet.torch; pad and flip of He et al. 2015, section 4.2.
    "cifar10": Dataset(
        splits={"train": "train", "test": "test"},
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        train_crop=None,
        eval_crop=decode.whole,
        flip=True,
        shift=1 / 8,
        prepare=_prepare_command("cifar10"),
    ),
    # Mean, deviation and crops of fb.resnet.torch, which Goyal et al. 2017 follow.
    "imagenet2012": Dataset(
        splits={"train": "train", "test": "validation"},
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        train_crop=decode.random_resized_crop,
        eval_crop=decode.center_crop,
        flip=True,
        shift=0.0,
        prepare="put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
        "DIR/downloads/manual && " + _prepare_command("imagenet2012"),
    ),
}


def get_dataset(name: str) -> Dataset:
    """The row of that name; raises `UsageError` with the nearest ones."""
    if name not in DATASETS:
        raise unknown_name("config.data.name", name, DATASETS)
    return DATASETS[name]
