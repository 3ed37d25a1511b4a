"""Encoded examples by index: data sets prepared by tfds, and folders; no TensorFlow."""

import bisect
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import io
import os
import shlex
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds
from array_record.python.array_record_module import (  # type: ignore[import-untyped]
    ArrayRecordReader,
)
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from resjax.config import UsageError, unknown_name
from resjax.data.datasets import get_dataset
from resjax.data.decode import DataError
from resjax.data.folder import open_folder
from resjax.data.tfrecord import DISK_THREADS, TFRecords, open_tfrecords

Example = Mapping[str, Any]  # {"image": encoded bytes, "label": int, ...}

_DEFAULT_DIR = Path("~/tensorflow_datasets")
_FORMATS = ("array_record", "tfrecord")  # that can be read at random, the better one first
_TRIED = 100  # records at which a whole one is looked for


class Source(Protocol):
    """Encoded examples by index, in any order, from many threads and processes at once.

    Attributes:
      class_names: of the labels, in order.
    """

    @property
    def class_names(self) -> list[str]: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """An example; raises `DataError` if it is damaged."""
        ...

    def where(self, index: int) -> str:
        """Where an example lies, for a person to look at."""
        ...


# --- data sets of tfds --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """A split of a data set that tfds prepared.

    Attributes:
      class_names: of the labels, in order.
      shards: the paths of its files.
      ends: of every shard, the number of records up to its end.
      records: serialized examples.
      parse: a record -> {"image": encoded bytes, "label": int}.
    """

    class_names: list[str]
    shards: list[str]
    ends: list[int]
    records: Any
    parse: Callable[[bytes], Example]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Example:
        """Reads an example.

        Raises:
          DataError: the record is damaged.
          UsageError: its shard is gone.
        """
        try:
            return self.parse(self.records[index])
        except Exception as error:  # of many kinds, from three libraries
            path = self.shards[self._shard(index)]
            if not epath.Path(path).exists():
                raise UsageError(f"{path}: the shard is gone") from error
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise UsageError(f"{path}: {error.strerror}") from error  # of the machine
            raise DataError(" ".join(str(error).split())) from error

    def is_whole(self, index: int) -> bool:
        """Whether a record is what its checksum says, where the reader leaves that open."""
        return not isinstance(self.records, TFRecords) or self.records.is_whole(index)

    def _shard(self, index: int) -> int:
        return bisect.bisect_right(self.ends, index)

    def where(self, index: int) -> str:
        """The file of an example, and the number of the record in it."""
        shard = self._shard(index)
        first = self.ends[shard - 1] if shard else 0
        return f"{Path(self.shards[shard]).name}, record {index - first}"


def serialize(encoded: bytes, label: int) -> bytes:
    """A record of an encoded image and its label."""
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(encoded)
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString()


def _parse(record: bytes) -> Example:
    """The image and the label alone: a seventh of the time of tfds' definitions."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    image, label = features["image"].bytes_list.value, features["label"].int64_list.value
    if not (image and label):
        raise ValueError("the record has no image or no label")
    return {"image": image[0], "label": label[0]}


def _parse_all(features: Any, record: bytes) -> Example:
    """What the feature definitions of the data set make of a record."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    example = features.deserialize_example_np(record, decoders=decoders)
    if example["image"] is None or example["label"] is None:
        raise ValueError("the record has no image or no label")
    return {"image": example["image"], "label": int(example["label"])}


def _choose_parse(source: TfdsSource) -> TfdsSource:
    """The source with `_parse`, if that agrees with its own on the first whole record."""
    fast = dataclasses.replace(source, parse=_parse)
    for index in range(min(len(source), _TRIED)):
        try:
            example = source[index]
        except DataError:
            continue
        try:
            agrees = fast[index] == example
        except DataError:
            agrees = False
        return fast if agrees else source
    return source


def _prepare_digits(data_dir: epath.Path) -> None:
    from resjax.data.digits import Digits

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = Digits(data_dir=str(data_dir), file_format="array_record")
            builder.download_and_prepare()
    except OSError as error:
        if _newest_version(data_dir / "digits") is None:  # else another process was first
            raise UsageError(f"config.data.dir: {data_dir}: {error}") from error


def _newest_version(directory: epath.Path) -> epath.Path | None:
    """The folder of the newest prepared version of a data set, tfds' NAME/VERSION."""
    if not directory.is_dir():
        return None
    versions = {}
    for path in directory.iterdir():
        parts = path.name.split(".")
        if all(p.isdigit() for p in parts) and (path / "dataset_info.json").exists():
            versions[tuple(map(int, parts))] = path
    return versions[max(versions)] if versions else None


def data_root(data_dir: str | None) -> epath.Path:
    """The folder of tfds data sets."""
    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_DIR)
    return root.expanduser()


def prepare(name: str, data_dir: str | None) -> None:
    """Has tfds make a data set that is not there and that opening does not make.

    Here alone TensorFlow may be loaded: tfds encodes many data sets with it.

    Args:
      name: a name in `DATASETS`.
      data_dir: as in `open_source`.

    Raises:
      UsageError: TensorFlow is not installed, or tfds fails; it says why.
    """
    if name == "folder" or get_dataset(name).prepare is None:
        return
    root = data_root(data_dir)
    if _newest_version(root / name) is not None:
        return
    failed = f"data set {name} cannot be prepared in {root}"
    if importlib.util.find_spec("tensorflow") is None:
        raise UsageError(f"{failed} without TensorFlow; run: pip install tensorflow")
    try:
        builder = tfds.builder(name, data_dir=str(root), file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:  # of many kinds: no network, no archive, a full disk
        raise UsageError(f"{failed}: {type(error).__name__}: {error}") from error


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The tfds builder of a prepared data set; prepares `digits` if need be.

    Args:
      name: a name in `DATASETS`, of a data set of tfds.
      data_dir: the folder of tfds data sets; None = $TFDS_DATA_DIR, or
        ~/tensorflow_datasets.

    Returns:
      The builder, set to ArrayRecord if the data set is there in that format, else to
      TFRecord.

    Raises:
      UsageError: an unknown name, a folder that does not exist, a data set that is not
        prepared or cannot be read at random; it says what to run.
    """
    dataset = get_dataset(name)
    root = data_root(data_dir)
    if data_dir and not root.is_dir():
        raise UsageError(f"config.data.dir: there is no directory {data_dir}")
    directory = _newest_version(root / name)
    if directory is None and dataset.prepare is None:
        _prepare_digits(root)
        directory = _newest_version(root / name)
    how = dataset.prepare or "python train.py"
    if directory is None:
        how = how.replace("DIR", shlex.quote(str(root)))
        raise UsageError(f"data set {name} is not prepared in {root}; run: {how}")
    try:
        builder = tfds.builder_from_directory(str(directory))
        formats = {known.value for known in builder.info.available_file_formats()}
        readable = [known for known in _FORMATS if known in formats]
        if readable:  # tfds' own argument for it fails if there are two
            builder.info.set_file_format(
                readable[0], override=True, override_if_initialized=True
            )
            return builder
    except Exception as error:  # of many kinds: damaged JSON, missing files
        raise UsageError(f"data set in {directory} cannot be read: {error}") from error
    raise UsageError(
        f"data set {name} in {directory} is stored as {'/'.join(sorted(formats))}, "
        f"which cannot be read at random; for another --config.data.dir=DIR run: {how}"
    )


def class_names(builder: tfds.core.DatasetBuilder) -> list[str]:
    """The names of the labels, in order."""
    return list(builder.info.features["label"].names)


def known_class_names(name: str) -> list[str]:
    """The class names that tfds knows of a data set which need not be there; [] if none."""
    try:
        return class_names(tfds.builder(name))
    except tfds.core.DatasetNotFoundError:
        return []


def _count_records(path: str) -> int:
    """The number of records in an ArrayRecord shard, which its end tells."""
    try:
        reader = ArrayRecordReader(path)
        count = int(reader.num_records())
        reader.close()  # raises what has gone wrong
    except Exception as error:  # of many kinds, some without a text
        reason = " ".join(["cut off or damaged", *str(error).split()])
        raise UsageError(f"{path}: {reason}") from error
    return count


def _open_array_records(
    builder: tfds.core.DatasetBuilder, split: str, shards: list[str], counts: list[int]
) -> Any:
    """The records of a split by index; raises `UsageError` for a shard that is cut off."""
    with ThreadPoolExecutor(DISK_THREADS) as threads:
        found = list(threads.map(_count_records, shards))
    for path, number, count in zip(shards, found, counts, strict=True):
        if number != count:
            raise UsageError(
                f"{path}: {number} records, but dataset_info.json says {count}"
            )
    return builder.as_data_source(split).data_source


def _open_tfds(name: str, data_dir: str | None, split: str) -> TfdsSource:
    builder = open_builder(name, data_dir)
    if split not in builder.info.splits:
        raise unknown_name("split", split, builder.info.splits)
    shards = [str(path) for path in builder.info.splits[split].filepaths]
    counts = list(builder.info.splits[split].shard_lengths)
    folder = os.path.normpath(builder.data_dir)
    for path in shards:
        if os.path.dirname(os.path.normpath(path)) != folder:  # dataset_info.json says so
            raise UsageError(f"{path}: the shard is outside its data set's folder {folder}")
    with ThreadPoolExecutor(DISK_THREADS) as threads:
        there = list(threads.map(lambda path: epath.Path(path).exists(), shards))
    if not all(there):
        raise UsageError(
            f"{shards[there.index(False)]}: the shard is missing, as are "
            f"{there.count(False) - 1:,} more of {len(shards):,}"
        )
    if builder.info.file_format.value == "array_record":
        records = _open_array_records(builder, split, shards, counts)
    else:
        records = open_tfrecords(shards, counts)
    parse = functools.partial(_parse_all, builder.info.features)
    ends = list(accumulate(counts))
    return _choose_parse(TfdsSource(class_names(builder), shards, ends, records, parse))


# --- all of them --------------------------------------------------------------------


def open_source(name: str, data_dir: str | None, split: str) -> Source:
    """The examples of a split of a data set.

    Args:
      name: a name in `DATASETS`.
      data_dir: the folder of tfds data sets, or the folder of images; None = as
        `open_builder`, for the former.
      split: "train" or "test".

    Raises:
      UsageError: the data set, or a part of it, is unknown or not there or damaged.
    """
    dataset = get_dataset(name)
    if split not in dataset.splits:
        raise unknown_name("split", split, dataset.splits)
    stored = dataset.splits[split]
    if name == "folder":
        return open_folder(data_dir, stored)
    return _open_tfds(name, data_dir, stored)
