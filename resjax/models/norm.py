"""Batch normalisation with explicit statistics, defined in examples, and its absence.

Knows nothing of devices but the name of the axis that joins them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name


class Bias(nn.Module):
    """Stands where a norm would in a net without: adds a bias a channel; no statistics.

    By its name it is a norm's bias to weight decay, which leaves it alone.

    Source: He et al. 2015 (arXiv:1502.01852), equation 5, a layer of such a net.
    """

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, ..., C] -> [B, ..., C]; the flags are those of `BatchNorm`, of no effect."""
        return x + self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(x.dtype)


class BatchNorm(nn.Module):
    """Normalises over virtual batches of consecutive examples.

    Statistics and normalisation are float32 whatever the input; the output has the
    input's dtype. The batch variance is biased in the normalisation and unbiased in
    the running average, as Caffe and PyTorch store it. Running statistics are averaged
    over the virtual batches of the input.

    Attributes:
      virtual_batch_size: consecutive examples that share statistics, over the devices of
        `axis_name` if they are more than a device holds; 0 = all.
      axis_name: the mapped axis whose devices hold consecutive slices of the batch; None:
        the input is the whole batch.
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
          ValueError: virtual batches that do not divide the batch, a single value a
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

        parts = x.astype(jnp.float32)
        if not train:
            mean, var = running_mean.value, running_var.value  # [C]
        else:
            parts, mean, var, count = self._moments(parts)  # [P, p, ..., C], [P, 1, ..., C]
            if count < 2:
                raise ValueError("batch statistics need more than one value a channel")
            if update_stats and not self.is_initializing():
                unbiased = var * (count / (count - 1))
                for running, batch in ((running_mean, mean), (running_var, unbiased)):
                    batch = batch.reshape(-1, *channels).mean(axis=0)  # [C]
                    running.value = self.decay * running.value + (1 - self.decay) * batch
        origin = lax.stop_gradient(mean)
        factor = lax.rsqrt(var + self.epsilon) * scale
        y = (parts - origin) * factor + (bias - (mean - origin) * factor)
        return y.reshape(x.shape).astype(x.dtype)

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, int]:
        """The input in parts that each lie in one group, and the moments of those groups.

        Returns:
          `x` as [P, p, ..., C], mean and biased variance of the group of each part
          [P, 1, ..., C], and how many values a channel they are taken over.
        """
        local = x.shape[0]
        devices = lax.axis_size(self.axis_name) if self.axis_name else 1
        size = self.virtual_batch_size or local * devices
        if local * devices % size:
            raise ValueError(
                f"virtual_batch_size={size} does not divide a batch of {local * devices}"
            )
        part = math.gcd(size, local)
        x = x.reshape(-1, part, *x.shape[1:])
        axes = tuple(range(1, x.ndim - 1))
        mean = checkpoint_name(x.mean(axes, keepdims=True), "moments")
        origin = lax.stop_gradient(mean)
        var = jnp.square(x - origin).mean(axes, keepdims=True) - jnp.square(mean - origin)
        var = checkpoint_name(var, "moments")
        if size > part:
            mean, var = self._join(mean, var, size // part, devices)
        return x, mean, var, size * math.prod(x.shape[2:-1])

    def _join(
        self, mean: jax.Array, var: jax.Array, group: int, devices: int
    ) -> tuple[jax.Array, jax.Array]:
        """Moments [P, ...] of a device's parts -> of their groups of `group` parts each.

        As few neighbouring devices are joined as hold whole groups.
        """
        local = len(mean)
        joined = math.lcm(group, local) // local
        neighbours = np.arange(devices).reshape(-1, joined).tolist()
        moments = lax.all_gather(
            jnp.stack([mean, var]),
            self.axis_name,
            axis=1,
            axis_index_groups=neighbours,
            tiled=True,
        )  # [2, joined * P, ...]
        moments = checkpoint_name(moments, "moments")
        means, variances = moments.reshape(2, -1, group, *mean.shape[1:])
        mean = means.mean(axis=1)  # [G, ...]
        var = (variances + jnp.square(means - mean[:, None])).mean(axis=1)
        if len(mean) == 1:
            return mean, var
        first = lax.axis_index(self.axis_name) % joined * local
        mine = (first + jnp.arange(local)) // group
        return mean[mine], var[mine]
