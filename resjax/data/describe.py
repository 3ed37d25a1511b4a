"""Reads every example of a split, counts what is there and lists what is damaged."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from etils import epath
from tqdm import tqdm

from resjax.data import jpeg
from resjax.data.decode import DataError, check_label, decode
from resjax.data.folder import FolderSource
from resjax.data.sources import Source, TfdsSource
from resjax.data.workers import in_order, num_cores

_PART = 8  # examples a thread takes at once
_WAITING = 64  # parts that may wait to be taken over, each 1 MB of ImageNet
_LISTED = 20  # damaged examples that are named

_Result = TypeVar("_Result")


@dataclasses.dataclass
class Description:
    """What a split holds.

    Attributes:
      class_names: of the labels, in order.
      num_examples: of the split.
      unit: what they lie in, "shards" or "files".
      num_files: how many.
      num_bytes: of those.
      class_counts: examples of each class, [num_classes] int.
      kinds: images of each kind, "JPEG", "PNG, grey", ...; these and the sums are of the
        examples that could be decoded.
      image_bytes: encoded, the sum.
      heights: in pixels, the sum.
      widths: in pixels, the sum.
      num_read: examples that were looked at.
      num_unreadable: of these.
      num_mislabelled: of these, whose label is out of range.
      damaged: a line on each of the first of both.
    """

    class_names: list[str]
    num_examples: int
    unit: str
    num_files: int
    num_bytes: int
    class_counts: np.ndarray
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    image_bytes: int = 0
    heights: int = 0
    widths: int = 0
    num_read: int = 0
    num_unreadable: int = 0
    num_mislabelled: int = 0
    damaged: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_damaged(self) -> int:
        """Examples that training would stop at."""
        return self.num_unreadable + self.num_mislabelled


class _Facts(NamedTuple):
    """Of an example that can be decoded."""

    label: int
    kind: str
    num_bytes: int
    height: int
    width: int


def _files(source: Source) -> Iterator[epath.Path]:
    if isinstance(source, TfdsSource):
        yield from map(epath.Path, source.shards)
    if isinstance(source, FolderSource):
        for index in range(len(source)):
            yield epath.Path(source.directory.parent / source.where(index))


def location(source: Source) -> epath.Path:
    """The folder of the data set."""
    return next(_files(source)).parents[2 if isinstance(source, FolderSource) else 0]


def disk_bytes(source: Source) -> int:
    """What the files of a split take."""
    return sum(path.stat().length for path in _files(source))


def in_parts(
    function: Callable[[int], _Result], indices: Sequence[int], label: str
) -> Iterator[_Result]:
    """function(index) of all indices, in order, in threads, behind a progress bar."""
    parts = (indices[i : i + _PART] for i in range(0, len(indices), _PART))
    # disable=None: no bar if standard error is no terminal.
    bar = tqdm(total=len(indices), desc=label, unit="image", disable=None, leave=False)

    def read(part: Sequence[int]) -> list[_Result]:
        return [function(i) for i in part]

    with bar:
        cv2.setNumThreads(0)  # parallelism is over images
        for results in in_order(read, parts, num_cores(), _WAITING):
            yield from results
            bar.update(len(results))


def evenly_spaced(num_examples: int, count: int) -> list[int]:
    """`count` indices, or all if there are no more."""
    count = min(count, num_examples)
    return [i * num_examples // count for i in range(count)]


def kind_of(encoded: bytes) -> str:
    """What an encoded image is, by its first bytes."""
    header = jpeg.read_header(encoded)
    if header:
        return {1: "JPEG, grey", 4: "JPEG, CMYK"}.get(header.components, "JPEG")
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG, grey" if encoded[25] in (0, 4) else "PNG"  # its colour type
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WebP"
    return "other images"


def describe(source: Source, rotates: bool, sample: int | None, label: str) -> Description:
    """Reads and decodes the examples of a split, in constant memory.

    Args:
      source: the split.
      rotates: apply the EXIF orientation.
      sample: how many examples to decode, evenly spaced; None = all.
      label: of the progress bar, and of the lines on damaged examples.

    Raises:
      UsageError: a shard is gone.
    """
    is_folder = isinstance(source, FolderSource)
    found = Description(
        class_names=source.class_names,
        num_examples=len(source),
        unit="files" if is_folder else "shards",
        num_files=sum(1 for _ in _files(source)),
        num_bytes=disk_bytes(source),
        class_counts=np.zeros(len(source.class_names), np.int64),
    )

    def look(index: int) -> _Facts | str:
        try:
            example = source[index]
            encoded = example["image"]
            if isinstance(source, TfdsSource) and not source.is_whole(index):
                return "its checksum is wrong"
            height, width = decode(encoded, rotates).shape[:2]
        except DataError as error:
            return str(error)
        return _Facts(example["label"], kind_of(encoded), len(encoded), height, width)

    indices = evenly_spaced(len(source), sample or len(source))
    for index, facts in zip(indices, in_parts(look, indices, label), strict=True):
        reason = _count(found, facts)
        if reason and len(found.damaged) < _LISTED:
            where = source.where(index)
            found.damaged.append(f"{label}: example {index} ({where}): {reason}")
    return found


def _count(found: Description, facts: _Facts | str) -> str | None:
    """Counts an example; returns what is wrong with it."""
    found.num_read += 1
    if isinstance(facts, str):
        found.num_unreadable += 1
        return facts
    found.kinds[facts.kind] += 1
    found.image_bytes += facts.num_bytes
    found.heights += facts.height
    found.widths += facts.width
    try:
        check_label(facts.label, len(found.class_counts))
    except DataError as error:
        found.num_mislabelled += 1
        return str(error)
    found.class_counts[facts.label] += 1
    return None


def format_table(columns: dict[str, dict[str, str]]) -> str:
    """Columns by heading, {row: text} each, as lines; what a column lacks stays empty."""
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    width = max(map(len, rows))
    lines = [" " * width, *(row.ljust(width) for row in rows)]
    for heading, column in columns.items():
        cells = [heading, *(column.get(row, "") for row in rows)]
        size = max(map(len, cells))
        lines = [f"{line}  {cell:>{size}}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(lines)


def cells(found: Description) -> dict[str, str]:
    """A column of the table on the splits."""
    decoded = found.kinds.total()
    told: dict[str, Any] = {"examples": found.num_examples}
    if found.num_read < found.num_examples:
        told["of these looked at"] = found.num_read
    told |= {found.unit: found.num_files, "bytes on disk": found.num_bytes}
    if decoded:
        height, width = found.heights / decoded, found.widths / decoded
        told["mean kB of an image"] = f"{found.image_bytes / decoded / 1000:.1f}"
        told["mean height x width"] = f"{height:.1f} x {width:.1f}"
    told["classes"] = len(found.class_names)
    if found.num_read == found.num_examples:
        for name, place in (("smallest class", np.argmin), ("largest class", np.argmax)):
            label = int(place(found.class_counts))
            told[name] = f"{found.class_counts[label]:,} ({found.class_names[label]})"
    told |= dict(sorted(found.kinds.items()))
    told["unreadable"] = found.num_unreadable
    told["labels out of range"] = found.num_mislabelled
    return {row: t if isinstance(t, str) else f"{t:,}" for row, t in told.items()}
