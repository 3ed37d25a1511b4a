"""A deleted block is the network built without it; swapped blocks run in other order."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from scipy import stats

from resjax.analysis import lesions
from resjax.config import UsageError
from resjax.models.blocks import ResidualBlock, basic
from resjax.models.norm import BatchNorm, Bias
from resjax.models.ops import Conv
from resjax.models.resnet import create_model

IMAGES = np.random.RandomState(0).randn(2, 4, 4, 3).astype(np.float32)


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0), IMAGES)


def logits(model, variables):
    # Not compiled as a whole: the networks share their operations.
    return np.array(model.apply(variables, IMAGES, train=False))


def without(variables, stage, gone):
    """The variables of a network whose stage ends before these blocks."""
    kept = {}
    for collection, tree in variables.items():
        blocks = {
            key: block for key, block in tree.get(stage, {}).items() if key not in gone
        }
        kept[collection] = {**tree, stage: blocks} if blocks else tree
    return kept


@pytest.mark.parametrize(
    "name, options",
    [
        ("cifar_resnet20", {}),
        ("cifar_resnet20", {"norm": Bias}),
        ("cifar_preact_resnet110", {}),
        ("cifar_preact_resnet110", {"norm": Bias}),
        pytest.param("cifar_resnext29_4x24d", {}, marks=pytest.mark.slow),
        ("cifar_preact_resnet164", {}),
        ("cifar_plain20", {"norm": partial(BatchNorm, epsilon=0.1)}),
        ("cifar_plain20", {"norm": Bias}),
    ],
)
def test_deleted_blocks_are_the_network_built_without_them(name, options):
    model = create_model(name, stage_sizes=(3,), width=16, **options)
    variables = random_variables(model)
    smaller = create_model(name, stage_sizes=(1,), width=16, **options)
    expected = logits(smaller, without(variables, "stage1", ["block2", "block3"]))
    deleted = lesions.delete_blocks(variables, "stage1/block2", "stage1/block3")
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(model, deleted), expected, atol=1e-5 * scale)
    assert np.abs(logits(model, variables) - expected).max() > 0.01 * scale


def test_a_deleted_block_that_changes_the_shape_is_its_shortcut():
    model = create_model("cifar_resnet20", stage_sizes=(1, 1), width=16)
    variables = lesions.delete_blocks(random_variables(model), "stage2/block1")
    _, found = model.apply(variables, IMAGES, train=False, return_stages=True)
    kept = np.array(found["stage1"])[:, ::2, ::2]  # a ReLU's output, so not below 0
    expected = np.concatenate([kept, np.zeros_like(kept)], axis=-1)
    np.testing.assert_array_equal(found["stage2"], expected)


def test_blocks_are_listed_from_input_to_output():
    variables = shapes(create_model("cifar_plain20", stage_sizes=(1, 11)))
    expected = ["stage1/block1", *(f"stage2/block{i}" for i in range(1, 12))]
    assert lesions.list_blocks(variables) == expected


@pytest.mark.parametrize(
    "name, changing",
    [
        ("cifar_resnet20", ["stage2/block1", "stage3/block1"]),
        ("preact_resnet50", ["stage1/block1", "stage2/block1", "stage3/block1"]),
    ],
)
def test_the_first_block_of_a_wider_stage_changes_the_shape(name, changing):
    variables = shapes(create_model(name, stage_sizes=(2, 1, 1)))
    blocks = lesions.list_blocks(variables)
    assert [b for b in blocks if lesions.changes_shape(variables, b)] == changing


def test_swapped_blocks_run_in_the_other_order():
    model = create_model("cifar_resnet20", stage_sizes=(1, 3), width=16)
    variables = random_variables(model)
    swapped = lesions.swap_blocks(variables, "stage2/block2", "stage2/block3")
    _, found = model.apply(swapped, IMAGES, train=False, return_stages=True)
    x = found["stage1"]
    for block, strides in (("block1", 2), ("block3", 1), ("block2", 1)):
        own = {key: tree["stage2"][block] for key, tree in variables.items()}
        x = ResidualBlock(basic, 32, strides, "A", Conv, BatchNorm).apply(own, x)
    np.testing.assert_allclose(found["stage2"], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swaps", [0, 1, 9])
def test_random_swaps_stay_among_equals_and_tell_their_correlation(swaps):
    variables = shapes(create_model("cifar_resnet20", stage_sizes=(5, 5)))
    blocks = lesions.list_blocks(variables)
    for tree in variables.values():  # every leaf tells where it came from
        for i, name in enumerate(blocks):
            stage, block = name.split("/")
            tree[stage][block] = jax.tree.map(
                lambda leaf, i=i: np.full(leaf.shape, i), tree[stage][block]
            )
    moved, tau = lesions.swap_random_blocks(variables, swaps, np.random.default_rng(0))
    order = []
    for name in blocks:
        stage, block = name.split("/")
        leaves = jax.tree.leaves([tree[stage][block] for tree in moved.values()])
        (origin,) = {int(value) for leaf in leaves for value in np.unique(leaf)}
        order.append(origin)
    assert sorted(order) == list(range(len(blocks)))
    assert order[5] == 5  # it strides
    assert all(i // 5 == origin // 5 for i, origin in enumerate(order))
    assert sum(i != origin for i, origin in enumerate(order)) <= 2 * swaps
    assert (tau == 1) == (swaps == 0)
    assert tau == pytest.approx(stats.kendalltau(range(len(blocks)), order).statistic)


def test_lesions_leave_their_argument_as_it_was():
    variables = random_variables(create_model("cifar_plain20", stage_sizes=(2,), width=16))
    before = jax.tree.map(np.copy, variables)
    lesions.delete_blocks(variables, "stage1/block1", "stage1/block2")
    lesions.swap_blocks(variables, "stage1/block1", "stage1/block2")
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize(
    "name, options, block, message",
    [
        ("cifar_resnet20", {}, "stage1/blok1", "did you mean .*stage1/block1"),
        ("cifar_plain20", {}, "stage2/block1", "'stage2/block1'.* no shortcut"),
        ("resnet50", {"shortcut": "none"}, "stage1/block2", "'stage1/block2'.* channels"),
        (
            "cifar_preact_resnet110",
            {"shortcut": "none"},
            "stage1/block2",
            "'stage1/block2'.* pre-activation",
        ),
    ],
)
def test_a_block_that_cannot_be_deleted_is_named(name, options, block, message):
    variables = shapes(create_model(name, stage_sizes=(2, 1), **options))
    with pytest.raises(UsageError, match=message):
        lesions.delete_blocks(variables, block)


def test_only_blocks_of_equal_shapes_swap():
    variables = shapes(create_model("cifar_resnet20", stage_sizes=(1, 1)))
    with pytest.raises(UsageError, match=r"'stage1/block1' and 'stage2/block1'"):
        lesions.swap_blocks(variables, "stage1/block1", "stage2/block1")
    with pytest.raises(UsageError, match="no two of"):
        lesions.swap_random_blocks(variables, 1, np.random.default_rng(0))


def test_top1_error_counts_each_image_once_in_one_program():
    traced = []

    def apply(weights, images, train):
        traced.append(images.shape)
        return images[:, 0, 0, :] @ weights

    rng = np.random.RandomState(0)
    images, labels = rng.randn(37, 1, 1, 3).astype(np.float32), rng.randint(4, size=37)
    model = SimpleNamespace(apply=apply)
    top1_error = lesions.make_top1_error(model, images, labels, batch_size=16)
    for _ in range(2):
        weights = rng.randn(3, 4).astype(np.float32)
        wrong = np.argmax(images[:, 0, 0] @ weights, axis=1) != labels
        assert top1_error(jnp.array(weights)) == pytest.approx(100 * wrong.mean())
    assert len(traced) == 1
