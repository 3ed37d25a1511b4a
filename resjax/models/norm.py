"""Batch normalisation with explicit statistics, defined in examples.

Knows nothing of devices but the name of the axis that joins them.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


class BatchNorm(nn.Module):
    """Normalises over virtual batches of consecutive examples.

    Statistics and normalisation are float32 whatever the input; the output has the
    input's dtype. The batch variance is biased in the normalisation and unbiased in
    the running average, as Caffe and PyTorch store it. Running statistics are averaged
    over the virtual batches of the input.

    Attributes:
      virtual_batch_size: examples that share statistics; 0 = all of the input, joined
        over the devices of `axis_name` if one is given.
      axis_name: the mapped axis over which `virtual_batch_size=0` joins devices.
      decay: new running average = decay * old + (1 - decay) * batch.
      epsilon: added to the variance.

    Source: Ioffe & Szegedy 2015 (arXiv:1502.03167), algorithm 1; virtual batches are the
      per-worker statistics of Goyal et al. 2017 (arXiv:1706.02677), section 2.3.
    """

    virtual_batch_size: int = 0
    axis_name: str | None = None
    decay: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """Normalises `x`.

        Args:
          x: [B, ..., C].
          train: normalise with the batch's statistics; otherwise with the running ones.
          update_stats: move the running statistics (needs mutable=["batch_stats"]);
            None = as `train`.

        Returns:
          [B, ..., C], the dtype of `x`.

        Raises:
          ValueError: a batch that the virtual batches do not divide, a single value a
            channel, or an update of statistics that were not computed.
        """
        update_stats = train if update_stats is None else update_stats
        if update_stats and not train:
            raise ValueError("update_stats=True needs train=True")
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)

        grouped = x.astype(jnp.float32)
        if not train:
            mean, var = running_mean.value, running_var.value  # [C]
        else:
            size = self.virtual_batch_size or x.shape[0]
            if x.shape[0] % size:
                raise ValueError(
                    f"virtual_batch_size={size} does not divide a batch of {x.shape[0]}"
                )
            grouped = grouped.reshape(-1, size, *x.shape[1:])  # [G, n, ..., C]
            mean, var, count = self._moments(grouped)  # [G, 1, ..., C]
            if count < 2:
                raise ValueError("batch statistics need more than one value a channel")
            if update_stats and not self.is_initializing():
                unbiased = var * (count / (count - 1))
                for running, batch in ((running_mean, mean), (running_var, unbiased)):
                    batch = batch.reshape(-1, *channels).mean(axis=0)  # [C]
                    running.value = self.decay * running.value + (1 - self.decay) * batch
        y = (grouped - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.reshape(x.shape).astype(x.dtype)

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array, int]:
        """Mean and biased variance of each group of [G, n, ..., C], and their count."""
        axes = tuple(range(1, x.ndim - 1))
        count = math.prod(x.shape[1:-1])
        joined = self.axis_name is not None and not self.virtual_batch_size

        def average(values: jax.Array) -> jax.Array:
            values = values.mean(axes, keepdims=True)
            return lax.pmean(values, self.axis_name) if joined else values

        mean = average(x)
        var = average(jnp.square(x - mean))
        return mean, var, count * (lax.axis_size(self.axis_name) if joined else 1)
