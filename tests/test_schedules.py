"""Learning rates against their formulas, step by step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax import schedules
from resjax.build import build_schedule
from resjax.config import Config


def values(schedule, steps):
    return np.array([float(schedule(step)) for step in steps])


@pytest.mark.parametrize("kn, rate", [(128, 0.05), (256, 0.1), (8192, 3.2), (65536, 25.6)])
def test_linear_scaling_gives_the_rates_of_goyal_table_1(kn, rate):
    assert schedules.scale_learning_rate(0.1, kn) == pytest.approx(rate)


def test_step_decay_drops_at_each_boundary():
    rate = schedules.step_decay(0.5, [3, 5])
    expected = [0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005]
    np.testing.assert_allclose(values(rate, range(7)), expected, rtol=1e-6)


def test_step_decay_without_boundaries_is_constant():
    np.testing.assert_allclose(values(schedules.step_decay(0.5, []), [0, 9]), 0.5)


def test_cosine_is_half_a_period_between_warmup_and_end():
    rate = schedules.cosine_decay(0.5, first_step=10, num_steps=50)
    expected = [0.25 * (1 + math.cos(math.pi * max(t - 10, 0) / 40)) for t in range(51)]
    np.testing.assert_allclose(values(rate, range(51)), expected, atol=1e-7)
    assert float(rate(50)) == pytest.approx(0, abs=1e-8)


def test_gradual_warmup_adds_a_constant_each_iteration():
    # Goyal et al. 2017, section 2.2: from 0.1 to 3.2 in 5 epochs, then as without it.
    after = schedules.step_decay(3.2, [300])
    rate = schedules.warm_up(after, "gradual", start=0.1, peak=3.2, steps=100)
    warm = values(rate, range(101))
    np.testing.assert_allclose(np.diff(warm), 3.1 / 100, rtol=1e-4)
    np.testing.assert_allclose(warm[[0, 100]], [0.1, 3.2], rtol=1e-6)
    np.testing.assert_allclose(values(rate, [299, 300]), [3.2, 0.32], rtol=1e-6)


def test_constant_warmup_jumps():
    after = schedules.step_decay(3.2, [])
    rate = schedules.warm_up(after, "constant", start=0.1, peak=3.2, steps=4)
    np.testing.assert_allclose(values(rate, range(6)), [0.1] * 4 + [3.2] * 2, rtol=1e-6)


# --- Goyal et al. 2017 on ImageNet's 1,281,167 images, through the config ---------------

# kn: the peak rate, and the first steps of epochs 5, 30, 60, 80 and 90 (the end), which are
# epoch * 1,281,167 / kn, rounded.
GOYAL = {
    256: (0.1, (25_023, 150_137, 300_274, 400_365, 450_410)),
    8192: (3.2, (782, 4_692, 9_384, 12_511, 14_075)),
    16384: (6.4, (391, 2_346, 4_692, 6_256, 7_038)),
}


def goyal_schedule(kn, warmup="goyal"):
    """Of 90 epochs with drops at 30, 60 and 80 and five epochs of warmup from 0.1."""
    config = Config(
        batch_size=kn,
        lr_per_256=0.1,
        schedule="step",
        warmup=warmup,
        warmup_epochs=5.0,
        drop_epochs=(30.0, 60.0, 80.0),
        num_epochs=90.0,
    )
    return build_schedule(config, 1_281_167)


@pytest.mark.parametrize("warmup", ["goyal", "gradual", "constant", "none"])
@pytest.mark.parametrize("kn", GOYAL)
def test_rates_at_named_steps_are_those_of_goyal(kn, warmup):
    peak, (warm, *drops, end) = GOYAL[kn]
    schedule, derived = goyal_schedule(kn, warmup)
    assert (derived["num_steps"], derived["drop_steps"]) == (end, drops)
    gradual = [0.1, 0.1 + (peak - 0.1) / warm, 0.1 + (peak - 0.1) * (warm - 1) / warm]
    start = {"constant": [0.1] * 3, "none": [peak] * 3}.get(warmup, gradual)
    expected = dict(zip([0, 1, warm - 1], start, strict=True))
    expected |= {warm: peak, warm + 1: peak}
    for i, drop in enumerate(drops):
        expected |= {drop - 1: peak / 10**i, drop: peak / 10 ** (i + 1)}
    expected[end - 1] = peak / 1000
    rates = values(schedule, expected)
    np.testing.assert_allclose(rates, list(expected.values()), rtol=1e-6)


@pytest.mark.parametrize("kn", [8192, 16384])
def test_gradual_warmup_of_imagenet_climbs_evenly_from_exactly_the_base_rate(kn):
    peak, (warm, *_) = GOYAL[kn]
    rates = np.asarray(jax.jit(jax.vmap(goyal_schedule(kn)[0]))(jnp.arange(warm + 1)))
    assert (rates[0], rates[warm]) == (np.float32(0.1), np.float32(peak))
    increments = np.diff(rates.astype(np.float64))
    np.testing.assert_allclose(increments, (peak - 0.1) / warm, atol=6e-7)
