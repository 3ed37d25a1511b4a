"""The loss scale is a power of two, halved by an overflow, doubled after many updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax.loss_scale import LossScale, all_finite, init_loss_scale


@pytest.mark.parametrize(
    "value, good_steps, finite, expected",
    [
        (8.0, 0, True, (8.0, 1)),
        (8.0, 1998, True, (8.0, 1999)),
        (8.0, 1999, True, (16.0, 0)),
        (8.0, 1999, False, (4.0, 0)),
        (2.0**24, 1999, True, (2.0**24, 0)),
        (1.0, 5, False, (1.0, 0)),
    ],
)
def test_scale_after_a_step(value, good_steps, finite, expected):
    scale = LossScale(jnp.float32(value), jnp.int32(good_steps))
    after = jax.jit(LossScale.adjust)(scale, jnp.bool_(finite))
    assert (float(after.value), int(after.good_steps)) == expected


def test_the_first_scale_is_a_power_of_two():
    value = float(init_loss_scale().value)
    assert np.log2(value) % 1 == 0 and value > 2.0**15


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_one_bad_number_is_found(bad):
    tree = {"a": jnp.ones(3), "b": [jnp.zeros((2, 2))]}
    assert all_finite(tree)
    tree["b"][0] = tree["b"][0].at[1, 0].set(bad)
    assert not all_finite(tree)
