"""Maps of why: against the logits they explain, nets set by hand, formulas and PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, random_variables
from flax import linen as nn
from patch_net import patch_net, with_patch

import resjax
from resjax.analysis import attribution
from resjax.config import UsageError
from resjax.models.resnet import create_model

RANDOM = np.random.RandomState(0)
WEIGHTS = RANDOM.randn(6, 5, 3, 3).astype(np.float32)  # [H, W, channels, classes]


class Sum(nn.Module):
    """A logit is a weighted sum of a function of the image's values."""

    num_classes: int = 3
    of: str = "itself"

    @nn.compact
    def __call__(self, x, *, train=False):
        values = {"itself": x, "magnitude": jnp.abs(x), "square": x * x}[self.of]
        return jnp.einsum(
            "bhwc,hwck->bk", values, jnp.asarray(WEIGHTS), precision="highest"
        )


@pytest.mark.parametrize(
    "name, options, rtol",
    [
        ("preact_resnet18", {"stage_sizes": (1, 1), "dtype": jnp.bfloat16}, 0.02),
        ("cifar_resnext29_4x24d", {"width": 16}, 1e-5),
        ("cifar_preact_resnet164", {"width": 16}, 1e-5),
        ("cifar_resnet20", {"remat": "blocks", "stage_sizes": (3,)}, 1e-5),
        pytest.param("resnet50", {"width": 16}, 1e-5, marks=pytest.mark.slow),
        pytest.param("resnext50_32x4d", {"width": 16}, 1e-5, marks=pytest.mark.slow),
        pytest.param("plain18", {}, 1e-5, marks=pytest.mark.slow),
    ],
)
def test_the_mean_of_the_class_activation_plus_the_bias_is_the_logit(name, options, rtol):
    options = {"stage_sizes": (1,), "width": 8, "num_classes": 10} | options
    model = create_model(name, **options)
    variables = random_variables(model)
    images = np.random.RandomState(0).randn(4, 20, 16, 3).astype(np.float32)
    classes = np.array([3, 0, 9, 3])
    logits = np.asarray(jax.jit(model.apply)(variables, images))
    bias = variables["params"]["head"]["bias"]
    maps = attribution.class_activation_map(model, variables, images, classes)
    assert maps.dtype == jnp.float32
    stride = (4 if model.downsample else 1) * 2 ** (len(model.stage_sizes) - 1)
    assert maps.shape == (4, -(-20 // stride), -(-16 // stride))
    found = np.asarray(maps).mean(axis=(1, 2)) + bias[classes]
    expected = logits[np.arange(4), classes]
    scale = np.abs(logits).max()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * scale)
    # And of class differences, which other weights would not give.
    other = attribution.class_activation_map(model, variables, images, 7)
    difference = np.asarray(maps - other).mean(axis=(1, 2)) + bias[classes] - bias[7]
    np.testing.assert_allclose(difference, expected - logits[:, 7], atol=rtol * scale)


@pytest.mark.parametrize("size, downsample", [(8, False), (32, True), (33, True)])
def test_the_class_activation_lies_on_the_patch(size, downsample):
    model, variables = patch_net(downsample)
    row, column = (5, 2) if not downsample else (20, 8)
    images = with_patch(row, column, size=size)[None]
    maps = attribution.class_activation_map(model, variables, images, 1)
    full = np.asarray(attribution.upsample(maps, size, size))[0]
    assert np.unravel_index(full.argmax(), full.shape) == (row, column)
    assert full[row, column] == pytest.approx(3)  # of the class's weight
    stride = 4 if downsample else 1
    rows, columns = np.nonzero(full)
    assert np.abs(rows - row).max() < stride
    assert np.abs(columns - column).max() < stride
    assert not attribution.class_activation_map(model, variables, images, 0).any()


@pytest.mark.parametrize("height, width", [(16, 12), (13, 9)])
def test_upsampling_is_linear_between_positions_and_flat_past_the_last(height, width):
    maps = np.random.RandomState(0).randn(2, 4, 3).astype(np.float32)
    found = np.asarray(attribution.upsample(maps, height, width))
    assert found.shape == (2, height, width)
    across = [
        [np.interp(np.arange(width) / 4, range(3), row) for row in each] for each in maps
    ]
    expected = [
        np.stack([np.interp(np.arange(height) / 4, range(4), row) for row in each.T], 1)
        for each in np.array(across)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_saliency_and_smooth_grad_of_a_linear_score_are_its_weights():
    images = RANDOM.randn(3, 6, 5, 3).astype(np.float32)
    classes = np.array([2, 0, 2])
    expected = np.stack([np.abs(WEIGHTS[..., k]).max(axis=-1) for k in classes])
    maps = attribution.saliency(Sum(), {}, images, classes)
    np.testing.assert_allclose(maps, expected, rtol=1e-6)
    smooth = attribution.smooth_grad(Sum(), {}, images, classes, jax.random.key(0))
    np.testing.assert_allclose(smooth, expected, rtol=1e-5)
    one = attribution.saliency(Sum(), {}, images, 2)
    np.testing.assert_array_equal(one[::2], maps[::2])


def test_smooth_grad_is_the_mean_gradient_under_noise_of_that_size():
    """Of |x| it is the weight times P(x + noise > 0) - P(x + noise < 0)."""
    images = RANDOM.uniform(-1, 1, (2, 6, 5, 3)).astype(np.float32)
    images[1] *= 10  # noise is a share of the range
    sigma = 0.2 * (images.max(axis=(1, 2, 3)) - images.min(axis=(1, 2, 3)))
    smooth = attribution.smooth_grad(
        Sum(of="magnitude"), {}, images, 1, jax.random.key(0), samples=800, noise=0.2
    )
    steps = images / (sigma[:, None, None, None] * math.sqrt(2))
    mean = np.vectorize(math.erf)(steps) * WEIGHTS[..., 1]
    error = np.abs(smooth - np.abs(mean).max(axis=-1))
    # A sign's mean over 800 draws deviates by up to 1 / sqrt(800).
    assert error.max() < 5 / math.sqrt(800) * np.abs(WEIGHTS[..., 1]).max()
    assert error.mean() < 1 / math.sqrt(800) * np.abs(WEIGHTS[..., 1]).max()


def test_smooth_grad_of_an_image_is_its_own_whatever_stands_beside_it():
    model = create_model("cifar_resnet20", stage_sizes=(1,), width=8)
    variables = random_variables(model)
    images = np.random.RandomState(0).randn(3, 8, 8, 3).astype(np.float32)
    key = jax.random.key(3)
    classes = np.array([1, 2, 3])
    find = attribution.smooth_grad
    together = find(model, variables, images, classes, key, samples=3)
    alone = find(model, variables, images[2:], 3, key, samples=3)
    np.testing.assert_allclose(alone[0], together[2], rtol=1e-3, atol=1e-5)
    other = find(model, variables, images[2:], 3, jax.random.key(4), samples=3)
    assert np.abs(other - alone).max() > 0.01 * np.abs(alone).max()
    # Without noise it is the saliency.
    still = find(model, variables, images, classes, key, samples=2, noise=0)
    expected = attribution.saliency(model, variables, images, classes)
    np.testing.assert_allclose(still, expected, rtol=1e-5, atol=1e-6)


def test_saliency_is_zero_where_the_net_does_not_look():
    model, variables = patch_net()
    images = with_patch(5, 2)[None]
    maps = np.asarray(attribution.saliency(model, variables, images, 1))
    # Only at the patch is the ReLU open: 3, the class's weight, over 64 positions.
    expected = np.zeros((1, 8, 8), np.float32)
    expected[0, 4:7, 1:4] = 3 / 64
    np.testing.assert_allclose(maps, expected, rtol=1e-6)


def test_saliency_is_the_change_of_the_score_with_each_pixel():
    """By central differences in float64."""
    images = RANDOM.randn(1, 6, 5, 3).astype(np.float32)
    maps = np.asarray(attribution.saliency(Sum(of="square"), {}, images, 0))
    score = lambda image: (np.float64(image) ** 2 * WEIGHTS[..., 0]).sum()  # noqa: E731
    for row, column in [(0, 0), (3, 2), (5, 4)]:
        slopes = []
        for channel in range(3):
            step = np.zeros((6, 5, 3))
            step[row, column, channel] = 1e-3
            slopes.append((score(images[0] + step) - score(images[0] - step)) / 2e-3)
        assert maps[0, row, column] == pytest.approx(np.abs(slopes).max(), rel=1e-4)


@pytest.mark.parametrize("find", ["class_activation_map", "saliency", "smooth_grad"])
def test_wrong_classes_are_named(find):
    model, variables = patch_net()
    images = np.zeros((3, 8, 8, 3), np.float32)
    more = (jax.random.key(0),) if find == "smooth_grad" else ()
    find = getattr(attribution, find)
    for classes, told in [
        (2, "classes: 2 is not one of 0 to 1"),
        ([0, -1, 1], "classes: -1 is not one of 0 to 1"),
        ([0, 1], r"classes: int64 of shape \(2,\); .* list of 3 of them"),
        (0.5, r"classes: float64 of shape \(\)"),
        ([[0, 1, 0]], r"shape \(1, 3\)"),
        ("1", "classes: <U1"),
    ]:
        with pytest.raises(UsageError, match=told):
            find(model, variables, images, classes, *more)
    with pytest.raises(UsageError, match="images: uint8 is no float"):
        find(model, variables, images.astype(np.uint8), 0, *more)
    headless = model.clone(num_classes=0)
    with pytest.raises(UsageError, match="num_classes=0"):
        find(headless, variables, images, 0, *more)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"samples": 0}, "samples: 0 is no whole number from 1"),
        ({"noise": -0.1}, "noise: -0.1 is not 0 or more"),
        ({"noise": math.nan}, "noise: nan is not 0 or more"),
    ],
)
def test_wrong_noise_is_named(options, told):
    images = np.zeros((1, 6, 5, 3), np.float32)
    with pytest.raises(UsageError, match=told):
        attribution.smooth_grad(Sum(), {}, images, 0, jax.random.key(0), **options)


@pytest.mark.peers
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_maps_are_those_of_pytorch(name, monkeypatch):
    """Of torchvision's net with the same weights: hooks, and its own gradients."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_torch_golden
    import torch

    torch.manual_seed(0)
    net = make_torch_golden.create_net("torchvision", name, 10).eval()
    variables = resjax.from_torch(net.state_dict(), name)
    model = create_model(name, num_classes=10)
    images = np.random.RandomState(0).randn(2, 64, 48, 3).astype(np.float32)
    classes = np.array([7, 1])
    held = {}
    net.layer4.register_forward_hook(lambda module, inputs, y: held.update(last=y))
    x = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
    scores = net(x)[range(2), torch.tensor(classes)]
    scores.sum().backward()
    weights = net.fc.weight[torch.tensor(classes)]  # [B, D]
    expected = torch.einsum("bdij,bd->bij", held["last"], weights).detach().numpy()
    found = attribution.class_activation_map(model, variables, images, classes)
    np.testing.assert_allclose(
        found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
    gradients = x.grad.abs().amax(dim=1).numpy()
    maps = attribution.saliency(model, variables, images, classes)
    np.testing.assert_allclose(maps, gradients, rtol=0.01, atol=1e-3 * gradients.max())
