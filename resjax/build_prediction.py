"""Config -> what predicts a split, in one of the ways in which the papers evaluate."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from resjax import build, build_data, hosts, parallel, steps
from resjax.config import Config, UsageError
from resjax.models import dense
from resjax.models.resnet import ResNet
from resjax.steps import Batch


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How an image is shown to the net.

    Attributes:
      crops: 1 = the crop in the middle, as in training; 10 = four corners, the middle, and
        their mirror images.
      scales: shorter sides in pixels, of the whole image, for dense evaluation; none =
        crops.
    """

    crops: int = 1
    scales: tuple[int, ...] = ()

    @property
    def described(self) -> dict[str, Any]:
        """What differs from the plain evaluation, in JSON."""
        crops = {"crops": self.crops} if self.crops != 1 else {}
        return {**crops, **({"scales": list(self.scales)} if self.scales else {})}


PLAIN = Protocol()


def check_protocol(protocol: Protocol) -> None:
    """Raises `UsageError` for values that no data set and no model allows."""
    crops, scales = protocol.crops, protocol.scales
    if crops not in (1, 10):
        raise UsageError(f"--crops: {crops!r} is not 1 or 10")
    for scale in scales:
        if type(scale) is not int or scale < 1:
            raise UsageError(f"--scales: {scale!r} is not a whole number above 0")
        if scales.count(scale) > 1:
            raise UsageError(f"--scales: {scale} is there twice")
    if crops != 1 and scales:
        shown = ",".join(map(str, scales))
        raise UsageError(
            f"--crops: {crops} with --scales={shown}, which takes whole images; give one "
            "of the two"
        )


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predictions of a model for a split, built and not yet made.

    Attributes:
      step: (variables, batch) -> outputs, see `steps.make_predict_step`, on all devices.
      passes: for each pass over the split, the indices of its examples, and a function that
        starts its sharded batches. The softmax of the passes is to be averaged.
      num_examples: of the split.
      sizes: of the images, [(height, width), ...], where scales need them.
      read_image: index -> the image as it is evaluated, [H, W, 3] uint8; of several crops
        the middle, of several scales the smallest.
    """

    step: Callable[[Any, Batch], dict[str, jax.Array]]
    passes: Sequence[tuple[np.ndarray, Callable[[], Iterable[Batch]]]]
    num_examples: int
    sizes: Sequence[tuple[int, int] | None] | None
    read_image: Callable[[int], np.ndarray]


def build_prediction(
    config: Config,
    split: str,
    batch_size: int,
    model: ResNet,
    protocol: Protocol = PLAIN,
    class_names: list[str] | None = None,
    sizes: Sequence[tuple[int, int] | None] | None = None,
) -> Prediction:
    """The predictions for a split.

    Args:
      config: of the run.
      split: our name for it.
      batch_size: images of `config.data.image_size` at a time, over all devices; of larger
        ones, and of several crops, as many as have no more pixels (at least one a device).
      model: to evaluate.
      protocol: how images are shown to it.
      class_names: that the data must have.
      sizes: of another prediction of the same split, which need not be read again.

    Raises:
      UsageError: the data is not there, or has other classes; a protocol that the data or
        the model does not allow.
    """
    from resjax.data import views

    check_protocol(protocol)
    _check_fits(config, model, protocol)
    source = build_data.build_source(config, split)
    build.check_class_names(source.class_names, class_names or source.class_names)
    reader = build_data.build_reader(config, source)
    _, prepare = build_data.build_transforms(config)
    size, count = config.data.image_size, len(source)

    def fitting(shape: views.Shape) -> int:
        pixels = math.prod(shape[:-1]) * (2 if len(shape) == 4 else 1)  # with the mirrored
        return max(1, min(batch_size, batch_size * size**2 // pixels))

    apply: Callable[..., Any] = partial(model.apply, train=False)
    crop = reader.eval_crop
    if protocol.scales:
        window = dense.window_size(model, size)
        apply = partial(dense.dense_logits, model, window=window)
        crop = reader.crop_to(views.resized)
        sizes = sizes or _read_sizes(reader)
        plans = _build_scales(sizes, model, protocol.scales, fitting)
    else:
        shape: views.Shape = (size, size, 3)
        if protocol.crops == 10:
            crop, shape = reader.crop_to(views.five_crops), (5, size, size, 3)
        plans = [views.group_by_shape([shape] * count, fitting)]

    def read_image(index: int) -> np.ndarray:
        shape = next(group.shape for group in plans[-1] if index in group.indices)
        image = np.zeros(shape, np.uint8)
        reader.read(index, crop, image)
        return image[-1] if image.ndim == 4 else image

    return Prediction(
        step=parallel.run_on_devices(
            steps.make_predict_step(apply, prepare), config.parallel
        ),
        passes=[_build_pass(reader, crop, plan) for plan in plans],
        num_examples=count,
        sizes=sizes,
        read_image=read_image,
    )


def _check_fits(config: Config, model: ResNet, protocol: Protocol) -> None:
    """Raises `UsageError` for a protocol that the data or the model does not allow."""
    from resjax.data import datasets, decode

    name = config.data.name
    if protocol.crops != 1 and datasets.get_dataset(name).eval_crop is decode.whole:
        raise UsageError(
            f"--crops: {protocol.crops}, but images of {name} are evaluated whole, which "
            "leaves nothing to crop; allowed: 1"
        )
    stride = dense.total_stride(model)
    small = [scale for scale in protocol.scales if scale < stride]
    if small:
        raise UsageError(
            f"--scales: {small[0]} is less than the stride of {config.model}; allowed: "
            f"{stride} and more"
        )


def _read_sizes(reader: Any) -> list[tuple[int, int] | None]:
    """Of all images of a split; checks that the hosts have the same."""
    from resjax.data import pipeline

    sizes = pipeline.image_sizes(reader)
    if not hosts.is_same(zlib.crc32(repr(sizes).encode())):
        raise UsageError(
            f"config.data.dir: process {jax.process_index()} has images of other sizes "
            "than the others"
        )
    return sizes


def _build_scales(
    sizes: Sequence[tuple[int, int] | None],
    model: ResNet,
    scales: Sequence[int],
    fitting: Callable[..., int],
) -> list[Any]:
    """A plan for each scale, the largest first, which shows whether memory is enough."""
    from resjax.data import views

    stride = dense.total_stride(model)
    return [
        views.group_by_shape(
            (size and views.scaled_shape(*size, scale, stride) for size in sizes), fitting
        )
        for scale in sorted(scales, reverse=True)
    ]


def _build_pass(
    reader: Any, crop: Any, plan: Sequence[Any]
) -> tuple[np.ndarray, Callable[[], Iterable[Batch]]]:
    from resjax.data import pipeline

    def start() -> Iterable[Batch]:
        batches = pipeline.plan_batches(
            reader,
            crop,
            plan,
            num_shards=jax.device_count(),
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        return parallel.prefetch(batches)

    return np.concatenate([group.indices for group in plan]), start
