"""TFRecord shards by index, through an offset index that is built once.

A shard is a row of records: 8 bytes of length, 4 of checksum, the data, 4 of checksum, all
little-endian, and says nowhere where its records lie. The index holds their lengths. The
files must be on a disk that this machine mounts.

Source: https://www.tensorflow.org/tutorials/load_data/tfrecord, "TFRecords format details".
"""

import hashlib
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
from tqdm import tqdm

from resjax.config import UsageError

_HEAD, _FRAME = 12, 16  # bytes before a record, and around it
_SAMPLE = 8  # records of a shard, at most, whose data are checked when it is indexed
DISK_THREADS = 16  # files looked at at once: most of it is waiting for the disk


def masked_crc32c(data: bytes) -> int:
    """The checksum that stands behind some bytes, their CRC-32C turned and shifted."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- records ------------------------------------------------------------------------


class TFRecords:
    """The records of some shards by index, in their order; opens no file before a read.

    Args:
      paths: of the shards.
      counts: of their records.
      lengths: in bytes, of all records.
    """

    def __init__(self, paths: list[str], counts: list[int], lengths: np.ndarray) -> None:
        self._paths = paths
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        self._lengths = lengths
        ends = np.concatenate([[0], np.cumsum(lengths + _FRAME)])
        # Bytes from the start of a shard, not of all.
        self._starts = ends[:-1] - np.repeat(ends[self._bounds[:-1]], counts)

    def __len__(self) -> int:
        return len(self._lengths)

    def _framed(self, index: int) -> bytes:
        """A record with its length and checksums."""
        path = self._paths[int(np.searchsorted(self._bounds, index, "right")) - 1]
        length = int(self._lengths[index])
        file = os.open(path, os.O_RDONLY)
        try:
            framed = os.pread(file, length + _FRAME, int(self._starts[index]))
        finally:
            os.close(file)
        if len(framed) < length + _FRAME or _length(framed) != length:
            raise ValueError("the shard has changed since it was indexed")
        return framed

    def __getitem__(self, index: int) -> bytes:
        """The data of a record.

        Raises:
          OSError: it cannot be read.
          ValueError: it is not what the index says.
        """
        return self._framed(index)[_HEAD:-4]

    def is_whole(self, index: int) -> bool:
        """Whether the data of a record are what their checksum was made of."""
        framed = self._framed(index)
        stored = int.from_bytes(framed[-4:], "little")
        return masked_crc32c(framed[_HEAD:-4]) == stored


def _length(framed: bytes) -> int:
    return int.from_bytes(framed[:8], "little")


# --- the index ----------------------------------------------------------------------


def _walk(path: str) -> tuple[np.ndarray, int]:
    """What stands before each record, [n, 12] uint8, and how many bytes are missing."""
    headers, offset = [], 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while offset < size:
            header = os.pread(file.fileno(), _HEAD, offset)
            offset += _FRAME
            if len(header) == _HEAD:
                headers.append(header)
                offset += _length(header)
    rows = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _HEAD)
    return rows, offset - size


def _index_shard(path: str, count: int) -> np.ndarray:
    """The lengths of a shard's records, [count] int64, all and some data being checked."""
    try:
        rows, missing = _walk(path)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    lengths = np.ascontiguousarray(rows[:, :8]).view("<i8")[:, 0]
    for i, row in enumerate(rows):
        if masked_crc32c(row[:8].tobytes()) != int.from_bytes(row[8:].tobytes(), "little"):
            raise UsageError(f"{path}: damaged at record {i}, CRC of its length")
    if missing:
        raise UsageError(f"{path}: cut off near record {len(rows)} of {count}")
    if len(rows) != count:
        raise UsageError(f"{path}: {len(rows)} records, but dataset_info.json says {count}")
    records = TFRecords([path], [count], lengths)
    for i in range(0, count, -(-count // _SAMPLE) or 1):
        if not records.is_whole(i):
            raise UsageError(f"{path}: damaged in record {i}, CRC of its data")
    return lengths


def _split(paths: list[str]) -> Path:
    """Its shards without their numbers, FOLDER/NAME-SPLIT.tfrecord."""
    first = Path(paths[0])
    return first.with_name(first.name.rsplit("-", 3)[0])


def _build(paths: list[str], counts: list[int]) -> np.ndarray:
    """The lengths of all records, [sum of counts] int64."""
    print(f"data: indexing {len(paths):,} shards of {_split(paths)}", file=sys.stderr)
    # disable=None: no bar if standard error is no terminal.
    bar = tqdm(total=len(paths), desc="index", unit="shard", disable=None, leave=False)
    with bar, ThreadPoolExecutor(DISK_THREADS) as threads:
        lengths = []
        for shard in threads.map(_index_shard, paths, counts):
            lengths.append(shard)
            bar.update()
    return np.concatenate(lengths)


def _stamp(paths: list[str]) -> dict[str, np.ndarray]:
    """What changes when a shard does."""
    stats = [os.stat(path) for path in paths]
    return {
        "names": np.array([Path(path).name for path in paths]),
        "sizes": np.array([stat.st_size for stat in stats], np.int64),
        "times": np.array([stat.st_mtime_ns for stat in stats], np.int64),
    }


def _load(path: Path, stamp: dict[str, np.ndarray], counts: list[int]) -> np.ndarray | None:
    """The lengths in an index file; None if there is none, or it is not of these shards."""
    try:
        with open(path, "rb") as file:
            stored = dict(np.load(file, allow_pickle=False))  # checks their CRCs
        lengths = stored.pop("lengths")
    except Exception:  # of many kinds, if the file is damaged
        return None
    fresh = stored.keys() == stamp.keys() and all(
        np.array_equal(stored[name], stamp[name]) for name in stamp
    )
    return lengths if fresh and len(lengths) == sum(counts) else None


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an index file at once: other processes may read or write it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def index_paths(paths: list[str]) -> tuple[Path, Path]:
    """Where the index of these shards may be: beside them, or in the user's cache."""
    split = _split(paths).absolute()
    beside = split.with_name(split.name + ".index.npz")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.sha256(str(beside).encode()).hexdigest()[:16]
    return beside, cache / "resjax" / f"{digest}-{beside.name}"


def open_tfrecords(paths: list[str], counts: list[int]) -> TFRecords:
    """The records of the shards of a split; builds their index if there is none.

    Args:
      paths: of the shards, which exist.
      counts: of their records, as dataset_info.json says.

    Raises:
      UsageError: a shard is cut off or damaged or has another number of records; the
        index can be written neither beside the shards nor into the user's cache.
    """
    stamp = _stamp(paths)
    beside, cached = index_paths(paths)
    for path in (beside, cached):
        lengths = _load(path, stamp, counts)
        if lengths is not None:
            return TFRecords(paths, counts, lengths)
    lengths = _build(paths, counts)
    try:
        _save(beside, {**stamp, "lengths": lengths})
    except OSError:  # a data set that others own, or a full disk
        try:
            _save(cached, {**stamp, "lengths": lengths})
        except OSError as error:
            raise UsageError(
                f"{cached}: the index of {beside.parent} cannot be written: "
                f"{error.strerror}; make room there, or set XDG_CACHE_HOME"
            ) from error
    return TFRecords(paths, counts, lengths)
