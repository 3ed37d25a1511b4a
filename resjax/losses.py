"""Losses, one number an example; how they are averaged is the step's business."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label].

    Args:
      logits: [B, K] float.
      labels: [B] int, from 0 to K - 1.

    Returns:
      [B] float32, in nats.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
