"""Learning-rate schedules: functions of the step, made from numbers already in steps.

step = optimizer updates finished before this one, 0-based. Knows nothing of epochs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array | int], jax.Array]


def scale_learning_rate(lr_per_256: float, batch_size: int) -> float:
    """The linear scaling rule: when the minibatch is multiplied by k, so is the rate.

    Source: Goyal et al. 2017 (arXiv:1706.02677), section 2.1.
    """
    return lr_per_256 * batch_size / 256


def step_decay(peak: float, boundaries: Sequence[int], factor: float = 0.1) -> Schedule:
    """`peak`, multiplied by `factor` at each boundary.

    Args:
      peak: learning rate before the first boundary.
      boundaries: increasing step numbers; step `boundaries[0]` is the first with the
        lower rate.
      factor: multiplier at each boundary.

    Returns:
      step [] -> learning rate [] float32.

    Source: He et al. 2015 (arXiv:1512.03385), section 3.4.
    """

    def schedule(step: jax.Array | int) -> jax.Array:
        rates = [peak * factor**i for i in range(len(boundaries) + 1)]
        drops = jnp.sum(jnp.asarray(step) >= jnp.asarray(boundaries, jnp.int32))
        return jnp.asarray(rates, jnp.float32)[drops]

    return schedule


def cosine_decay(peak: float, first_step: int, num_steps: int) -> Schedule:
    """Half a cosine from `peak` at `first_step` to 0 at `num_steps`.

    Args:
      peak: learning rate at `first_step`, and before it.
      first_step: where the decay begins, the end of the warmup.
      num_steps: updates of the whole run.

    Returns:
      step [] -> learning rate [] float32.

    Source: Loshchilov & Hutter 2016 (arXiv:1608.03983), equation 5, without restarts.
    """
    length = max(num_steps - first_step, 1)

    def schedule(step: jax.Array | int) -> jax.Array:
        done = jnp.clip((jnp.asarray(step, jnp.float32) - first_step) / length, 0, 1)
        return jnp.float32(peak) * (1 + jnp.cos(jnp.pi * done)) / 2

    return schedule


def warm_up(after: Schedule, kind: str, start: float, peak: float, steps: int) -> Schedule:
    """`after`, preceded by `steps` updates of warmup; its own steps still count from 0.

    Args:
      after: the schedule from update `steps` on.
      kind: "gradual", start + (peak - start) * step / steps, or "constant", start.
      start: the learning rate at step 0.
      peak: the learning rate that the gradual warmup reaches at step `steps`.
      steps: length of the warmup; 0 = none.

    Returns:
      step [] -> learning rate [] float32.

    Source: Goyal et al. 2017 (arXiv:1706.02677), section 2.2.
    """
    slope = {"gradual": (peak - start) / max(steps, 1), "constant": 0.0}[kind]

    def schedule(step: jax.Array | int) -> jax.Array:
        warm = start + slope * jnp.asarray(step, jnp.float32)
        return jnp.where(jnp.asarray(step) < steps, warm, after(step))

    return schedule
