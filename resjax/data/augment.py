"""Device-side images: normalisation, flips and shifts, pure functions of (seed, position).

Runs inside the compiled step, on uint8 batches.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_AUGMENT = 1  # apart from the keys of the parameters, which are folded from paths


def normalize(images: ArrayLike, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(x / 255 - mean) / std per channel.

    Args:
      images: [B, H, W, 3] uint8.
      mean: per channel, of pixels from 0 to 1.
      std: per channel.

    Returns:
      [B, H, W, 3] float32.
    """
    shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (jnp.asarray(images, jnp.float32) / 255 - shift) / scale


def example_keys(seed: int, positions: jax.Array) -> jax.Array:
    """One random key an example, from the seed and its position [B] in the stream."""
    domain = jax.random.fold_in(jax.random.key(seed), _AUGMENT)
    return jax.vmap(jax.random.fold_in, (None, 0))(domain, positions)


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Each image [B, H, W, C] mirrored left to right with probability one half."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1, :], images)


def random_shift(keys: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Each image padded by `pad` zeros a side and cropped back at a random place.

    Args:
      keys: [B].
      images: [B, H, W, C], normalised, so that zero is the mean colour.
      pad: pixels.

    Returns:
      [B, H, W, C].

    Source: He et al. 2015 (arXiv:1512.03385), section 4.2 (pad 4, crop 32).
    """
    padded = jnp.pad(images, [(0, 0), (pad, pad), (pad, pad), (0, 0)])

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(crop)(keys, padded)


def augment(
    images: jax.Array,
    positions: jax.Array,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool,
    pad: int,
) -> jax.Array:
    """Training images: normalised, then flipped and shifted if asked.

    Args:
      images: [B, H, W, 3] uint8.
      positions: [B] int32, places in the training stream.
      seed: of the run.
      mean: per channel.
      std: per channel.
      flip: mirror half of the images.
      pad: shift by up to so many pixels; 0 = not at all.

    Returns:
      [B, H, W, 3] float32.
    """
    images = normalize(images, mean, std)
    flip_keys, shift_keys = jax.vmap(jax.random.split, out_axes=1)(
        example_keys(seed, positions)
    )
    if flip:
        images = random_flip(flip_keys, images)
    return random_shift(shift_keys, images, pad) if pad else images
