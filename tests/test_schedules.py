"""Learning rates against their formulas, step by step."""

import math

import numpy as np
import pytest

from resjax import schedules


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
