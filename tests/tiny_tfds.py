"""Writes tiny tfds data sets with the names and features of the real ones, no TensorFlow.

They land in DATA_DIR/NAME/VERSION. Image i is `pixels(i, height, width)`. The file formats
are "array_record", "tfrecord" and "both".
"""

import json
from pathlib import Path

import cv2
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorboardX.record_writer import RecordWriter

# Heights and widths of the tiny ImageNet: landscape, portrait, square, odd and even.
SIZES = [(40, 60), (90, 50), (64, 64), (47, 71), (75, 75), (81, 44)]


def pixels(index, height, width):
    """A smooth [height, width, 3] uint8 RGB image of its own for every index."""
    rng = np.random.RandomState(index)
    corners = rng.randint(0, 256, (2, 2, 3)).astype(np.uint8)
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(image, extension):
    """[H, W, 3] uint8 RGB to the bytes of a ".jpg" or ".png"."""
    _, encoded = cv2.imencode(extension, image[:, :, ::-1])
    return encoded.tobytes()


def write_imagenet(
    data_dir,
    *,
    num_classes=5,
    num_train=24,
    num_validation=10,
    version="5.1.0",
    file_format="array_record",
    num_shards=1,
):
    """A tiny `imagenet2012` of JPEGs of different sizes; returns its folder.

    Example i of the two splits together is of class i % num_classes.
    """
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=[f"n{i:08}" for i in range(num_classes)]),
        "file_name": tfds.features.Text(),
    }

    def example(i):
        return {
            "image": encode(pixels(i, *SIZES[i % len(SIZES)]), ".jpg"),
            "label": i % num_classes,
            "file_name": f"image_{i:08}.JPEG",
        }

    splits = {"train": num_train, "validation": num_validation}
    return _write(
        "imagenet2012",
        features,
        example,
        splits,
        data_dir,
        version,
        file_format,
        num_shards,
    )


def write_cifar10(
    data_dir,
    *,
    num_train=40,
    num_test=20,
    version="3.0.2",
    file_format="array_record",
    num_shards=1,
):
    """A tiny `cifar10` of 32 x 32 PNGs in ten classes; returns its folder."""
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=[f"class{i}" for i in range(10)]),
    }

    def example(i):
        png = encode(pixels(i, 32, 32), ".png")
        return {"id": f"image_{i:05}", "image": png, "label": i % 10}

    splits = {"train": num_train, "test": num_test}
    return _write(
        "cifar10", features, example, splits, data_dir, version, file_format, num_shards
    )


def _write(
    name, features, example, split_sizes, data_dir, version, file_format, num_shards
):
    """Examples 0, 1, ... fill the splits in their order."""

    # Not registered: tfds has builders of these names, and so may the next call.
    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            features_dict = tfds.features.FeaturesDict(features)
            return tfds.core.DatasetInfo(builder=self, features=features_dict)

        def _split_generators(self, dl_manager):
            ends = np.cumsum(list(split_sizes.values()))
            return {
                split: ((i, example(i)) for i in range(end - size, end))
                for (split, size), end in zip(split_sizes.items(), ends, strict=True)
            }

        def _generate_examples(self):
            raise NotImplementedError  # the splits above are generators already

    Tiny.name = name
    tfds.disable_progress_bar()
    builder = Tiny(data_dir=str(data_dir), file_format="array_record")
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    builder.download_and_prepare(download_config=config)
    directory = Path(builder.data_dir)
    if file_format != "array_record":
        _to_tfrecord(directory, keep=file_format == "both")
    return directory


def _to_tfrecord(directory, keep):
    """The same data set as TFRecords; tfds itself writes those with TensorFlow alone.

    With `keep`, also as it was, as tfds says it of a data set in two formats.
    """
    for path in directory.glob("*.array_record*"):
        reader = ArrayRecordReader(str(path))
        tfrecord = path.with_name(path.name.replace("array_record", "tfrecord"))
        writer = RecordWriter(str(tfrecord))
        for record in reader.read_all():
            writer.write(record)
        writer.close()
        reader.close()
        if not keep:
            path.unlink()
    info_path = directory / "dataset_info.json"
    info = json.loads(info_path.read_text())
    info["fileFormat"] = "tfrecord"
    if keep:
        info["alternativeFileFormats"] = ["array_record"]
    info_path.write_text(json.dumps(info, indent=2))
