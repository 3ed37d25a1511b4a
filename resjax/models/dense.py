"""A residual network at images of any size, as a fully convolutional network."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from resjax.models.resnet import ResNet

Tree = dict[str, Any]


def total_stride(model: ResNet) -> int:
    """Pixels of the input for one of the last map, along either axis: 32 for ImageNet."""
    return (4 if model.downsample else 1) * 2 ** (len(model.stage_sizes) - 1)


def window_size(model: ResNet, image_size: int) -> int:
    """Side of the map that the classifier averages for images of that side: 7 for 224."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)

    def last_map(images: jax.Array) -> jax.Array:
        result: Any
        result, _ = model.init_with_output(jax.random.key(0), images, return_stages=True)
        return _last(result)

    return jax.eval_shape(last_map, images).shape[1]


def dense_logits(
    model: ResNet, variables: Tree, images: jax.Array, window: int
) -> jax.Array:
    """The scores of an image, averaged over all places where the net can stand in it.

    That is the mean of `score_map`. The classifier is linear, so it is applied once, to a
    weighted mean of the last map.

    Args:
      model: of `create_model`, with a classifier.
      variables: {"params", "batch_stats"} of it.
      images: [B, H, W, 3], normalised, of any size.
      window: side of the last map for the images of the training, see `window_size`. An
        axis of the map that is shorter is averaged as a whole.

    Returns:
      [B, num_classes] float32; for images of the size of the training, the logits of the
      model itself.

    Source: Simonyan & Zisserman 2014 (arXiv:1409.1556), section 3.2; He et al. 2015
      (arXiv:1512.03385), section 3.4.
    Differs: Simonyan & Zisserman also average over the mirror image.
    """
    x = _last_map(model, variables, images)  # [B, H/32, W/32, D]
    rows, columns = (jnp.asarray(_coverage(side, window)) for side in x.shape[1:3])
    x = (x * rows[:, None, None]).sum(axis=1)  # [B, W/32, D]
    x = (x * columns[:, None]).sum(axis=1)  # [B, D]
    return _classify(variables, x)  # [B, num_classes]


def score_map(model: ResNet, variables: Tree, images: jax.Array, window: int) -> jax.Array:
    """The scores at each place where the net can stand in an image.

    The windows of the last map that are as large as it is in training are averaged, one
    position apart, and the classifier is a 1x1 convolution.

    Args:
      model: as for `dense_logits`.
      variables: of it.
      images: [B, H, W, 3], normalised, of any size.
      window: side of the windows.

    Returns:
      [B, h - window + 1, w - window + 1, num_classes] float32, where the last map is
      [B, h, w, D].
    """
    x = _last_map(model, variables, images)  # [B, h, w, D]
    sides = [min(window, side) for side in x.shape[1:3]]
    x = lax.reduce_window(x, 0.0, lax.add, (1, *sides, 1), (1, 1, 1, 1), "VALID")
    return _classify(variables, x / (sides[0] * sides[1]))


def _coverage(side: int, window: int) -> np.ndarray:
    """What each position of an axis counts in the mean over all windows; adds up to 1."""
    window = min(window, side)
    ends = np.arange(side)
    held = np.minimum(ends + 1, side - ends)  # windows that could hold it
    held = np.minimum(held, min(window, side - window + 1))
    return (held / held.sum()).astype(np.float32)


def _last_map(model: ResNet, variables: Tree, images: jax.Array) -> jax.Array:
    """What the classifier averages, [B, h, w, D] float32."""
    return _last(model.apply(variables, images, train=False, return_stages=True))


def _last(result: Any) -> jax.Array:
    _, stages = result
    return list(stages.values())[-1].astype(jnp.float32)


def _classify(variables: Tree, x: jax.Array) -> jax.Array:
    """The classifier, [..., D] -> [..., num_classes]."""
    head = variables["params"]["head"]
    return jnp.dot(x, head["kernel"], precision=lax.Precision.HIGHEST) + head["bias"]
