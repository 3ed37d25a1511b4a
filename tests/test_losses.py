"""Cross-entropy against a float64 formula, and against PyTorch's."""

import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_a_smoothed_label_leaves_the_other_classes_their_share(smoothing):
    logits = np.random.RandomState(0).randn(6, 5) * 4
    labels = np.array([0, 4, 2, 2, 1, 3])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = np.full((6, 5), smoothing / 5)
    target[np.arange(6), labels] += 1 - smoothing
    expected = -(target * np.log(p)).sum(axis=1)
    actual = cross_entropy(jnp.array(logits), jnp.array(labels), smoothing)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.peers
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_pytorch(smoothing):
    import torch

    logits = np.random.RandomState(1).randn(8, 1000) * 4
    labels = np.random.RandomState(2).randint(1000, size=8)
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        label_smoothing=smoothing,
        reduction="none",
    )
    actual = cross_entropy(jnp.array(logits), jnp.array(labels), smoothing)
    np.testing.assert_allclose(actual, theirs.numpy(), rtol=1e-5)
