"""Images a second of resjax's input pipeline, of TensorFlow's and of PyTorch's.

  pip install -r requirements-dev.txt && pip install --no-deps -r requirements-peers.txt
  pip install tensorflow-cpu==2.21.0
  python -m benchmarks.input_pipeline

All read the same generated JPEG files of 500 x 375 pixels and about 110 kB, as ImageNet's
are on average, take a random-resized crop of 224 and give batches of 64. They have the same
cores and take turns in the same run, each in a process of its own that is stopped while it
is not its turn. A ratio is the median over the rounds of one round's against the peer's.

  resjax         TFRecord through its index, bilinear -> uint8; flip and normalisation are
                 the device's. OpenCV alone: without libjpeg-turbo 3, the same pixels.
  tf.data        TFRecord, the fused decode-and-crop op, bicubic as in flax's ImageNet
                 example, flip -> uint8: the work of resjax and the flip.
  tf.data, flax  what that example does: the same, and normalised float32.
  torch          a folder, DataLoader with a worker a core, Pillow, torchvision's reference
                 transforms: crop, flip, to float32, normalised.

A peer that is not installed is left out and named.
"""

import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
from tqdm import tqdm

from resjax.config import ArgumentParser, RunError, run_command

SIZE, BATCH, CLASSES = 224, 64, 10
SHARD = "imagenet2012-train.tfrecord-00000-of-00001"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# --- the images ---------------------------------------------------------------------


def photograph(index: int) -> bytes:
    """A JPEG file of 500 x 375 with the 1 / f spectrum of photographs."""
    rng = np.random.RandomState(index)
    height, width = ((375, 500), (500, 375))[index % 4 == 3]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency = np.maximum(frequency, 1 / 500)

    def layer(power: float) -> np.ndarray:
        noise = rng.randn(2, *frequency.shape)
        values = np.fft.irfft2(
            (noise[0] + 1j * noise[1]) / frequency**power, (height, width)
        )
        return values / values.std()

    grey = layer(1.0)  # colours vary less, and more slowly
    image = np.stack([128 + 50 * (grey + 0.5 * layer(1.2)) for _ in range(3)], axis=-1)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 89])
    return encoded.tobytes()


def write_images(root: Path, count: int) -> float:
    """The same images as a tfds data set of TFRecords and as a folder; mean bytes."""
    import tensorflow_datasets as tfds
    from tensorboardX.record_writer import RecordWriter

    from resjax.data.sources import serialize

    names = [f"n{i:08}" for i in range(CLASSES)]
    for name in names:
        (root / "folder" / "train" / name).mkdir(parents=True)
    tfrecords = root / "imagenet2012" / "5.1.0"
    tfrecords.mkdir(parents=True)
    writer, num_bytes = RecordWriter(str(tfrecords / SHARD)), 0
    for i in tqdm(range(count), desc="images", leave=False, disable=None):
        jpeg, label = photograph(i), i % CLASSES
        num_bytes += len(jpeg)
        writer.write(serialize(jpeg, label))
        (root / "folder" / "train" / names[label] / f"{i:06}.jpg").write_bytes(jpeg)
    writer.close()
    tfds.folder_dataset.write_metadata(
        data_dir=tfrecords,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=names),
            }
        ),
        split_infos=[
            tfds.core.SplitInfo(
                name="train",
                shard_lengths=[count],
                num_bytes=num_bytes,
                filename_template=None,
            )
        ],
        check_data=False,
    )
    return num_bytes / count


# --- the pipelines, each a function (root, cores) -> endless batches -----------------

Batches = Iterator[Any]


def resjax_batches(root: Path, cores: int) -> Batches:
    """Of the whole pipeline of train.py, up to the device."""
    from resjax import build_data
    from resjax.config import Config, DataConfig
    from resjax.data import pipeline

    data = DataConfig(name="imagenet2012", dir=str(root), image_size=SIZE)
    config = Config(num_classes=CLASSES, data=data)
    return pipeline.train_batches(
        build_data.build_reader(config, build_data.build_source(config, "train")),
        build_data.build_recipe(config),
        seed=0,
        batch_size=BATCH,
        start_step=0,
        num_steps=10**6,
    )


def opencv_batches(root: Path, cores: int) -> Batches:
    """The same where libjpeg-turbo 3 is not installed."""
    from resjax.data import jpeg

    mock.patch.object(jpeg, "turbojpeg", lambda: None).start()
    return resjax_batches(root, cores)


def tf_batches(
    root: Path, cores: int, method: str = "bicubic", normalize: bool = False
) -> Batches:
    """TensorFlow's, with its fused op."""
    import tensorflow as tf

    window = functools.partial(
        tf.image.sample_distorted_bounding_box,
        bounding_boxes=tf.zeros((1, 0, 4)),
        min_object_covered=0.1,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.08, 1.0),
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    spec = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "label": tf.io.FixedLenFeature([], tf.int64),
    }

    def load(record: Any) -> Any:
        example = tf.io.parse_single_example(record, spec)
        jpeg = example["image"]
        begin, extent, _ = window(tf.image.extract_jpeg_shape(jpeg))
        where = tf.concat([begin[:2], extent[:2]], axis=0)
        image = tf.image.decode_and_crop_jpeg(jpeg, where, channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method=method)
        image = tf.image.random_flip_left_right(image)
        if normalize:
            image = (image - 255 * tf.constant(MEAN)) / (255 * tf.constant(STD))
        else:
            image = tf.saturate_cast(image, tf.uint8)
        return image, example["label"]

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    shard = str(root / "imagenet2012" / "5.1.0" / SHARD)
    records = tf.data.TFRecordDataset(shard).repeat()
    images = records.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    return iter(images.batch(BATCH).prefetch(2).with_options(options))


def torch_batches(root: Path, cores: int) -> Batches:
    """PyTorch's, with a worker a core."""
    import torch

    # torchvision's compiled operators, of no use here, do not load beside a torch for the
    # CPU alone, and registering their shapes would fail.
    with mock.patch.object(torch.library, "register_fake", lambda name: lambda f: f):
        from torchvision import datasets, transforms

    torch.set_num_threads(1)
    images = datasets.ImageFolder(
        str(root / "folder" / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        ),
    )
    sampler = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**8)
    loader = torch.utils.data.DataLoader(
        images, BATCH, sampler=sampler, num_workers=cores, multiprocessing_context="fork"
    )
    return iter(loader)


PIPELINES: dict[str, tuple[str, Callable[[Path, int], Batches]]] = {
    "resjax": ("resjax", resjax_batches),
    "resjax, OpenCV alone": ("resjax", opencv_batches),
    "tf.data": ("tensorflow", tf_batches),
    "tf.data, bilinear": ("tensorflow", functools.partial(tf_batches, method="bilinear")),
    "tf.data, flax": ("tensorflow", functools.partial(tf_batches, normalize=True)),
    "torch": ("torchvision", torch_batches),
}

# --- the measurement ----------------------------------------------------------------


def serve(name: str, root: Path, cores: int, pipe: Any) -> None:
    """A process of one pipeline: takes a number of batches, gives the seconds for them."""
    os.setpgrp()  # so that its workers are stopped with it
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    batches = PIPELINES[name][1](root, cores)
    while True:
        count = pipe.recv()
        for _ in range(4 * cores):  # more than were made before
            next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        pipe.send(time.perf_counter() - start)


def measure(root: Path, cores: int, rounds: int, count: int) -> dict[str, list[float]]:
    """Images a second of every pipeline that is installed, for every round."""
    context = multiprocessing.get_context("spawn")
    peers: dict[str, Any] = {}
    rates: dict[str, list[float]] = {}
    try:
        for number in tqdm(range(-1, rounds), desc="rounds", leave=False, disable=None):
            for name, (package, _) in PIPELINES.items():
                if importlib.util.find_spec(package) is None:
                    continue
                if name not in peers:
                    pipe, theirs = context.Pipe()
                    arguments = (name, root, cores, theirs)
                    process: Any = context.Process(target=serve, args=arguments)
                    process.start()
                    theirs.close()
                    peers[name], rates[name] = (process, pipe), []
                else:
                    process, pipe = peers[name]
                    os.killpg(process.pid, signal.SIGCONT)
                pipe.send(count)
                seconds = pipe.recv()
                os.killpg(process.pid, signal.SIGSTOP)
                if number >= 0:  # the first warms up
                    rates[name].append(count * BATCH / seconds)
    except EOFError:
        raise RunError(f"{name}: its process has ended") from None
    finally:
        for process, _ in peers.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return rates


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.input_pipeline", description=__doc__)
    parser.add_argument("--images", type=int, default=1024, help="in the data set")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=24, help="of 64 images, a round")
    parser.add_argument("--json", metavar="FILE", help="writes the numbers")
    flags = parser.parse_args(arguments)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = write_images(Path(folder), flags.images)
        rates = measure(Path(folder), cores, flags.rounds, flags.batches)
    print(
        f"{flags.images} JPEG files of 500 x 375, {mean_bytes / 1e3:.0f} kB, {cores} cores"
    )
    print(f"{'pipeline':<24}{'images/s':>10}{'a core':>8}   resjax / it (least, most)")
    rows = {}
    for name, (package, _) in PIPELINES.items():
        if name not in rates:
            print(f"{name:<24}{package} is not installed")
            continue
        values = rates[name]
        ratios = [
            ours / theirs for ours, theirs in zip(rates["resjax"], values, strict=True)
        ]
        rate, ratio = statistics.median(values), statistics.median(ratios)
        spread = f"({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"{name:<24}{rate:10.0f}{rate / cores:8.0f}   {ratio:.2f} {spread}")
        rows[name] = {"images_per_second": rate, "ratio": ratio}
    if flags.json:
        numbers = {"cores": cores, "mean_bytes": mean_bytes, "pipelines": rows}
        Path(flags.json).write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
