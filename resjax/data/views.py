"""Views of an image that an evaluation averages over, and the batches that they come in.

Geometry only. A view is of a given shape: [H, W, 3], or [V, H, W, 3] for several at once.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from resjax.data import decode

Shape = tuple[int, ...]
View = Callable[[np.ndarray, Shape], np.ndarray]  # decoded [H, W, 3] -> of that shape


def five_crops(image: np.ndarray, shape: Shape) -> np.ndarray:
    """The corners and the middle of the image with its shorter side at S * 256 / 224.

    With their mirror images, which the device makes, they are the crops of "10-crop".

    Args:
      image: [H, W, 3] uint8.
      shape: (5, S, S, 3).

    Returns:
      [5, S, S, 3] uint8: the upper left and right, the lower left and right, the middle,
      which is `decode.center_crop`.

    Source: Krizhevsky et al. 2012, section 4.1; He et al. 2015, section 3.4.
    Differs: Krizhevsky et al. first cut the resized image to the square in its middle;
      these are its own corners, as in fb.resnet.torch (`TenCrop` of
      datasets/transforms.lua).
    """
    size = shape[1]
    image = decode.resize_for_crop(image, size)
    bottom, right = image.shape[0] - size, image.shape[1] - size
    corners = [(top, left) for top in (0, bottom) for left in (0, right)]
    places = [*corners, (bottom // 2, right // 2)]
    return np.stack([image[y : y + size, x : x + size] for y, x in places])


def resized(image: np.ndarray, shape: Shape) -> np.ndarray:
    """The whole image as [H, W, 3]; of a strip its middle, see `decode.trim_strip`."""
    return decode.resize(decode.trim_strip(image), *shape[:2])


def scaled_shape(height: int, width: int, scale: int, stride: int) -> Shape:
    """The shape of an image whose shorter side is `scale` pixels.

    Args:
      height: of the image.
      width: of the image.
      scale: pixels.
      stride: of the net, pixels of its input for one of its last map.

    Differs: the longer side is the nearest multiple of the stride (at least `scale`), so
      that few shapes have to be compiled for; it is off by up to half a stride. Of a strip
      longer than 8 times its shorter side the middle is taken.
    """
    shorter = min(height, width)
    longer = min(max(height, width), 8 * shorter)
    # In whole numbers, so that all hosts round alike; a half goes up.
    steps = (2 * longer * scale + shorter * stride) // (2 * shorter * stride)
    side = max(steps * stride, scale)
    return (side, scale, 3) if height > width else (scale, side, 3)


@dataclasses.dataclass(frozen=True)
class Group:
    """Examples whose views have one shape, so that one program evaluates them all.

    Attributes:
      shape: of the view of an example.
      indices: of the examples, in the order in which they come.
      batch_size: of them at a time, over all hosts.
    """

    shape: Shape
    indices: Sequence[int]
    batch_size: int


def group_by_shape(
    shapes: Iterable[Shape | None], batch_size: Callable[[Shape], int]
) -> list[Group]:
    """The examples by the shape of their views; those without a shape are left out.

    The largest come first: if the memory of the devices is too small, it shows at once.

    Args:
      shapes: of each example of a split; None for one that cannot be read.
      batch_size: examples at a time of a shape.
    """
    places: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        if shape is not None:
            places.setdefault(shape, []).append(index)
    ordered = sorted(places, key=lambda shape: (-math.prod(shape), shape))
    return [
        Group(shape, places[shape], min(batch_size(shape), len(places[shape])))
        for shape in ordered
    ]
