"""Host-side images: encoded bytes to uint8 crops, with OpenCV.

Geometry only; normalisation, flips and shifts happen on the device (augment.py).
"""

import math

import cv2
import numpy as np


def decode(encoded: bytes) -> np.ndarray:
    """Encoded image (JPEG, PNG, ...) to [H, W, 3] uint8 RGB; grey becomes three channels.

    The EXIF orientation is ignored, as the papers' pipelines do.

    Raises:
      ValueError: the bytes are no image that OpenCV reads.
    """
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags) if encoded else None
    if image is None:
        raise ValueError(f"{len(encoded)} bytes that are no readable image")
    return image


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """[H, W, 3] uint8 to [height, width, 3]: area average to shrink, bicubic to grow."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method)


def whole(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image, squeezed to [size, size, 3]."""
    return resize(image, size, size)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, 3] of the image with its shorter side at size * 256 / 224.

    Source: Krizhevsky et al. 2012; He et al. 2015, section 3.4 (224 of 256).
    """
    height, width = image.shape[:2]
    scale = round(size * 256 / 224) / min(height, width)
    height, width = max(round(height * scale), size), max(round(width * scale), size)
    image = resize(image, height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def random_window(
    height: int, width: int, rng: np.random.RandomState
) -> tuple[int, int, int, int]:
    """A window of 8-100 % of the area and aspect ratio 3/4-4/3: (top, left, h, w) pixels.

    Ten attempts; then the largest centred window of an allowed ratio.

    Source: Szegedy et al. 2014 (arXiv:1409.4842), section 6, through fb.resnet.torch.
    Differs: the ratio is uniform in its logarithm, as in torchvision.
    """
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(height - h + 1), rng.randint(width - w + 1), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    image: np.ndarray, size: int, rng: np.random.RandomState
) -> np.ndarray:
    """`random_window` of the image, resized to [size, size, 3]."""
    top, left, h, w = random_window(image.shape[0], image.shape[1], rng)
    return resize(image[top : top + h, left : left + w], size, size)
