"""The three forms of ResNeXt are one function, and it is the one that models compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from resjax.analysis import resnext
from resjax.models.blocks import ResidualBlock, bottleneck
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv

GROUPS, STRIDES = 4, 2
FORMS = [
    resnext.split_transform_add,
    resnext.early_concatenation,
    resnext.grouped_convolution,
]


def branch(width, strides):
    return bottleneck(width, strides, groups=GROUPS, group_width=16)


@pytest.fixture(scope="module")
def case():
    """A block, its variables (no leaf a default), its input and a cotangent."""
    block = ResidualBlock(branch, 8, STRIDES, "B", Conv, BatchNorm)
    rng = np.random.RandomState(0)
    x = jnp.array(rng.randn(3, 7, 6, 12), jnp.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(
        lambda leaf: jnp.array(
            rng.randn(*leaf.shape) if leaf.ndim > 1 else rng.uniform(0.5, 1.5, leaf.shape),
            jnp.float32,
        ),
        shapes,
    )
    cotangent = jnp.array(rng.randn(3, 4, 3, 32), jnp.float32)
    return block, variables, x, cotangent


def output_and_gradient(form, case):
    _, variables, x, cotangent = case

    def weighted(params, x):
        own = {**variables, "params": params}
        out = form(own, x, GROUPS, STRIDES, train=True)
        return (out * cotangent).sum(), out

    grad = jax.grad(weighted, argnums=(0, 1), has_aux=True)
    return jax.jit(grad)(variables["params"], x)


@pytest.mark.slow
def test_forms_agree_in_output_and_gradient(case):
    expected, *others = (output_and_gradient(form, case) for form in FORMS)
    for found in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(abs(b).max())),
            found,
            expected,
        )


@pytest.mark.parametrize("form", FORMS)
def test_a_block_is_the_form_and_its_shortcut(form, case):
    block, variables, x, _ = case
    params, stats = variables["params"], variables["batch_stats"]
    projected = x[:, ::STRIDES, ::STRIDES] @ params["shortcut_conv"]["kernel"][0, 0]
    own = {"params": params["shortcut_norm"], "batch_stats": stats["shortcut_norm"]}
    expected = nn.relu(
        form(variables, x, GROUPS, STRIDES) + BatchNorm().apply(own, projected)
    )
    np.testing.assert_allclose(block.apply(variables, x), expected, rtol=2e-5, atol=2e-5)
