"""Residual blocks and their shortcuts against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from resjax.models.blocks import BasicBlock, BottleneckBlock
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv

WIDTH = 4
# Whether conv1, conv2, ... takes the strides of the block.
STRIDED = {BasicBlock: [True, False], BottleneckBlock: [False, True, False]}
BLOCKS = list(STRIDED)


def make_block(block, channels, strides=1, shortcut="B"):
    """A block, variables of which no leaf is a default, and its input."""
    module = block(WIDTH, strides, shortcut, Conv, BatchNorm)
    rng = np.random.RandomState(0)
    x = jnp.array(rng.randn(2, 6, 7, channels), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    variables = traverse_util.path_aware_map(
        lambda path, leaf: jnp.array(
            rng.uniform(0.5, 2, leaf.shape)
            if path[-1] in ("var", "scale")
            else rng.randn(*leaf.shape),
            jnp.float32,
        ),
        shapes,
    )
    return module, variables, x


def flat(variables):
    return traverse_util.flatten_dict(variables["params"], sep="/")


def conv(variables, name, x, strides):
    """The convolution of that name as a sum over its shifts."""
    kernel = np.array(variables["params"][name]["kernel"], np.float64)
    k, pad = len(kernel), len(kernel) // 2
    _, height, width, _ = x.shape
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    shifts = (
        x[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(k)
        for j in range(k)
    )
    return sum(shifts)[:, ::strides, ::strides]


def norm(variables, name, x):
    """The norm of that name, from its running statistics."""
    params, stats = variables["params"][name], variables["batch_stats"][name]
    std = np.sqrt(np.array(stats["var"], np.float64) + 1e-5)
    return (x - stats["mean"]) / std * params["scale"] + params["bias"]


def branch(block, variables, x, strides):
    for i, is_strided in enumerate(STRIDED[block], start=1):
        is_last = i == len(STRIDED[block])
        x = conv(variables, f"conv{i}", x, strides if is_strided else 1)
        x = norm(variables, "norm_out" if is_last else f"norm{i}", x)
        x = x if is_last else np.maximum(x, 0)
    return x


def shortcut_path(kind, variables, x, strides, features):
    if kind == "C" or (kind == "B" and (strides, x.shape[-1]) != (1, features)):
        x = conv(variables, "shortcut_conv", x, strides)
        return norm(variables, "shortcut_norm", x)
    zeros = np.zeros((*x.shape[:3], features - x.shape[-1]))
    return np.concatenate([x, zeros], axis=-1)[:, ::strides, ::strides]


# (input channels as a share of the output's, strides): the same, wider, halved map, both.
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("share, strides", SHAPES)
@pytest.mark.parametrize("kind", "ABC")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_the_relu_of_branch_plus_shortcut(block, kind, share, strides):
    features = WIDTH * (1 if block is BasicBlock else 4)
    module, variables, x = make_block(block, features // share, strides, kind)
    y = module.apply(variables, x)
    expected = branch(block, variables, x, strides)
    expected = expected + shortcut_path(kind, variables, x, strides, features)
    assert y.shape == (2, 6 // strides, -(-7 // strides), features)
    np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-4, atol=1e-3)


def with_zero_gamma(variables):
    params = flat(variables)
    params["norm_out/scale"] *= 0
    params["norm_out/bias"] *= 0
    return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("block", BLOCKS)
def test_zero_gamma_makes_an_identity_shortcut_block_the_relu_of_its_input(block, kind):
    channels = WIDTH * {BasicBlock: 1, BottleneckBlock: 4}[block]
    module, variables, x = make_block(block, channels, shortcut=kind)
    for flags in ({}, {"train": True, "update_stats": False}):
        y = module.apply(with_zero_gamma(variables), x, **flags)
        np.testing.assert_array_equal(y, np.maximum(x, 0))


def test_shortcut_a_subsamples_and_appends_zero_channels():
    module, variables, x = make_block(BasicBlock, 3, strides=2, shortcut="A")
    y = module.apply(with_zero_gamma(variables), x)
    np.testing.assert_array_equal(y[..., :3], np.maximum(x, 0)[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)


def test_shortcut_c_projects_even_where_the_shape_stays():
    _, variables, _ = make_block(BasicBlock, WIDTH, shortcut="C")
    assert flat(variables)["shortcut_conv/kernel"].shape == (1, 1, WIDTH, WIDTH)


def leaves(convs, norms):
    return {f"{name}/kernel" for name in convs} | {
        f"{name}/{leaf}" for name in norms for leaf in ("scale", "bias")
    }


NAMES = {
    BasicBlock: leaves(["conv1", "conv2"], ["norm1", "norm_out"]),
    BottleneckBlock: leaves(["conv1", "conv2", "conv3"], ["norm1", "norm2", "norm_out"]),
}
PROJECTION = leaves(["shortcut_conv"], ["shortcut_norm"])


@pytest.mark.parametrize(
    "kind, added", [("A", set()), ("B", PROJECTION), ("C", PROJECTION)]
)
@pytest.mark.parametrize("block", BLOCKS)
def test_parameter_names(block, kind, added):
    _, variables, _ = make_block(block, 3, strides=2, shortcut=kind)
    assert set(flat(variables)) == NAMES[block] | added


@pytest.mark.parametrize("block", BLOCKS)
def test_training_moves_the_statistics_of_every_norm(block):
    module, variables, x = make_block(block, 3, strides=2)
    _, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    before = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    after = traverse_util.flatten_dict(updates["batch_stats"], sep="/")
    assert set(after) == set(before)
    assert all((after[path] != before[path]).any() for path in before)
