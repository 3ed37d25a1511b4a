"""Convolution and pooling against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.models.lowerings import conv_as_products
from resjax.models.ops import Conv, conv, max_pool


def windows(x, size, strides, fill):
    """[B, H, W, C] -> {(i, j): [B, size, size, C]}, padded (size - 1) // 2 on each side."""
    pad = (size - 1) // 2
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)], constant_values=fill)
    rows, cols = ((side - size) // strides + 1 for side in x.shape[1:3])
    return {
        (i, j): x[:, i * strides :, j * strides :][:, :size, :size]
        for i in range(rows)
        for j in range(cols)
    }


def assemble(pixels):
    """{(i, j): [B, C]} -> [B, H, W, C]."""
    rows, cols = (n + 1 for n in max(pixels))
    stacked = np.stack([pixels[i, j] for i in range(rows) for j in range(cols)], axis=1)
    return stacked.reshape(len(stacked), rows, cols, -1)


def conv_by_loops(x, kernel, strides, groups):
    inputs = kernel.shape[2]
    outputs = kernel.shape[3] // groups

    def pixel(window):
        values = [
            (window[..., g * inputs : (g + 1) * inputs] * kernel[..., d]).sum((1, 2, 3))
            for g in range(groups)
            for d in range(g * outputs, (g + 1) * outputs)
        ]
        return np.stack(values, axis=-1)

    patches = windows(x, kernel.shape[0], strides, fill=0)
    return assemble({at: pixel(window) for at, window in patches.items()})


def max_pool_by_loops(x, size, strides):
    patches = windows(x, size, strides, fill=-np.inf)
    return assemble({at: window.max((1, 2)) for at, window in patches.items()})


SIZES = [(8, 8), (9, 9), (8, 11)]


@pytest.mark.parametrize("form", [conv, conv_as_products])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_conv_is_the_sum_over_the_window(k, strides, size, groups, form):
    rng = np.random.RandomState(0)
    x, kernel = rng.randn(2, *size, 4), rng.randn(k, k, 4 // groups, 8)
    actual = form(jnp.array(x), jnp.array(kernel), strides, groups)
    expected = conv_by_loops(x, kernel, strides, groups)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [conv, conv_as_products])
@pytest.mark.parametrize(
    "k, strides, size, groups",
    [(1, 1, (8, 8), 1), (1, 2, (9, 7), 2), (3, 1, (9, 7), 2), (3, 2, (8, 8), 1)],
)
def test_derivatives_of_conv_in_both_directions(k, strides, size, groups, form):
    rng = np.random.RandomState(0)
    x, dx = rng.randn(2, 2, *size, 4)
    kernel, dkernel = rng.randn(2, k, k, 4 // groups, 6)
    # Convolution is linear in each: what loops say of a change is the derivative along it.
    along_x = conv_by_loops(dx, kernel, strides, groups)
    along_kernel = conv_by_loops(x, dkernel, strides, groups)

    def run(x, kernel):
        return form(x, kernel, strides, groups)

    at = jnp.array(x, jnp.float32), jnp.array(kernel, jnp.float32)
    along = jnp.array(dx, jnp.float32), jnp.array(dkernel, jnp.float32)
    _, forward = jax.jvp(run, at, along)
    np.testing.assert_allclose(forward, along_x + along_kernel, rtol=1e-4, atol=1e-4)
    weights = rng.randn(*along_x.shape)
    grad_x, grad_kernel = jax.vjp(run, *at)[1](jnp.array(weights, jnp.float32))
    np.testing.assert_allclose((grad_x * dx).sum(), (weights * along_x).sum(), rtol=1e-4)
    back = (grad_kernel * dkernel).sum()
    np.testing.assert_allclose(back, (weights * along_kernel).sum(), rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_max_pool_is_the_maximum_of_the_window(k, strides, size):
    x = np.random.RandomState(0).randn(2, *size, 3).astype(np.float32)
    actual = max_pool(jnp.array(x), k, strides)
    np.testing.assert_array_equal(actual, max_pool_by_loops(x, k, strides))


def test_max_pool_is_3x3_with_stride_2_unless_told():
    x = np.random.RandomState(0).randn(2, 8, 9, 3).astype(np.float32)
    np.testing.assert_array_equal(max_pool(jnp.array(x)), max_pool_by_loops(x, 3, 2))


def test_padding_never_wins_the_max_pool():
    x = -1 - np.random.RandomState(0).rand(2, 6, 6, 3).astype(np.float32)
    assert max_pool(jnp.array(x)).max() <= -1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_conv_module_computes_in_its_dtype_and_keeps_a_float32_kernel(dtype):
    layer = Conv(8, 3, strides=2, groups=2, dtype=dtype)
    x = jnp.array(np.random.RandomState(0).randn(2, 8, 8, 4), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    (kernel,) = jax.tree.leaves(variables)  # no bias
    assert kernel.dtype == jnp.float32
    y = layer.apply(variables, x)
    assert y.dtype == dtype
    # What the layer sees of its input and kernel is their rounding to `dtype`.
    rounded = (np.array(v.astype(dtype), np.float64) for v in (x, kernel))
    expected = conv_by_loops(*rounded, strides=2, groups=2)
    tolerance = 2 * float(jnp.finfo(dtype).eps)
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.array(y, np.float64), expected, atol=limit)
