"""Every form against XLA's own convolution and pooling in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.models import lowerings
from resjax.models.lowerings import plain_conv, plain_max_pool

# (B, H, W, C), D, k, strides, groups
CONVS = [
    ((2, 8, 8, 6), 10, 1, 1, 1),
    ((2, 9, 7, 6), 10, 1, 2, 1),
    ((2, 8, 8, 6), 10, 1, 2, 1),
    ((2, 9, 7, 6), 10, 1, 3, 1),
    ((2, 8, 8, 20), 24, 3, 1, 1),
    ((2, 7, 9, 24), 20, 3, 1, 1),
    ((3, 8, 9, 3), 20, 3, 1, 1),
    ((2, 8, 8, 24), 20, 3, 2, 1),
    ((2, 9, 7, 20), 24, 3, 2, 1),
    ((2, 9, 8, 20), 24, 3, 3, 1),
    ((2, 14, 11, 3), 20, 7, 2, 1),
    ((1, 12, 12, 4), 6, 7, 2, 1),
    ((2, 9, 9, 5), 6, 5, 1, 1),
    ((2, 2, 2, 20), 20, 3, 1, 1),  # a map smaller than the kernel
    ((2, 1, 1, 20), 20, 3, 2, 1),
    ((2, 3, 2, 20), 20, 7, 2, 1),
    ((2, 8, 8, 8), 8, 1, 1, 4),
    ((2, 8, 7, 32), 32, 3, 1, 8),  # groups that are joined
    ((2, 7, 8, 32), 64, 3, 2, 8),
    ((2, 8, 8, 12), 24, 3, 1, 3),  # groups that cannot be
    ((2, 8, 8, 24), 12, 3, 2, 6),
    ((2, 6, 6, 12), 12, 3, 1, 12),  # one channel each
    ((2, 6, 6, 40), 40, 5, 1, 2),
]
FORMS = {"chosen": lowerings.conv, "products": lowerings.conv_as_products}
POOLS = [
    ((2, 8, 8, 6), 3, 2),
    ((2, 9, 7, 3), 3, 2),
    ((2, 9, 7, 3), 3, 1),
    ((2, 8, 9, 3), 5, 2),
    ((2, 8, 9, 3), 5, 3),
    ((1, 1, 2, 3), 3, 2),
]


def draw(seed, *shape):
    return np.random.RandomState(seed).randn(*shape)


def conv_inputs(shape, outputs, k, strides, groups):
    """Input, kernel, changes of both and weights of the output."""
    size = [-(-side // strides) for side in shape[1:3]]
    kernel = (k, k, shape[-1] // groups, outputs)
    shapes = [shape, kernel, shape, kernel, (shape[0], *size, outputs)]
    return [draw(i, *own) for i, own in enumerate(shapes)]


def everything(form, x, kernel, dx, dkernel, weights):
    """Output, the change along each argument, the gradient of each."""
    y, pull = jax.vjp(form, x, kernel)
    _, along_x = jax.jvp(lambda x: form(x, kernel), (x,), (dx,))
    _, along_kernel = jax.jvp(lambda kernel: form(x, kernel), (kernel,), (dkernel,))
    _, along_both = jax.jvp(form, (x, kernel), (dx, dkernel))
    return y, along_x, along_kernel, along_both, *pull(weights)


def assert_as_exact(form, plain, arrays, dtype):
    """Its errors are no more than rounding, or thrice those of the plain form."""
    arrays = [jnp.asarray(array, dtype) for array in arrays]
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        exact = [np.asarray(a) for a in jax.jit(partial(everything, plain))(*wide)]
        assert exact[0].dtype == np.float64
    actual = jax.jit(partial(everything, form))(*arrays)
    usual = jax.jit(partial(everything, plain))(*arrays)
    for a, u, e in zip(actual, usual, exact, strict=True):
        assert a.dtype == dtype and a.shape == e.shape
        rounding = float(jnp.finfo(dtype).eps) * np.abs(e).max()
        error = np.abs(np.asarray(a, np.float64) - e).max()
        assert error <= max(4 * rounding, 3 * np.abs(np.asarray(u, np.float64) - e).max())


@pytest.mark.parametrize("case", CONVS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_derivatives_of_a_convolution(form, case):
    check_convolution(form, case, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", CONVS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_derivatives_in_half_precision(form, case, dtype):
    check_convolution(form, case, dtype)


def check_convolution(form, case, dtype):
    *_, strides, groups = case
    run = partial(FORMS[form], strides=strides, groups=groups)
    plain = partial(plain_conv, strides=strides, groups=groups)
    assert_as_exact(run, plain, conv_inputs(*case), dtype)


def square(form):
    """A function of two arrays that is not linear in either."""
    return lambda x, kernel: (jnp.sin(form(x, kernel)) ** 2).sum()


CURVED = [CONVS[1], CONVS[4], CONVS[7], CONVS[17]]


@pytest.mark.parametrize("case", CURVED, ids=str)
def test_second_derivatives_of_a_convolution(case):
    *_, strides, groups = case
    x, kernel, dx, dkernel, _ = (
        jnp.asarray(a, jnp.float32) / 4 for a in conv_inputs(*case)
    )

    def of(form):
        own = square(partial(form, strides=strides, groups=groups))
        grad = jax.grad(own, (0, 1))
        forward_over_reverse = jax.jvp(grad, (x, kernel), (dx, dkernel))[1]

        def slope(x, kernel):
            return jax.jvp(own, (x, kernel), (dx, dkernel))[1]

        return forward_over_reverse, jax.grad(slope, (0, 1))(x, kernel)

    actual, expected = of(lowerings.conv), of(plain_conv)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=2e-5 * np.abs(e).max())


@pytest.mark.parametrize("case", CURVED, ids=str)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_a_convolution_is_mapped_over(case, axes):
    *_, strides, groups = case
    x, kernel, *_ = (jnp.asarray(a, jnp.float32) for a in conv_inputs(*case))
    x = jnp.stack([x, -2 * x]) if axes[0] == 0 else x
    kernel = jnp.stack([kernel, kernel + 1]) if axes[1] == 0 else kernel

    def of(form):
        own = square(partial(form, strides=strides, groups=groups))
        return jax.vmap(jax.value_and_grad(own, (0, 1)), axes)(x, kernel)

    actual, expected = of(lowerings.conv), of(plain_conv)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=2e-5 * np.abs(e).max())


def test_a_convolution_is_rematerialised_inside_a_loop():
    case = CONVS[4][0], CONVS[4][0][-1], *CONVS[4][2:]
    x, kernel, *_ = (jnp.asarray(a, jnp.float32) / 9 for a in conv_inputs(*case))

    def of(form):
        block = jax.checkpoint(lambda x, kernel: (jnp.sin(form(x, kernel, 1, 1)), None))
        return jax.grad(lambda k: jax.lax.scan(block, x, k)[0].sum())(
            jnp.stack([kernel] * 3)
        )

    expected = of(plain_conv)
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(of(lowerings.conv), expected, atol=limit)


@pytest.mark.parametrize("k", [2, 4])
def test_an_even_kernel_keeps_the_plain_form(k):
    x, kernel, *_ = (jnp.asarray(a) for a in conv_inputs((2, 8, 8, 4), 4, k, 2, 1))
    np.testing.assert_array_equal(
        lowerings.conv(x, kernel, 2, 1), plain_conv(x, kernel, 2, 1)
    )


def test_other_platforms_keep_the_plain_forms(monkeypatch):
    def lowered():
        def run(x, kernel):
            return lowerings.max_pool(lowerings.conv(x, kernel, 1, 4), 3, 2).sum()

        x, kernel, *_ = (jnp.asarray(a) for a in conv_inputs((2, 8, 8, 32), 32, 3, 1, 4))
        return jax.jit(jax.grad(run)).lower(x, kernel).as_text()

    assert "select_and_scatter" not in lowered()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = lowered()
    assert "select_and_scatter" in text and "feature_group_count = 4" in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", POOLS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_outputs_and_derivatives_of_max_pooling(case, ties, dtype):
    shape, size, strides = case
    x, dx = draw(0, *shape), draw(1, *shape)
    x = jnp.asarray(np.round(x) if ties else x, dtype)  # few values, so many are equal

    def of(form):
        run = partial(form, size=size, strides=strides)
        y, pull = jax.vjp(run, x)
        weights = jnp.asarray(draw(2, *y.shape), dtype)
        _, along = jax.jvp(run, (x,), (jnp.asarray(dx, dtype),))
        pushed, _ = jax.jvp(lambda x: run(x), (x,), (jnp.zeros_like(x),))
        return y, pushed, along, *pull(weights)

    actual, expected = of(lowerings.max_pool), of(plain_max_pool)
    for a, e in zip(actual[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(a, e)
    # A pixel that wins several windows sums their gradients, in another order.
    eps = float(jnp.finfo(dtype).eps)
    a, e = (np.asarray(v[3], np.float64) for v in (actual, expected))
    np.testing.assert_allclose(a, e, rtol=4 * eps, atol=8 * eps)


def test_max_pooling_has_higher_derivatives():
    x = jnp.asarray(draw(0, 2, 6, 6, 3), jnp.float32)

    def of(form):
        def own(x):
            return (form(x, 3, 2) ** 3).sum()

        return jax.jvp(jax.grad(own), (x,), (jnp.cos(x),))[1]

    np.testing.assert_allclose(of(lowerings.max_pool), of(plain_max_pool), rtol=1e-5)


@pytest.mark.parametrize(
    "inputs, kernel, groups",
    [
        (8, (1, 1, 4, 8), 1),
        (9, (3, 3, 2, 8), 4),
        (8, (3, 3, 1, 8), 4),
        (4, (3, 3, 8, 8), 1),
    ],
)
def test_channels_that_do_not_fit_are_refused_as_by_the_plain_form(inputs, kernel, groups):
    x, kernel = jnp.ones((2, 8, 8, inputs)), jnp.ones(kernel)
    for form in (plain_conv, lowerings.conv):
        with pytest.raises((TypeError, ValueError)):
            form(x, kernel, 1, groups)


def test_a_window_of_many_pixels_has_a_gradient():
    x = jnp.asarray(draw(0, 1, 20, 20, 1), jnp.float32)
    actual = jax.grad(lambda x: lowerings.max_pool(x, 13, 2).sum())(x)
    expected = jax.grad(lambda x: plain_max_pool(x, 13, 2).sum())(x)
    np.testing.assert_array_equal(actual, expected)
