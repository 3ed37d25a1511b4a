"""Damaged data and train.py: one line that says what and where, or a run that goes on."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import ROOT
from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_pb2
from tiny_tfds import encode, pixels, write_imagenet

from resjax.data import sources

pytestmark = pytest.mark.slow  # each starts train.py: some 4 s


def write_folder(root, damaged=()):
    """A folder data set of 24 training and 6 validation images in two classes."""
    for split, count in (("train", 24), ("val", 6)):
        for i in range(count):
            path = root / split / ("cat", "dog")[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = encode(pixels(i, 24, 32), ".jpg")
            path.write_bytes(whole[:200] if (split, i) in damaged else whole)
    return root


@pytest.fixture
def train(command, tiny_config, tmp_path):
    """train(data, name, *flags) -> train.py, finished, on crops of 16."""

    def run(directory, name="imagenet2012", num_classes=5, *flags):
        return command(
            "train.py",
            f"--config={tiny_config}",
            f"--config.data.name={name}",
            f"--config.data.dir={directory}",
            f"--config.num_classes={num_classes}",
            "--config.data.image_size=16",
            "--config.batch_size=8",
            "--config.num_epochs=3",
            "--config.eval_every_epochs=3",
            f"--workdir={tmp_path / 'run'}",
            *flags,
        )

    return run


def assert_one_line(done, *parts):
    """The last line holds the parts; those before say what was done until then."""
    assert done.returncode == 2, done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("train.py: error: ")
    assert all(line.startswith("data: ") for line in before), done.stderr
    for part in parts:
        assert part in last


def test_image_that_cannot_be_decoded_is_named(train, tmp_path):
    folder = write_folder(tmp_path / "pets", damaged=[("train", 7)])
    done = train(folder, "folder", 2)
    assert_one_line(done, "train/dog/07.jpg", "200 bytes", "config.data.skip_errors=0")


@pytest.mark.parametrize("split", ["train", "val"])
def test_with_skipping_the_run_completes_and_says_how_many(train, tmp_path, split):
    folder = write_folder(tmp_path / "pets", damaged=[(split, 2), (split, 5)])
    done = train(folder, "folder", 2, "--config.data.skip_errors=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("left out") == 2
    assert "left out, as 2 of at most 2" in done.stderr
    assert f"{split}/cat/02.jpg" in done.stderr and f"{split}/dog/05.jpg" in done.stderr
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["split"] == "test"] == [9]


def test_one_damaged_image_too_many_stops(train, tmp_path):
    folder = write_folder(tmp_path / "pets", damaged=[("train", 2), ("train", 5)])
    done = train(folder, "folder", 2, "--config.data.skip_errors=1")
    assert_one_line(done, "train/", "at most config.data.skip_errors=1")


def test_damage_in_a_decoding_process_is_the_same_line(train, tmp_path):
    folder = write_folder(tmp_path / "pets", damaged=[("train", 7)])
    done = train(folder, "folder", 2, "--config.data.num_workers=1")
    assert_one_line(done, "train/dog/07.jpg", "200 bytes", "config.data.skip_errors=0")


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder_is_named(train, tmp_path, split):
    folder = write_folder(tmp_path / "pets")
    shutil.rmtree(folder / split / "dog")
    (folder / split / "dog").mkdir()
    assert_one_line(train(folder, "folder", 2), f"{split}/dog", "no image")


@pytest.fixture(params=["array_record", "tfrecord"])
def shards(request, tmp_path):
    """The training shards, and the folder, of a tiny imagenet2012 in one of the formats."""
    directory = write_imagenet(tmp_path / "tfds", file_format=request.param, num_shards=2)
    found = sorted(directory.glob(f"imagenet2012-train.{request.param}*"))
    assert len(found) == 2
    return found, tmp_path / "tfds"


def test_truncated_shard_is_named(train, shards):
    (_, shard), directory = shards
    shard.write_bytes(shard.read_bytes()[:-100])
    assert_one_line(train(directory), shard.name, "cut off")


def test_missing_shard_is_named(train, shards):
    (_, shard), directory = shards
    shard.unlink()
    assert_one_line(train(directory), shard.name, "missing")


def test_label_out_of_range_is_named(train, shards):
    (_, shard), directory = shards
    source = sources.open_source("imagenet2012", str(directory), "train")
    first = len(source) // 2
    assert source.where(first) == f"{shard.name}, record 0"
    examples = [source.records[i] for i in range(first, len(source))]
    example = tf_example_pb2.Example.FromString(examples[1])
    example.features.feature["label"].int64_list.value[0] = 7
    examples[1] = example.SerializeToString()
    is_tfrecord = "tfrecord" in shard.name
    writer = (
        RecordWriter(str(shard))
        if is_tfrecord
        else ArrayRecordWriter(str(shard), "group_size:1")
    )
    for record in examples:
        writer.write(record)
    writer.close()
    done = train(directory)
    where = f"{shard.name}, record 1"
    assert_one_line(done, where, "label is 7", "0 to 4")


def test_full_disk_is_one_line_and_leaves_nothing(tiny_config, tmp_path):
    directory = write_imagenet(tmp_path / "tfds", file_format="tfrecord")
    before = sorted(directory.iterdir())
    cache = tmp_path / "cache"
    words = [
        sys.executable,
        ROOT / "train.py",
        f"--config={tiny_config}",
        "--config.data.name=imagenet2012",
        f"--config.data.dir={tmp_path / 'tfds'}",
        "--config.num_classes=5",
        "--config.data.image_size=16",
        "--config.batch_size=8",
        f"--workdir={tmp_path / 'run'}",
    ]
    # No file may grow: what a full disk does to one.
    shell = f"ulimit -f 0; XDG_CACHE_HOME={cache} exec {shlex.join(map(str, words))}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert_one_line(done, str(cache), "cannot be written", "XDG_CACHE_HOME")
    assert sorted(directory.iterdir()) == before
    assert not (tmp_path / "run").exists()
    assert not any(path.is_file() for path in cache.rglob("*"))
