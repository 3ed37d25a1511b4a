"""Re-encodes the large JPEG files of a data set once, at a shorter side.

For hosts that are too small for their accelerators: a smaller file is read and decoded
sooner. Order, labels and class names stay, and so does the order of training.
"""

import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import (  # type: ignore[import-untyped]
    ArrayRecordWriter,
)

from resjax.config import UsageError
from resjax.data import crops, decode, jpeg, order, sources
from resjax.data.datasets import get_dataset
from resjax.data.decode import DataError
from resjax.data.describe import evenly_spaced, in_parts
from resjax.data.sources import Source, TfdsSource

SIDES = range(16, 8193)  # pixels, that may be asked for
QUALITIES = range(1, 101)

_CROP = 224  # pixels, of the crops that are compared
_SAMPLE = 256  # images that are compared
_ROUNDS = 3  # times each is decoded
_DRAWS = 16  # crops of each whose size is looked at

# (index, encoded, label, whether it was re-encoded)
_Example = tuple[int, bytes, int, bool]


def shrink_image(encoded: bytes, side: int, quality: int, rotate: bool) -> bytes:
    """A JPEG file of a shorter side at most `side`; anything else as it is.

    Args:
      encoded: the file; a damaged one comes back as it is.
      side: pixels.
      quality: of JPEG, 1 to 100; colours have half the resolution (4:2:0).
      rotate: apply the EXIF orientation, which is lost.
    """
    header = jpeg.read_header(encoded)
    if header is None or min(header.height, header.width) <= side:
        return encoded
    try:
        image = decode.decode(encoded, rotate)
    except DataError:
        return encoded
    height, width = image.shape[:2]
    scale = side / min(height, width)
    image = decode.resize(image, round(height * scale), round(width * scale))
    half = cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, half]
    _, shrunk = cv2.imencode(".jpg", image[:, :, ::-1], options)
    return shrunk.tobytes()


def _shrunk(
    source: Source, shrink: Callable[[bytes], bytes], label: str
) -> Iterator[_Example]:
    """The examples of a split in their order; raises `UsageError` for a damaged record."""

    def read(index: int) -> _Example:
        try:
            example = source[index]
        except DataError as error:
            raise UsageError(
                f"{label}: example {index} ({source.where(index)}) cannot be read: {error}"
            ) from error
        encoded = shrink(example["image"])
        return index, encoded, example["label"], encoded is not example["image"]

    return in_parts(read, range(len(source)), f"shrink {label}")


# --- writing ------------------------------------------------------------------------


def check_target(name: str, to: str) -> None:
    """Raises `UsageError` if there is a data set of this name, or can be no folder."""
    root = Path(to).expanduser()
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"--to: {to} cannot be made: {there} is no directory")
    parts = get_dataset(name).splits.values() if name == "folder" else [name]
    for part in parts:
        if (root / part).exists():
            raise UsageError(f"--to: {root / part} exists; choose another directory")


@contextlib.contextmanager
def _all_or_nothing(to: str) -> Iterator[Path]:
    """A folder whose contents move to `to` at the end; nothing is left of a failure."""
    root = Path(to).expanduser()
    made = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=root) as temporary:
            yield Path(temporary)
            for path in Path(temporary).iterdir():
                path.rename(root / path.name)
            made = False
    except UsageError:
        raise
    except (OSError, RuntimeError) as error:  # the latter from ArrayRecord
        raise UsageError(f"--to: {to} cannot be written: {error}") from error
    finally:
        if made and root.is_dir():
            root.rmdir()


def _write_folder(examples: Iterator[_Example], source: Source, root: Path) -> int:
    """Writes a split as a folder of images; returns how many were re-encoded."""
    num_reencoded = 0
    for index, encoded, _, reencoded in examples:
        path = root / source.where(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded)
        num_reencoded += reencoded
    return num_reencoded


def _write_shards(
    examples: Iterator[_Example], source: TfdsSource, prefix: Path
) -> tuple[int, int]:
    """Writes a split in shards of as many examples as the source has in each.

    Not through a builder of tfds, which keeps what it does not shuffle in memory.

    Returns:
      How many were re-encoded; the bytes of all records.
    """
    num_reencoded = num_bytes = 0
    counts = _shard_lengths(source)
    for shard, count in enumerate(counts):
        path = f"{prefix}.array_record-{shard:05}-of-{len(counts):05}"
        writer = ArrayRecordWriter(path, "group_size:1")  # as tfds does, to read at random
        for _, encoded, label, reencoded in itertools.islice(examples, count):
            record = sources.serialize(encoded, label)
            writer.write(record)
            num_reencoded += reencoded
            num_bytes += len(record)
        writer.close()
    return num_reencoded, num_bytes


def _shard_lengths(source: TfdsSource) -> list[int]:
    return [end - start for start, end in itertools.pairwise([0, *source.ends])]


def _write_tfds(
    examples: dict[str, Iterator[_Example]],
    splits: dict[str, TfdsSource],
    builder: tfds.core.DatasetBuilder,
    name: str,
    root: Path,
) -> int:
    """Writes a data set of tfds, of image and label; returns how many were re-encoded."""
    directory = root / name / str(builder.version)
    directory.mkdir(parents=True)
    total, infos = 0, []
    for split, source in splits.items():
        prefix = directory / f"{name}-{split}"
        num_reencoded, num_bytes = _write_shards(examples[split], source, prefix)
        total += num_reencoded
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=_shard_lengths(source),
                num_bytes=num_bytes,
                filename_template=None,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features={name: builder.info.features[name] for name in ("image", "label")},
        split_infos=infos,
        check_data=False,  # that would need TensorFlow
    )
    return total


def shrink(name: str, data_dir: str | None, to: str, side: int, quality: int) -> int:
    """Writes all splits of a data set anew, with JPEG files of a shorter side.

    A data set of tfds becomes `to`/NAME/VERSION, in ArrayRecord; a folder of images becomes
    `to`/train and `to`/val. Both open under the same name.

    Args:
      name: a name in `DATASETS`.
      data_dir: where it is, as in `open_source`.
      to: the folder to be filled.
      side: pixels, of the shorter side; only larger JPEG files are re-encoded.
      quality: of JPEG.

    Returns:
      The number of images that were re-encoded.

    Raises:
      UsageError: the data set is there already, or cannot be written; a record is damaged.
        Nothing is left then.
    """
    check_target(name, to)
    dataset = get_dataset(name)
    encode = functools.partial(
        shrink_image, side=side, quality=quality, rotate=dataset.rotates
    )
    splits: dict[str, Any] = {
        stored: sources.open_source(name, data_dir, split)
        for split, stored in dataset.splits.items()
    }
    examples = {split: _shrunk(splits[split], encode, split) for split in splits}
    with _all_or_nothing(to) as root:
        if name == "folder":
            return sum(_write_folder(examples[s], splits[s], root) for s in splits)
        builder = sources.open_builder(name, data_dir)
        return _write_tfds(examples, splits, builder, name, root)


# --- what has changed ---------------------------------------------------------------


@dataclasses.dataclass
class Costs:
    """Of random-resized crops of 224 pixels from a sample of images.

    Attributes:
      seconds: of one core, to decode and resize a crop of each.
      num_images: how many.
      num_enlarged: crops that are smaller than 224 pixels in the file, of 16 of each.
    """

    seconds: float = 0.0
    num_images: int = 0
    num_enlarged: int = 0

    @property
    def images_per_second(self) -> float:
        """Of one core."""
        return self.num_images / self.seconds

    @property
    def enlarged_share(self) -> float:
        """Of all crops."""
        return self.num_enlarged / (self.num_images * _DRAWS)


def compare(before: Source, after: Source, rotates: bool) -> tuple[Costs, Costs]:
    """What the crops of both cost, the same crops of the same images in turns.

    Args:
      before: a split.
      after: the same, shrunk.
      rotates: apply the EXIF orientation.

    Raises:
      UsageError: no image of the sample can be decoded.
    """
    costs = Costs(), Costs()
    for index in evenly_spaced(len(before), _SAMPLE):
        pair = before[index]["image"], after[index]["image"]
        draws = order.uniforms(0, index * _DRAWS, _DRAWS)
        try:
            rounds = [[_crop(e, draws[0], rotates) for e in pair] for _ in range(_ROUNDS)]
        except DataError:
            continue
        for cost, runs in zip(costs, zip(*rounds, strict=True), strict=True):
            seconds, height, width = min(runs)
            cost.seconds += seconds
            cost.num_images += 1
            for uniforms in draws:
                _, _, h, w = crops.random_resized_window(height, width, _CROP, uniforms)
                cost.num_enlarged += min(h, w) < _CROP
    if not costs[0].num_images:
        raise UsageError("no image of a sample can be decoded")
    return costs


def _crop(encoded: bytes, uniforms: np.ndarray, rotates: bool) -> tuple[float, int, int]:
    """Seconds that a crop of an image took; its height and width."""
    out = np.empty((_CROP, _CROP, 3), np.uint8)
    sizes = []

    def window(height: int, width: int) -> tuple[int, int, int, int]:
        sizes.append((height, width))
        return crops.random_resized_window(height, width, _CROP, uniforms)

    start = time.thread_time()  # what else the machine does is not counted
    decode.decode_window(encoded, window, out, rotates)
    return time.thread_time() - start, *sizes[0]
