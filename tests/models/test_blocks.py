"""Residual blocks and their shortcuts against numpy."""

from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from resjax.models.blocks import PreActBlock, ResidualBlock, basic, bottleneck
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv
from resjax.models.resnet import Stage

WIDTH = 4
BLOCKS = [ResidualBlock, PreActBlock]
BRANCHES = {
    "basic": basic,
    "bottleneck": bottleneck,
    "grouped": partial(bottleneck, groups=2, group_width=48),  # 2 groups of 3 channels
    "stride_in_1x1": partial(bottleneck, stride_in_1x1=True),
}
# (kernel size, outputs, whether it takes the strides of the block, groups) of the papers.
LAYERS = {
    "basic": [(3, 4, True, 1), (3, 4, False, 1)],
    "bottleneck": [(1, 4, False, 1), (3, 4, True, 1), (1, 16, False, 1)],
    "grouped": [(1, 6, False, 1), (3, 6, True, 2), (1, 16, False, 1)],
    "stride_in_1x1": [(1, 4, True, 1), (3, 4, False, 1), (1, 16, False, 1)],
}
TRAIN = {"train": True, "update_stats": False}


def features_of(branch):
    return LAYERS[branch][-1][1]


def make_block(block, branch, channels=None, strides=1, shortcut="B", **options):
    """A block, variables of which no leaf is a default, and its input."""
    module = block(BRANCHES[branch], WIDTH, strides, shortcut, Conv, BatchNorm, **options)
    rng = np.random.RandomState(0)
    channels = channels or features_of(branch)
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


def relu(x):
    return np.maximum(x, 0)


def conv(variables, name, x, strides, groups=1):
    """The convolution of that name as a sum over its shifts, group by group."""
    kernel = np.array(variables["params"][name]["kernel"], np.float64)
    k, pad = len(kernel), len(kernel) // 2
    _, height, width, _ = x.shape
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    parts = [
        sum(
            part[:, i : i + height, j : j + width] @ weights[i, j]
            for i in range(k)
            for j in range(k)
        )
        for part, weights in zip(
            np.split(x, groups, axis=-1), np.split(kernel, groups, axis=-1), strict=True
        )
    ]
    return np.concatenate(parts, axis=-1)[:, ::strides, ::strides]


def norm(variables, name, x):
    """The norm of that name, from its running statistics."""
    params, stats = variables["params"][name], variables["batch_stats"][name]
    std = np.sqrt(np.array(stats["var"], np.float64) + 1e-5)
    return (x - stats["mean"]) / std * params["scale"] + params["bias"]


def branch_path(block, branch, variables, x, strides, kind="B"):
    """The branch of a block in float64, from the tables of the papers."""
    last = len(LAYERS[branch])
    for i, (_, _, strided, groups) in enumerate(LAYERS[branch], start=1):
        is_end = i == last and kind != "none"
        step = strides if strided else 1
        if block is PreActBlock:
            x = relu(norm(variables, f"norm{i}", x))
            x = conv(variables, "conv_out" if is_end else f"conv{i}", x, step, groups)
        else:
            x = conv(variables, f"conv{i}", x, step, groups)
            x = norm(variables, "norm_out" if is_end else f"norm{i}", x)
            x = x if i == last else relu(x)
    return x


def shortcut_path(block, kind, variables, x, strides, features, is_first=False):
    """The shortcut of a block in float64."""
    is_identity = kind != "C" and (strides, x.shape[-1]) == (1, features)
    if block is PreActBlock and (is_first or not is_identity):
        x = relu(norm(variables, "norm1", x))
    if is_identity:
        return x
    if kind == "A":
        zeros = np.zeros((*x.shape[:3], features - x.shape[-1]))
        return np.concatenate([x, zeros], axis=-1)[:, ::strides, ::strides]
    x = conv(variables, "shortcut_conv", x, strides)
    return x if block is PreActBlock else norm(variables, "shortcut_norm", x)


def expected_output(block, branch, kind, variables, x, strides, survival=1, **options):
    y = survival * branch_path(block, branch, variables, x, strides, kind)
    if kind != "none":
        features = features_of(branch)
        y = y + shortcut_path(block, kind, variables, x, strides, features, **options)
    return y if block is PreActBlock else relu(y)


# (input channels as a share of the output's, strides): the same, wider, halved map, both.
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2)]
CASES = [
    (branch, kind, *shape)
    for branch in ("basic", "bottleneck")
    for kind in "ABC"
    for shape in SHAPES
] + [
    (branch, kind, 2, 2)
    for branch, kind in [(b, "none") for b in BRANCHES]
    + [(b, kind) for b in ("grouped", "stride_in_1x1") for kind in "AB"]
]


@pytest.mark.parametrize("branch, kind, share, strides", CASES)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_is_its_branch_plus_its_shortcut(block, branch, kind, share, strides):
    features = features_of(branch)
    module, variables, x = make_block(block, branch, features // share, strides, kind)
    y = module.apply(variables, x)
    assert y.shape == (2, 6 // strides, -(-7 // strides), features)
    expected = expected_output(block, branch, kind, variables, x, strides)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", "ABC")
def test_the_first_pre_activation_block_shortcuts_its_activated_input(kind):
    module, variables, x = make_block(PreActBlock, "basic", shortcut=kind, is_first=True)
    y = module.apply(variables, x)
    args = (PreActBlock, "basic", kind, variables, x, 1)
    first, later = (expected_output(*args, is_first=flag) for flag in (True, False))
    np.testing.assert_allclose(y, first, rtol=1e-4, atol=1e-3)
    assert (np.abs(first - later).max() > 0.1) == (kind != "C")


def test_the_first_post_activation_block_is_like_the_others():
    module, variables, x = make_block(ResidualBlock, "basic")
    first = module.clone(is_first=True)
    np.testing.assert_array_equal(first.apply(variables, x), module.apply(variables, x))


def with_zero_end(variables):
    """The variables with the last layer of the branch at zero."""
    params = flat(variables)
    ends = [path for path in params if path.startswith(("norm_out/", "conv_out/"))]
    params |= {path: jnp.zeros_like(params[path]) for path in ends}
    return {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


@pytest.mark.parametrize("kind", "AB")
@pytest.mark.parametrize("branch", ["basic", "bottleneck"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_zero_end_makes_an_identity_block_its_input(block, branch, kind):
    module, variables, x = make_block(block, branch, shortcut=kind)
    expected = x if block is PreActBlock else np.maximum(x, 0)
    for flags in ({}, TRAIN):
        y = module.apply(with_zero_end(variables), x, **flags)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("kind", "BC")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_zero_end_makes_a_block_its_projection(block, kind):
    module, variables, x = make_block(block, "basic", 2, 2, kind)
    y = module.apply(with_zero_end(variables), x)
    expected = shortcut_path(block, kind, variables, x, 2, WIDTH)
    expected = expected if block is PreActBlock else relu(expected)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_shortcut_a_subsamples_and_appends_zero_channels():
    module, variables, x = make_block(ResidualBlock, "basic", 3, 2, "A")
    y = module.apply(with_zero_end(variables), x)
    np.testing.assert_array_equal(y[..., :3], np.maximum(x, 0)[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)


# --- parameters -----------------------------------------------------------------------


def named(kernels, norms):
    return {f"{name}/kernel" for name in kernels} | {
        f"{name}/{leaf}" for name in norms for leaf in ("scale", "bias")
    }


@pytest.mark.parametrize("kind", ["A", "B", "C", "none"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("block", BLOCKS)
def test_parameter_names_and_kernel_shapes(block, branch, kind):
    _, variables, _ = make_block(block, branch, 3, 2, kind)
    layers, post = LAYERS[branch], block is ResidualBlock
    convs = [f"conv{i}" for i in range(1, len(layers) + 1)]
    norms = [f"norm{i}" for i in range(1, len(layers) + 1)]
    if kind != "none":
        (norms if post else convs)[-1] = "norm_out" if post else "conv_out"
    names = named(convs, norms)
    if kind in ("B", "C"):
        names |= named(["shortcut_conv"], ["shortcut_norm"] if post else [])
    params = flat(variables)
    assert set(params) == names
    inputs = 3
    for name, (size, outputs, _, groups) in zip(convs, layers, strict=True):
        shape = (size, size, inputs // groups, outputs)
        assert params[f"{name}/kernel"].shape == shape
        inputs = outputs


@pytest.mark.parametrize("block", BLOCKS)
def test_shortcut_c_projects_even_where_the_shape_stays(block):
    _, variables, _ = make_block(block, "basic", shortcut="C")
    assert flat(variables)["shortcut_conv/kernel"].shape == (1, 1, WIDTH, WIDTH)


@pytest.mark.parametrize("kind", ["B", "none"])
@pytest.mark.parametrize("branch", ["basic", "bottleneck"])
@pytest.mark.parametrize("block", BLOCKS)
def test_training_moves_the_statistics_of_every_norm(block, branch, kind):
    module, variables, x = make_block(block, branch, 3, 2, kind)
    _, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
    before = traverse_util.flatten_dict(variables["batch_stats"], sep="/")
    after = traverse_util.flatten_dict(updates["batch_stats"], sep="/")
    assert set(after) == set(before)
    assert all((after[path] != before[path]).any() for path in before)


# --- stochastic depth: Huang et al. 2016 (arXiv:1603.09382), equations 2 and 5 ----------


def make_stage(block, survival):
    """A stage of one block, and a function to name variables as the stage does."""
    first = partial(block, basic, WIDTH, strides=2, shortcut="B", conv=Conv, norm=BatchNorm)
    stage = Stage(first, first, (survival,))
    return stage, lambda variables: {c: {"block1": tree} for c, tree in variables.items()}


@pytest.mark.parametrize("survival", [0.5, 0.8])
@pytest.mark.parametrize("block", BLOCKS)
def test_evaluation_multiplies_the_branch_by_its_survival(block, survival):
    _, variables, x = make_block(block, "basic", 2, 2)
    stage, named = make_stage(block, survival)
    expected = expected_output(block, "basic", "B", variables, x, 2, survival)
    y = stage.apply(named(variables), x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("survival", [0.5, 0.8])
@pytest.mark.parametrize("block", BLOCKS)
def test_training_keeps_or_drops_the_branch_of_the_whole_minibatch(block, survival):
    always, variables, x = make_block(block, "basic", 2, 2)
    kept = np.array(always.apply(variables, x, **TRAIN))
    dropped = np.array(always.apply(with_zero_end(variables), x, **TRAIN))
    assert all(np.abs(kept - dropped).max(axis=(1, 2, 3)) > 0.1)

    count = 1000
    keys = jax.random.split(jax.random.key(0), count)
    stage, named = make_stage(block, survival)
    apply = partial(stage.apply, named(variables), x, **TRAIN)
    outputs = np.array(jax.vmap(lambda key: apply(rngs={"dropout": key}))(keys))
    is_kept, is_dropped = (
        np.isclose(outputs, one, rtol=1e-4, atol=1e-4).all(axis=(1, 2, 3, 4))
        for one in (kept, dropped)
    )
    assert (is_kept != is_dropped).all()
    error = np.sqrt(survival * (1 - survival) / count)
    assert abs(is_kept.mean() - survival) < 4 * error


@pytest.mark.parametrize("block", BLOCKS)
def test_training_needs_a_key_only_where_a_branch_may_be_dropped(block):
    _, variables, x = make_block(block, "basic", 2, 2)
    stage, named = make_stage(block, 0.5)
    for rngs in (None, {}, {"depth": jax.random.key(0)}):
        with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
            stage.apply(named(variables), x, **TRAIN, rngs=rngs)
        stage.clone(survivals=(1.0,)).apply(named(variables), x, **TRAIN, rngs=rngs)
        stage.apply(named(variables), x, rngs=rngs)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_dropped_branch_gets_no_gradient(block):
    module, variables, x = make_block(block, "basic")

    def loss(params, scale):
        y = module.apply({**variables, "params": params}, x, **TRAIN, scale=scale)
        return (y**2).sum()

    gradient = jax.jit(jax.grad(loss))
    for scale in (0.0, 1.0):
        leaves = flat({"params": gradient(variables["params"], jnp.array(scale))})
        assert {bool(np.any(leaf)) for leaf in leaves.values()} == {scale > 0}
