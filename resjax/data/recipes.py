"""The training augmentations, named compositions of crops.py and augment.py, in one table.

To add a recipe, add a row to `RECIPES`.
"""

import dataclasses

from resjax.config import unknown_name
from resjax.data import crops


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done to a training image, in this order.

    Attributes:
      window: what the host crops; None = as in evaluation.
      jitter: brightness, contrast and saturation change by up to this share.
      lighting: standard deviation of the noise along the principal colours.
      flip: mirror half of the images, after normalisation.
      shift: shift by up to this share of the side.
    """

    window: crops.Window | None = None
    jitter: float = 0.0
    lighting: float = 0.0
    flip: bool = False
    shift: float = 0.0


RECIPES: dict[str, Recipe] = {
    "none": Recipe(),
    # One pixel of 8: digits are not the same in a mirror.
    "shift": Recipe(shift=1 / 8),
    # Pad 4, crop 32, flip: He et al. 2015 (arXiv:1512.03385), section 4.2.
    "cifar": Recipe(flip=True, shift=1 / 8),
    # Goyal et al. 2017 (arXiv:1706.02677), section 5.1, which names no change of colour.
    "goyal": Recipe(window=crops.random_resized_window, flip=True),
    # He et al. 2015, section 3.4; "the standard color augmentation" is AlexNet's
    # (Krizhevsky et al. 2012, section 4.1).
    "resnet": Recipe(window=crops.scale_jitter_window, lighting=0.1, flip=True),
    # datasets/imagenet.lua of fb.resnet.torch.
    "fb_resnet_torch": Recipe(
        window=crops.random_resized_window, jitter=0.4, lighting=0.1, flip=True
    ),
}


def get_recipe(name: str) -> Recipe:
    """The row of that name; raises `UsageError` with the nearest ones."""
    if name not in RECIPES:
        raise unknown_name("config.data.recipe", name, RECIPES)
    return RECIPES[name]
