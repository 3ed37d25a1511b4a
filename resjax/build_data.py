"""Config -> the data of a run: source, crops, augmentation, batches; one `build_*` each."""

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from resjax import hosts, parallel, precise_bn, steps
from resjax.config import Config, UsageError
from resjax.steps import Batch, TrainState

_SMALL_BYTES = 512 * 2**20  # of images that devices hold without being asked


def build_source(config: Config, split: str) -> Any:
    """Encoded examples of a split (our name for it) by index; a `sources.Source`.

    Raises:
      UsageError: the data set is unknown or not there, has no such split, or another
        number of classes than the config says.
    """
    from resjax.data import sources

    source = sources.open_source(config.data.name, config.data.dir, split)
    if not len(source):
        raise UsageError(f"config.data.name: {config.data.name} has no {split} examples")
    if len(source.class_names) != config.num_classes:
        raise UsageError(
            f"config.num_classes: {config.num_classes}, but the data set "
            f"{config.data.name} has {len(source.class_names)} classes"
        )
    _check_hosts(source, split)
    return source


def _check_hosts(source: Any, split: str) -> None:
    """Raises `UsageError` if the hosts have different data, by a sample of its places."""
    if jax.process_count() == 1:
        return
    every = -(-len(source) // 1000)
    sample = [source.where(i) for i in range(0, len(source), every)]
    told = repr((len(source), source.class_names, sample))
    if not hosts.is_same(zlib.crc32(told.encode())):
        raise UsageError(
            f"config.data.dir: process {jax.process_index()} has other {split} examples "
            "than the others"
        )


def build_class_names(config: Config) -> list[str]:
    """The class names of the data set, which need not be there; else numbers."""
    from resjax.data import sources

    names = sources.known_class_names(config.data.name)
    known = len(names) == config.num_classes
    return names if known else [str(i) for i in range(config.num_classes)]


def build_reader(config: Config, source: Any) -> Any:
    """How the examples of a source become crops; a `pipeline.Reader`."""
    from resjax.data import pipeline
    from resjax.data.datasets import get_dataset

    return pipeline.Reader(
        get_dataset(config.data.name),
        source,
        image_size=config.data.image_size,
        num_classes=config.num_classes,
        skip_errors=config.data.skip_errors,
        num_workers=config.data.num_workers,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )


def build_recipe(config: Config) -> Any:
    """The augmentation of the training images; a `recipes.Recipe`."""
    from resjax.data.datasets import get_dataset
    from resjax.data.recipes import get_recipe

    return get_recipe(config.data.recipe or get_dataset(config.data.name).recipe)


def build_transforms(config: Config) -> tuple[steps.Transform, steps.Transform]:
    """The device-side halves of the input: (training, evaluation) batch -> images."""
    from resjax.data import augment
    from resjax.data.datasets import get_dataset

    dataset, recipe = get_dataset(config.data.name), build_recipe(config)
    stats = {"mean": dataset.mean, "std": dataset.std}
    pad = round(recipe.shift * config.data.image_size)

    def train(batch: Batch) -> jax.Array:
        return augment.augment(
            batch["image"],
            batch["position"],
            config.seed,
            jitter=recipe.jitter,
            lighting=recipe.lighting,
            flip=recipe.flip,
            pad=pad,
            **stats,
        )

    def evaluation(batch: Batch) -> jax.Array:
        return augment.normalize(batch["image"], **stats)

    return train, evaluation


def describe_preprocess(config: Config) -> dict[str, Any]:
    """What `make_preprocess` needs, in JSON, so that a checkpoint can hold it."""
    from resjax.data.datasets import get_dataset

    dataset = get_dataset(config.data.name)
    return {
        "crop": dataset.eval_crop.__name__,
        "image_size": config.data.image_size,
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "rotates": dataset.rotates,
    }


def make_preprocess(described: dict[str, Any]) -> Callable[[Any], np.ndarray]:
    """Images of any size, uint8 arrays or PIL -> [B, S, S, 3] float32, as in evaluation.

    The function takes an image or a sequence or array of images, each [H, W, 3], [H, W, 1],
    [H, W] (grey) or PIL; it raises `UsageError` for anything else. An array of three axes
    is one image if the last holds at most 4 channels, else a batch [B, H, W] of grey ones.
    """
    from resjax.data import augment, decode

    size, mean, std = (described[name] for name in ("image_size", "mean", "std"))

    def to_rgb(image: Any) -> np.ndarray:
        if described["rotates"] and hasattr(image, "getexif"):
            from PIL import ImageOps

            image = ImageOps.exif_transpose(image)
        array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim == 3 and array.shape[-1] == 1:
            array = np.repeat(array, 3, axis=-1)
        right = array.ndim == 3 and array.shape[-1] == 3 and array.size > 0
        if not right or array.dtype != np.uint8:
            raise UsageError(
                f"image: {array.dtype} of shape {array.shape}; it must be uint8 and "
                "[H, W, 3], [H, W, 1] or [H, W], or PIL"
            )
        return array

    def preprocess(images: Any) -> np.ndarray:
        shape: tuple[int, ...] = getattr(images, "shape", ())
        one_array = len(shape) == 2 or (len(shape) == 3 and shape[-1] <= 4)
        single = hasattr(images, "convert") or one_array
        images = [images] if single else images
        crop = decode.get_eval_crop(described["crop"])
        crops = [crop(to_rgb(image), size) for image in images]
        if not crops:
            raise UsageError("image: an empty list; give at least one image")
        return np.asarray(augment.normalize(np.stack(crops), mean, std))

    return preprocess


def build_on_device(config: Config, num_examples: int) -> bool:
    """Whether the devices hold the training set.

    Raises:
      UsageError: they are to, and cannot.
    """
    asked, why = config.data.on_device, None
    if jax.process_count() > 1:
        why = f"the run has {jax.process_count()} processes, which stop by their batches"
    elif build_recipe(config).window is not None:
        why = "the recipe crops each image anew; config.data.recipe=cifar does not"
    if asked and why:
        raise UsageError(f"config.data.on_device: true, but {why}; allowed: false or none")
    if asked is None:
        return why is None and is_small(config, num_examples)
    return asked


def is_small(config: Config, num_examples: int) -> bool:
    """Whether so many examples fit on the devices without being asked."""
    return num_examples * config.data.image_size**2 * 3 <= _SMALL_BYTES


def build_steps_per_dispatch(config: Config, on_device: bool) -> int:
    """Updates of one dispatch.

    Raises:
      UsageError: several, where each needs something of the host.
    """
    asked = config.data.steps_per_dispatch
    why = None if on_device else "the data is not on the device (config.data.on_device)"
    if config.dtype == "float16":
        why = "config.dtype=float16 repeats an update that overflows"
    if asked > 1 and why:
        raise UsageError(
            f"config.data.steps_per_dispatch: {asked}, but {why}; allowed: 0 or 1"
        )
    if why:
        return 1
    return asked or (1 if jax.default_backend() == "cpu" else 8)


def with_stop(batches: Iterable[Any], wants_stop: Callable[[], bool]) -> Iterable[Any]:
    """The batches, until this process is to stop; those of several tell each other."""
    from resjax.data import workers

    if jax.process_count() == 1:
        return workers.until(wants_stop, batches)
    return (
        {**batch, "stop": np.full(len(batch["label"]), wants_stop(), np.int32)}
        for batch in batches
    )


def build_streamed(
    config: Config, reader: Any, train_step: steps.TrainStep, num_steps: int
) -> tuple[Callable, Callable[..., Iterator[Any]]]:
    """`train_step` and `train_batches` of a run whose batches the host makes."""
    from resjax.data import pipeline

    def train_batches(
        start_step: int, wants_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[Batch]:
        batches = pipeline.train_batches(
            reader,
            build_recipe(config),
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=start_step,
            num_steps=num_steps,
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        return parallel.prefetch(with_stop(batches, wants_stop))

    run_step = parallel.run_on_devices(train_step, config.parallel, donate_state=True)
    return run_step, train_batches


def build_groups(
    config: Config, reader: Any, num_examples: int, group: int
) -> tuple[Iterator[Batch], Batch | None]:
    """The first examples of the training stream, augmented as in training, in groups.

    Args:
      config: of the run.
      reader: of the training split.
      num_examples: from position 0 on; more than the split has are of its next epoch.
      group: examples that share statistics.

    Returns:
      The groups of `precise_bn.split`: batches of one for every device, of which the last
      may hold more than there are; and the last group, the same on all devices, or None.
    """
    from resjax.data import pipeline

    read = partial(pipeline.train_batches, recipe=build_recipe(config), seed=config.seed)
    count, last = precise_bn.split(num_examples, group)
    whole = read(
        reader,
        batch_size=group * jax.device_count(),
        start_step=0,
        num_steps=-(-count // jax.device_count()),
        host=jax.process_index(),
        num_hosts=jax.process_count(),
    )
    if not last:
        return parallel.prefetch(whole), None
    reader = dataclasses.replace(reader, num_workers=0)  # not worth a start of processes
    end = count + -(-last // group)
    rest = list(read(reader, batch_size=group, start_step=count, num_steps=end))
    joined = {name: np.concatenate([part[name] for part in rest]) for name in rest[0]}
    last_group = {name: array[:last] for name, array in joined.items()}
    return parallel.prefetch(whole), parallel.replicate(last_group)


def build_resident(
    config: Config,
    reader: Any,
    train_step: steps.TrainStep,
    num_steps: int,
    steps_per_dispatch: int,
    must_end: Callable[[int], bool],
) -> tuple[Callable, Callable[..., Iterator[Any]]]:
    """`train_step` and `train_batches` of a run whose devices hold the training set."""
    from resjax.data import pipeline, resident

    take_batch = partial(resident.resident_batch, batch_size=config.batch_size)
    unroll = jax.default_backend() == "cpu"  # where a convolution in a loop is slow

    def program(length: int) -> Callable:
        train_steps = steps.make_train_steps(train_step, take_batch, length, unroll)
        return parallel.run_on_devices(
            train_steps, config.parallel, donate_state=True, sharded=False
        )

    programs = {length: program(length) for length in {1, steps_per_dispatch}}

    def run_step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        length, data = batch
        return programs[length](state, data)

    def train_batches(start_step: int, wants_stop: Any = None) -> Iterator[Any]:
        yield from resident.resident_batches(
            *pipeline.load_all(reader),
            parallel.replicate,
            seed=config.seed,
            batch_size=config.batch_size,
            start_step=start_step,
            num_steps=num_steps,
            steps_per_dispatch=steps_per_dispatch,
            must_end=must_end,
        )

    return run_step, train_batches
