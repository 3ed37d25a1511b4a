"""Checkpoints: what is restored is what was saved, on any devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import SingleDeviceSharding

from resjax import checkpoint, optim, parallel, steps
from resjax.config import UsageError

TX = optim.sgd(lambda step: jnp.float32(0.1), 0.9, True, 1e-4)


def make_state(seed=0):
    rng = np.random.RandomState(seed)
    params = {"stem": {"conv": {"kernel": rng.randn(3, 2).astype(np.float32)}}}
    stats = {"stem": {"norm": {"mean": rng.randn(2).astype(np.float32)}}}
    state = steps.create_state({"params": params, "batch_stats": stats}, TX)
    return parallel.replicate(state.replace(step=jnp.int32(seed)))


def save(workdir, seeds, keep=9):
    with checkpoint.open_checkpoints(workdir, keep) as manager:
        for seed in seeds:
            state = make_state(seed)
            record = {"seed": seed}
            checkpoint.save(manager, seed, state.variables, state.optimizer, record)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_a_state_from_eight_devices_returns_bitwise_on_one(workdir):
    save(workdir, [3])
    state = make_state(3)
    like = checkpoint.abstract(state, SingleDeviceSharding(jax.devices()[5]))
    with checkpoint.open_checkpoints(workdir) as manager:
        items = checkpoint.restore_arrays(
            manager, 3, variables=like.variables, optimizer=like.optimizer
        )
        assert checkpoint.restore_record(manager, 3) == {"seed": 3}
    restored = steps.TrainState(**items["variables"], **items["optimizer"])
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    devices = {d for leaf in jax.tree.leaves(restored) for d in leaf.devices()}
    assert devices == {jax.devices()[5]}


def test_variables_open_without_knowing_the_optimizer(workdir):
    save(workdir, [3])
    variables = make_state(3).variables
    like = checkpoint.abstract(variables, SingleDeviceSharding(jax.devices()[0]))
    with checkpoint.open_checkpoints(workdir) as manager:
        items = checkpoint.restore_arrays(manager, 3, variables=like)
    jax.tree.map(np.testing.assert_array_equal, items["variables"], variables)


def test_the_latest_are_kept_and_steps_are_picked(workdir):
    save(workdir, [1, 2, 3, 4], keep=2)
    with checkpoint.open_checkpoints(workdir) as manager:
        assert sorted(manager.all_steps()) == [3, 4]
        assert checkpoint.pick_step(manager, None) == 4
        assert checkpoint.pick_step(manager, 3) == 3
        with pytest.raises(UsageError, match=r"step 1 .*\[3, 4\]"):
            checkpoint.pick_step(manager, 1)


def test_opening_to_read_makes_no_folder(workdir):
    no_checkpoint = pytest.raises(UsageError, match="no checkpoint")
    with checkpoint.open_checkpoints(workdir) as manager, no_checkpoint:
        checkpoint.pick_step(manager, None)
    assert list(workdir.iterdir()) == []


def test_variables_that_are_not_finite_are_not_saved(workdir):
    state = make_state(1)
    kernel = state.params["stem"]["conv"]["kernel"].at[0, 0].set(jnp.nan)
    broken = {"params": {"k": kernel}, "batch_stats": state.batch_stats}
    with checkpoint.open_checkpoints(workdir, 2) as manager:
        with pytest.raises(FloatingPointError, match="step 1"):
            checkpoint.save(manager, 1, broken, state.optimizer, {})
        assert manager.latest_step() is None
