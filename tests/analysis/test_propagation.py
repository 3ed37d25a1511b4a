"""Responses and gradients are measured where they are, and theory is that of the papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax import initializers
from resjax.analysis import propagation
from resjax.models.blocks import ConvSpec
from resjax.models.norm import Bias
from resjax.models.resnet import ResNet, create_model

IMAGES = np.random.RandomState(0).randn(2, 4, 4, 3).astype(np.float32)


def plain(layers, width, **options):
    """A net without norms of 1 + 2 * layers / 2 convolutions."""
    options = {"norm": Bias, "stage_sizes": (layers // 2,), **options}
    return create_model("cifar_plain20", width=width, **options)


def by_hand(x, kernel, strides=1):
    """A convolution of [B, H, W, C], padded by (k - 1) / 2, in float64."""
    k, (_, rows, columns, _) = len(kernel), x.shape
    x = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    return sum(
        x[:, i : i + rows : strides, j : j + columns : strides] @ kernel[i, j]
        for i, j in np.ndindex(k, k)
    )


@pytest.fixture(scope="module")
def three_convolutions():
    """The model, its parameters, what was found, and responses by hand."""
    model = plain(2, 6, num_classes=5)
    variables = initializers.init(model, jax.random.key(1), "xavier")
    found = propagation.signal_propagation(model, variables, IMAGES, key=jax.random.key(2))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    block = params["stage1"]["block1"]
    kernels = [params["stem"]["conv"], block["conv1"], block["conv2"]]
    kernels = [each["kernel"] for each in kernels] + [params["head"]["kernel"]]
    signs = np.asarray(jax.random.rademacher(jax.random.key(2), (2, 5)), np.float64)
    return kernels, signs, found


def responses_from(kernels, y, start=0):
    """All responses from that convolution's response on, and the logits."""
    found = [y]
    for kernel in kernels[start + 1 : 3]:
        found.append(by_hand(np.maximum(found[-1], 0), kernel))
    return [*found, np.maximum(found[-1], 0).mean(axis=(1, 2)) @ kernels[3]]


def test_responses_are_those_of_the_net_written_out(three_convolutions):
    kernels, _, found = three_convolutions
    responses = responses_from(kernels, by_hand(IMAGES.astype(np.float64), kernels[0]))
    conv = "stage1/block1/conv"
    assert found.layers == ("stem/conv", f"{conv}1", f"{conv}2", "head")
    squares = [np.square(y).mean() for y in responses]
    np.testing.assert_allclose(found.forward, squares, rtol=1e-5)
    np.testing.assert_allclose(
        found.forward_variance, [y.var() for y in responses], rtol=1e-5
    )


def test_gradients_are_finite_differences(three_convolutions):
    kernels, signs, found = three_convolutions
    responses = responses_from(kernels, by_hand(IMAGES.astype(np.float64), kernels[0]))
    for layer, y in enumerate(responses[:3]):
        gradient = np.zeros_like(y)
        for index in np.ndindex(*y.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = y.copy()
                moved[index] += step
                ends.append((signs * responses_from(kernels, moved, layer)[-1]).sum())
            gradient[index] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(
            [found.backward[layer], found.backward_variance[layer]],
            [np.square(gradient).mean(), gradient.var()],
            rtol=1e-3,
        )
    np.testing.assert_allclose(found.backward[3], 1)


def test_products_are_those_of_the_papers(three_convolutions):
    kernels, _, found = three_convolutions
    n_in, n_out = 9 * 6, 9 * 6
    var = [np.square(kernel).mean() for kernel in kernels]
    first = found.forward[0]
    relu = [first, first * n_in * var[1] / 2, first * n_in**2 * var[1] * var[2] / 4]
    # The classifier's gradient is 1; the mean over 4 x 4 positions divides it by 16.
    top = 5 * var[3] / 16**2
    last, back = top / 2, n_out / 2
    relu_back = [last * back**2 * var[1] * var[2], last * back * var[2], last, 1]
    np.testing.assert_allclose(found.forward_relu, [*relu, np.nan], rtol=1e-5)
    np.testing.assert_allclose(found.backward_relu, relu_back, rtol=1e-5)
    powers = 2.0 ** np.arange(3)
    np.testing.assert_allclose(found.forward_linear[:3], relu * powers, rtol=1e-5)
    linear_back = relu_back[:3] * (2 * powers[::-1])
    np.testing.assert_allclose(found.backward_linear[:3], linear_back, rtol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_mean_squares_on_a_padded_map(k, strides):
    """Sum over the taps inside the map, forward; the transposed matrix, backward."""
    rng = np.random.RandomState(0)
    taps = rng.rand(k, k)
    positions = [(i, j) for i in range(5) for j in range(5)]
    outputs = [(i, j) for i in range(0, 5, strides) for j in range(0, 5, strides)]
    matrix = np.zeros((len(outputs), 25))
    for row, (i, j) in enumerate(outputs):
        for column, (a, b) in enumerate(positions):
            u, v = a - i + k // 2, b - j + k // 2
            if 0 <= u < k and 0 <= v < k:
                matrix[row, column] = taps[u, v]
    x, d = rng.rand(5, 5), rng.rand(len(outputs))
    side = len(range(0, 5, strides))
    np.testing.assert_allclose(
        propagation._gather(x, taps, strides).ravel(), matrix @ x.ravel()
    )
    np.testing.assert_allclose(
        propagation._spread(d.reshape(side, side), taps, strides, (5, 5)).ravel(),
        matrix.T @ d,
    )


def test_theory_without_padding_is_half_a_layer_for_xavier():
    """Inputs and outputs alike: Var[w] = 1 / n, He et al. 2015, equation 10."""
    model = plain(6, 64)
    variables = initializers.init(model, jax.random.key(0), "xavier")
    forward, backward = propagation._predict(
        model, variables, np.ones((4, 4)), padded=False
    )
    halves = 0.5 ** np.arange(7)
    np.testing.assert_allclose(list(forward.values())[:-1], halves, rtol=0.05)
    back = np.array([backward[layer] for layer in forward])[:-1]
    np.testing.assert_allclose(back / back[-1], halves[::-1], rtol=0.05)


def pointwise(width, strides):
    """Two 1x1 convolutions, which no padding touches: a fully connected net a pixel."""
    return [ConvSpec(width, 1, strides), ConvSpec(width, 1)]


# Widths, seeds and keys were chosen for a standard error of 5 %, before the first run.
NETS = {
    "1x1": ResNet((14,), pointwise, 1024, False, "none", norm=Bias, num_classes=10),
    "3x3": plain(28, 512),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("scheme, factor", [("xavier", 0.5), ("msra_fan_in", 1.0)])
@pytest.mark.parametrize("kind", NETS)
def test_thirty_layers_of_relus_without_norms(kind, scheme, factor):
    """He et al. 2015, section 2.2: Xavier halves mean squares a layer, MSRA keeps them."""
    keys = map(jax.random.key, range(1000, 1048))
    found = propagation.mean_propagation(NETS[kind], IMAGES, scheme, keys)
    assert len(found.layers) == 30
    powers = factor ** np.arange(29)  # of the 29 convolutions, from the first or the last
    forward, backward = found.forward[:-1], found.backward[:-1]
    if kind == "3x3":  # what padding takes from the papers' product
        powers = powers * (found.forward_theory / found.forward_relu)[:-1]
        np.testing.assert_allclose(
            forward / forward[0] / (powers / powers[0]), 1, atol=0.15
        )
        powers = (factor ** np.arange(29))[::-1]
        powers = powers * (found.backward_theory / found.backward_relu)[:-1]
        back = backward / backward[-1] / (powers / powers[-1])
    else:
        np.testing.assert_allclose(forward / forward[0] / powers, 1, atol=0.15)
        back = backward / backward[-1] / powers[::-1]
    np.testing.assert_allclose(back, 1, atol=0.15)


MODELS = {
    "plain": ("cifar_plain20", {"norm": Bias}),
    "residual": ("cifar_resnet20", {"norm": Bias}),
    "preactivation": ("cifar_preact_resnet110", {"norm": Bias, "shortcut": "B"}),
    "plain, batch norm": ("cifar_plain20", {}),
    "residual, batch norm": ("cifar_resnet20", {"shortcut": "C"}),
    "preactivation, batch norm": ("cifar_preact_resnet110", {"remat": "blocks"}),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("case", MODELS)
def test_theory_of_all_kinds_of_nets(case):
    name, options = MODELS[case]
    model = create_model(name, stage_sizes=(2, 2), width=64, **options)
    images = np.random.RandomState(1).randn(16, 8, 8, 3).astype(np.float32)
    keys = map(jax.random.key, range(8))
    found = propagation.mean_propagation(model, images, "xavier", keys)
    np.testing.assert_allclose(found.forward[:-1] / found.forward_theory[:-1], 1, atol=0.25)
    ratios = found.backward / found.backward_theory
    # Batch norms take more of a gradient away than theory knows, the same at each layer.
    low = 0.7 * 0.9 ** np.arange(len(ratios))[::-1] if "batch" in case else 0.75
    # Of ReLUs that a shortcut joins it knows not how they correlate.
    blocks = len(ratios) // 2 - np.arange(len(ratios)) // 2
    high = 1.35 * 1.1 ** (blocks * (case == "residual"))
    assert (low <= ratios + 1e-6).all() and (ratios < high).all(), ratios


def test_layers_are_all_that_have_kernels_and_stochastic_depth_keeps_all():
    model = create_model(
        "cifar_preact_resnet164", stage_sizes=(1,), width=2, stochastic_depth=0.5
    )
    variables = initializers.init(model, jax.random.key(0))
    found = propagation.signal_propagation(model, variables, jnp.asarray(IMAGES))
    flat = jax.tree_util.tree_leaves_with_path(variables["params"])
    paths = ["/".join(key.key for key in path) for path, _ in flat]
    kernels = {path.removesuffix("/kernel") for path in paths if path.endswith("/kernel")}
    assert len(found.layers) == len(kernels) and set(found.layers) == kernels
    assert all(np.isfinite(column[:-1]).all() for column in found[1:])


def test_the_picture_shows_what_was_measured_on_what_was_predicted(three_convolutions):
    _, _, found = three_convolutions
    figure = propagation.draw_propagation({"net": found})
    for panel, way, end in zip(figure.axes, ("forward", "backward"), (0, 2), strict=True):
        columns = (f"{way}{kind}" for kind in ("", "_theory", "_relu"))
        for line, column in zip(panel.lines, columns, strict=True):
            squares = getattr(found, column)[:3]  # without the classifier
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), squares / squares[end])
        assert panel.get_yscale() == "log"
