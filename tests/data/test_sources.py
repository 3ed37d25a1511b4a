"""Prepared data sets are found; what is missing or of a wrong kind is one line."""

import functools
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorboardX.record_writer import RecordWriter
from tiny_tfds import SIZES, encode, pixels, write_cifar10, write_imagenet

from resjax.config import UsageError
from resjax.data import sources
from resjax.data.decode import DataError, decode

FORMATS = ["array_record", "tfrecord"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a tiny imagenet2012 and a tiny cifar10."""
    folder = tmp_path_factory.mktemp("prepared")
    write_imagenet(folder, num_shards=3)
    write_cifar10(folder)
    return folder


@pytest.fixture(scope="module")
def as_tfrecord(tmp_path_factory):
    """A folder with the same imagenet2012 as TFRecords."""
    folder = tmp_path_factory.mktemp("as_tfrecord")
    write_imagenet(folder, num_shards=3, file_format="tfrecord")
    return folder


@pytest.fixture(params=FORMATS)
def folder(request, prepared, as_tfrecord):
    """Of the tiny imagenet2012 in one format, then the other; to be read."""
    return prepared if request.param == "array_record" else as_tfrecord


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of it, to be damaged: the folder of tfds data sets."""
    shutil.copytree(folder, tmp_path / "copied")
    return tmp_path / "copied"


def shard(folder, number=1):
    """A shard of the training split: its path and the place where it holds image bytes."""
    (path,) = folder.glob(f"imagenet2012/*/*-train.*-{number:05}-of-00003")
    return path, path.read_bytes().index(b"JFIF") + 50


@functools.cache
def files():
    """The bytes of every image of the tiny imagenet2012 -> its number."""
    return {encode(pixels(i, *SIZES[i % len(SIZES)]), ".jpg"): i for i in range(34)}


def message(name, data_dir, split="train"):
    """The text of the `UsageError` that opening raises, which must be one line."""
    with pytest.raises(UsageError) as error:
        sources.open_source(name, data_dir, split)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("split", "first", "size"), [("train", 0, 24), ("test", 24, 10)])
def test_every_example_is_read_with_its_bytes_and_label(folder, split, first, size):
    source = sources.open_source("imagenet2012", str(folder), split)
    examples = [source[i] for i in range(len(source))]
    numbers = [files()[example["image"]] for example in examples]
    assert sorted(numbers) == list(range(first, first + size))
    assert [example["label"] for example in examples] == [i % 5 for i in numbers]
    assert all(type(example["label"]) is int for example in examples)


@pytest.mark.parametrize(("split", "first", "size"), [("train", 0, 40), ("test", 40, 20)])
def test_lossless_images_come_back_exactly(prepared, split, first, size):
    source = sources.open_source("cifar10", str(prepared), split)
    assert len(source) == size
    left = {pixels(i, 32, 32).tobytes(): i % 10 for i in range(first, first + size)}
    for i in range(size):
        assert left.pop(decode(source[i]["image"]).tobytes()) == source[i]["label"]


def test_order_is_that_of_tfds(folder):
    builder = tfds.builder_from_directory(str(folder / "imagenet2012" / "5.1.0"))
    source = sources.open_source("imagenet2012", str(folder), "train")
    ours = [source[i]["image"] for i in range(24)]
    if builder.info.file_format.value == "array_record":
        decoders = {"image": tfds.decode.SkipDecoding()}
        theirs = [e["image"] for e in builder.as_data_source("train", decoders=decoders)]
        assert ours == theirs
    names = [source.where(i).split(",")[0] for i in range(24)]
    lengths = dict(
        zip(
            builder.info.splits["train"].filenames,
            builder.info.splits["train"].shard_lengths,
            strict=True,
        )
    )
    assert {name: names.count(name) for name in names} == lengths
    assert names == sorted(names)


def test_example_is_where_the_source_says(folder):
    source = sources.open_source("imagenet2012", str(folder), "train")
    for i in range(len(source)):
        name, record = source.where(i).split(", record ")
        (path,) = folder.glob(f"imagenet2012/*/{name}")
        if "array_record" in name:
            found = ArrayRecordReader(str(path)).read([int(record)])[0]
            assert source[i]["image"] in found
        else:
            data = path.read_bytes()
            starts = [match.start() - 6 for match in re.finditer(b"JFIF", data)]
            assert data.startswith(source[i]["image"], starts[int(record)])


def test_array_record_is_read_where_a_data_set_has_both(tmp_path):
    write_imagenet(tmp_path, num_train=3, num_validation=2, file_format="both")
    assert len(list(tmp_path.glob("imagenet2012/*/*-train.tfrecord*"))) == 1
    source = sources.open_source("imagenet2012", str(tmp_path), "train")
    assert ".array_record-" in source.where(0)
    assert {files()[source[i]["image"]] for i in range(3)} == {0, 1, 2}


def test_many_threads_read_at_once(folder):
    source = sources.open_source("imagenet2012", str(folder), "train")
    alone = [source[i] for i in range(24)]
    order = np.random.RandomState(0).randint(0, 24, 400)
    fresh = sources.open_source("imagenet2012", str(folder), "train")
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda i: fresh[i], order.tolist()))
    assert together == [alone[i] for i in order]


def test_source_that_is_pickled_reads_the_same(folder):
    source = sources.open_source("imagenet2012", str(folder), "train")
    examples = [source[i] for i in range(24)]
    other = pickle.loads(pickle.dumps(source))  # with files open in one, not in the other
    assert [other[i] for i in range(24)] == examples
    assert other.where(23) == source.where(23)


def test_definitions_of_tfds_are_used_where_the_short_way_gives_something_else(
    folder, monkeypatch
):
    monkeypatch.setattr(sources, "_parse", lambda record: {"image": b"", "label": 0})
    source = sources.open_source("imagenet2012", str(folder), "train")
    assert {files()[source[i]["image"]] for i in range(24)} == set(range(24))


def test_class_names_are_in_the_order_of_the_labels(folder):
    source = sources.open_source("imagenet2012", str(folder), "train")
    names = ["n00000000", "n00000001", "n00000002", "n00000003", "n00000004"]
    assert source.class_names == names


def test_class_names_of_digits(data_dir):
    source = sources.open_source("digits", str(data_dir), "test")
    assert source.class_names == list("0123456789")


@pytest.mark.parametrize(
    ("older", "newer"), [("5.0.0", "5.1.0"), ("5.9.0", "5.10.0"), ("9.0.0", "10.0.0")]
)
def test_newest_version_is_read(tmp_path, older, newer):
    for version in (newer, older):
        write_imagenet(tmp_path, num_train=2, num_validation=2, version=version)
    # What tfds leaves behind when it was interrupted.
    (tmp_path / "imagenet2012" / "99.0.0").mkdir()
    (tmp_path / "imagenet2012" / "98.0.0.incompleteABC").mkdir()
    assert str(sources.open_builder("imagenet2012", str(tmp_path)).version) == newer


def test_directory_of_the_environment_is_the_default(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert sources.open_builder("cifar10", None).info.splits["train"].num_examples == 40


def test_given_directory_goes_before_the_environment(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    sources.open_builder("cifar10", str(prepared))
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert "not prepared" in message("cifar10", str(tmp_path))


def test_home_directory_is_the_last_default(prepared, tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(prepared, tmp_path / "tensorflow_datasets")
    builder = sources.open_builder("cifar10", None)
    assert str(builder.data_dir).startswith(str(tmp_path))


def test_digits_prepare_once(data_dir):
    first = sources.open_builder("digits", str(data_dir)).data_dir
    (written,) = data_dir.glob("digits/*/dataset_info.json")
    before = written.stat().st_mtime_ns
    assert sources.open_builder("digits", str(data_dir)).data_dir == first
    assert written.stat().st_mtime_ns == before


def test_digits_prepare_silently(tmp_path, capfd):
    sources.open_builder("digits", str(tmp_path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("typo", "nearest"), [("digit", "digits"), ("cifar", "cifar10")])
def test_unknown_data_set(typo, nearest, prepared):
    text = message(typo, str(prepared))
    assert "config.data.name" in text and f"did you mean {nearest}" in text


def test_data_directory_that_does_not_exist(tmp_path):
    missing = tmp_path / "nowhere"
    for name in ("digits", "cifar10"):
        text = message(name, str(missing))
        assert "config.data.dir" in text and str(missing) in text
    assert not missing.exists()


def test_data_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert "config.data.dir" in message("digits", str(tmp_path / "file"))


def test_digits_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file" / "below"))
    assert str(tmp_path) in message("digits", None)


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_data_set_that_is_not_prepared(name, tmp_path):
    text = message(name, str(tmp_path))
    assert "not prepared" in text
    assert f"python -m resjax.data {name} --data_dir={tmp_path}" in text


def test_data_set_that_cannot_be_read_at_random(tmp_path):
    directory = write_imagenet(tmp_path, num_train=2)
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "riegeli"))
    text = message("imagenet2012", str(tmp_path))
    assert str(directory) in text and "stored as riegeli" in text
    assert "python -m resjax.data imagenet2012 --data_dir=DIR" in text
    # tfds refuses to prepare a second format into the same folder.
    assert f"--data_dir={tmp_path}" not in text


@pytest.mark.parametrize(("typo", "nearest"), [("tests", "test"), ("trian", "train")])
def test_unknown_split(typo, nearest, prepared):
    text = message("imagenet2012", str(prepared), split=typo)
    assert f"'{typo}'; did you mean {nearest}" in text


def test_split_that_was_not_prepared(tmp_path):
    directory = write_imagenet(tmp_path, num_train=2, num_validation=2)
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace('"validation"', '"other"'))
    assert "split: there is no 'validation'" in message("imagenet2012", tmp_path, "test")


def test_description_of_the_data_set_that_is_damaged(copied):
    (info,) = copied.glob("imagenet2012/*/dataset_info.json")
    info.write_text(info.read_text()[:-20])
    assert f"data set in {info.parent} cannot be read" in message("imagenet2012", copied)


def test_missing_shards_are_named(copied):
    path, _ = shard(copied)
    path.unlink()
    text = message("imagenet2012", str(copied))
    assert f"{path}: the shard is missing" in text and "0 more of 3" in text
    shard(copied, 2)[0].unlink()
    text = message("imagenet2012", str(copied))
    assert f"{path}: the shard is missing" in text and "1 more of 3" in text
    sources.open_source("imagenet2012", str(copied), "test")  # the other split is whole


@pytest.mark.parametrize("left", [0, 5, 0.5, -1])
def test_shard_that_is_cut_off_is_named(copied, left):
    path, _ = shard(copied)
    size = path.stat().st_size
    os.truncate(path, int(size * left) if isinstance(left, float) else left % size)
    text = message("imagenet2012", str(copied))
    assert str(path) in text and ("cut off" in text or (left == 0 and "0 records" in text))


def test_shard_of_another_data_set_is_named(copied):
    path, _ = shard(copied)
    (other,) = copied.glob("imagenet2012/*/*-validation.*-00000-of-00003")
    shutil.copy(other, path)
    text = message("imagenet2012", str(copied))
    (info,) = copied.glob("imagenet2012/*/dataset_info.json")
    builder = tfds.builder_from_directory(str(info.parent))
    expected = builder.info.splits["train"].shard_lengths[1]
    found = builder.info.splits["validation"].shard_lengths[0]
    assert f"{path}: {found} records, but dataset_info.json says {expected}" in text


def test_shard_that_vanishes_is_no_damaged_example(copied):
    source = sources.open_source("imagenet2012", str(copied), "train")
    path, _ = shard(copied)
    path.unlink()
    index = next(i for i in range(24) if path.name in source.where(i))
    with pytest.raises(UsageError, match="the shard is gone") as error:
        source[index]
    assert not isinstance(error.value, DataError) and str(path) in str(error.value)
    assert files()[source[0]["image"]] in range(24)


def test_damaged_record_is_told_from_the_others(prepared, tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(prepared, folder)
    path, place = shard(folder)
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)
    source = sources.open_source("imagenet2012", str(folder), "train")
    whole = sources.open_source("imagenet2012", str(prepared), "train")
    damaged = []
    for i in range(24):
        try:
            assert source[i] == whole[i]
        except DataError as error:
            assert "\n" not in str(error)
            damaged.append(source.where(i))
    assert damaged == [f"{path.name}, record 0"]


def test_record_that_is_no_example_is_damaged(tmp_path):
    directory = write_imagenet(tmp_path, num_train=2, file_format="tfrecord")
    (path,) = directory.glob("*-train*")
    writer = RecordWriter(str(path))
    writer.write(b"not an example")
    writer.write(b"")
    writer.close()
    source = sources.open_source("imagenet2012", str(tmp_path), "train")
    for i in range(2):
        with pytest.raises(DataError):
            source[i]
