"""A net whose answers are known, for the tests of what looks into nets."""

import jax
import jax.numpy as jnp
import numpy as np

from resjax.models.blocks import basic
from resjax.models.norm import Bias
from resjax.models.resnet import ResNet

CHANNELS = 4


def patch_net(downsample=False):
    """A net whose channel 0 tells how bright the 3x3 patch round a pixel is, less 26 of 27.

    One pixel of a brighter colour is enough for 0.5 of channel 1. The rest is silent.
    """
    model = ResNet(
        (1,), basic, CHANNELS, downsample, shortcut="A", num_classes=2, norm=Bias
    )
    images = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    stem, head = variables["params"]["stem"], variables["params"]["head"]
    middle = len(stem["conv"]["kernel"]) // 2
    stem["conv"]["kernel"][middle - 1 : middle + 2, middle - 1 : middle + 2, :, 0] = 1
    stem["conv"]["kernel"][middle, middle, 2, 1] = 1
    stem["norm"]["bias"][:] = [-26, -0.5, 0, 0]
    head["kernel"][0, 1] = 3
    head["bias"][:] = [0.25, -0.5]
    return model, variables


def with_patch(row, column, brightness=1.0, size=8):
    """An image [size, size, 3], black but for a 3x3 patch round a pixel."""
    image = np.zeros((size, size, 3), np.float32)
    image[row - 1 : row + 2, column - 1 : column + 2] = brightness
    return image
