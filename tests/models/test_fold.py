"""Folded nets against the nets they were made of, float64 formulas and PyTorch's fusion."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from flax import linen as nn
from flax import traverse_util

import resjax
from resjax.config import UsageError
from resjax.models.norm import BatchNorm, Bias
from resjax.models.ops import Conv

CIFAR = {"stage_sizes": (2, 1), "width": 8}
IMAGENET = {"stage_sizes": (2, 2), "width": 8}
DEEP = {"stage_sizes": (4, 3), "width": 8}  # the blocks of a loop
NETS = {
    "basic": ("resnet18", IMAGENET),
    "bottleneck": ("resnet50", IMAGENET),
    "strides of the paper": ("resnet50_v1", IMAGENET),
    "shortcut C": ("resnet18", {**IMAGENET, "shortcut": "C"}),
    "cifar, shortcut A": ("cifar_resnet20", CIFAR),
    "resnext": ("resnext50_32x4d", {**IMAGENET, "width": 16}),
    "cifar resnext": ("cifar_resnext29_8x14d", CIFAR),
    "preact": ("preact_resnet18", IMAGENET),
    "preact bottleneck, shortcut C": ("preact_resnet50", {**IMAGENET, "shortcut": "C"}),
    "cifar preact": ("cifar_preact_resnet110", CIFAR),
    "plain": ("plain18", IMAGENET),
    "cifar plain": ("cifar_plain20", CIFAR),
    "plain bottleneck": ("resnet50", {**IMAGENET, "shortcut": "none"}),
    "plain preact": ("preact_resnet18", {**IMAGENET, "shortcut": "none"}),
    "stochastic depth": ("cifar_resnet20", {**CIFAR, "stochastic_depth": 0.5}),
    "a loop": ("cifar_resnet20", {**DEEP, "remat": True, "stochastic_depth": 0.5}),
    "a preact loop": ("cifar_preact_resnet164", {**DEEP, "remat": True}),
    "no classifier": ("resnet18", {**IMAGENET, "num_classes": 0}),
    "another epsilon": ("resnet18", {**IMAGENET, "norm": partial(BatchNorm, epsilon=0.3)}),
    "groups": ("resnet18", {**IMAGENET, "norm": partial(BatchNorm, 4, "devices")}),
    "products": ("resnet18", {**IMAGENET, "conv": partial(Conv, as_products=True)}),
}


def make(name, options):
    """The model, and variables with scales of both signs, some of them zero."""
    model = resjax.create_model(name, **options)
    rng = np.random.RandomState(2)
    leaves = traverse_util.flatten_dict(random_variables(model))
    for path, leaf in leaves.items():
        if path[-1] == "scale":
            leaf *= rng.choice([-1, 1], leaf.shape)
            leaf[rng.randint(leaf.size)] = 0
        elif path[-1] in ("bias", "mean"):
            leaf[:] = rng.randn(*leaf.shape)
    return model, traverse_util.unflatten_dict(leaves)


def forward(model, variables, side=24):
    images = np.random.RandomState(3).randn(2, side, side, 3).astype(np.float32)
    apply = jax.jit(partial(model.apply, return_stages=True))
    return apply(variables, images)


def relative_error(actual, expected):
    """Root mean square of the differences, beside that of the numbers."""
    actual, expected = (np.asarray(leaf, np.float64) for leaf in (actual, expected))
    return np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())


@pytest.mark.parametrize(("name", "options"), NETS.values(), ids=NETS)
def test_a_folded_net_computes_what_the_net_does(name, options):
    model, variables = make(name, options)
    expected, expected_stages = forward(model, variables)
    folded, folded_variables = resjax.fold_batch_norm(model, variables)
    logits, stages = forward(folded, folded_variables)
    assert logits.shape == expected.shape and list(stages) == list(expected_stages)
    assert relative_error(logits, expected) < 2e-6
    for stage, features in expected_stages.items():
        assert relative_error(stages[stage], features) < 2e-6
        assert np.asarray(features).std() > 0.1  # neither died out nor lost its pixels


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("net", ["basic", "preact"])
def test_folding_costs_a_net_of_half_precision_no_accuracy(net, dtype):
    exact, variables = make(*NETS[net])
    expected, expected_stages = forward(exact, variables)
    model = exact.clone(dtype=dtype)
    folded, folded_variables = resjax.fold_batch_norm(model, variables)
    logits, stages = forward(folded, folded_variables)
    own_logits, own_stages = forward(model, variables)
    assert logits.dtype == jnp.float32 and stages["stage1"].dtype == dtype
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(folded_variables))
    error, own = (relative_error(x, expected) for x in (logits, own_logits))
    assert 1e-5 < error < 2 * own < 0.05
    error, own = (
        relative_error(x["stage2"], expected_stages["stage2"]) for x in (stages, own_stages)
    )
    assert 1e-5 < error < 2 * own < 0.05


# The convolution before each norm, and those norms that have none.
PAIRS = {
    "bottleneck": (
        ("stem/norm", "stem/conv"),
        ("stage2/block1/norm1", "stage2/block1/conv1"),
        ("stage2/block1/norm2", "stage2/block1/conv2"),
        ("stage2/block1/norm_out", "stage2/block1/conv3"),
        ("stage2/block1/shortcut_norm", "stage2/block1/shortcut_conv"),
    ),
    "cifar plain": (("stage1/block2/norm2", "stage1/block2/conv2"),),
    "cifar preact": (
        ("stage1/block1/norm2", "stage1/block1/conv1"),
        ("stage1/block1/norm1", None),
        ("norm", None),
    ),
}


def fold_flat(net):
    """Variables before and folded, by their paths."""
    model, variables = make(*NETS[net])
    trees = variables, resjax.fold_batch_norm(model, variables)[1]
    return [traverse_util.flatten_dict(tree, sep="/") for tree in trees]


@pytest.mark.parametrize("net", PAIRS)
def test_kernels_and_biases_are_those_of_the_formula(net):
    old, new = fold_flat(net)
    for norm, conv in PAIRS[net]:
        gamma, beta = (
            np.float64(old[f"params/{norm}/{leaf}"]) for leaf in ("scale", "bias")
        )
        mean, var = (
            np.float64(old[f"batch_stats/{norm}/{leaf}"]) for leaf in ("mean", "var")
        )
        std = np.sqrt(var + 1e-5)
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        close(new[f"params/{norm}/bias"], beta - gamma * mean / std)
        if conv:
            kernel = np.float64(old[f"params/{conv}/kernel"])
            close(new[f"params/{conv}/kernel"], kernel * gamma / std)
            assert f"params/{norm}/scale" not in new
        else:
            close(new[f"params/{norm}/scale"], gamma / std)


def test_one_folded_convolution_is_the_sum_and_norm_in_float64():
    model, variables = make("cifar_resnet20", {"stage_sizes": (1,), "width": 4})
    _, folded = resjax.fold_batch_norm(model, variables)
    x = np.random.RandomState(0).randn(3, 3, 3)  # the window of one output
    own = variables["params"]["stem"]["conv"]["kernel"]
    norm, stats = (variables[name]["stem"]["norm"] for name in ("params", "batch_stats"))
    y = np.einsum("hwc,hwcd->d", x, own)
    y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    stem = folded["params"]["stem"]
    z = np.einsum("hwc,hwcd->d", x, np.float64(stem["conv"]["kernel"]))
    np.testing.assert_allclose(z + stem["norm"]["bias"], y, rtol=1e-5, atol=1e-5)


@pytest.mark.peers
def test_kernels_and_biases_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    old, new = fold_flat("bottleneck")
    for norm, conv in PAIRS["bottleneck"]:
        kernel, mean, var, scale, bias = (
            torch.tensor(np.asarray(old[path]))
            for path in (
                f"params/{conv}/kernel",
                f"batch_stats/{norm}/mean",
                f"batch_stats/{norm}/var",
                f"params/{norm}/scale",
                f"params/{norm}/bias",
            )
        )
        oihw = kernel.permute(3, 2, 0, 1)
        kernel, bias = fuse_conv_bn_weights(oihw, None, mean, var, 1e-5, scale, bias)
        kernel = kernel.permute(2, 3, 1, 0).detach().numpy()
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        close(new[f"params/{conv}/kernel"], kernel)
        close(new[f"params/{norm}/bias"], bias.detach().numpy())


@pytest.mark.parametrize("net", ["bottleneck", "cifar preact", "a loop"])
def test_the_variables_are_those_of_the_folded_model_and_no_statistics(net):
    model, variables = make(*NETS[net])
    before = jax.tree.map(np.copy, variables)
    folded, folded_variables = resjax.fold_batch_norm(model, variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    like = jax.eval_shape(folded.init, jax.random.key(0), images)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), like)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), folded_variables)
    assert set(folded_variables) == {"params"}
    head = (tree["params"]["head"]["kernel"] for tree in (variables, folded_variables))
    np.testing.assert_array_equal(*head)


def test_folding_is_a_function_of_arrays():
    model, variables = make(*NETS["cifar preact"])
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), variables, doubled)
    folded = jax.jit(jax.vmap(lambda v: resjax.fold_batch_norm(model, v)[1]))(stacked)
    alone = [resjax.fold_batch_norm(model, v)[1] for v in (variables, doubled)]
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda many, *ones: close(many, np.stack(ones)), folded, *alone)


# --- what is refused ------------------------------------------------------------------


class OwnNorm(BatchNorm):
    """May do anything."""


class OwnConv(Conv):
    """May do anything."""


def refused(call, *args, **kwargs):
    """The line that a call ends with."""
    with pytest.raises(UsageError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": Bias}, ["norm: ", "Bias", "BatchNorm"]),
        ({"norm": OwnNorm}, ["norm: ", "OwnNorm", "BatchNorm"]),
        ({"norm": partial(nn.GroupNorm, 2)}, ["norm: ", "GroupNorm", "BatchNorm"]),
        ({"norm": lambda name: BatchNorm(name=name)}, ["norm: ", "<lambda>"]),
        ({"conv": partial(OwnConv, as_products=True)}, ["conv: ", "OwnConv", "needs Conv"]),
    ],
)
def test_other_norms_and_convolutions_are_named(options, words):
    model = resjax.create_model("cifar_resnet20", **CIFAR, **options)
    message = refused(resjax.fold_batch_norm, model, {"params": {}, "batch_stats": {}})
    assert all(word in message for word in words)


def test_what_is_no_model_of_ours_is_named():
    assert "model: Dense" in refused(resjax.fold_batch_norm, nn.Dense(3), {})


def test_a_folded_net_is_not_folded_again():
    folded = resjax.fold_batch_norm(*make(*NETS["preact"]))
    assert "norm: the model has FoldedNorm" in refused(resjax.fold_batch_norm, *folded)


def test_variables_of_another_model_are_named():
    model, variables = make(*NETS["basic"])
    fold = partial(resjax.fold_batch_norm, model)
    params_only = {"params": variables["params"]}
    assert "no batch_stats/" in refused(fold, params_only)
    assert "/norm_out/" in refused(fold, make(*NETS["preact"])[1])
    wide = make("resnet18", {**IMAGENET, "width": 16})[1]
    assert " is (16,), in the model (8,)" in refused(fold, wide)


def test_variables_beside_those_of_the_model_are_left_out():
    name, options = NETS["basic"]
    model, variables = make(name, {**options, "num_classes": 0})
    _, expected = resjax.fold_batch_norm(model, variables)
    variables["params"]["head"] = {"bias": np.zeros(10, np.float32)}
    _, folded = resjax.fold_batch_norm(model, {**variables, "ema": {}})
    jax.tree.map(np.testing.assert_array_equal, folded, expected)


@pytest.mark.parametrize("net", ["basic", "preact", "plain", "a loop"])
@pytest.mark.parametrize("flags", [{"train": True}, {"update_stats": True}], ids=str)
def test_a_folded_net_does_not_train(net, flags):
    folded, variables = resjax.fold_batch_norm(*make(*NETS[net]))
    images = np.zeros((2, 24, 24, 3), np.float32)
    rngs = {"dropout": jax.random.key(0)}
    apply = partial(folded.apply, rngs=rngs, mutable=["batch_stats"])
    message = refused(apply, variables, images, **flags)
    assert "only evaluates" in message and f"{next(iter(flags))}=True" in message


@pytest.mark.parametrize("net", ["basic", "preact", "plain"])
def test_a_folded_net_does_not_take_the_variables_it_was_made_of(net):
    model, variables = make(*NETS[net])
    folded, _ = resjax.fold_batch_norm(model, variables)
    assert "has a scale" in refused(forward, folded, variables)
