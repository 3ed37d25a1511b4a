"""Prepared data sets are found; what is missing or of a wrong kind is one line."""

import shutil

import numpy as np
import pytest
from tiny_tfds import SIZES, pixels, write_cifar10, write_imagenet

from resjax.config import UsageError
from resjax.data import sources
from resjax.data.decode import decode


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a tiny imagenet2012 and a tiny cifar10."""
    folder = tmp_path_factory.mktemp("prepared")
    write_imagenet(folder)
    write_cifar10(folder)
    return folder


def message(name, data_dir, split=None):
    """The text of the `UsageError` that opening raises, which must be one line."""
    with pytest.raises(UsageError) as error:
        builder = sources.open_builder(name, data_dir)
        sources.open_source(builder, split)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("split", "first", "size"), [("train", 0, 24), ("validation", 24, 10)]
)
def test_every_example_is_read_with_its_bytes_and_label(prepared, split, first, size):
    builder = sources.open_builder("imagenet2012", str(prepared))
    source = sources.open_source(builder, split)
    indices = [int(example["file_name"][6:14]) for example in source]
    assert sorted(indices) == list(range(first, first + size))
    for i, example in zip(indices, source, strict=True):
        assert isinstance(example["image"], bytes)
        assert example["label"] == i % 5
        image = pixels(i, *SIZES[i % len(SIZES)])
        assert np.abs(decode(example["image"]).astype(int) - image).mean() < 3


@pytest.mark.parametrize(("split", "first", "size"), [("train", 0, 40), ("test", 40, 20)])
def test_lossless_images_come_back_exactly(prepared, split, first, size):
    builder = sources.open_builder("cifar10", str(prepared))
    source = sources.open_source(builder, split)
    assert len(source) == size
    for example in source:
        i = int(example["id"][6:])
        assert first <= i < first + size
        np.testing.assert_array_equal(decode(example["image"]), pixels(i, 32, 32))


def test_class_names_are_in_the_order_of_the_labels(prepared):
    builder = sources.open_builder("imagenet2012", str(prepared))
    names = ["n00000000", "n00000001", "n00000002", "n00000003", "n00000004"]
    assert sources.class_names(builder) == names


def test_class_names_of_digits(data_dir):
    builder = sources.open_builder("digits", str(data_dir))
    assert sources.class_names(builder) == list("0123456789")


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
    assert f"tfds.builder('{name}', data_dir='{tmp_path}'" in text
    assert "file_format='array_record').download_and_prepare()" in text


def test_data_set_that_cannot_be_read_at_random(tmp_path):
    directory = write_imagenet(tmp_path, num_train=2, file_format="tfrecord")
    text = message("imagenet2012", str(tmp_path))
    assert str(directory) in text and "tfrecord" in text
    assert "tfds.builder('imagenet2012'" in text and "file_format='array_record'" in text
    # tfds refuses to prepare a second format into the same folder.
    assert f"data_dir='{tmp_path}'" not in text


@pytest.mark.parametrize(("typo", "nearest"), [("valid", "validation"), ("trian", "train")])
def test_unknown_split(typo, nearest, prepared):
    text = message("imagenet2012", str(prepared), split=typo)
    assert f"'{typo}'; did you mean {nearest}" in text
