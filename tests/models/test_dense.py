"""The dense form against windows cut out of the input and of PyTorch's last map."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from conftest import ROOT, random_variables

import resjax
from resjax.models import dense
from resjax.models.blocks import basic
from resjax.models.ops import Conv
from resjax.models.resnet import ResNet

SMALL = {"width": 8, "num_classes": 5}
NETS = {
    "imagenet": partial(resjax.create_model, "resnet18", stage_sizes=(1,) * 4, **SMALL),
    "preact": partial(
        resjax.create_model, "preact_resnet50", stage_sizes=(1,) * 4, **SMALL
    ),
    "cifar": partial(resjax.create_model, "cifar_resnet20", stage_sizes=(1,) * 3, **SMALL),
}


def noise(*shape):
    return np.random.RandomState(0).randn(*shape, 3).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 3))
def outputs(model, variables, images, window):
    """Logits, last map, dense logits and score map, in one program."""
    logits, stages = model.apply(variables, images, return_stages=True)
    return (
        logits,
        list(stages.values())[-1],
        dense.dense_logits(model, variables, images, window),
        dense.score_map(model, variables, images, window),
    )


def mean_over_windows(variables, last_map, side):
    """A loop over the windows of a map [B, h, w, D]: mean, classifier, mean of scores."""
    head = {name: np.float64(x) for name, x in variables["params"]["head"].items()}
    rows, columns = (min(side, n) for n in last_map.shape[1:3])
    scores = [
        last_map[:, top : top + rows, left : left + columns].mean(axis=(1, 2))
        @ head["kernel"]
        + head["bias"]
        for top in range(last_map.shape[1] - rows + 1)
        for left in range(last_map.shape[2] - columns + 1)
    ]
    return np.mean(scores, axis=0)


def assert_close(actual, expected):
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", NETS)
def test_an_image_of_the_training_size_has_the_logits_of_the_model(name):
    model = NETS[name]()
    window = dense.window_size(model, 64)
    assert window * dense.total_stride(model) == 64
    logits, _, scores, _ = outputs(model, random_variables(model), noise(3, 64, 64), window)
    assert_close(scores, logits)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("imagenet", (96, 160)),
        ("imagenet", (32, 96)),  # less than a window high
        ("preact", (128, 70)),
        ("cifar", (20, 28)),
        ("cifar", (96, 70)),
    ],
)
def test_scores_are_averaged_over_all_windows_of_the_last_map(name, shape):
    model = NETS[name]()
    variables, window = random_variables(model), dense.window_size(model, 64)
    _, last_map, scores, mapped = outputs(model, variables, noise(2, *shape), window)
    expected = mean_over_windows(variables, np.float64(last_map), window)
    assert scores.dtype == jnp.float32
    assert_close(scores, expected)
    assert_close(np.asarray(mapped).mean(axis=(1, 2)), expected)


def test_a_position_of_the_score_map_is_the_window_that_begins_there():
    model = NETS["imagenet"]()
    variables = random_variables(model)
    _, last_map, _, scores = outputs(model, variables, noise(2, 128, 160), 2)
    assert last_map.shape[1:3] == (4, 5) and scores.shape == (2, 3, 4, 5)
    for top, left in ((0, 0), (2, 3), (1, 2)):
        part = np.float64(last_map)[:, top : top + 2, left : left + 2]
        assert_close(scores[:, top, left], mean_over_windows(variables, part, 2))


def _pointwise(features, kernel_size=1, *args, **kwargs):
    return Conv(features, 1, *args, **kwargs)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (384, 384), (224, 320)])
def test_a_net_without_padding_sees_exactly_the_crops_of_224_pixels(height, width):
    # All kernels are 1x1, so that a window of the last map is what a crop gives.
    model = ResNet(
        (1,) * 6, basic, width=2, downsample=False, num_classes=5, conv=_pointwise
    )
    variables, image = random_variables(model), noise(1, height, width)
    assert (dense.total_stride(model), dense.window_size(model, 224)) == (32, 7)
    crops = [
        image[0, top : top + 224, left : left + 224]
        for top in range(0, height - 223, 32)
        for left in range(0, width - 223, 32)
    ]
    logits = np.float64(jax.jit(model.apply)(variables, np.stack(crops)))
    _, _, scores, mapped = outputs(model, variables, image, 7)
    assert_close(np.asarray(mapped)[0].reshape(-1, 5), logits)
    assert_close(scores[0], logits.mean(axis=0))


def test_scores_are_float32_whatever_computes():
    model = NETS["imagenet"](dtype=jnp.bfloat16)
    logits, last_map, scores, _ = outputs(
        model, random_variables(model), noise(2, 64, 64), 2
    )
    assert (last_map.dtype, scores.dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(scores, logits)


@pytest.mark.parametrize(
    ("name", "stride", "window"),
    [("resnet50", 32, 7), ("preact_resnet18", 32, 7), ("cifar_resnet110", 4, 56)],
)
def test_strides_and_windows_of_the_papers_nets(name, stride, window):
    model = resjax.create_model(name)
    assert dense.total_stride(model) == stride
    assert dense.window_size(model, 224) == window


@pytest.mark.peers
@pytest.mark.parametrize("shape", [(224, 224), (256, 256), (384, 384), (256, 352)])
def test_dense_scores_are_those_of_the_windows_of_pytorchs_map(shape):
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_torch_golden as golden
    import torch

    net = golden.load("resnet18").eval()
    arrays = {key: np.float32(x) for key, x in net.state_dict().items()}
    variables = resjax.from_torch(arrays, "resnet18")
    model = resjax.create_model("resnet18", num_classes=parity.NUM_CLASSES)
    images = noise(1, *shape)
    body = torch.nn.Sequential(*list(net.children())[:-2])
    with torch.no_grad():
        last_map = body(golden.tensor(images))  # [1, 512, h, w], float64
        height, width = last_map.shape[2:]
        scores = [
            net.fc(last_map[:, :, top : top + 7, left : left + 7].mean(dim=(2, 3)))
            for top in range(height - 6)
            for left in range(width - 6)
        ]
    expected = np.mean([score.numpy() for score in scores], axis=0)
    ours = jax.jit(partial(dense.dense_logits, model, window=7))(variables, images)
    assert_close(ours, expected)
