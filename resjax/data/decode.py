"""Host-side images: encoded bytes to uint8 crops.

Geometry only; colours, normalisation, flips and shifts happen on the device (augment.py).
"""

from collections.abc import Callable

import cv2
import numpy as np

from resjax.config import UsageError, unknown_name
from resjax.data import jpeg

_REDUCED = {
    8: cv2.IMREAD_REDUCED_COLOR_8,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    2: cv2.IMREAD_REDUCED_COLOR_2,
}


class DataError(UsageError):
    """An example is damaged; a run may be allowed to do without it."""


def check_label(label: int, num_classes: int) -> None:
    """Raises `DataError` if there is no such class."""
    if not 0 <= label < num_classes:
        raise DataError(f"its label is {label}; it must be from 0 to {num_classes - 1}")


def decode(encoded: bytes, rotate: bool = False) -> np.ndarray:
    """Encoded image (JPEG, PNG, WebP, ...) to [H, W, 3] uint8 RGB.

    Grey becomes three channels, CMYK becomes RGB, 16 bits become the upper 8, and alpha is
    left out.

    Args:
      encoded: the file.
      rotate: apply the EXIF orientation, which the papers' pipelines ignore.

    Raises:
      DataError: the bytes are no image that OpenCV reads, or a JPEG file that is cut off.
    """
    header = jpeg.read_header(encoded)
    if header and not header.complete:
        raise DataError(f"{len(encoded)} bytes of a JPEG file that is cut off")
    flags = cv2.IMREAD_COLOR_RGB
    if not rotate:
        flags |= cv2.IMREAD_IGNORE_ORIENTATION
    return _imdecode(encoded, flags)


def _imdecode(encoded: bytes, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:  # empty, or of an absurd size
        raise DataError(
            f"{len(encoded)} bytes that are no readable image: {error.err}"
        ) from None
    if image is None:
        raise DataError(f"{len(encoded)} bytes that are no readable image")
    return image


def decode_window(
    encoded: bytes,
    window: Callable[[int, int], tuple[int, int, int, int]],
    out: np.ndarray,
    rotate: bool = False,
) -> None:
    """Fills `out` with the part of an image where `window` says, resized.

    A JPEG file whose window is at least twice the target is decoded at 1/2, 1/4 or 1/8 of
    its size, within the discrete cosine transform, and what remains to shrink is less than
    twofold, for which bilinear interpolation is enough.

    Args:
      encoded: the file.
      window: (height, width) of the image -> (top, left, height, width) in it.
      out: [size, size, 3] uint8, contiguous; becomes RGB.
      rotate: apply the EXIF orientation.

    Raises:
      DataError: as `decode`.
    """
    header, size = jpeg.read_header(encoded), len(out)
    if not header or not header.complete or (rotate and header.exif):
        image = decode(encoded, rotate)
        top, left, height, width = window(*image.shape[:2])
        crop: np.ndarray | None = image[top : top + height, left : left + width]
    else:
        top, left, height, width = window(header.height, header.width)
        reduce = next((r for r in _REDUCED if min(height, width) >= r * size), 1)
        top, left, height, width = (n // reduce for n in (top, left, height, width))
        crop = jpeg.decode_window(encoded, top, left, height, width, reduce)
        if crop is None:
            image = _decode_reduced(encoded, reduce)
            crop = image[top : top + height, left : left + width]
    cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)


def _decode_reduced(encoded: bytes, reduce: int) -> np.ndarray:
    """A JPEG file, decoded at 1 / `reduce` of its size."""
    if reduce == 1:
        return decode(encoded)
    flags = _REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION
    return _imdecode(encoded, flags)[:, :, ::-1]


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


def trim_strip(image: np.ndarray) -> np.ndarray:
    """The middle of an image whose longer side is over 8 times the shorter one."""
    limit = 8 * min(image.shape[:2])
    top, left = (max(side - limit, 0) // 2 for side in image.shape[:2])
    return image[top : top + limit, left : left + limit]


def resize_for_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The image with its shorter side at size * 256 / 224, see `center_crop`."""
    image = trim_strip(image)  # what would be enlarged in vain
    height, width = image.shape[:2]
    scale = round(size * 256 / 224) / min(height, width)
    height, width = max(round(height * scale), size), max(round(width * scale), size)
    return resize(image, height, width)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, 3] of the image with its shorter side at size * 256 / 224.

    Source: Krizhevsky et al. 2012; He et al. 2015, section 3.4 (224 of 256).
    """
    image = resize_for_crop(image, size)
    height, width = image.shape[:2]
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


EVAL_CROPS = {crop.__name__: crop for crop in (whole, center_crop)}


def get_eval_crop(name: str) -> Callable[[np.ndarray, int], np.ndarray]:
    """The crop of that name; raises `UsageError` with those there are."""
    if name not in EVAL_CROPS:
        raise unknown_name("eval_crop", name, EVAL_CROPS)
    return EVAL_CROPS[name]
