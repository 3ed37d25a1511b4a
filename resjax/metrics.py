"""Metrics as sums and a count, so that they add up over devices, batches and steps."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resjax.losses import cross_entropy

Sums = dict[str, jax.Array]


def classification_sums(
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    label_smoothing: float = 0.0,
) -> Sums:
    """Sums over a batch of loss, top-1 and top-5 hits, and the number of examples.

    Args:
      logits: [B, K] float.
      labels: [B] int.
      mask: [B] bool, False for padding; None = all count.
      label_smoothing: of the loss, see `cross_entropy`.

    Returns:
      {"loss", "top1", "top5", "num_examples"}, each [] float32. With fewer than five
      classes top5 counts the label among all of them. An example whose logits are not
      all finite has no hits.
    """
    logits = logits.astype(jnp.float32)
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))  # [B, 5]
    finite = jnp.isfinite(logits).all(axis=-1)
    hits = (best == labels[:, None]) & finite[:, None]
    values = {
        "loss": cross_entropy(logits, labels, label_smoothing),
        "top1": hits[:, 0],
        "top5": hits.any(axis=-1),
        "num_examples": mask,
    }
    return {
        name: jnp.where(mask, value, 0).sum(dtype=jnp.float32)
        for name, value in values.items()
    }


def add_up(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Many `classification_sums`, fetched to the host and added in float64, in order."""
    total = dict.fromkeys(("loss", "top1", "top5", "num_examples"), 0.0)
    for part in jax.device_get(list(sums)):
        for name in total:
            total[name] += float(part[name])
    return total


def summarize(sums: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Averages of many `classification_sums`.

    Returns:
      {"loss" (nats), "top1", "top5" (percent), "num_examples"}.
    """
    total = add_up(sums)
    count = total["num_examples"]
    return {
        "loss": total["loss"] / count,
        "top1": 100 * total["top1"] / count,
        "top5": 100 * total["top5"] / count,
        "num_examples": round(count),
    }
