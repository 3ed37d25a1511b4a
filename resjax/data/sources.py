"""Encoded examples by index, from data sets prepared by tfds, without TensorFlow."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from resjax.config import UsageError, unknown_name
from resjax.data.datasets import get_dataset

_DEFAULT_DIR = Path("~/tensorflow_datasets")


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


def open_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
    """The tfds builder of a prepared data set; prepares `digits` if need be.

    Args:
      name: a name in `DATASETS`.
      data_dir: the folder of tfds data sets; None = $TFDS_DATA_DIR, or
        ~/tensorflow_datasets.

    Raises:
      UsageError: an unknown name, a folder that does not exist, a data set that is not
        prepared or cannot be read at random; it says what to run.
    """
    dataset = get_dataset(name)
    root = epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or _DEFAULT_DIR)
    root = root.expanduser()
    if data_dir and not root.is_dir():
        raise UsageError(f"config.data.dir: there is no directory {data_dir}")
    directory = _newest_version(root / name)
    if directory is None and dataset.prepare is None:
        _prepare_digits(root)
        directory = _newest_version(root / name)
    how = dataset.prepare or "python train.py"
    if directory is None:
        how = how.replace("DIR", str(root))
        raise UsageError(f"data set {name} is not prepared in {root}; run: {how}")
    try:
        builder = tfds.builder_from_directory(str(directory))
    except Exception as error:  # of many kinds: damaged JSON, missing files
        raise UsageError(f"data set in {directory} cannot be read: {error}") from error
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UsageError(
            f"data set {name} in {directory} is stored as {'/'.join(sorted(formats))}, "
            f"which cannot be read at random; for another --config.data.dir=DIR run: {how}"
        )
    return builder


def class_names(builder: tfds.core.DatasetBuilder) -> list[str]:
    """The names of the labels, in order."""
    return list(builder.info.features["label"].names)


def known_class_names(name: str) -> list[str]:
    """The class names that tfds knows of a data set which need not be there; [] if none."""
    try:
        return class_names(tfds.builder(name))
    except tfds.core.DatasetNotFoundError:
        return []


def open_source(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict[str, Any]]:
    """Examples by index: {"image": encoded bytes, "label": int, ...}.

    Raises:
      UsageError: the data set has no such split, or its first example cannot be read.
    """
    if split not in builder.info.splits:
        raise unknown_name("split", split, builder.info.splits)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(split, decoders=decoders)
        source[0]
    except Exception as error:  # of many kinds: missing or cut off shards
        where = f"split {split!r} of the data set in {builder.data_dir}"
        raise UsageError(f"{where} cannot be read: {error}") from error
    return source
