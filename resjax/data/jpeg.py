"""JPEG files: what their header says, and decoding of a part, with libjpeg-turbo 3.

OpenCV decodes whole images alone. Where libjpeg-turbo 3 is installed, only the part that is
asked for is decoded (its rows' entropy code, its columns' inverse transform). The pixels
are the same bit for bit; only the time differs.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
import struct
import threading
from typing import Any, NamedTuple

import numpy as np

# Of turbojpeg.h, version 3.
_DECOMPRESS, _RGB = 1, 0
_SUBSAMPLING, _WIDTH = 4, 5
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # by chroma subsampling: 4:4:4, 4:2:2, 4:2:0, ...


class Header(NamedTuple):
    """Of a JPEG file: size in pixels, colour components, and what was found before."""

    height: int
    width: int
    components: int
    exif: bool  # there is EXIF data, which may say that the image is rotated
    complete: bool  # the file goes on to its end marker


def read_header(encoded: bytes) -> Header | None:
    """The frame header of a JPEG file; None if it is something else.

    Source: ITU-T T.81 (JPEG), annex B.
    """
    if encoded[:2] != b"\xff\xd8":
        return None
    at, exif = 2, False
    while at + 10 <= len(encoded) and encoded[at] == 0xFF:
        marker = encoded[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # have no length; not found here
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF
            height, width, components = struct.unpack_from(">HHB", encoded, at + 5)
            end = b"\xff\xd9"
            complete = encoded.endswith(end) or end in encoded[at:]
            return Header(height, width, components, exif, complete)
        exif |= marker == 0xE1 and encoded[at + 4 : at + 8] == b"Exif"
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return None


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class _Fraction(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("num", "denom")]


@functools.cache
def turbojpeg() -> ctypes.CDLL | None:
    """libjpeg-turbo 3, of the system or of the package `turbojpeg`; None if absent."""
    paths = [ctypes.util.find_library("turbojpeg")]
    try:
        files = importlib.metadata.files("turbojpeg") or []
        paths += [str(f.locate()) for f in files if f.name.startswith("libturbojpeg")]
    except importlib.metadata.PackageNotFoundError:
        pass
    for path in filter(None, paths):
        try:
            found = ctypes.CDLL(path)
            found.tj3SetCroppingRegion  # noqa: B018  # absent from version 2
        except (OSError, AttributeError):
            continue
        return _declare(found)
    return None


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    handle, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    size = ctypes.c_size_t
    for name, result, arguments in (
        ("tj3Init", handle, [number]),
        ("tj3DecompressHeader", number, [handle, text, size]),
        ("tj3Get", number, [handle, number]),
        ("tj3SetScalingFactor", number, [handle, _Fraction]),
        ("tj3SetCroppingRegion", number, [handle, _Region]),
        ("tj3Decompress8", number, [handle, text, size, handle, number, number]),
        ("tj3GetErrorCode", number, [handle]),
    ):
        function: Any = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


_threads = threading.local()  # a decoder each


def decode_window(
    encoded: bytes, top: int, left: int, height: int, width: int, reduce: int
) -> np.ndarray | None:
    """A window of a JPEG image, decoded at 1 / `reduce` of its size.

    Args:
      encoded: the file.
      top: of the window, in pixels of the reduced image, as are the following.
      left: first column.
      height: rows.
      width: columns.
      reduce: 1, 2, 4 or 8: scaled in the discrete cosine transform.

    Returns:
      [height, width, 3] uint8 RGB; None where libjpeg-turbo 3 is not installed or does not
      read the file to RGB.
    """
    lib = turbojpeg()
    if lib is None:
        return None
    if not hasattr(_threads, "decoder"):
        _threads.decoder = lib.tj3Init(_DECOMPRESS)
    decoder = _threads.decoder
    if lib.tj3DecompressHeader(decoder, encoded, len(encoded)):
        return None
    subsampling = lib.tj3Get(decoder, _SUBSAMPLING)
    if not 0 <= subsampling < len(_BLOCK_WIDTHS):
        return None
    if lib.tj3SetScalingFactor(decoder, _Fraction(1, reduce)):
        return None
    # A region starts at a block. Chroma of its first and last column is interpolated from
    # one neighbour alone, so there must be another column beside the window.
    full_width = -(-lib.tj3Get(decoder, _WIDTH) // reduce)
    block = _BLOCK_WIDTHS[subsampling] // reduce
    start = max(left - 2, 0) // block * block
    end = min(left + width + 2, full_width)
    pixels = np.empty((height, end - start, 3), np.uint8)
    if lib.tj3SetCroppingRegion(decoder, _Region(start, top, end - start, height)):
        return None
    failed = lib.tj3Decompress8(
        decoder, encoded, len(encoded), pixels.ctypes.data, pixels.strides[0], _RGB
    )
    if failed and lib.tj3GetErrorCode(decoder):  # else a warning
        return None
    return pixels[:, left - start : left - start + width]
