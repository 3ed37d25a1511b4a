"""Residual blocks: a branch, a shortcut, their sum and a ReLU.

Blocks take their convolution and norm as arguments (classes or partials of them) and
know nothing of initialisation, devices or the network around them. `norm_out` is the
last norm of every branch; the names are public (parameter paths).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Layer = Callable[..., Any]  # a Module class, or a partial of one


def shortcut_path(
    x: jax.Array, features: int, strides: int, kind: str, conv: Layer, norm: Layer
) -> jax.Array:
    """The input of a block brought to the shape of its branch.

    A: every `strides`-th pixel, missing channels appended as zeros; no parameters.
    B: a 1x1 convolution and a norm where the shape changes, else the input itself.
    C: a 1x1 convolution and a norm always.

    Args:
      x: [B, H, W, C].
      features: channels of the branch's output.
      strides: of the branch, in pixels.
      kind: "A", "B" or "C".
      conv: makes the convolution.
      norm: makes the norm, from a name alone.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), features].

    Source: He et al. 2015 (arXiv:1512.03385), section 3.3 and table 3.
    """
    same_shape = strides == 1 and x.shape[-1] == features
    if kind != "C" and same_shape:
        return x
    if kind == "A":
        x = x[:, ::strides, ::strides, :]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, features - x.shape[-1])])
    x = conv(features, 1, strides, name="shortcut_conv")(x)
    return norm("shortcut_norm")(x)


def _bind_norm(norm: Layer, train: bool, update_stats: bool | None) -> Layer:
    """norm(name) -> a function of x alone."""
    return lambda name: partial(norm(name=name), train=train, update_stats=update_stats)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions.

    Attributes:
      width: channels of the branch.
      strides: of the first convolution, in pixels.
      shortcut: "A", "B" or "C", see `shortcut_path`.
      conv: makes a convolution from (features, kernel_size, strides, name=).
      norm: makes a norm from (name=).

    Source: He et al. 2015, figure 5 left.
    """

    width: int
    strides: int
    shortcut: str
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> [B, H / strides, W / strides, width]."""
        norm = _bind_norm(self.norm, train, update_stats)
        y = self.conv(self.width, 3, self.strides, name="conv1")(x)
        y = nn.relu(norm("norm1")(y))
        y = self.conv(self.width, 3, name="conv2")(y)
        y = norm("norm_out")(y)
        x = shortcut_path(x, self.width, self.strides, self.shortcut, self.conv, norm)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """1x1 down to `width`, 3x3, 1x1 up to 4 * `width`.

    Attributes: as `BasicBlock`; `strides` is that of the 3x3 convolution.

    Source: He et al. 2015, figure 5 right.
    Differs: the paper strides in the first 1x1; the 3x3 is fb.resnet.torch's choice,
      which Goyal et al. 2017 and torchvision follow.
    """

    width: int
    strides: int
    shortcut: str
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> [B, H / strides, W / strides, 4 * width]."""
        norm = _bind_norm(self.norm, train, update_stats)
        features = 4 * self.width
        y = self.conv(self.width, 1, name="conv1")(x)
        y = nn.relu(norm("norm1")(y))
        y = self.conv(self.width, 3, self.strides, name="conv2")(y)
        y = nn.relu(norm("norm2")(y))
        y = self.conv(features, 1, name="conv3")(y)
        y = norm("norm_out")(y)
        x = shortcut_path(x, features, self.strides, self.shortcut, self.conv, norm)
        return nn.relu(x + y)
