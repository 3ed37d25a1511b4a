"""Forms of convolution and max pooling that a platform runs faster than XLA's own.

A form changes speed, never a number: `plain_conv` and `plain_max_pool` say what is
computed. It is chosen when a program is traced, by platform and shape, and has derivatives
in both directions and of any order.

XLA:CPU of jaxlib 0.10 takes up to a hundred times as long as need be for gradients of
kernels, and longer than need be for 1x1 and grouped convolutions. In their place stand

- matrix products, for 1x1, grouped and strided 3x3 convolutions and for the gradients of
  all kernels;
- for 3x3 without a stride a convolution with a row of output too many: XLA gives others to
  a library that is slower than its own code, but not those whose output is larger than
  their input;
- for max pooling the number of the window's first largest value, in place of a
  select-and-scatter.
"""

import functools
import math
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero

_WIDTH = 16  # channels of a group below which the products of several groups are one


def conv(x: jax.Array, kernel: jax.Array, strides: int, groups: int) -> jax.Array:
    """`plain_conv` in the form that suits the platform and the shapes."""
    if jax.default_backend() == "cpu" and len(kernel) % 2:
        return _conv_on_cpu(x, kernel, strides, groups)
    return plain_conv(x, kernel, strides, groups)


def plain_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: int = 1,
    groups: int = 1,
    more_rows: tuple[int, int] = (0, 0),
) -> jax.Array:
    """XLA's own convolution.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C // groups, D].
      strides: step between outputs, in pixels.
      groups: number of channel groups.
      more_rows: of padding, above and below, than (k - 1) // 2.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), D] for odd k, more rows apart.
    """
    pad = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=[(pad + more_rows[0], pad + more_rows[1]), (pad, pad)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@partial(jax.jit, static_argnums=(2, 3), inline=True)  # layers of one shape are traced once
def _conv_on_cpu(x: jax.Array, kernel: jax.Array, strides: int, groups: int) -> jax.Array:
    if len(kernel) == 1 or groups > 1 or (len(kernel) == 3 and strides > 1):
        return conv_as_products(x, kernel, strides, groups)
    return _dense_conv(x, kernel, strides)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _dense_conv(x: jax.Array, kernel: jax.Array, strides: int) -> jax.Array:
    if strides > 1:
        return plain_conv(x, kernel, strides)
    return plain_conv(x, kernel, more_rows=(0, 1))[:, :-1]


def _derivative(strides: int, primals: Any, tangents: Any) -> Any:
    """Each term is written so that its transpose, the gradient, has a fast form."""
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
        if strides > 1:
            terms.append(plain_conv(dx, kernel, strides))
        else:  # the gradient, from output to input, has one row too many
            dx = jnp.pad(dx, [(0, 0), (0, 1), (0, 0), (0, 0)])
            terms.append(plain_conv(dx, kernel, more_rows=(0, -1)))
    if not isinstance(dkernel, SymbolicZero):
        terms.append(conv_as_products(x, dkernel, strides))
    return _dense_conv(x, kernel, strides), _sum(terms)


_dense_conv.defjvp(_derivative, symbolic_zeros=True)


def conv_as_products(
    x: jax.Array,
    kernel: jax.Array,
    strides: int = 1,
    groups: int = 1,
) -> jax.Array:
    """`plain_conv` of an odd kernel as matrix products of the input with the kernel.

    The k pixels of a row that meet the kernel stand side by side as k * C channels, one
    product makes the terms of k rows of output of it, and these are moved to their rows and
    added up: both sides grow k times, no side k * k times as by the windows themselves.
    Small groups of channels are joined into larger ones by zeros in the kernel.

    Below float32, it is computed in float32 and rounded once. Where several groups are one,
    an infinite value in one of them makes the others NaN.
    """
    jax.eval_shape(partial(plain_conv, strides=strides, groups=groups), x, kernel)  # checks
    dtype = x.dtype
    if dtype.itemsize < 4:
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    size = [-(-side // strides) for side in x.shape[1:3]]
    if groups == 1:
        return _products(x, kernel, strides, size).astype(dtype)
    kernel = _join_groups(_split(kernel, groups))  # [G, k, k, C / G, D / G]

    def run(x: jax.Array) -> jax.Array:
        split = _split(x, len(kernel))  # [G, B, H, W, C / G]
        y = jax.vmap(partial(_products, strides=strides, size=size))(split, kernel)
        return jnp.moveaxis(y, 0, 3).reshape(*y.shape[1:4], -1)

    if strides == 1:  # one image after another: what is moved about stays in the cache
        return lax.map(lambda image: run(image[None])[0], x).astype(dtype)
    return run(x).astype(dtype)


def _split(x: jax.Array, groups: int) -> jax.Array:
    """[..., G * C] -> [G, ..., C]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)


def _join_groups(kernel: jax.Array) -> jax.Array:
    """[G, k, k, C, D] -> [G / n, k, k, n * C, n * D], of groups that are not too small."""
    groups, k, _, inputs, outputs = kernel.shape
    joined = 1
    while joined * max(inputs, outputs) < _WIDTH and groups % (2 * joined) == 0:
        joined *= 2
    kernel = kernel.reshape(-1, joined, k, k, inputs, outputs)
    one = jnp.eye(joined, dtype=kernel.dtype)[:, None, None, None, :, None]
    kernel = kernel[..., None, :] * one  # [G / n, n, k, k, C, n, D]
    return jnp.moveaxis(kernel, 1, 3).reshape(-1, k, k, joined * inputs, joined * outputs)


def _products(x: jax.Array, kernel: jax.Array, strides: int, size: list[int]) -> jax.Array:
    """[B, H, W, C], [k, k, C, D] -> [B, *size, D]."""
    k, _, inputs, outputs = kernel.shape
    # Output o meets input strides * o + i - pad = strides * (o + ahead) + phase.
    phases: dict[int, list[tuple[int, int]]] = {}
    for i in range(k):
        ahead, phase = divmod(i - (k - 1) // 2, strides)
        phases.setdefault(phase, []).append((i, ahead))
    terms = []
    for phase, rows in phases.items():
        own = x[:, phase::strides]
        if not own.size:  # a map smaller than the stride
            continue
        beside = [
            _moved(own[:, :, column::strides], 2, ahead, size[1], j * inputs, k * inputs)
            for column, places in phases.items()
            if column < x.shape[2]
            for j, ahead in places
        ]
        pixels = _sum(beside)  # [B, H / s, W / s, k * C]
        part = jnp.stack([kernel[i] for i, _ in rows], axis=2)  # [k, C, rows, D]
        y = _multiply(pixels.reshape(-1, k * inputs), part.reshape(k * inputs, -1))
        y = y.reshape(*pixels.shape[:3], -1)
        for n, (_, ahead) in enumerate(rows):
            term = y[..., n * outputs : (n + 1) * outputs]
            terms.append(_moved(term, 1, ahead, size[0], 0, outputs))
    return _sum(terms)


def _multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """[N, K], [K, M] -> [N, M], in parts of N.

    In the gradient of the matrix these are products of their own, to be added up; XLA:CPU
    is up to twice as fast at them, and where such a product has more columns than rows.
    """
    count, inputs = x.shape
    parts = math.gcd(count, 1 if count < 4096 else 2 if count < 65536 else 8)
    if parts == 1:
        return x @ matrix
    x = x.reshape(parts, -1, inputs)
    if inputs > matrix.shape[1]:
        many = jnp.broadcast_to(matrix.T, (parts, *matrix.T.shape))
        return jnp.einsum("pnk,pmk->pnm", x, many).reshape(count, -1)
    many = jnp.broadcast_to(matrix, (parts, *matrix.shape))
    return jnp.einsum("pnk,pkm->pnm", x, many).reshape(count, -1)


def _sum(terms: list[jax.Array]) -> jax.Array:
    """Of at least one term."""
    return functools.reduce(operator.add, terms)


def _moved(
    x: jax.Array, axis: int, ahead: int, size: int, channel: int, channels: int
) -> jax.Array:
    """x[ahead : ahead + size] along an axis, from a channel on of so many, zero elsewhere.

    XLA:CPU makes one loop of a sum of these; a concatenation takes it 3 times as long.
    """
    padding = [(0, 0, 0)] * x.ndim
    padding[axis] = (-ahead, size + ahead - x.shape[axis], 0)
    padding[-1] = (channel, channels - channel - x.shape[-1], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), padding)


def max_pool(x: jax.Array, size: int, strides: int) -> jax.Array:
    """`plain_max_pool` in the form that suits the platform."""
    if jax.default_backend() == "cpu" and size % 2 and size**2 < 128:  # in an int8
        return _max_pool_on_cpu(x, size, strides)
    return plain_max_pool(x, size, strides)


def plain_max_pool(x: jax.Array, size: int, strides: int) -> jax.Array:
    """XLA's own: [B, H, W, C] -> [B, ceil(H / strides), ceil(W / strides), C], odd size."""
    pad = (size - 1) // 2
    return nn.max_pool(x, (size, size), (strides, strides), [(pad, pad), (pad, pad)])


_max_pool_on_cpu = jax.custom_jvp(plain_max_pool, nondiff_argnums=(1, 2))


@_max_pool_on_cpu.defjvp
def _derivative_of_max_pool(size: int, strides: int, primals: Any, tangents: Any) -> Any:
    """The gradient goes to the first of the largest, as XLA's does."""
    (x,), (dx,) = primals, tangents
    first, *others = _window_pixels(x, size, strides, -jnp.inf)
    largest, winner = first, jnp.zeros(first.shape, jnp.int8)
    for n, pixel in enumerate(others, start=1):
        winner = jnp.where(pixel > largest, jnp.int8(n), winner)
        largest = jnp.maximum(pixel, largest)
    winner = lax.optimization_barrier(winner)  # is kept, and not found once more
    changes = enumerate(_window_pixels(dx, size, strides, 0))
    terms = [jnp.where(winner == n, change, 0) for n, change in changes]
    return largest, _sum(terms)


def _window_pixels(x: jax.Array, size: int, strides: int, fill: float) -> list[jax.Array]:
    """Of all windows the first pixel, the second, ...: [B, H / strides, W / strides, C]."""
    pad = (size - 1) // 2
    rows, columns = (strides * (-(-side // strides) - 1) + 1 for side in x.shape[1:3])
    x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)], constant_values=fill)
    return [
        x[:, i : i + rows : strides, j : j + columns : strides]
        for i in range(size)
        for j in range(size)
    ]
