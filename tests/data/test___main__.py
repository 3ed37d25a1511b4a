"""`python -m resjax.data` says of a data set what is in it, and what is damaged."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from PIL import Image
from tiny_tfds import SIZES, encode, pixels, write_cifar10, write_imagenet

from resjax.config import UsageError
from resjax.data import sources
from resjax.data.__main__ import main
from resjax.data.datasets import DATASETS


def table(text):
    """{row: its words after the name} of the table in the output."""
    names = ["examples", "of these looked at", "shards", "files", "bytes on disk"]
    names += ["mean kB of an image", "mean height x width", "classes", "smallest class"]
    names += ["largest class", "JPEG", "JPEG, grey", "JPEG, CMYK", "PNG", "PNG, grey"]
    names += ["WebP", "unreadable", "labels out of range"]
    rows = {}
    for line in text.splitlines():
        for name in names:
            if line.startswith(name + "  "):
                rows[name] = line.removeprefix(name).split()
    return rows


def write_images(folder, count=12, damaged=()):
    """A folder data set of one class: PNGs 000.png, ...; some cut off in the middle."""
    for split in ("train", "val"):
        (folder / split / "cat").mkdir(parents=True)
        for i in range(count):
            data = encode(pixels(i, 8, 8), ".png")
            broken = split == "train" and i in damaged
            path = folder / split / "cat" / f"{i:03}.png"
            path.write_bytes(data[:20] if broken else data)


def test_table_agrees_with_what_was_written(tmp_path, capsys):
    directory = write_imagenet(tmp_path, num_shards=2)
    assert main(["imagenet2012", f"--data_dir={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    rows = table(out)
    assert f"imagenet2012 in {directory}\n" in out and not err
    assert (rows["examples"], rows["shards"]) == (["24", "10"], ["2", "2"])
    for column, split, numbers in (
        (0, "train", range(24)),
        (1, "validation", range(24, 34)),
    ):
        files = directory.glob(f"*-{split}.array_record-*")
        total = sum(path.stat().st_size for path in files)
        assert rows["bytes on disk"][column] == f"{total:,}"
        sizes = np.array([SIZES[i % len(SIZES)] for i in numbers])
        height, width = sizes.mean(axis=0)
        said = rows["mean height x width"][3 * column : 3 * column + 3]
        assert said == [f"{height:.1f}", "x", f"{width:.1f}"]
        encoded = [len(encode(pixels(i, *SIZES[i % len(SIZES)]), ".jpg")) for i in numbers]
        assert rows["mean kB of an image"][column] == f"{np.mean(encoded) / 1000:.1f}"
        assert rows["JPEG"][column] == str(len(numbers))
    # Classes are i % 5: train has 5 5 5 5 4 of them, test 2 of each.
    assert rows["classes"] == ["5", "5"]
    assert rows["smallest class"] == ["4", "(n00000004)", "2", "(n00000000)"]
    assert rows["largest class"] == ["5", "(n00000000)", "2", "(n00000000)"]
    assert rows["unreadable"] == rows["labels out of range"] == ["0", "0"]


def test_one_split_alone_is_described(tmp_path, capsys):
    write_cifar10(tmp_path)
    assert main(["cifar10", f"--data_dir={tmp_path}", "--splits=test"]) == 0
    rows = table(capsys.readouterr().out)
    assert (rows["examples"], rows["PNG"], rows["classes"]) == (["20"], ["20"], ["10"])


def test_kinds_of_images_are_counted_and_sizes_are_upright(tmp_path, capsys):
    for split in ("train", "val"):
        folder = tmp_path / split / "cat"
        folder.mkdir(parents=True)
        image = Image.fromarray(pixels(0, 30, 60))
        image.save(folder / "a.jpg")
        image.convert("L").save(folder / "b.jpg")
        image.convert("CMYK").save(folder / "c.jpg")
        image.save(folder / "d.png")
        image.convert("L").save(folder / "e.png")
        image.save(folder / "f.webp")
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        image.save(folder / "g.jpeg", exif=exif)
    assert main(["folder", f"--data_dir={tmp_path}"]) == 0
    rows = table(capsys.readouterr().out)
    kinds = ["JPEG", "JPEG, grey", "JPEG, CMYK", "PNG", "PNG, grey", "WebP"]
    assert [rows[kind][0] for kind in kinds] == ["2", "1", "1", "1", "1", "1"]
    size = [f"{(6 * 30 + 60) / 7:.1f}", "x", f"{(6 * 60 + 30) / 7:.1f}"]
    assert rows["mean height x width"] == size * 2
    total = sum(path.stat().st_size for path in (tmp_path / "train" / "cat").iterdir())
    assert (rows["files"][0], rows["bytes on disk"][0]) == ("7", f"{total:,}")


def test_damaged_images_are_listed_and_the_rest_counted(tmp_path, capsys):
    write_images(tmp_path, count=30, damaged=range(2, 27))
    assert main(["folder", f"--data_dir={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert table(out)["unreadable"] == ["25", "0"]
    listed = [line for line in out.splitlines() if line.startswith("train: example")]
    for i, line in zip(range(2, 22), listed, strict=True):
        reason = "20 bytes that are no readable image"
        assert line.startswith(f"train: example {i} (train/cat/{i:03}.png): {reason}")
    assert "train: 5 more\n" in out and "25 damaged examples" in out
    assert "of these looked at" not in out


def test_labels_out_of_range_are_told_from_unreadable_images(tmp_path, capsys):
    directory = write_imagenet(tmp_path)
    features = directory / "features.json"
    features.write_text(
        features.read_text().replace('"numClasses": "5"', '"numClasses": "4"')
    )
    names = directory / "label.labels.txt"
    names.write_text("".join(names.read_text().splitlines(keepends=True)[:4]))
    assert main(["imagenet2012", f"--data_dir={tmp_path}"]) == 1
    out = capsys.readouterr().out
    assert table(out)["labels out of range"] == ["4", "2"]  # i % 5 = 4
    assert table(out)["unreadable"] == ["0", "0"]
    assert out.count("its label is 4; it must be from 0 to 3\n") == 6
    assert "imagenet2012-validation.array_record-00000-of-00001, record " in out


def test_sample_is_evenly_spaced(tmp_path, capsys):
    write_images(tmp_path, damaged=(3, 4))
    assert main(["folder", f"--data_dir={tmp_path}", "--sample=4"]) == 1
    out = capsys.readouterr().out
    assert "looked at 4 examples" in out
    assert table(out)["of these looked at"] == ["4", "4"]
    assert table(out)["unreadable"] == ["1", "0"]  # 0, 3, 6, 9
    assert "example 3 (train/cat/003.png)" in out and "example 4" not in out


def test_sample_that_is_larger_than_the_split_is_all_of_it(tmp_path, capsys):
    write_images(tmp_path)
    assert main(["folder", f"--data_dir={tmp_path}", "--sample=99"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["PNG"] == ["12", "12"] and "of these looked at" not in rows


class TinyUnprepared(tfds.core.GeneratorBasedBuilder):
    """A data set that tfds knows how to prepare."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        features_dict = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features_dict)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "test")}

    def _generate_examples(self):
        for i in range(6):
            yield i, {"image": encode(pixels(i, 8, 8), ".png"), "label": i % 3}


@pytest.fixture
def unprepared(monkeypatch):
    """Its name in our table, as if TensorFlow were there to prepare it."""
    monkeypatch.setitem(DATASETS, TinyUnprepared.name, DATASETS["cifar10"])
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: name)
    return TinyUnprepared.name


def test_tfds_prepares_what_is_not_there_once(unprepared, tmp_path, capsys):
    words = [unprepared, f"--data_dir={tmp_path / 'new'}"]
    assert main(words) == 0
    assert table(capsys.readouterr().out)["examples"] == ["6", "6"]
    (shard,) = tmp_path.glob(f"new/{unprepared}/2.0.0/*-train.array_record*")
    before = shard.stat().st_mtime_ns
    assert main(words) == 0
    assert shard.stat().st_mtime_ns == before


def test_preparation_that_fails_says_why(unprepared, tmp_path, monkeypatch):
    def fail(self, dl_manager):
        raise AssertionError("Manual directory is empty")

    monkeypatch.setattr(TinyUnprepared, "_split_generators", fail)
    with pytest.raises(UsageError, match=f"{unprepared} cannot be prepared in") as error:
        main([unprepared, f"--data_dir={tmp_path}"])
    assert "Manual directory is empty" in str(error.value)


def test_preparation_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="run: pip install tensorflow") as error:
        main(["cifar10", f"--data_dir={tmp_path}"])
    assert f"cifar10 cannot be prepared in {tmp_path}" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifar"], "DATASET: there is no 'cifar'; did you mean cifar10"),
        (["digits", "--splits=train,tset"], "--splits: there is no 'tset'; did you mean"),
        (["digits", "--sample=0"], "--sample: 0 is not greater than 0"),
        (["digits", "--sample=x"], "invalid int value"),
        (["digits", "--to=x"], "--to: it is for --shrink=SIDE"),
        (["digits", "--shrink=0", "--to=x"], "--shrink: 0 is not from 16 to 8192"),
        (["digits", "--shrink=99999", "--to=x"], "--shrink: 99999 is not from"),
        (["digits", "--shrink=64", "--to=x", "--quality=0"], "--quality: 0 is not from 1"),
        (["folder"], "config.data.dir"),
        ([], "required: DATASET"),
    ],
)
def test_bad_words_are_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        main(words)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command_prepares_and_describes_digits(command, tmp_path):
    done = command("-m", "resjax.data", "digits", f"--data_dir={tmp_path}", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    rows = table(done.stdout)
    assert rows["examples"] == rows["PNG, grey"] == ["1,437", "360"]
    assert rows["mean height x width"] == ["8.0", "x", "8.0"] * 2
