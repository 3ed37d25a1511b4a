"""Losses, one number an example; how they are averaged is the step's business."""

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """-log softmax(logits)[label], or that of a label which is smoothed.

    With `label_smoothing` s the target has probability 1 - s + s / K at the label and s / K
    at each other class. Its loss is at least its entropy, so never 0.

    Args:
      logits: [B, K] float.
      labels: [B] int, from 0 to K - 1.
      label_smoothing: s, at least 0 and below 1.

    Returns:
      [B] float32, in nats.

    Source: Szegedy et al. 2015 (arXiv:1512.00567), section 7, with u(k) = 1 / K.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if not label_smoothing:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * log_p.mean(axis=-1)
