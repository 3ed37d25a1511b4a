"""The gradients along all paths add up to the gradient; lengths are those of the paper."""

from functools import partial
from itertools import product

import jax
import numpy as np
import pytest
from conftest import random_variables
from scipy import stats

from resjax.analysis import paths
from resjax.config import UsageError
from resjax.losses import cross_entropy
from resjax.models.resnet import create_model

IMAGES = np.random.RandomState(0).randn(3, 4, 4, 3).astype(np.float32)
LABELS = np.array([1, 4, 9])
QUICK = {"xla_backend_optimization_level": 0}  # compiled in a third of the time


def all_paths(blocks):
    return np.array(list(product([False, True], repeat=blocks)))


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def along(model, variables, chosen):
    """Losses [M, B] and gradients [M, B, H, W, 3] along paths [M, n]."""
    gradient = partial(paths.gradient_by_path, model, variables, IMAGES, LABELS)
    return jax.vmap(gradient)(chosen)


@pytest.fixture(scope="module")
def basic_blocks():
    """A model of three blocks, whose training would drop branches and repeat forwards."""
    model = create_model(
        "cifar_preact_resnet110",
        stage_sizes=(3,),
        width=4,
        stochastic_depth=0.5,
        remat="blocks",
    )
    return model, random_variables(model)


@pytest.fixture(scope="module")
def bottleneck():
    """A model of one block, whose shortcut is a projection."""
    model = create_model("cifar_preact_resnet164", stage_sizes=(1,), width=4)
    return model, random_variables(model)


@pytest.mark.parametrize(
    "case", ["basic_blocks", pytest.param("bottleneck", marks=pytest.mark.slow)]
)
def test_gradients_along_all_paths_add_up_to_the_gradient(case, request):
    model, variables = request.getfixturevalue(case)

    @partial(jax.jit, compiler_options=QUICK)
    def whole(variables, images):
        def total(images):
            losses = cross_entropy(model.apply(variables, images, train=False), LABELS)
            return losses.sum(), losses

        return jax.grad(total, has_aux=True)(images)

    gradient, losses = whole(variables, IMAGES)
    found_losses, found = along(model, variables, all_paths(sum(model.stage_sizes)))
    for each in found_losses:
        np.testing.assert_allclose(each, losses, rtol=1e-5)
    scale = np.abs(found).sum(axis=0).max()
    np.testing.assert_allclose(found.sum(axis=0), gradient, atol=1e-5 * scale)
    assert np.abs(gradient).max() > 0.01 * scale


@pytest.mark.parametrize("block", [0, 1, 2])
def test_no_gradient_returns_through_a_branch_that_puts_out_zeros(block, basic_blocks):
    model, variables = basic_blocks
    variables = jax.tree.map(np.copy, variables)
    variables["params"]["stage1"][f"block{block + 1}"]["conv_out"]["kernel"][:] = 0
    chosen = all_paths(3)
    _, gradients = along(model, variables, chosen)
    returned = np.abs(gradients).max(axis=(1, 2, 3, 4)) > 0
    np.testing.assert_array_equal(returned, ~chosen[:, block])


def test_lengths_of_paths_through_54_blocks():
    fractions = paths.path_length_distribution(54)
    np.testing.assert_allclose(fractions, stats.binom.pmf(range(55), 54, 0.5), rtol=1e-12)
    # Veit et al. 2016, section 5: 0.45 % of the paths; more than 95 % of them.
    assert round(100 * fractions[5:18].sum(), 4) == 0.4537
    assert round(100 * fractions[19:36].sum(), 1) == 98.0


def test_lengths_of_paths_are_counted():
    lengths = all_paths(5).sum(axis=1)
    expected = np.bincount(lengths) / 2**5
    np.testing.assert_array_equal(paths.path_length_distribution(5), expected)


def test_gradient_by_length_averages_norms_and_weighs_them_by_the_number_of_paths(
    basic_blocks,
):
    model, variables = basic_blocks
    found = paths.gradient_by_length(
        model, variables, IMAGES, LABELS, rng=np.random.default_rng(0), samples=8
    )
    _, gradients = along(model, variables, all_paths(3))
    squares = np.square(np.array(gradients, np.float64))
    norms = np.sqrt(squares.sum(axis=(2, 3, 4))).mean(axis=1)  # of the eight paths
    rng = np.random.default_rng(0)  # the same draws
    drawn = np.array([paths.sample_paths(3, k, 8, rng) @ [4, 2, 1] for k in range(4)])
    assert len(set(drawn[1])) == len(set(drawn[2])) == 3
    mean = norms[drawn].mean(axis=1)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4)
    np.testing.assert_allclose(found.std, norms[drawn].std(axis=1), atol=1e-4 * mean.max())
    np.testing.assert_array_equal(found.lengths, [0, 1, 2, 3])
    np.testing.assert_array_equal(found.probability, [1 / 8, 3 / 8, 3 / 8, 1 / 8])
    weights = mean * [1, 3, 3, 1]
    np.testing.assert_allclose(found.share, weights / weights.sum(), rtol=1e-4)


def test_norms_of_gradients_whose_squares_underflow(basic_blocks):
    model, variables = basic_blocks
    means = []
    for factor in (1e-5, 1e-25):  # either way all classes are about as likely
        head = {
            "kernel": factor * variables["params"]["head"]["kernel"],
            "bias": np.zeros(10, "f"),
        }
        own = {**variables, "params": {**variables["params"], "head": head}}
        rng = np.random.default_rng(0)
        found = paths.gradient_by_length(model, own, IMAGES, LABELS, rng=rng, samples=8)
        means.append(found.mean)
    np.testing.assert_allclose(means[1], 1e-20 * means[0], rtol=1e-3)


def test_sampled_paths_have_their_length_and_are_equally_likely():
    chosen = paths.sample_paths(4, 2, 6000, np.random.default_rng(0))
    assert chosen.dtype == bool
    np.testing.assert_array_equal(chosen.sum(axis=1), 2)
    _, counts = np.unique(chosen, axis=0, return_counts=True)
    sigma = np.sqrt(6000 * 1 / 6 * 5 / 6)
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 4 * sigma


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.95])
def test_central_range_leaves_equal_tails(mass):
    tails = (1 - mass) / 2, (1 + mass) / 2
    expected = stats.binom.ppf(tails, 54, 0.3)
    found = paths.central_range(stats.binom.pmf(range(55), 54, 0.3), mass)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "name, options, blocks, message",
    [
        ("cifar_resnet20", {}, 9, "preactivation=False"),
        ("cifar_preact_resnet110", {"shortcut": "none"}, 54, "shortcut='none'"),
        ("cifar_preact_resnet110", {}, 53, "shape .53,., but there are 54 blocks"),
    ],
)
def test_what_has_no_such_path_is_refused(name, options, blocks, message):
    model = create_model(name, **options)
    with pytest.raises(UsageError, match=message):
        paths.gradient_by_path(model, {}, IMAGES, LABELS, np.zeros(blocks, bool))
