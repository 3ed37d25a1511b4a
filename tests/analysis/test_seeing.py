"""Filters, maps and favourite images of nets whose weights are set by hand or known."""

import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_variables
from patch_net import CHANNELS, patch_net, with_patch

from resjax.analysis import seeing
from resjax.config import UsageError
from resjax.models.resnet import create_model

NETS = [
    ("cifar_resnet20", {"stage_sizes": (2, 1), "width": 8}),
    ("cifar_preact_resnet110", {"stage_sizes": (2, 1), "width": 8}),
    ("cifar_resnext29_4x24d", {"stage_sizes": (1, 1), "width": 16}),
    ("resnet18", {"stage_sizes": (1, 1), "width": 8, "dtype": jnp.bfloat16}),
]


def test_filters_are_kernels_in_their_own_scale_round_grey():
    kernel = np.random.RandomState(0).randn(5, 5, 3, 4).astype(np.float32)
    kernel[..., 2] *= 1e-3
    kernel[..., 3] = 0
    filters = seeing.first_layer_filters({"params": {"stem": {"conv": {"kernel": kernel}}}})
    assert filters.shape == (4, 5, 5, 3)
    for i in range(3):
        largest = np.abs(kernel[..., i]).max()
        np.testing.assert_allclose(
            filters[i], (kernel[..., i] / largest + 1) / 2, atol=1e-6
        )
    assert (filters[3] == 0.5).all()


def test_layers_are_named_from_input_to_output():
    model = create_model("resnet18", stage_sizes=(2, 1))
    blocks = ["stage1", "stage1/block1", "stage1/block2", "stage2", "stage2/block1"]
    assert seeing.list_layers(model) == ["stem", *blocks]


@pytest.mark.parametrize("name, options", NETS)
def test_maps_of_stages_are_those_that_the_net_returns(name, options):
    model = create_model(name, **options)
    variables = random_variables(model)
    images = np.random.RandomState(0).randn(2, 16, 12, 3).astype(np.float32)
    _, stages = jax.jit(partial(model.apply, train=False, return_stages=True))(
        variables, images
    )
    for stage, expected in stages.items():
        maps = seeing.feature_maps(model, variables, images, stage)
        assert maps.dtype == model.dtype
        tolerance = 1e-5 if model.dtype == jnp.float32 else 0.02
        np.testing.assert_allclose(
            np.float32(maps), np.float32(expected), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("remat", ["none", "blocks"])
@pytest.mark.parametrize("name, options", NETS[:2])
def test_maps_of_blocks_are_those_of_the_net_that_ends_there(name, options, remat):
    model = create_model(name, **(options | {"stage_sizes": (3,), "remat": remat}))
    variables = random_variables(model)
    images = np.random.RandomState(0).randn(2, 8, 8, 3).astype(np.float32)
    found = {
        i: np.asarray(seeing.feature_maps(model, variables, images, f"stage1/block{i}"))
        for i in (1, 3)
    }
    for i, maps in found.items():
        shorter = model.clone(stage_sizes=(i,), remat="none")
        apply = jax.jit(partial(shorter.apply, train=False, return_stages=True))
        _, stages = apply(variables, images)
        if model.preactivation:  # which normalises behind the last block
            norm, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
            maps = (maps - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
            maps = np.maximum(maps * norm["scale"] + norm["bias"], 0)
        np.testing.assert_allclose(maps, stages["stage1"], rtol=1e-4, atol=1e-4)


def test_the_map_of_the_stem_is_the_patch_that_it_detects():
    model, variables = patch_net()
    images = np.stack([with_patch(3, 5), with_patch(3, 5, 0.5)])
    maps = np.asarray(seeing.feature_maps(model, variables, images, "stem"))
    expected = np.zeros((2, 8, 8), np.float32)
    expected[0, 3, 5] = 1
    np.testing.assert_array_equal(maps[..., 0], expected)
    # Channel 1 sees single pixels.
    np.testing.assert_array_equal(maps[..., 1], 0.5 * (images[..., 2] == 1))


@pytest.mark.parametrize("downsample", [False, True])
def test_top_images_are_those_that_hold_the_patch_brightest_first_and_where(downsample):
    model, variables = patch_net(downsample)
    images = np.zeros((200, 32, 32, 3), np.float32)
    holds = {150: (1.2, 8, 12), 7: (1.1, 4, 24), 64: (1.05, 28, 4)}
    for i, (brightness, row, column) in holds.items():
        images[i] = with_patch(row, column, brightness, 32)
    top = seeing.top_images(model, variables, [images], "stage1", n=5)
    assert top.indices[0].tolist() == [150, 7, 64, 0, 1]  # then those without, in order
    expected = [27 * brightness - 26 for brightness, *_ in holds.values()]
    np.testing.assert_allclose(top.values[0], [*expected, 0, 0], rtol=1e-5, atol=1e-5)
    places = [[row, column] for _, row, column in holds.values()]
    assert top.positions[0].tolist() == [*places, [0, 0], [0, 0]]


def test_equal_images_keep_their_order_and_equal_positions_theirs():
    model, variables = patch_net()
    both = with_patch(5, 2) + with_patch(2, 5)
    images = np.stack([with_patch(4, 4), both, np.zeros_like(both), both])
    top = seeing.top_images(model, variables, [images], "stage1", n=9)
    assert top.indices.shape == (CHANNELS, 4)  # there are no more
    assert top.indices[0].tolist() == [0, 1, 3, 2]
    assert top.positions[0].tolist() == [[4, 4], [2, 5], [2, 5], [0, 0]]
    assert top.indices[3].tolist() == [0, 1, 2, 3]  # a silent channel


def test_top_images_do_not_depend_on_the_batches():
    model = create_model("cifar_resnet20", stage_sizes=(1, 1), width=8)
    variables = random_variables(model)
    images = np.random.RandomState(0).randn(150, 8, 8, 3).astype(np.float32)
    apply = jax.jit(partial(model.apply, train=False, return_stages=True))
    maps = apply(variables, images)[1]["stage2"]
    largest = np.asarray(maps).max(axis=(1, 2))  # [150, C]
    whole = seeing.top_images(model, variables, [images], "stage2", n=6)
    for channel in range(largest.shape[1]):
        order = np.argsort(-largest[:, channel].round(4), kind="stable")[:6]
        np.testing.assert_array_equal(whole.indices[channel], order)
        np.testing.assert_allclose(
            whole.values[channel], largest[order, channel], rtol=1e-4, atol=1e-5
        )
    for size in (1, 7, 64, 149):
        batches = (images[i : i + size] for i in range(0, len(images), size))
        found = seeing.top_images(model, variables, batches, "stage2", n=6)
        for one, other in zip(found, whole, strict=True):
            np.testing.assert_array_equal(one, other)


def test_memory_does_not_grow_with_the_stream():
    """Of a stream, no more is held at a time than one pass needs, 4 batches of 16."""
    model, variables = patch_net()
    alive, most = 0, 0

    def let_go():
        nonlocal alive
        alive -= 1

    def stream():
        nonlocal alive, most
        for _ in range(40):
            batch = np.zeros((16, 8, 8, 3), np.float32)
            weakref.finalize(batch, let_go)
            alive += 1
            most = max(most, alive)
            yield batch
            del batch

    top = seeing.top_images(model, variables, stream(), "stem", n=2)
    assert top.indices.shape == (CHANNELS, 2)
    assert most <= 10


def test_wrong_layers_and_streams_are_named():
    model, variables = patch_net()
    images = np.zeros((2, 8, 8, 3), np.float32)
    for layer, told in [
        ("stage2", "'stage2'; did you mean .*stage1"),
        ("stage1/blok1", "'stage1/blok1'; did you mean .*stage1/block1"),
        ("x", r"'x'; there are \['stage1', 'stage1/block1', 'stem'\]"),
    ]:
        with pytest.raises(UsageError, match=told):
            seeing.feature_maps(model, variables, images, layer)
        with pytest.raises(UsageError, match=told):
            seeing.top_images(model, variables, [images], layer)
    with pytest.raises(UsageError, match="n: 0 is no whole number from 1"):
        seeing.top_images(model, variables, [images], "stem", n=0)
    with pytest.raises(UsageError, match="there is no image"):
        seeing.top_images(model, variables, [], "stem")
    with pytest.raises(UsageError, match=r"shape \(4, 8, 3\).* the first is \(8, 8, 3\)"):
        seeing.top_images(model, variables, [images, images[:, :4]], "stem")
    with pytest.raises(UsageError, match=r"shape \(8, 3\)"):
        seeing.top_images(model, variables, [images[0]], "stem")


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 32])
def test_strides_follow_from_sizes_that_halve_and_round_up(stride):
    for pixels in range(2, 230):
        cells = pixels
        for _ in range(stride.bit_length() - 1):
            cells = (cells + 1) // 2
        if cells > 1:
            assert seeing.pixel_stride(pixels, cells) == stride
