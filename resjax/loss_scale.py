"""Dynamic loss scaling: keeps the gradients of a float16 computation in its range."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

_GROWTH_INTERVAL = 2000  # updates without an overflow before the scale is doubled
_LARGEST = 2.0**24


@flax.struct.dataclass
class LossScale:
    """What the loss is multiplied by before, and the gradients divided by after.

    Always a power of two, so that scaling changes no digit. It starts high: each halving
    costs one repeated step, each doubling takes thousands.

    Attributes:
      value: [] float32.
      good_steps: [] int32, updates since it last changed.

    Source: Micikevicius et al. 2017 (arXiv:1710.03740), section 3.2.
    """

    value: jax.Array
    good_steps: jax.Array

    def adjust(self, finite: jax.Array) -> "LossScale":
        """The scale after a step whose gradients were finite or not."""
        grows = self.good_steps + 1 >= _GROWTH_INTERVAL
        value = jnp.where(grows, jnp.minimum(2 * self.value, _LARGEST), self.value)
        value = jnp.where(finite, value, jnp.maximum(self.value / 2, 1))
        return LossScale(value, jnp.where(finite & ~grows, self.good_steps + 1, 0))


def init_loss_scale(value: float = _LARGEST) -> LossScale:
    """The scale before the first step."""
    return LossScale(jnp.float32(value), jnp.zeros((), jnp.int32))


def all_finite(tree: Any) -> jax.Array:
    """[] bool: no array of the tree holds an infinity or a NaN."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()
