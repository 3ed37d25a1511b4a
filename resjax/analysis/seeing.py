"""What units of a network respond to: filters, maps, the images that excite them most.

A layer is named as its parameters are: "stem", "stage2", "stage2/block1". Networks are in
evaluation mode.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from resjax.config import UsageError, unknown_name
from resjax.models.resnet import ResNet

Variables = dict[str, Any]
_CHUNK = 64  # images of one forward pass of `top_images`, whatever batches they come in


class TopImages(NamedTuple):
    """The images that excite each channel of a layer most, the strongest first.

    Attributes:
      indices: of the images in the stream, [C, n] int32, counted from 0.
      values: of the channel where it is largest in the image, [C, n] float32.
      positions: row and column in the image of the pixel at the centre of what the channel
        sees there, [C, n, 2] int32.
    """

    indices: np.ndarray
    values: np.ndarray
    positions: np.ndarray


def list_layers(model: ResNet) -> list[str]:
    """The names of layers that have maps, ["stem", "stage1", "stage1/block1", ...]."""
    names = ["stem"]
    for i, blocks in enumerate(model.stage_sizes, start=1):
        names += [f"stage{i}", *(f"stage{i}/block{j + 1}" for j in range(blocks))]
    return names


def first_layer_filters(variables: Variables) -> np.ndarray:
    """The kernels of the first convolution as images.

    Args:
      variables: {"params", ...}.

    Returns:
      [D, k, k, 3] float32 in 0..1; zero is 0.5, and one scale for all of a filter brings
      its largest weight, by magnitude, to 0 or 1.

    Source: Krizhevsky et al. 2012, figure 3, for the picture.
    """
    kernel = np.asarray(variables["params"]["stem"]["conv"]["kernel"], np.float32)
    filters = np.moveaxis(kernel, -1, 0)  # [D, k, k, 3]
    largest = np.abs(filters).max(axis=(1, 2, 3), keepdims=True)
    return 0.5 + filters / np.where(largest > 0, 2 * largest, 1)


def feature_maps(
    model: ResNet, variables: Variables, images: jax.Array | np.ndarray, layer: str
) -> jax.Array:
    """What a layer puts out.

    Args:
      model: from `create_model`.
      variables: {"params", "batch_stats"}.
      images: [B, H, W, 3] float, normalised as in training.
      layer: see `list_layers`. The last stage of a pre-activation net has the net's last
        norm and ReLU behind it, and its last block has not.

    Returns:
      [B, h, w, C], of the model's dtype; that of a stage is what `return_stages` gives.

    Raises:
      UsageError: no layer of that name.
    """
    _check_layer(model, layer)
    return _feature_maps(model, variables, images, layer)


def top_images(
    model: ResNet,
    variables: Variables,
    batches: Iterable[Any],
    layer: str,
    n: int = 9,
) -> TopImages:
    """The n images of a stream that excite each channel of a layer most.

    An image counts with the position where the channel is largest, and so only once. Of
    equal values that of the earlier image comes first, and within an image that of the
    first position, row by row. The result does not depend on the size of the batches, for
    the network always sees 64 images at once; memory does not grow with the stream.

    Args:
      model: from `create_model`.
      variables: {"params", "batch_stats"}.
      batches: of images [B, H, W, 3] float of one size, normalised as in training.
      layer: see `list_layers`.
      n: images a channel.

    Returns:
      `TopImages`, of fewer than n images if the stream has no more.

    Raises:
      UsageError: no layer of that name, no images, images of several sizes, or n below 1.

    Source: Zeiler & Fergus 2013 (arXiv:1311.2901), section 4 and figure 2.
    """
    _check_layer(model, layer)
    if n < 1:
        raise UsageError(f"n: {n} is no whole number from 1")
    best, seen = None, 0
    for chunk in _chunks(batches):
        count = len(chunk)
        padded = np.pad(chunk, [(0, _CHUNK - count), (0, 0), (0, 0), (0, 0)])
        if best is None:
            best = _no_images(model, variables, padded, layer, n)
        best = _merge(model, variables, padded, layer, best, seen, count)
        seen += count
    if best is None:
        raise UsageError("batches: there is no image in them")
    negated, indices, rows, columns = (np.asarray(each)[:, :seen] for each in best)
    return TopImages(indices, -negated, np.stack([rows, columns], axis=-1))


def pixel_stride(pixels: int, cells: int) -> int:
    """The step in pixels between the positions of a map along one axis.

    Strides halve and round up, so that cells = ceil(pixels / stride), stride a power of 2.
    """
    return 1 << (-(-pixels // cells) - 1).bit_length()


def _check_layer(model: ResNet, layer: str) -> None:
    known = list_layers(model)
    if layer not in known:
        raise unknown_name("layer", str(layer), known)


def _find_maps(
    model: ResNet, variables: Variables, images: jax.Array, layer: str
) -> jax.Array:
    """`feature_maps` of a known layer."""
    if layer in [f"stage{i + 1}" for i in range(len(model.stage_sizes))]:
        _, stages = model.apply(variables, images, train=False, return_stages=True)
        return stages[layer]
    found: list[jax.Array] = []

    def keep(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        is_layer = "/".join(context.module.path) == layer
        if is_layer and context.method_name == "__call__":
            found.append(y)
        return y

    unrolled = model.clone(remat="none")  # a loop over blocks would hide which is which
    with nn.intercept_methods(keep):
        unrolled.apply(variables, images, train=False)
    return found[0]


_feature_maps = partial(jax.jit, static_argnums=(0, 3))(_find_maps)


def _chunks(batches: Iterable[Any]) -> Iterator[np.ndarray]:
    """The same images, so many at once."""
    images = (image for batch in batches for image in np.asarray(batch))
    size = None
    while chunk := list(itertools.islice(images, _CHUNK)):
        size = size or chunk[0].shape
        for image in chunk:
            if image.shape != size or len(size) != 3:
                raise UsageError(
                    f"batches: an image of shape {image.shape}; all must be [H, W, 3] of "
                    f"one size, and the first is {size}"
                )
        yield np.stack(chunk)


def _no_images(
    model: ResNet, variables: Variables, images: np.ndarray, layer: str, n: int
) -> tuple[jax.Array, ...]:
    """What `_merge` starts from: values that any other displaces."""
    maps = jax.eval_shape(partial(_find_maps, model, layer=layer), variables, images)
    empty = jnp.zeros((maps.shape[-1], n), jnp.int32)
    return jnp.full(empty.shape, jnp.inf), empty, empty, empty


@partial(jax.jit, static_argnums=(0, 3))
def _merge(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    layer: str,
    best: tuple[jax.Array, ...],
    seen: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, ...]:
    """The best after these images, of which the first `count` count.

    Args:
      model: from `create_model`.
      variables: {"params", "batch_stats"}.
      images: [B, H, W, 3].
      layer: see `list_layers`.
      best: values (negated, so that the order is ascending), indices, rows and columns,
        [C, n] each.
      seen: images before these.
      count: images; the rest is padding.
    """
    maps = _find_maps(model, variables, images, layer).astype(jnp.float32)
    height, width = maps.shape[1:3]
    flat = maps.reshape(len(maps), height * width, -1)  # [B, h * w, C]
    places = flat.argmax(axis=1).T  # [C, B], the first of equal ones
    is_image = jnp.arange(len(maps)) < count
    negated = jnp.where(is_image, -flat.max(axis=1).T, jnp.inf)
    indices = jnp.broadcast_to(seen + jnp.arange(len(maps)), negated.shape)
    rows = places // width * pixel_stride(images.shape[1], height)
    columns = places % width * pixel_stride(images.shape[2], width)
    new = (negated, indices, rows, columns)
    joined = [
        jnp.concatenate([old, each.astype(old.dtype)], axis=1)
        for old, each in zip(best, new, strict=True)
    ]
    ordered = lax.sort(joined, dimension=1, num_keys=2)
    return tuple(each[:, : best[0].shape[1]] for each in ordered)
