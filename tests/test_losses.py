"""Cross-entropy against a float64 formula."""

import jax.numpy as jnp
import numpy as np

from resjax.losses import cross_entropy


def test_cross_entropy_is_minus_log_softmax_of_the_label():
    logits = np.random.RandomState(0).randn(6, 5) * 4
    labels = np.array([0, 4, 2, 2, 1, 3])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(p[np.arange(6), labels])
    actual = cross_entropy(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_cross_entropy_is_float32_and_finite_for_large_bfloat16_logits():
    loss = cross_entropy(jnp.array([[1e4, -1e4]], jnp.bfloat16), jnp.array([1]))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [2e4], rtol=1e-2)
