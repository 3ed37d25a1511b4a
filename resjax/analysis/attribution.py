"""Which pixels of an image a class's score comes from: maps to lay over the image.

The score is the logit, before the softmax, of the network in evaluation mode, so that
images of a batch know nothing of each other.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resjax.analysis.seeing import pixel_stride
from resjax.config import UsageError
from resjax.models.resnet import ResNet, check_images

Variables = dict[str, Any]


def class_activation_map(
    model: ResNet, variables: Variables, images: jax.Array | np.ndarray, classes: Any
) -> jax.Array:
    """How much each position of the last map speaks for a class.

    The map's mean over positions plus the classifier's bias is the logit. The map of one
    class less that of another says likewise why it is the one and not the other.

    Args:
      model: with a classifier, which all of ours have behind a global average.
      variables: {"params", "batch_stats"}.
      images: [B, H, W, 3] float, normalised as in training.
      classes: one whole number, or [B], one an image.

    Returns:
      [B, h, w] float32, of the last stage's positions; `upsample` brings it to pixels.

    Raises:
      UsageError: a class that is none, or a model without classifier.

    Source: Zhou et al. 2016 (arXiv:1512.04150), equations 1 and 2.
    Differs: the paper pools by a sum in its equations, and leaves the bias out.
    """
    return _class_activation_map(model, variables, images, _classes(model, images, classes))


def upsample(maps: jax.Array, height: int, width: int) -> jax.Array:
    """Maps at the pixels of the image, interpolated linearly between their positions.

    Position i of a map stands at pixel i * stride, where the centre of what it sees is:
    our convolutions pad both sides alike. Past the last one the map goes on as it is.

    Args:
      maps: [B, h, w] of images [B, height, width, 3].
      height: of the image, in pixels.
      width: likewise.

    Returns:
      [B, height, width].

    Differs: to resize the map as a picture, as is often done, moves it by (stride - 1) / 2
      pixels, 15.5 of an ImageNet net.
    """
    rows, columns = (
        _interpolation(pixels, cells)
        for pixels, cells in zip((height, width), maps.shape[1:], strict=True)
    )
    highest = lax.Precision.HIGHEST
    return jnp.einsum("bij,yi,xj->byx", maps, rows, columns, precision=highest)


def saliency(
    model: ResNet, variables: Variables, images: jax.Array | np.ndarray, classes: Any
) -> jax.Array:
    """How much the class's score changes with each pixel, in its most telling colour.

    Args:
      model: with a classifier.
      variables: {"params", "batch_stats"}.
      images: [B, H, W, 3] float, normalised as in training.
      classes: one whole number, or [B], one an image.

    Returns:
      [B, H, W] float32, not negative: max over channels of |d score / d image|.

    Raises:
      UsageError: a class that is none, or a model without classifier.

    Source: Simonyan et al. 2013 (arXiv:1312.6034), section 3.
    """
    classes = _classes(model, images, classes)
    return _magnitude(_gradients(model, variables, images, classes))


def smooth_grad(
    model: ResNet,
    variables: Variables,
    images: jax.Array | np.ndarray,
    classes: Any,
    key: jax.Array,
    *,
    samples: int = 50,
    noise: float = 0.15,
) -> jax.Array:
    """The saliency of gradients averaged over noisy copies of the image.

    Args:
      model: with a classifier.
      variables: {"params", "batch_stats"}.
      images: [B, H, W, 3] float, normalised as in training.
      classes: one whole number, or [B], one an image.
      key: of the noise. All images get the same, each in its own range, so that the map of
        an image does not depend on the others.
      samples: noisy copies of each image.
      noise: standard deviation, as a fraction of the range of the image's values.

    Returns:
      [B, H, W] float32: max over channels of |mean gradient|.

    Raises:
      UsageError: a class that is none, a model without classifier, no samples, or noise
        below 0.

    Source: Smilkov et al. 2017 (arXiv:1706.03825), which finds 10 to 20 % noise and 50
      samples good.
    """
    if samples < 1:
        raise UsageError(f"samples: {samples} is no whole number from 1")
    if not noise >= 0:
        raise UsageError(f"noise: {noise} is not 0 or more")
    classes = _classes(model, images, classes)
    total = jnp.zeros(images.shape, jnp.float32)
    for i in range(samples):  # not as a scan, which is slower on CPUs
        total = _add_noisy(model, variables, images, classes, key, i, noise, total)
    return _magnitude(total / samples)


def check_units(name: str, units: Any, count: int, length: int | None = None) -> np.ndarray:
    """Whole numbers from 0 below `count`, as an array [N] of int32.

    Args:
      name: of the argument, for the error.
      units: a whole number or a list of them.
      count: of the classes or channels that there are.
      length: N; None = as many as there are.

    Raises:
      UsageError: anything else.
    """
    array = np.asarray(units)
    wanted = array.shape if length is None else (length,)
    if array.dtype.kind not in "iu" or array.shape not in ((), wanted) or array.ndim > 1:
        many = "" if length is None else f" {length} of"
        raise UsageError(
            f"{name}: {array.dtype} of shape {array.shape}; it must be a whole number or a "
            f"list of{many} them"
        )
    for unit in array.ravel():
        if not 0 <= unit < count:
            raise UsageError(f"{name}: {unit} is not one of 0 to {count - 1}")
    return np.broadcast_to(np.atleast_1d(array), wanted or (1,)).astype(np.int32)


def check_classifier(model: ResNet) -> int:
    """The number of classes; raises `UsageError` if the model has no classifier."""
    if not model.num_classes:
        raise UsageError("model: num_classes=0 is a net without classes to score")
    return model.num_classes


def _classes(model: ResNet, images: jax.Array | np.ndarray, classes: Any) -> np.ndarray:
    check_images(images)
    return check_units("classes", classes, check_classifier(model), len(images))


@partial(jax.jit, static_argnums=0)
def _class_activation_map(
    model: ResNet, variables: Variables, images: jax.Array, classes: jax.Array
) -> jax.Array:
    _, stages = model.apply(variables, images, train=False, return_stages=True)
    last = stages[f"stage{len(stages)}"].astype(jnp.float32)  # [B, h, w, D]
    weights = variables["params"]["head"]["kernel"][:, classes]  # [D, B]
    highest = lax.Precision.HIGHEST  # as the classifier
    return jnp.einsum("bijd,db->bij", last, weights, precision=highest)


@partial(jax.jit, static_argnums=0)
def _gradients(
    model: ResNet, variables: Variables, images: jax.Array, classes: jax.Array
) -> jax.Array:
    """The gradient of the score at the image, [B, H, W, 3] float32."""

    def total(images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images, train=False)
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    return jax.grad(total)(jnp.asarray(images, jnp.float32))


@partial(jax.jit, static_argnums=0, donate_argnames="total")
def _add_noisy(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    classes: jax.Array,
    key: jax.Array,
    sample: int,
    noise: float,
    total: jax.Array,
) -> jax.Array:
    """The gradients at one noisy copy of the images, added to a total."""
    axes = (1, 2, 3)
    spread = images.max(axes, keepdims=True) - images.min(axes, keepdims=True)
    draw = jax.random.normal(jax.random.fold_in(key, sample), images.shape[1:])
    noisy = images + noise * spread * draw
    return total + _gradients(model, variables, noisy, classes)


@jax.jit
def _magnitude(gradients: jax.Array) -> jax.Array:
    return jnp.abs(gradients).max(axis=-1)


def _interpolation(pixels: int, cells: int) -> np.ndarray:
    """The weight of each position at each pixel, [pixels, cells] float32."""
    places = np.arange(pixels) / pixel_stride(pixels, cells)
    distances = np.abs(places.clip(max=cells - 1)[:, None] - np.arange(cells))
    return np.maximum(1 - distances, 0).astype(np.float32)
