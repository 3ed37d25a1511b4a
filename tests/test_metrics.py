"""Metric sums against plain numpy, with padding, few classes and broken logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from resjax.metrics import classification_sums, summarize

RNG = np.random.RandomState(0)
LOGITS, LABELS = RNG.randn(40, 12), RNG.randint(12, size=40)


def expected_hits(k):
    order = np.argsort(-LOGITS, axis=1)[:, :k]
    return (order == LABELS[:, None]).any(axis=1)


def test_sums_count_hits_among_the_best():
    sums = classification_sums(jnp.array(LOGITS), jnp.array(LABELS))
    assert float(sums["top1"]) == expected_hits(1).sum()
    assert float(sums["top5"]) == expected_hits(5).sum()
    assert float(sums["num_examples"]) == 40


def test_masked_examples_count_nothing_even_when_not_finite():
    mask = np.arange(40) < 25
    logits = np.where(mask[:, None], LOGITS, np.nan)
    sums = classification_sums(jnp.array(logits), jnp.array(LABELS), jnp.array(mask))
    assert float(sums["top1"]) == expected_hits(1)[:25].sum()
    assert float(sums["num_examples"]) == 25
    assert np.isfinite(float(sums["loss"]))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_logits_are_no_hit(broken):
    logits = np.full((3, 4), broken)
    sums = classification_sums(jnp.array(logits), jnp.array([0, 1, 2]))
    assert float(sums["top1"]) == float(sums["top5"]) == 0


def test_fewer_than_five_classes_count_all_for_top5():
    sums = classification_sums(jnp.zeros((2, 3)), jnp.array([0, 2]))
    assert float(sums["top5"]) == 2


def test_summaries_weigh_examples_not_batches():
    parts = [
        {"loss": 3.0, "top1": 1.0, "top5": 2.0, "num_examples": 3.0},
        {"loss": 1.0, "top1": 1.0, "top5": 1.0, "num_examples": 1.0},
    ]
    assert summarize(parts) == {"loss": 1.0, "top1": 50.0, "top5": 75.0, "num_examples": 4}


def test_a_smoothed_loss_changes_no_hit():
    logits, labels = jnp.array(LOGITS), jnp.array(LABELS)
    plain = classification_sums(logits, labels)
    smoothed = classification_sums(logits, labels, label_smoothing=0.2)
    log_p = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True))
    expected = 0.8 * float(plain["loss"]) - 0.2 * log_p.mean(axis=1).sum()
    np.testing.assert_allclose(smoothed.pop("loss"), expected, rtol=1e-5)
    assert all(smoothed[name] == plain[name] for name in smoothed)
