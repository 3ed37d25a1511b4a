"""Images made to excite a class or a channel, by gradient ascent on its score.

Source: Simonyan et al. 2013 (arXiv:1312.6034), section 2; Mordvintsev et al. 2015,
  "Inceptionism".
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from resjax.analysis.attribution import check_classifier, check_units
from resjax.analysis.seeing import feature_maps, list_layers
from resjax.config import UsageError, unknown_name
from resjax.models.resnet import ResNet

Variables = dict[str, Any]
Vector = Sequence[float] | np.ndarray
_START = 0.1  # standard deviation of the noise that becomes an image


class ExcitingImages(NamedTuple):
    """Images made to excite units.

    Attributes:
      images: [N, S, S, 3] float32, normalised as in training; `to_pixels` shows them.
      scores: of each image at the start and after each step, [steps + 1, N] float32; but
        for the last they are those of the image as jitter has moved it.
    """

    images: jax.Array
    scores: np.ndarray


def exciting_images(
    model: ResNet,
    variables: Variables,
    units: Any,
    key: jax.Array,
    *,
    image_size: int,
    layer: str = "head",
    steps: int = 256,
    step_size: float = 0.1,
    jitter: int | None = None,
    smoothness: float = 0.2,
    l2: float = 0.2,
    bounds: tuple[Any, Any] | None = None,
    grey: bool = False,
) -> ExcitingImages:
    """Images that gradient ascent makes to excite units, from noise.

    Each step follows the gradient of the unit's score, brought to a root mean square of 1,
    so that the weights of the priors mean the same for every net, unit and size:

      image += step_size * (gradient - smoothness * roughness' - l2 * image)

    The roughness is total variation with exponent 2: half the sum of squared differences
    between neighbouring pixels. Jitter moves the image round, the same way for all, while
    the score is taken. All start from the same noise; no image knows of the others.

    Args:
      model: from `create_model`.
      variables: {"params", "batch_stats"}.
      units: classes or channels, one or [N].
      key: of the noise at the start and of the jitter.
      image_size: S, in pixels.
      layer: "head" for the class's score before the softmax, or a name of
        `seeing.list_layers` for the channel's mean over positions.
      steps: of ascent; 0 gives the start.
      step_size: in normalised units of the image.
      jitter: at most so many pixels either way; None = a sixteenth of the side.
      smoothness: weight of the roughness; 0 = no such prior.
      l2: weight of half the squared length of the image, which is 0 where it has the mean
        colour.
      bounds: least and largest value an image may take, numbers or a colour [3] each;
        None = any.
      grey: keep the channels of the image equal, for a net that has seen only such images.

    Raises:
      UsageError: no such layer or unit, a number out of its range, or steps so large that
        the priors alone would let the image grow.

    Source: Simonyan et al. 2013 (arXiv:1312.6034), section 2, for the score and L2;
      Mordvintsev et al. 2015, "Inceptionism", and their code, for the prior, the jitter and
      the step's length; Mahendran & Vedaldi 2014 (arXiv:1412.0035) for total variation
      with an exponent.
    """
    jitter = image_size // 16 if jitter is None else jitter
    low, high = map(np.asarray, (-np.inf, np.inf) if bounds is None else bounds)
    ascent = _Ascent(step_size, jitter, smoothness, l2, low, high, grey)
    _check_ascent(ascent, steps, image_size)
    units = check_units("units", units, _count_units(model, variables, layer, image_size))
    shape = (image_size, image_size, 3)
    start = _START * jax.random.normal(jax.random.fold_in(key, 0), shape)
    start = jnp.where(grey, start[..., :1], start)
    images = jnp.broadcast_to(jnp.clip(start, low, high), (len(units), *shape))
    scores = []
    for step in range(1, steps + 1):  # not as a scan, 1.7 times slower on CPUs
        own = jax.random.fold_in(key, step)
        images, score = _ascend(model, variables, images, layer, units, own, ascent)
        scores.append(score)
    scores.append(_scores(model, variables, images, layer, units))
    return ExcitingImages(images, np.stack(scores))


def to_pixels(images: Any, mean: Vector, std: Vector) -> np.ndarray:
    """Normalised images as pictures.

    Args:
      images: [..., 3] float.
      mean: per channel, of pixels from 0 to 1, with which they were normalised.
      std: likewise.

    Returns:
      [..., 3] float32, cut to 0..1.
    """
    pixels = np.asarray(images, np.float32) * np.asarray(std) + np.asarray(mean)
    return pixels.clip(0, 1).astype(np.float32)


class _Ascent(NamedTuple):
    """The arguments of `exciting_images` of that name, for the program."""

    step_size: float
    jitter: int
    smoothness: float
    l2: float
    low: Any
    high: Any
    grey: bool


def _check_ascent(ascent: _Ascent, steps: int, image_size: int) -> None:
    """Raises `UsageError` for a number out of its range."""
    if image_size < 1:
        raise UsageError(f"image_size: {image_size} is no whole number from 1")
    if not np.all(np.less_equal(ascent.low, ascent.high)):
        raise UsageError(f"bounds: {ascent.low} to {ascent.high} leaves no values")
    for name in ("jitter", "smoothness", "l2"):
        if not getattr(ascent, name) >= 0:
            raise UsageError(f"{name}: {getattr(ascent, name)} is not 0 or more")
    if steps < 0:
        raise UsageError(f"steps: {steps} is not 0 or more")
    if not ascent.step_size > 0:
        raise UsageError(f"step_size: {ascent.step_size} is not greater than 0")
    # Of the roughness, the steepest direction is the chessboard: its curvature is 8.
    curvature = ascent.l2 + 8 * ascent.smoothness
    if ascent.step_size * curvature > 2:
        raise UsageError(
            f"step_size: {ascent.step_size} would make images grow without end with "
            f"smoothness={ascent.smoothness} and l2={ascent.l2}; allowed: up to "
            f"{2 / curvature:.3g}"
        )


def _count_units(model: ResNet, variables: Variables, layer: str, image_size: int) -> int:
    """Classes, or channels of a layer; raises `UsageError` if there is no such layer."""
    if layer == "head":
        return check_classifier(model)
    if layer not in list_layers(model):
        raise unknown_name("layer", str(layer), ["head", *list_layers(model)])
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    maps = jax.eval_shape(partial(feature_maps, model, layer=layer), variables, image)
    return int(maps.shape[-1])


def _unit_scores(
    model: ResNet, variables: Variables, images: jax.Array, layer: str, units: jax.Array
) -> jax.Array:
    """The score of each image's own unit, [N] float32."""
    if layer == "head":
        scores: Any = model.apply(variables, images, train=False)
    else:
        maps = feature_maps(model, variables, images, layer)
        scores = maps.astype(jnp.float32).mean(axis=(1, 2))
    return jnp.take_along_axis(scores, units[:, None], axis=1)[:, 0]


_scores = partial(jax.jit, static_argnums=(0, 3))(_unit_scores)


@partial(jax.jit, static_argnums=(0, 3))
def _ascend(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    layer: str,
    units: jax.Array,
    key: jax.Array,
    ascent: _Ascent,
) -> tuple[jax.Array, jax.Array]:
    """One step of `exciting_images`: images [N, S, S, 3], and scores [N] before it."""
    shift = jax.random.randint(key, (2,), -ascent.jitter, ascent.jitter + 1)

    def total(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = jnp.roll(images, shift, axis=(1, 2))  # whose gradient is rolled back
        scores = _unit_scores(model, variables, moved, layer, units)
        return scores.sum(), scores

    def penalty(images: jax.Array) -> jax.Array:
        rough = sum(jnp.square(jnp.diff(images, axis=axis)).sum() for axis in (1, 2))
        return (ascent.smoothness * rough + ascent.l2 * jnp.square(images).sum()) / 2

    gradients, scores = jax.grad(total, has_aux=True)(images)
    mean = gradients.mean(axis=-1, keepdims=True)
    gradients = jnp.where(ascent.grey, mean, gradients)
    step = _of_unit_size(gradients) - jax.grad(penalty)(images)
    return jnp.clip(images + ascent.step_size * step, ascent.low, ascent.high), scores


def _of_unit_size(gradients: jax.Array) -> jax.Array:
    """Each [S, S, 3] with a root mean square of 1; 0 where there is no gradient."""
    for size in (
        lambda x: jnp.abs(x).max((1, 2, 3), keepdims=True),  # squares may round to 0
        lambda x: jnp.sqrt(jnp.square(x).mean((1, 2, 3), keepdims=True)),
    ):
        own = size(gradients)
        gradients = gradients / jnp.where(own > 0, own, 1)
    return gradients
