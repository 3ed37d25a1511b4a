"""Writing checkpoints: whole or not at all, beside the training, and which are kept."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import saved
from etils import epath
from test_checkpoint import make_state, save

from resjax import checkpoint, checkpoint_writer


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_those_chosen_are_kept(workdir):
    save(workdir, [1, 2, 3, 4, 5], keep=lambda steps: {2, *steps[-2:]})
    assert checkpoint.list_steps(workdir) == [2, 4, 5]


def test_variables_that_are_not_finite_are_not_saved(workdir):
    state = make_state(1)
    kernel = state.params["stem"]["conv"]["kernel"].at[0, 0].set(jnp.nan)
    broken = {"params": {"k": kernel}, "batch_stats": state.batch_stats}
    not_finite = pytest.raises(FloatingPointError, match="step 1")
    with checkpoint_writer.open_writer(workdir, set) as writer, not_finite:
        checkpoint_writer.save(writer, 1, broken, state.optimizer, {})
    assert checkpoint.list_steps(workdir) == []


def test_what_was_saved_is_not_what_the_arrays_become(workdir):
    # On a CPU an array of numpy may be a view of what the next update overwrites.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(100_000)
    with checkpoint_writer.open_writer(workdir, lambda steps: set(steps)) as writer:
        for step in range(3):
            checkpoint_writer.save(writer, step, {"x": x}, {"step": step}, {})
            for _ in range(10):
                x = add(x)
    for step in range(3):
        np.testing.assert_array_equal(saved(workdir, step)["x"], 10.0 * step)


def test_saving_returns_before_the_files_are_written(workdir, monkeypatch):
    may_write, make = threading.Event(), checkpoint.to_files

    def slow(record, arrays):
        assert may_write.wait(20)
        return make(record, arrays)

    monkeypatch.setattr(checkpoint, "to_files", slow)
    with checkpoint_writer.open_writer(workdir, set) as writer:
        checkpoint_writer.save(writer, 1, {"x": np.zeros(3)}, {}, {})
        assert checkpoint.list_steps(workdir) == []  # what is begun is no checkpoint
        may_write.set()
    assert checkpoint.list_steps(workdir) == [1]


def test_old_ones_stay_until_the_new_one_is_written(workdir, monkeypatch):
    save(workdir, [1])

    def fail(record, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "to_files", fail)
    keep_newest = lambda steps: set(steps[-1:])  # noqa: E731
    no_space = pytest.raises(OSError, match="No space left")
    with no_space, checkpoint_writer.open_writer(workdir, keep_newest) as writer:
        checkpoint_writer.save(writer, 2, {"x": np.zeros(3)}, {}, {})
    assert checkpoint.list_steps(workdir) == [1]
