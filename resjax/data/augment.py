"""Device-side images: colours, normalisation, flips and shifts, pure functions.

Runs inside the compiled step, on uint8 batches; random draws are keyed by (seed, position).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_AUGMENT = 1  # apart from the keys of the parameters, which are folded from paths
_JITTER, _LIGHTING = 2, 3  # streams of an example; `split` takes 0 (flip) and 1 (shift)

# Of the colours of ImageNet, from fb.resnet.torch (datasets/imagenet.lua); a column of the
# vectors is a principal colour.
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


def _to_unit(images: ArrayLike) -> jax.Array:
    """Pixels from 0 to 1, float32."""
    return jnp.asarray(images, jnp.float32) / 255


def _standardize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    shift, scale = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images - shift) / scale


def normalize(images: ArrayLike, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """(x / 255 - mean) / std per channel.

    Args:
      images: [B, H, W, 3] uint8.
      mean: per channel, of pixels from 0 to 1.
      std: per channel.

    Returns:
      [B, H, W, 3] float32.
    """
    return _standardize(_to_unit(images), mean, std)


def example_keys(seed: int, positions: jax.Array) -> jax.Array:
    """One random key an example, from the seed and its position [B] in the stream."""
    domain = jax.random.fold_in(jax.random.key(seed), _AUGMENT)
    return jax.vmap(jax.random.fold_in, (None, 0))(domain, positions)


def random_jitter(keys: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation of each image times 1 + U(-strength, strength).

    That is, the image mixed with black, with its mean grey and with its grey version.
    Nothing is clipped, so the order of the three, random there, makes no difference: all
    are linear, so brightness may come at any point; saturation keeps the grey of each
    pixel, and so the mean that contrast takes, and leaves that mean, a grey, as it is.

    Args:
      keys: [B].
      images: [B, H, W, 3], pixels from 0 to 1.
      strength: 0 to 1.

    Returns:
      [B, H, W, 3].

    Source: fb.resnet.torch, `ColorJitter` of datasets/transforms.lua.
    """

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.uniform(
            key, (3, 1, 1, 1), minval=1 - strength, maxval=1 + strength
        )

    brightness, contrast, saturation = jax.vmap(draw, out_axes=1)(keys)  # [B, 1, 1, 1]
    red, green, blue = jnp.split(images, 3, axis=-1)
    # A matrix product would have fewer digits on an accelerator, a sum is slower on a CPU.
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # [B, H, W, 1], weights of BT.601
    mean = jnp.mean(grey, axis=(1, 2), keepdims=True)  # [B, 1, 1, 1]
    images = saturation * images + (1 - saturation) * grey
    return brightness * (contrast * images + (1 - contrast) * mean)


def random_lighting(keys: jax.Array, images: jax.Array, deviation: float) -> jax.Array:
    """One colour added to each image: normal noise along the principal colours.

    Args:
      keys: [B].
      images: [B, H, W, 3], pixels from 0 to 1.
      deviation: of the three draws, in units of the eigenvalues.

    Returns:
      [B, H, W, 3].

    Source: Krizhevsky et al. 2012, section 4.1, with the numbers of fb.resnet.torch
      (`Lighting` of datasets/transforms.lua).
    """
    draws = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    along = deviation * draws * jnp.asarray(_EIGENVALUES)  # [B, 3]
    vectors = jnp.asarray(_EIGENVECTORS)
    # Not a sum over an axis: on a CPU, jaxlib 0.10.2 compiles it wrongly (jax#39103).
    colour = (
        along[:, :1] * vectors[:, 0]
        + along[:, 1:2] * vectors[:, 1]
        + along[:, 2:] * vectors[:, 2]
    )  # [B, 3]
    return images + colour[:, None, None, :]


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
    *,
    jitter: float,
    lighting: float,
    flip: bool,
    pad: int,
) -> jax.Array:
    """Training images: recoloured, normalised, then flipped and shifted, each if asked.

    Args:
      images: [B, H, W, 3] uint8.
      positions: [B] int32, places in the training stream.
      seed: of the run.
      mean: per channel.
      std: per channel.
      jitter: brightness, contrast and saturation change by up to this share; 0 = not.
      lighting: standard deviation of the noise along the principal colours; 0 = none.
      flip: mirror half of the images.
      pad: shift by up to so many pixels; 0 = not at all.

    Returns:
      [B, H, W, 3] float32.
    """
    keys = example_keys(seed, positions)
    flip_keys, shift_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    stream = jax.vmap(jax.random.fold_in, (0, None))
    unit = _to_unit(images)
    if jitter:
        unit = random_jitter(stream(keys, _JITTER), unit, jitter)
    if lighting:
        unit = random_lighting(stream(keys, _LIGHTING), unit, lighting)
    images = _standardize(unit, mean, std)
    if flip:
        images = random_flip(flip_keys, images)
    return random_shift(shift_keys, images, pad) if pad else images
