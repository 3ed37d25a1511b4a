"""Batch normalisation against float64, on one device and joined over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from resjax.models.norm import BatchNorm, Bias

CHANNELS = 3


def make_inputs(batch=8, offset=3.0, shape=(2, 4)):
    return (offset + 2 * np.random.RandomState(0).randn(batch, *shape, CHANNELS)).astype(
        np.float32
    )


def make_variables():
    """Values that no default would give."""
    scale, bias, mean, var = np.random.RandomState(1).uniform(0.5, 2, (4, CHANNELS))
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), variables)


def reference(x, variables, size):
    """Train output and new running statistics in float64, `size` examples a group."""
    params, stats = variables["params"], variables["batch_stats"]
    groups = x.astype(np.float64).reshape(-1, size, *x.shape[1:])
    axes = tuple(range(1, groups.ndim - 1))
    mean = groups.mean(axes, keepdims=True)
    std = np.sqrt(groups.var(axes, keepdims=True) + 1e-5)
    scale, bias = (np.array(params[name], np.float64) for name in ("scale", "bias"))
    y = ((groups - mean) / std * scale + bias).reshape(x.shape)
    batch = {"mean": groups.mean(axes), "var": groups.var(axes, ddof=1)}
    new = {k: 0.9 * np.array(stats[k]) + 0.1 * batch[k].mean(axis=0) for k in batch}
    return y, new


def assert_stats_close(actual, expected, rtol=1e-5):
    assert set(actual) == set(expected) == {"mean", "var"}
    for name in expected:
        assert actual[name].dtype == jnp.float32
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol)


def train(norm, variables, x):
    y, updates = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, updates["batch_stats"]


@pytest.mark.parametrize("shape", [(2, 4), ()], ids=["images", "vectors"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_a_batch_is_normalised_and_enters_the_running_statistics(offset, shape):
    x, variables = make_inputs(offset=offset, shape=shape), make_variables()
    y, stats = train(BatchNorm(), variables, x)
    expected, expected_stats = reference(x, variables, size=len(x))
    # At an offset of 1000 the float32 mean itself is off by up to 6e-5.
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert_stats_close(stats, expected_stats)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_virtual_batches_share_statistics_among_consecutive_examples(size):
    x, variables = make_inputs(), make_variables()
    y, stats = train(BatchNorm(virtual_batch_size=size), variables, x)
    expected, expected_stats = reference(x, variables, size)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert_stats_close(stats, expected_stats)


def forward_and_gradient(norm):
    """(variables, x, weights) -> output, gradient of a weighted sum of it, statistics."""

    def run(variables, x, weights):
        def loss(x):
            y, stats = train(norm, variables, x)
            return (weights * y**2).sum(), (y, stats)

        gradient, (y, stats) = jax.grad(loss, has_aux=True)(x)
        return y, gradient, stats

    return run


def gradient_reference(x, variables, weights, size):
    """The gradient of `forward_and_gradient` by the chain rule of the paper, in float64."""
    groups = x.astype(np.float64).reshape(-1, size, *x.shape[1:])
    axes = tuple(range(1, groups.ndim - 1))
    std = np.sqrt(groups.var(axes, keepdims=True) + 1e-5)
    normal = (groups - groups.mean(axes, keepdims=True)) / std
    scale, bias = (np.array(variables["params"][name]) for name in ("scale", "bias"))
    upstream = 2 * weights.reshape(groups.shape) * (normal * scale + bias) * scale
    along = normal * (upstream * normal).mean(axes, keepdims=True)
    gradient = (upstream - upstream.mean(axes, keepdims=True) - along) / std
    return gradient.reshape(x.shape)


@pytest.mark.parametrize("size", [2, 8])
def test_the_gradient_passes_through_the_statistics(size):
    x, variables = make_inputs(), make_variables()
    weights = np.random.RandomState(2).randn(*x.shape).astype(np.float32)
    run = forward_and_gradient(BatchNorm(virtual_batch_size=size))
    _, gradient, _ = run(variables, x, weights)
    expected = gradient_reference(x, variables, weights, size)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def on_devices(run, runner, count):
    """`run` over `count` devices with the axis "devices"; whole batches in and out."""
    devices = jax.devices()[:count]

    def per_device(variables, x, weights):
        y, gradient, stats = run(variables, x, weights)
        return y, gradient, lax.pmean(stats, "devices")

    if runner == "shard_map":
        return jax.jit(
            jax.shard_map(
                per_device,
                mesh=Mesh(np.array(devices), ("devices",)),
                in_specs=(P(), P("devices"), P("devices")),
                out_specs=(P("devices"), P("devices"), P()),
                check_vma=False,
            )
        )
    mapped = jax.pmap(
        per_device,
        "devices",
        in_axes=(None, 0, 0),
        out_axes=(0, 0, None),
        devices=devices,
    )

    def whole(variables, x, weights):
        parts = (v.reshape(count, -1, *v.shape[1:]) for v in (x, weights))
        y, gradient, stats = mapped(variables, *parts)
        return y.reshape(x.shape), gradient.reshape(x.shape), stats

    return whole


@pytest.mark.parametrize(
    "count, size, runner",
    [
        (4, 2, "pmap"),  # six examples a device: groups smaller,
        (4, 6, "pmap"),  # equal,
        (4, 12, "pmap"),  # of two devices,
        (4, 12, "shard_map"),
        (4, 24, "pmap"),  # of all, named
        (8, 0, "shard_map"),  # or not,
        (4, 4, "pmap"),  # on both sides of a boundary,
        (8, 8, "shard_map"),  # of parts of four devices with three examples each
    ],
)
def test_groups_are_the_same_examples_on_any_number_of_devices(count, size, runner):
    x, variables = make_inputs(batch=24), make_variables()
    # Slices of unlike mean: the statistics of a device say nothing about a group.
    x += np.arange(24, dtype=np.float32).reshape(-1, 1, 1, 1)
    weights = np.random.RandomState(2).randn(*x.shape).astype(np.float32)
    norm = BatchNorm(virtual_batch_size=size, axis_name="devices")
    run = on_devices(forward_and_gradient(norm), runner, count)
    y, gradient, stats = run(variables, x, weights)
    size = size or len(x)
    expected, expected_stats = reference(x, variables, size)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    expected = gradient_reference(x, variables, weights, size)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=2e-5)
    assert_stats_close(stats, expected_stats)


def test_evaluation_uses_the_running_statistics():
    x, variables = make_inputs(), make_variables()
    params, stats = (
        {k: np.array(v, np.float64) for k, v in variables[name].items()}
        for name in ("params", "batch_stats")
    )
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    expected = expected * params["scale"] + params["bias"]
    for flags in ({}, {"train": False}):
        y = BatchNorm().apply(variables, x, **flags)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_batch_statistics_can_be_used_without_an_update():
    x, variables = make_inputs(), make_variables()
    y = BatchNorm().apply(variables, x, train=True, update_stats=False)
    np.testing.assert_allclose(y, reference(x, variables, len(x))[0], rtol=1e-4, atol=1e-5)
    _, updates = BatchNorm().apply(
        variables, x, train=True, update_stats=False, mutable=["batch_stats"]
    )
    for name, before in variables["batch_stats"].items():
        np.testing.assert_array_equal(updates["batch_stats"][name], before)


@pytest.mark.parametrize("mutable", [False, ["batch_stats"]])
def test_statistics_that_were_not_computed_cannot_be_updated(mutable):
    with pytest.raises(ValueError, match="update_stats=True needs train=True"):
        BatchNorm().apply(
            make_variables(), make_inputs(), update_stats=True, mutable=mutable
        )


@pytest.mark.parametrize("is_training", [False, True])
def test_init_starts_the_statistics_at_zero_and_one(is_training):
    variables = BatchNorm().init(jax.random.key(0), make_inputs(), train=is_training)
    ones, zeros = np.ones(CHANNELS, np.float32), np.zeros(CHANNELS, np.float32)
    stats, params = variables["batch_stats"], variables["params"]
    np.testing.assert_array_equal(stats["mean"], zeros)
    np.testing.assert_array_equal(stats["var"], ones)
    np.testing.assert_array_equal(params["scale"], ones)
    np.testing.assert_array_equal(params["bias"], zeros)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_normalised_in_float32(dtype):
    # 2,048 values around 300: their sum leaves float16, and bfloat16 has steps of 2 there.
    x = jnp.array(make_inputs(offset=300.0, shape=(16, 16)), dtype)
    variables = make_variables()
    y, stats = train(BatchNorm(), variables, x)
    expected, expected_stats = reference(np.array(x, np.float32), variables, len(x))
    assert y.dtype == dtype
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.array(y, np.float32), expected, rtol=tolerance, atol=1e-3)
    assert_stats_close(stats, expected_stats, rtol=1e-4)
    assert BatchNorm().apply(variables, x).dtype == dtype


def test_a_virtual_batch_must_divide_the_batch():
    with pytest.raises(ValueError, match=r"virtual_batch_size=3 does not divide .* 8"):
        train(BatchNorm(virtual_batch_size=3), make_variables(), make_inputs())
    run = forward_and_gradient(BatchNorm(virtual_batch_size=5, axis_name="devices"))
    with pytest.raises(ValueError, match=r"virtual_batch_size=5 does not divide .* 8"):
        on_devices(run, "pmap", 4)(make_variables(), make_inputs(), make_inputs())


@pytest.mark.parametrize("size, batch", [(0, 1), (1, 4)])
def test_a_single_value_a_channel_has_no_statistics(size, batch):
    x = make_inputs(batch=batch, shape=(1, 1))
    with pytest.raises(ValueError, match="more than one value"):
        train(BatchNorm(virtual_batch_size=size), make_variables(), x)


def test_one_value_a_device_is_enough_for_joined_devices():
    x, variables = make_inputs(batch=8, shape=()), make_variables()
    run = forward_and_gradient(BatchNorm(axis_name="devices"))
    y, _, stats = on_devices(run, "pmap", 8)(variables, x, x)
    expected, expected_stats = reference(x, variables, size=8)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert_stats_close(stats, expected_stats)


def test_a_bias_in_place_of_a_norm_adds_and_keeps_no_statistics():
    x = jnp.array(np.random.RandomState(0).randn(2, 4, 4, 3), jnp.bfloat16)
    variables = {"params": {"bias": jnp.array([1.0, -2.0, 0.5])}}
    y = Bias().apply(variables, x, train=True, update_stats=True)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, x + jnp.array([1, -2, 0.5], jnp.bfloat16))
    assert set(Bias().init(jax.random.key(0), x)) == {"params"}
