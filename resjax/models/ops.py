"""Convolution and pooling as functions of arrays, and the `Conv` module around them.

What runs faster on a platform stands in lowerings.py. Knows nothing of blocks or networks.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from resjax import initializers
from resjax.models import lowerings


def conv(x: jax.Array, kernel: jax.Array, strides: int = 1, groups: int = 1) -> jax.Array:
    """Convolution with symmetric zero padding of (k - 1) // 2, as PyTorch pads.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C // groups, D], HWIO.
      strides: step between outputs, in pixels, along both axes.
      groups: number of channel groups that do not see each other.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), D] for odd k.

    Differs: "SAME" would pad (0, 1) on an even input with stride 2, and shift the maps.
    """
    return lowerings.conv(x, kernel, strides, groups)


def max_pool(x: jax.Array, size: int = 3, strides: int = 2) -> jax.Array:
    """Max pooling with symmetric padding of (size - 1) // 2, padded values never win.

    Args:
      x: [B, H, W, C].
      size: side of the window, in pixels.
      strides: step between windows, in pixels.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), C] for odd `size`.
    """
    return lowerings.max_pool(x, size, strides)


class Conv(nn.Module):
    """A convolution without bias; a norm follows it.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel, odd.
      strides: step between outputs, in pixels.
      groups: number of channel groups (1 = an ordinary convolution).
      dtype: of the product; the kernel itself is kept in float32.
      as_products: in the form of `lowerings.conv_as_products`.
      kernel_init: what a plain `model.init` draws; schemes replace it (initializers.py).
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    dtype: jnp.dtype = jnp.float32
    as_products: bool = False
    kernel_init: initializers.Initializer = initializers.MSRA_FAN_OUT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / strides, W / strides, features], of `dtype`."""
        k = self.kernel_size
        shape = (k, k, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        form = lowerings.conv_as_products if self.as_products else conv
        y = form(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.groups)
        return checkpoint_name(y, "conv")
