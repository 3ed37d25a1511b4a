"""The two runners: same function, same numbers, memory given back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resjax import parallel


def step(state, batch):
    total = lax.psum(batch["x"].sum(axis=0) * state["w"], parallel.AXIS)
    return {"w": state["w"] - 0.1 * total}, lax.axis_index(parallel.AXIS) * 0 + total.sum()


def inputs():
    rng = np.random.RandomState(0)
    w, x = rng.randn(3).astype(np.float32), rng.randn(16, 3).astype(np.float32)
    return w, x


@pytest.mark.parametrize("runner", parallel.RUNNERS)
def test_runner_computes_the_sum_over_all_devices(runner):
    w, x = inputs()
    run = parallel.run_on_devices(step, runner)
    state, total = run(parallel.replicate({"w": w}), parallel.shard({"x": x}))
    expected = x.sum(axis=0) * w
    np.testing.assert_allclose(state["w"], w - 0.1 * expected, rtol=1e-5)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-4)
    assert state["w"].sharding.is_fully_replicated
    assert len(state["w"].sharding.device_set) == jax.device_count()


@pytest.mark.parametrize("runner", parallel.RUNNERS)
def test_gradients_of_replicated_parameters_are_summed_once(runner):
    def grad_step(w, batch):
        return lax.psum(jax.grad(lambda w: (batch["x"] @ w).sum())(w), parallel.AXIS)

    w, x = inputs()
    run = parallel.run_on_devices(grad_step, runner)
    grad = run(parallel.replicate(jnp.array(w)), parallel.shard({"x": x}))
    np.testing.assert_allclose(grad, x.sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("runner", parallel.RUNNERS)
def test_a_batch_that_is_not_sharded_is_whole_on_every_device(runner):
    def own_rows(state, batch):
        rows = batch["x"].reshape(lax.axis_size(parallel.AXIS), -1, 3)
        return state, lax.all_gather(rows[lax.axis_index(parallel.AXIS)], parallel.AXIS)

    w, x = inputs()
    run = parallel.run_on_devices(own_rows, runner, donate_state=True, sharded=False)
    first = parallel.replicate({"w": w})
    batch = parallel.replicate({"x": x})
    state, rows = run(first, batch)
    np.testing.assert_array_equal(rows.reshape(16, 3), x)
    assert state["w"].sharding.is_fully_replicated
    assert first["w"].is_deleted() and not batch["x"].is_deleted()


@pytest.mark.parametrize("runner", parallel.RUNNERS)
@pytest.mark.parametrize("donate", [False, True])
def test_state_is_donated_only_when_asked(runner, donate):
    w, x = inputs()
    state = parallel.replicate({"w": w})
    run = parallel.run_on_devices(step, runner, donate_state=donate)
    jax.block_until_ready(run(state, parallel.shard({"x": x})))
    assert state["w"].is_deleted() == donate


def test_each_device_holds_a_contiguous_slice():
    x = np.arange(24).reshape(24, 1)
    sharded = parallel.shard({"x": x})["x"]
    assert sharded.shape == (8, 3, 1)
    for device_index, device in enumerate(jax.devices()):
        (piece,) = (s.data for s in sharded.addressable_shards if s.device == device)
        assert piece.ravel().tolist() == [3 * device_index + i for i in range(3)]


def test_prefetch_keeps_order_and_reads_only_so_far_ahead():
    taken = []

    def batches():
        for i in range(6):
            taken.append(i)
            yield {"x": np.full((8, 1), i)}

    for i, batch in enumerate(parallel.prefetch(batches(), depth=2)):
        assert (np.asarray(batch["x"]) == i).all()
        assert len(taken) == min(i + 3, 6)
    assert i == 5


@pytest.mark.parametrize("count", [1, 3, 11])
def test_members_each_see_their_own_and_what_all_share(count):
    def program(state, own, shared):
        total = lax.psum(shared, parallel.AXIS)  # an axis of length 1
        return {"w": state["w"] + own["rate"] * total}

    rng = np.random.RandomState(0)
    states = [{"w": rng.randn(3).astype(np.float32)} for _ in range(count)]
    rates = [{"rate": np.float32(i)} for i in range(count)]
    shared = np.array([1.0, 2.0, 4.0], np.float32)
    mesh = parallel.member_mesh(count)
    assert mesh.size == min(count, jax.device_count())
    stacked, own = (parallel.shard_members(trees, mesh) for trees in (states, rates))
    out = parallel.run_members(program, mesh)(stacked, own, shared)["w"]
    expected = [state["w"] + i * shared for i, state in enumerate(states)]
    np.testing.assert_allclose(out[:count], expected, rtol=1e-6)
    assert len(out) % mesh.size == 0 and len(out) - count < mesh.size
    assert all((extra == out[count - 1]).all() for extra in out[count:])
    assert len(out.sharding.device_set) == mesh.size
