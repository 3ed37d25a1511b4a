"""Where a training crop lies in its image, from uniform random numbers.

Geometry only; decode.py cuts the window out and resizes it. Of the 24 numbers of an
example, 0 to 19 draw the size of the window, 20 its top and 21 its left.
"""

import math
from collections.abc import Callable

import numpy as np

# (height, width, size of the crop, [24] uniforms) -> (top, left, h, w), pixels of the image
Window = Callable[[int, int, int, np.ndarray], tuple[int, int, int, int]]


def _place(
    height: int, width: int, h: int, w: int, uniforms: np.ndarray
) -> tuple[int, int, int, int]:
    """A window of h x w pixels, anywhere in the image with equal chance."""
    top = int(uniforms[20] * (height - h + 1))
    left = int(uniforms[21] * (width - w + 1))
    return top, left, h, w


def random_resized_window(
    height: int, width: int, size: int, uniforms: np.ndarray
) -> tuple[int, int, int, int]:
    """A window of 8-100 % of the area and aspect ratio 3/4-4/3.

    Ten attempts; then the largest centred window of an allowed ratio.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      size: of the crop, pixels, on which the window does not depend.
      uniforms: [24] float64 in [0, 1); attempt i takes numbers 2i and 2i + 1.

    Returns:
      (top, left, h, w), pixels of the image.

    Source: Szegedy et al. 2014 (arXiv:1409.4842), section 6, through fb.resnet.torch.
    Differs: as in torchvision, the ratio is uniform in its logarithm and the last resort
      keeps more than a square; fb.resnet.torch's ratio is the square of a uniform number.
    """
    for u_area, u_ratio in uniforms[:20].reshape(10, 2):
        area = height * width * (0.08 + 0.92 * u_area)
        ratio = 3 / 4 * (16 / 9) ** u_ratio
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _place(height, width, h, w, uniforms)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def scale_jitter_window(
    height: int, width: int, size: int, uniforms: np.ndarray
) -> tuple[int, int, int, int]:
    """What a crop of 224 shows of the image with its shorter side at 256 to 480.

    The side is uniform; crops of another size are of an image scaled in proportion.

    Args:
      height: of the image, pixels.
      width: of the image, pixels.
      size: of the crop, pixels, on which the window does not depend.
      uniforms: [24] float64 in [0, 1); number 0 draws the side.

    Returns:
      (top, left, h, w), pixels of the image.

    Source: He et al. 2015 (arXiv:1512.03385), section 3.4.
    Differs: the side is any real number and the window whole pixels of the image; there
      the side and the place in the resized image are whole.
    """
    shorter_side = 256 + (480 - 256) * uniforms[0]
    side = max(round(min(height, width) * 224 / shorter_side), 1)
    return _place(height, width, side, side, uniforms)
