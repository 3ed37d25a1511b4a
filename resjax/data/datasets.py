"""The data sets: what their images are and how each is evaluated, in one table.

To add a data set, add a row to `DATASETS`; tfds must know how to prepare it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from resjax.config import RecipeName, unknown_name
from resjax.data import decode

EvalCrop = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """How a data set becomes batches.

    Attributes:
      splits: our split name -> its name in tfds.
      mean: per channel, of pixels from 0 to 1.
      std: per channel.
      eval_crop: decoded [H, W, 3] uint8 and size -> [size, size, 3].
      rotates: turn images as their EXIF orientation says, which the papers' pipelines
        ignore.
      recipe: of the training augmentation, a name in `recipes.RECIPES`.
      prepare: how a user makes it, a line of shell; None = made at the first use.
    """

    splits: dict[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eval_crop: EvalCrop
    rotates: bool
    recipe: RecipeName
    prepare: str | None


def _prepare_command(name: str) -> str:
    return f"pip install tensorflow && python -m resjax.data {name} --data_dir=DIR"


# Of fb.resnet.torch, which Goyal et al. 2017 follow.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS: dict[str, Dataset] = {
    "digits": Dataset(
        splits={"train": "train", "test": "test"},
        mean=(0.305,) * 3,
        std=(0.376,) * 3,
        eval_crop=decode.whole,
        rotates=False,
        recipe="shift",
        prepare=None,
    ),
    # Mean and deviation of fb.resnet.torch.
    "cifar10": Dataset(
        splits={"train": "train", "test": "test"},
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
        std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        eval_crop=decode.whole,
        rotates=False,
        recipe="cifar",
        prepare=_prepare_command("cifar10"),
    ),
    "imagenet2012": Dataset(
        splits={"train": "train", "test": "validation"},
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        eval_crop=decode.center_crop,
        rotates=False,
        recipe="goyal",
        prepare="put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into "
        "DIR/downloads/manual && " + _prepare_command("imagenet2012"),
    ),
    # A folder of images for each class; people's own photos, which may lie on their side.
    "folder": Dataset(
        splits={"train": "train", "test": "val"},
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        eval_crop=decode.center_crop,
        rotates=True,
        recipe="goyal",
        prepare="put the images into DIR/train/CLASS and DIR/val/CLASS",
    ),
}


def get_dataset(name: str) -> Dataset:
    """The row of that name; raises `UsageError` with the nearest ones."""
    if name not in DATASETS:
        raise unknown_name("config.data.name", name, DATASETS)
    return DATASETS[name]
