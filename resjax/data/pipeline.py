"""Batches for one host: positions of the stream, decoded by threads and processes.

Batches are dicts of host arrays: `image` [b, S, S, 3] uint8, `label` [b] int32, and
`position` [b] int32 (training) or `mask` [b] bool (evaluation), where b is the host's
share of the global batch: host h of n holds the h-th contiguous slice.

A pool of threads fills a batch in place; Grain makes several batches at once, in this
process or in others, and hands them over in order.
"""

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags
from tqdm import tqdm

from resjax.config import UsageError
from resjax.data import order
from resjax.data.datasets import Dataset
from resjax.data.decode import DataError, decode, decode_window
from resjax.data.recipes import Recipe

HostBatch = dict[str, Any]
Crop = Callable[[bytes, np.ndarray], None]  # encoded, and [S, S, 3] uint8 to be filled


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the examples of a split are read.

    Attributes:
      dataset: how images are cropped.
      source: encoded examples by index: a `sources.Source`, or a list of such examples.
      image_size: S, pixels.
      num_classes: labels are below it.
      skip_errors: damaged examples that may be left out; 0 = none.
      num_workers: processes; 0 = threads of this one; None: one for every 8 cores over 8.
      num_threads: of each process; 0 = the cores, shared out.
      prefetch: batches made ahead.
    """

    dataset: Dataset
    source: Sequence[Any]
    image_size: int
    num_classes: int
    skip_errors: int = 0
    num_workers: int | None = 0
    num_threads: int = 0
    prefetch: int = 2

    def read(self, index: int, crop: Crop, out: np.ndarray) -> int:
        """Crops an example into `out` and returns its label; `DataError` names it."""
        try:
            example = self.source[index]
            label = int(example["label"])
            if not 0 <= label < self.num_classes:
                allowed = f"it must be from 0 to {self.num_classes - 1}"
                raise DataError(f"its label is {label}; {allowed}")
            crop(example["image"], out)
            return label
        except DataError as error:
            where = getattr(self.source, "where", None)
            place = f" ({where(index)})" if where else ""
            raise DataError(f"data: example {index}{place}: {error}") from None

    def read_or_next(
        self, index: int, crop: Crop, out: np.ndarray, damaged: dict[int, str]
    ) -> int:
        """As `read`, of the next that is not damaged; says in `damaged` which were."""
        for offset in range(self.skip_errors + 1):
            tried = (index + offset) % len(self.source)
            try:
                return self.read(tried, crop, out)
            except DataError as error:
                damaged[tried] = str(error)
        raise _too_many(damaged[index], self.skip_errors)

    def eval_crop(self, encoded: bytes, out: np.ndarray) -> None:
        """The crop that is evaluated."""
        image = decode(encoded, self.dataset.rotates)
        out[:] = self.dataset.eval_crop(image, self.image_size)


def _too_many(line: str, allowed: int) -> UsageError:
    return UsageError(
        f"{line}; a run leaves out at most config.data.skip_errors={allowed} such examples"
    )


def _count(damaged: dict[int, str], seen: set[int], allowed: int) -> None:
    """Says which examples are new among the damaged; raises if they are too many."""
    for index in sorted(damaged.keys() - seen):
        seen.add(index)
        if len(seen) > allowed:
            raise _too_many(damaged[index], allowed)
        line = f"{damaged[index]}; left out, as {len(seen)} of at most {allowed}"
        tqdm.write(line, file=sys.stderr)


def _num_cores() -> int:
    mine = getattr(os, "sched_getaffinity", None)  # where the system has it
    return len(mine(0)) if mine else os.cpu_count() or 1


def _sized(reader: Reader) -> Reader:
    """The reader with its processes and threads counted.

    Python itself takes a tenth of an image's time, so threads of one process cannot use
    many more than eight cores.
    """
    cores, workers = _num_cores(), reader.num_workers
    if workers is None:
        workers = cores // 8 if cores > 8 else 0
    threads = reader.num_threads or max(1, cores // max(1, workers))
    return dataclasses.replace(reader, num_workers=workers, num_threads=threads)


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    cv2.setNumThreads(0)  # parallelism is over images
    return ThreadPoolExecutor(num_threads, "decode")


def _fill(
    reader: Reader, count: int, load: Callable[[int, np.ndarray], int]
) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, S, S, 3] and labels [count]; load(i, out) makes the i-th of them."""
    size = reader.image_size
    images = np.zeros((count, size, size, 3), np.uint8)
    labels = np.zeros(count, np.int32)

    def fill_part(part: range) -> None:
        for i in part:
            labels[i] = load(i, images[i])

    length = max(1, min(16, count // reader.num_threads))
    parts = [range(i, min(i + length, count)) for i in range(0, count, length)]
    for _ in _pool(reader.num_threads).map(fill_part, parts):
        pass  # raises what a part has raised
    return images, labels


def _caught(make: Callable[[int], HostBatch], step: int) -> HostBatch:
    """make(step), or {"error"}: a process that raises leaves its shared memory behind."""
    try:
        return make(step)
    except UsageError as error:
        return {"error": str(error)}


def _start_worker(index: int, count: int) -> None:
    """A decoding process leaves signals to the run, and ends with it."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    run: Any = multiprocessing.parent_process()

    def end_with_it() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def _batches(
    reader: Reader,
    make: Callable[[int], HostBatch],
    start: int,
    stop: int,
) -> Iterator[HostBatch]:
    """make(start), ..., make(stop - 1) in order; counts what `damaged` of each says."""
    ahead = grain.ReadOptions(min(2, reader.prefetch), reader.prefetch)
    steps: Any = grain.MapDataset.range(start, stop).map(functools.partial(_caught, make))
    steps = steps.to_iter_dataset(ahead)
    if reader.num_workers:
        if not flags.FLAGS.is_parsed():  # Grain has flags of its own, nobody sets them
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(reader.num_workers, 1)
        steps = steps.mp_prefetch(options, _start_worker)
    batches, seen = iter(steps), set[int]()
    ending = contextlib.ExitStack()  # of the processes, once
    ending.callback(batches.close)
    atexit.register(ending.close)  # where this generator is not closed before
    try:
        for batch in batches:
            if "error" in batch:
                raise UsageError(batch["error"])
            _count(batch.pop("damaged"), seen, reader.skip_errors)
            if reader.num_workers:  # out of shared memory, which nobody may outlive
                batch = {name: np.array(array) for name, array in batch.items()}
            yield batch
    finally:
        ending.close()


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """step -> the host's slice of that minibatch; made in any process."""

    reader: Reader
    recipe: Recipe
    seed: int
    batch_size: int
    host: int
    num_hosts: int

    def __call__(self, step: int) -> HostBatch:
        local_size = self.batch_size // self.num_hosts
        first = step * self.batch_size + self.host * local_size
        num_examples = len(self.reader.source)
        uniforms = order.uniforms(self.seed, first, local_size)
        damaged: dict[int, str] = {}

        def load(i: int, out: np.ndarray) -> int:
            index = order.example_index(self.seed, first + i, num_examples)
            return self.reader.read_or_next(index, self.crop(uniforms[i]), out, damaged)

        images, labels = _fill(self.reader, local_size, load)
        positions = np.arange(first, first + local_size, dtype=np.int32)
        return {
            "image": images,
            "label": labels,
            "position": positions,
            "damaged": damaged,
        }

    def crop(self, uniforms: np.ndarray) -> Crop:
        """How an image is cropped for which these numbers [24] were drawn."""
        window, reader, size = self.recipe.window, self.reader, self.reader.image_size
        if window is None:
            return reader.eval_crop

        def place(height: int, width: int) -> tuple[int, int, int, int]:
            return window(height, width, size, uniforms)

        return lambda encoded, out: decode_window(
            encoded, place, out, reader.dataset.rotates
        )


def train_batches(
    reader: Reader,
    recipe: Recipe,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    num_steps: int,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[HostBatch]:
    """The batches of updates `start_step` to `num_steps`, any of which is O(1) away.

    Args:
      reader: of the training split.
      recipe: how training images are cropped.
      seed: of the order and the augmentation.
      batch_size: the global minibatch, a multiple of `num_hosts`.
      start_step: updates already done.
      num_steps: updates of the whole run.
      host: index of this host.
      num_hosts: number of hosts.

    Raises:
      UsageError: more damaged examples than may be left out; else each is named in a line
        on standard error, and the next one takes its place.
    """
    reader = _sized(reader)
    make = _TrainBatch(reader, recipe, seed, batch_size, host, num_hosts)
    return _batches(reader, make, start_step, num_steps)


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """i -> the host's slice of the i-th batch; made in any process."""

    reader: Reader
    batch_size: int
    local_size: int
    host: int

    def __call__(self, batch: int) -> HostBatch:
        reader, damaged = self.reader, dict[int, str]()
        first = self.host * self.local_size
        mask = np.zeros(self.local_size, bool)

        def load(i: int, out: np.ndarray) -> int:
            index = batch * self.batch_size + first + i
            if first + i >= self.batch_size or index >= len(reader.source):
                return 0
            try:
                label = reader.read(index, reader.eval_crop, out)
            except DataError as error:
                damaged[index] = str(error)
                return 0
            mask[i] = True
            return label

        images, labels = _fill(reader, self.local_size, load)
        return {"image": images, "label": labels, "mask": mask, "damaged": damaged}


def eval_batches(
    reader: Reader,
    *,
    batch_size: int,
    num_shards: int,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[HostBatch]:
    """Every example once, in order, on any number of devices and hosts.

    Args:
      reader: of the split.
      batch_size: examples a batch, over all hosts; any positive number.
      num_shards: devices of all hosts; batches are padded to a multiple of it, with
        zero images whose mask is False.
      host: index of this host.
      num_hosts: number of hosts, which divides `num_shards`.

    Raises:
      UsageError: more damaged examples than may be left out; else each is named in a line
        on standard error, and not evaluated.
    """
    reader, num_examples = _sized(reader), len(reader.source)
    batch_size = min(batch_size, num_examples)
    padded_size = -(-batch_size // num_shards) * num_shards
    make = _EvalBatch(reader, batch_size, padded_size // num_hosts, host)
    return _batches(reader, make, 0, -(-num_examples // batch_size))


def load_all(reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """A whole split as it is trained on without random crops.

    Returns:
      Images [N, S, S, 3] uint8 and labels [N] int32; damaged examples as in training.

    Raises:
      UsageError: more damaged examples than may be left out.
    """
    reader, damaged = _sized(reader), dict[int, str]()
    images, labels = _fill(
        reader,
        len(reader.source),
        lambda i, out: reader.read_or_next(i, reader.eval_crop, out, damaged),
    )
    _count(damaged, set(), reader.skip_errors)
    return images, labels
