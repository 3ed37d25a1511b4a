"""Batches for one host: positions of the stream, loaded by Grain threads.

Batches are dicts of host arrays: `image` [b, S, S, 3] uint8, `label` [b] int32, and
`position` [b] int32 (training) or `mask` [b] bool (evaluation), where b is the host's
share of the global batch: host h of n holds the h-th contiguous slice.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import grain
import numpy as np

from resjax.config import UsageError
from resjax.data import order
from resjax.data.datasets import Dataset
from resjax.data.decode import decode

HostBatch = dict[str, np.ndarray]
Load = Callable[[int], dict[str, Any]]


def _decode_example(source: Sequence[dict[str, Any]], index: int) -> tuple[np.ndarray, int]:
    example = source[index]
    try:
        return decode(example["image"]), int(example["label"])
    except ValueError as error:
        raise UsageError(f"data: example {index}: {error}") from error


def _batches(
    load: Load, start: int, stop: int, local_size: int, num_threads: int
) -> Iterator[HostBatch]:
    """Batches `start` to `stop`; load(i) makes the host's i-th example of the stream."""
    cv2.setNumThreads(0)  # parallelism is over images
    if not num_threads:
        mine = getattr(os, "sched_getaffinity", None)  # where the system has it
        num_threads = len(mine(0)) if mine else os.cpu_count() or 1
    examples = grain.MapDataset.range(start * local_size, stop * local_size).map(load)
    # One more batch is decoded while one is taken.
    ahead = max(local_size, num_threads)
    options = grain.ReadOptions(num_threads, prefetch_buffer_size=ahead)
    return iter(examples.to_iter_dataset(options).batch(local_size))


def train_batches(
    dataset: Dataset,
    source: Sequence[dict[str, Any]],
    *,
    image_size: int,
    seed: int,
    batch_size: int,
    start_step: int,
    num_steps: int,
    num_threads: int = 0,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[HostBatch]:
    """The batches of updates `start_step` to `num_steps`, any of which is O(1) away.

    Args:
      dataset: how images are cropped.
      source: encoded training examples by index.
      image_size: S, pixels.
      seed: of the order and the augmentation.
      batch_size: the global minibatch, a multiple of `num_hosts`.
      start_step: updates already done.
      num_steps: updates of the whole run.
      num_threads: decoding threads; 0 = one a core.
      host: index of this host.
      num_hosts: number of hosts.
    """
    local_size = batch_size // num_hosts

    def load(i: int) -> dict[str, Any]:
        step, offset = divmod(i, local_size)
        position = step * batch_size + host * local_size + offset
        index = order.example_index(seed, position, len(source))
        image, label = _decode_example(source, index)
        if dataset.train_crop is None:
            image = dataset.eval_crop(image, image_size)
        else:
            rng = order.augmentation_rng(seed, position)
            image = dataset.train_crop(image, image_size, rng)
        return {
            "image": image,
            "label": np.int32(label),
            "position": np.int32(position),
        }

    return _batches(load, start_step, num_steps, local_size, num_threads)


def eval_batches(
    dataset: Dataset,
    source: Sequence[dict[str, Any]],
    *,
    image_size: int,
    batch_size: int,
    num_shards: int,
    num_threads: int = 0,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[HostBatch]:
    """Every example of `source` once, in order, on any number of devices and hosts.

    Args:
      dataset: how images are cropped.
      source: encoded examples by index.
      image_size: S, pixels.
      batch_size: examples a batch, over all hosts; any positive number.
      num_shards: devices of all hosts; batches are padded to a multiple of it, with
        zero images whose mask is False.
      num_threads: decoding threads; 0 = one a core.
      host: index of this host.
      num_hosts: number of hosts, which divides `num_shards`.
    """
    batch_size = min(batch_size, len(source))
    num_batches = -(-len(source) // batch_size)
    padded_size = -(-batch_size // num_shards) * num_shards
    local_size = padded_size // num_hosts

    def load(i: int) -> dict[str, Any]:
        batch, offset = divmod(i, local_size)
        offset += host * local_size
        index = batch * batch_size + offset
        mask = offset < batch_size and index < len(source)
        image, label = np.zeros((image_size, image_size, 3), np.uint8), 0
        if mask:
            image, label = _decode_example(source, index)
            image = dataset.eval_crop(image, image_size)
        return {"image": image, "label": np.int32(label), "mask": np.bool_(mask)}

    return _batches(load, 0, num_batches, local_size, num_threads)
