"""Convolution and pooling as functions of arrays, and the `Conv` module around them.

The one place for platform lowerings: another form may run faster, it never changes a
number. Knows nothing of blocks or networks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from resjax import initializers


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
    if jax.default_backend() == "cpu":
        return _conv_on_cpu_once(x, kernel, strides, groups)
    return _conv(x, kernel, strides, groups)


def _conv(x: jax.Array, kernel: jax.Array, strides: int, groups: int) -> jax.Array:
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(pad, pad), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


# The gradient of a kernel is a convolution itself, and XLA:CPU is up to a hundred times
# slower than need be at two kinds of it: grouped ones, and those inside a loop (as in
# accumulation and remat) unless they take NHWC and HWIO. The form of the derivative decides
# about the form of its transpose, which is the gradient.
_conv_on_cpu = jax.custom_jvp(_conv, nondiff_argnums=(2, 3))


def _derivative_on_cpu(strides: int, groups: int, primals: Any, tangents: Any) -> Any:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _conv_on_cpu(x, kernel, strides, groups)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(_conv_on_cpu(dx, kernel, strides, groups))
    if not isinstance(dkernel, SymbolicZero):
        along = _along_kernel if groups == 1 else _along_grouped_kernel
        terms.append(along(x, dkernel, strides, y.shape))
    return y, sum(terms[1:], start=terms[0])


_conv_on_cpu.defjvp(_derivative_on_cpu, symbolic_zeros=True)
_conv_on_cpu_once = jax.jit(_conv_on_cpu, static_argnums=(2, 3), inline=True)  # traced once


def _along_kernel(
    x: jax.Array, kernel: jax.Array, strides: int, shape: tuple[int, ...]
) -> jax.Array:
    """`_conv` whose transpose, from output to kernel, takes NHWC and HWIO."""
    pad = (kernel.shape[0] - 1) // 2
    y = lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        kernel.transpose(2, 0, 1, 3),
        window_strides=(strides, strides),
        padding=[(pad, pad), (pad, pad)],
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )
    return y.transpose(2, 0, 1, 3)


def _along_grouped_kernel(
    x: jax.Array, kernel: jax.Array, strides: int, shape: tuple[int, ...]
) -> jax.Array:
    """`_conv` as a sum of k * k matrix products, of outputs of that shape."""
    k, _, inputs, outputs = kernel.shape
    pad, groups = (k - 1) // 2, x.shape[-1] // inputs
    x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    x = x.reshape(*x.shape[:3], groups, inputs)
    kernel = kernel.reshape(k, k, inputs, groups, outputs // groups)
    rows, columns = (strides * (side - 1) + 1 for side in shape[1:3])

    def product(i: int, j: int) -> jax.Array:
        shifted = x[:, i : i + rows : strides, j : j + columns : strides]
        return jnp.einsum("nhwgc,cgd->nhwgd", shifted, kernel[i, j])

    y = sum(
        (product(i, j) for i in range(k) for j in range(k)), start=jnp.zeros((), x.dtype)
    )
    return y.reshape(shape)


def conv_as_products(
    x: jax.Array, kernel: jax.Array, strides: int = 1, groups: int = 1
) -> jax.Array:
    """`conv` as the matrix product of all windows with the kernel.

    What XLA:CPU needs where the kernel is one of many, mapped over by `vmap` or a loop, in
    which its convolutions are several times slower. The windows take k * k times the memory
    of the input.

    Arguments and result as those of `conv`.
    """
    k, _, inputs, outputs = kernel.shape
    rows, columns = (-(-side // strides) for side in x.shape[1:3])
    shape = (x.shape[0], rows, columns, outputs)
    if groups > 1:
        return _along_grouped_kernel(x, kernel, strides, shape)
    pad = (k - 1) // 2
    x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    below, right = strides * (rows - 1) + 1, strides * (columns - 1) + 1
    shifted = [
        x[:, i : i + below : strides, j : j + right : strides]
        for i in range(k)
        for j in range(k)
    ]
    windows = jnp.concatenate(shifted, axis=-1).reshape(-1, k * k * inputs)
    return (windows @ kernel.reshape(-1, outputs)).reshape(shape)


def max_pool(x: jax.Array, size: int = 3, strides: int = 2) -> jax.Array:
    """Max pooling with symmetric padding of (size - 1) // 2, padded values never win.

    Args:
      x: [B, H, W, C].
      size: side of the window, in pixels.
      strides: step between windows, in pixels.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), C] for odd `size`.
    """
    pad = (size - 1) // 2
    return nn.max_pool(x, (size, size), (strides, strides), [(pad, pad), (pad, pad)])


class Conv(nn.Module):
    """A convolution without bias; a norm follows it.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel, odd.
      strides: step between outputs, in pixels.
      groups: number of channel groups (1 = an ordinary convolution).
      dtype: of the product; the kernel itself is kept in float32.
      as_products: in the form of `conv_as_products`.
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
        form = conv_as_products if self.as_products else conv
        y = form(x.astype(self.dtype), kernel.astype(self.dtype), self.strides, self.groups)
        return checkpoint_name(y, "conv")
