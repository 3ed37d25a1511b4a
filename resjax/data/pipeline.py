"""Batches for one host: positions of the stream, decoded by threads and processes.

Batches are dicts of host arrays: `image` [b, S, S, 3] uint8, `label` [b] int32, and
`position` [b] int32 (training) or `mask` [b] bool (evaluation), where b is the host's
share of the global batch: host h of n holds the h-th contiguous slice. `plan_batches` has
images of other shapes, and `index` [b] int32, the places in the split.

A pool of threads fills a batch in place, while another is begun. Processes make parts of
batches, which are put together here.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from resjax.config import UsageError
from resjax.data import jpeg, order
from resjax.data.datasets import Dataset
from resjax.data.decode import DataError, check_label, decode, decode_window
from resjax.data.recipes import Recipe
from resjax.data.views import Group, Shape, View
from resjax.data.workers import can_share, in_order, num_cores, processes

HostBatch = dict[str, Any]
Crop = Callable[[bytes, np.ndarray], None]  # encoded, and the array to be filled

_PART = 32  # examples that a process makes at a time


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the examples of a split are read.

    Attributes:
      dataset: how images are cropped.
      source: encoded examples by index: a `sources.Source`, or a list of such examples.
      image_size: S, pixels.
      num_classes: labels are below it.
      skip_errors: damaged examples that may be left out; 0 = none.
      num_workers: processes; 0 = threads of this one; None: one for every 8 cores of 16
        or more.
      num_threads: of each process; 0 = the cores, shared out.
      prefetch: batches made ahead.
      damaged: the examples that were left out so far.
    """

    dataset: Dataset
    source: Sequence[Any]
    image_size: int
    num_classes: int
    skip_errors: int = 0
    num_workers: int | None = 0
    num_threads: int = 0
    prefetch: int = 2
    damaged: set[int] = dataclasses.field(default_factory=set)

    def read(self, index: int, crop: Crop, out: np.ndarray) -> int:
        """Crops an example into `out` and returns its label; `DataError` names it."""
        try:
            example = self.source[index]
            label = int(example["label"])
            check_label(label, self.num_classes)
            crop(example["image"], out)
            return label
        except (DataError, cv2.error, MemoryError) as error:
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
        raise self.too_many(damaged[index])

    def eval_crop(self, encoded: bytes, out: np.ndarray) -> None:
        """The crop that is evaluated."""
        image = decode(encoded, self.dataset.rotates)
        out[:] = self.dataset.eval_crop(image, self.image_size)

    def crop_to(self, view: View) -> Crop:
        """The crop that is this view of the decoded image, of the shape asked for."""

        def crop(encoded: bytes, out: np.ndarray) -> None:
            out[:] = view(decode(encoded, self.dataset.rotates), out.shape)

        return crop

    def measure(self, encoded: bytes, out: np.ndarray) -> None:
        """Fills `out` with height and width of the decoded image.

        The header of a JPEG file tells them; others are decoded.
        """
        header = jpeg.read_header(encoded)
        turned = header and header.exif and self.dataset.rotates
        if header and header.complete and header.height and not turned:
            out[:] = header.height, header.width
        else:
            out[:] = decode(encoded, self.dataset.rotates).shape[:2]

    def count(self, damaged: dict[int, str]) -> None:
        """Says which examples are new among the damaged; raises if they are too many."""
        for index in sorted(damaged.keys() - self.damaged):
            self.damaged.add(index)
            if len(self.damaged) > self.skip_errors:
                raise self.too_many(damaged[index])
            told = f"left out, as {len(self.damaged)} of at most {self.skip_errors}"
            tqdm.write(f"{damaged[index]}; {told}", file=sys.stderr)
        if len(self.damaged) == len(self.source):
            raise UsageError("data: none of the examples can be read")

    def too_many(self, line: str) -> UsageError:
        """The error of a damaged example that may not be left out."""
        return UsageError(
            f"{line}; a run leaves out at most config.data.skip_errors={self.skip_errors} "
            "such examples"
        )


def _sized(reader: Reader) -> Reader:
    """The reader with its processes and threads counted.

    Python itself takes a tenth of an image's time, so threads of one process cannot use
    many more than eight cores.

    Raises:
      UsageError: there is no shared memory for so many processes.
    """
    cores, workers = num_cores(), reader.num_workers
    if workers is None:
        workers = cores // 8 if cores >= 16 else 0
    if workers and not can_share(workers, _PART * 3 * reader.image_size**2):
        if reader.num_workers:
            raise UsageError(
                f"config.data.num_workers: {workers} processes need more shared memory "
                "(in Docker: --shm-size=2g); 0 decodes in threads of this one"
            )
        told = "data: decoding in threads alone, there is too little shared memory"
        tqdm.write(f"{told} for {workers} processes", file=sys.stderr)
        workers = 0
    threads = reader.num_threads or max(1, cores // max(1, workers))
    return dataclasses.replace(reader, num_workers=workers, num_threads=threads)


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    cv2.setNumThreads(0)  # parallelism is over images
    return ThreadPoolExecutor(num_threads, "decode")


def _fill(
    reader: Reader,
    count: int,
    load: Callable[[int, np.ndarray], int],
    shape: Shape | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, *shape] and labels [count]; load(i, out) makes the i-th of them."""
    size = reader.image_size
    images = np.zeros((count, *(shape or (size, size, 3))), np.uint8)
    labels = np.zeros(count, np.int32)

    def fill_part(part: range) -> None:
        for i in part:
            labels[i] = load(i, images[i])

    length = max(1, min(16, count // reader.num_threads))
    parts = [range(i, min(i + length, count)) for i in range(0, count, length)]
    for _ in _pool(reader.num_threads).map(fill_part, parts):
        pass  # raises what a part has raised
    return images, labels


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """(step, part) -> those examples of the host's slice of that minibatch."""

    reader: Reader
    recipe: Recipe
    seed: int
    batch_size: int
    host: int
    num_hosts: int

    def __call__(self, step: int, part: range) -> HostBatch:
        local_size = self.batch_size // self.num_hosts
        first = step * self.batch_size + self.host * local_size + part.start
        positions = range(first, first + len(part))
        num_examples, damaged = len(self.reader.source), dict[int, str]()
        indices = [order.example_index(self.seed, p, num_examples) for p in positions]
        uniforms = order.uniforms(self.seed, first, len(part))

        def load(i: int, out: np.ndarray) -> int:
            crop = self.crop(uniforms[i])
            return self.reader.read_or_next(indices[i], crop, out, damaged)

        images, labels = _fill(self.reader, len(part), load)
        return {
            "image": images,
            "label": labels,
            "position": np.array(positions, np.int32),
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


@dataclasses.dataclass(frozen=True)
class _InProcesses:
    """i -> a part of a minibatch, so that a process holds little; made in any of them."""

    make: _TrainBatch
    start: int
    parts: list[range]

    def __call__(self, i: int) -> HostBatch:
        step, part = divmod(i, len(self.parts))
        return self.make(self.start + step, self.parts[part])


def _join(parts: Iterable[HostBatch], local_size: int) -> HostBatch:
    """A batch of its parts, which may lie in shared memory."""
    batch: HostBatch = {"damaged": {}}
    done = 0
    for part in parts:
        batch["damaged"] |= part.pop("damaged")
        count = len(part["label"])
        for name, array in part.items():
            if name not in batch:
                batch[name] = np.empty((local_size, *array.shape[1:]), array.dtype)
            batch[name][done : done + count] = array
        done += count
    return batch


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
    reader, local_size = _sized(reader), batch_size // num_hosts
    make = _TrainBatch(reader, recipe, seed, batch_size, host, num_hosts)
    steps = range(start_step, num_steps)
    with contextlib.ExitStack() as stack:
        if reader.num_workers:
            whole = range(local_size)
            parts = [whole[i : i + _PART] for i in whole[::_PART]]
            function = _InProcesses(make, start_step, parts)
            count = len(steps) * len(parts)
            take = stack.enter_context(processes(function, count, reader.num_workers))
            batches = in_order(
                lambda step: _join((take() for _ in parts), local_size),
                steps,
                num_threads=1,
                ahead=reader.prefetch,
            )
        else:
            batches = in_order(
                lambda step: make(step, range(local_size)),
                steps,
                num_threads=2,  # so that one begins while the other ends
                ahead=reader.prefetch,
            )
        for batch in stack.enter_context(contextlib.closing(batches)):
            reader.count(batch.pop("damaged"))
            yield batch


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """(group, first) -> the host's slice of the batch that begins with its first-th."""

    reader: Reader
    crop: Crop
    num_shards: int
    host: int
    num_hosts: int

    def __call__(self, place: tuple[Group, int]) -> HostBatch:
        group, first = place
        whole = group.indices[first : first + group.batch_size]
        local_size = -(-group.batch_size // self.num_shards) * (
            self.num_shards // self.num_hosts
        )
        mine = whole[self.host * local_size : (self.host + 1) * local_size]
        index = np.full(local_size, -1, np.int32)
        index[: len(mine)] = mine
        mask, damaged = np.zeros(local_size, bool), dict[int, str]()

        def load(i: int, out: np.ndarray) -> int:
            if index[i] < 0:
                return 0
            try:
                label = self.reader.read(int(index[i]), self.crop, out)
            except DataError as error:
                damaged[int(index[i])] = str(error)
                return 0
            mask[i] = True
            return label

        images, labels = _fill(self.reader, local_size, load, group.shape)
        return {
            "image": images,
            "label": labels,
            "mask": mask,
            "index": index,
            "damaged": damaged,
        }


def plan_batches(
    reader: Reader,
    crop: Crop,
    plan: Sequence[Group],
    *,
    num_shards: int,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[HostBatch]:
    """Every example of a plan once, in its order, on any number of devices and hosts.

    Decoded by threads: processes would have to start for every evaluation.

    Args:
      reader: of the split.
      crop: makes the view of an example, of the shape of its group.
      plan: the examples by the shape of their views; all batches of a group are of one
        size, so that one compiled program takes them.
      num_shards: devices of all hosts; batches are padded to a multiple of it, with
        zero images whose mask is False and whose index is -1.
      host: index of this host.
      num_hosts: number of hosts, which divides `num_shards`.

    Raises:
      UsageError: more damaged examples than may be left out; else each is named in a line
        on standard error, and its mask is False.
    """
    reader = _sized(dataclasses.replace(reader, num_workers=0))
    make = _EvalBatch(reader, crop, num_shards, host, num_hosts)
    places = [
        (group, first)
        for group in plan
        for first in range(0, len(group.indices), group.batch_size)
    ]
    for batch in in_order(make, places, num_threads=2, ahead=reader.prefetch):
        reader.count(batch.pop("damaged"))
        yield batch


def eval_batches(
    reader: Reader,
    *,
    batch_size: int,
    num_shards: int,
    host: int = 0,
    num_hosts: int = 1,
) -> Iterator[HostBatch]:
    """The crops of a whole split that are evaluated, in order, as `plan_batches`.

    Args:
      reader: of the split.
      batch_size: examples a batch, over all hosts; any positive number.
      num_shards: devices of all hosts.
      host: index of this host.
      num_hosts: number of hosts, which divides `num_shards`.

    Raises:
      UsageError: more damaged examples than may be left out.
    """
    count, size = len(reader.source), reader.image_size
    group = Group((size, size, 3), range(count), min(batch_size, count))
    batches = plan_batches(
        reader,
        reader.eval_crop,
        [group],
        num_shards=num_shards,
        host=host,
        num_hosts=num_hosts,
    )
    for batch in batches:
        del batch["index"]
        yield batch


def image_sizes(reader: Reader) -> list[tuple[int, int] | None]:
    """Height and width of every example, as it is decoded; None for a damaged one.

    Raises:
      UsageError: more damaged examples than may be left out.
    """
    reader = _sized(dataclasses.replace(reader, num_workers=0))
    count, damaged = len(reader.source), dict[int, str]()
    sizes = np.zeros((count, 2), np.int64)

    def look(part: range) -> int:
        for i in part:
            try:
                reader.read(i, reader.measure, sizes[i])
            except DataError as error:
                damaged[i] = str(error)
        return len(part)

    parts = [range(i, min(i + _PART, count)) for i in range(0, count, _PART)]
    # disable=None: no bar if standard error is no terminal.
    with tqdm(
        total=count, desc="sizes", unit="img", unit_scale=True, disable=None, leave=False
    ) as bar:
        for done in _pool(reader.num_threads).map(look, parts):
            bar.update(done)
    reader.count(damaged)
    return [
        None if i in damaged else (int(height), int(width))
        for i, (height, width) in enumerate(sizes)
    ]


def load_all(reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """A whole split as it is trained on without random crops.

    Returns:
      Images [N, S, S, 3] uint8 and labels [N] int32; damaged examples as in training.

    Raises:
      UsageError: more damaged examples than may be left out.
    """
    reader, damaged = _sized(dataclasses.replace(reader, num_workers=0)), dict[int, str]()
    images, labels = _fill(
        reader,
        len(reader.source),
        lambda i, out: reader.read_or_next(i, reader.eval_crop, out, damaged),
    )
    reader.count(damaged)
    return images, labels
