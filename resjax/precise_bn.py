"""Precise batch norm: statistics of many training examples, of weights that stand still.

Running statistics are an average over the last minibatches, made while the weights moved.
These are those of the weights at hand. The examples go through the network in groups, each
of which is normalised by its own statistics as in training; the moments of all groups are
then pooled as if each layer's values had been gathered first.

Knows no config and no data set.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax

from resjax.config import UsageError
from resjax.models.blocks import Layer
from resjax.models.norm import BatchNorm
from resjax.models.resnet import ResNet
from resjax.parallel import AXIS
from resjax.steps import Batch, Transform

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and spread of the values of K channels, each of its own.

    Attributes:
      count: values, [K].
      mean: of them, [K].
      deviation: the sum of their squared distances from the mean, [K].
    """

    count: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def join(a: Moments, b: Moments) -> Moments:
    """The moments of the values of both.

    Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance",
      where no large numbers are subtracted, as in E[x^2] - E[x]^2.
    """
    count = a.count + b.count
    distance = b.mean - a.mean
    return Moments(
        count,
        a.mean + distance * (b.count / count),
        a.deviation + b.deviation + distance**2 * (a.count * b.count / count),
    )


def pool(groups: Iterable[tuple[int, np.ndarray]], values: np.ndarray) -> np.ndarray:
    """Mean and unbiased variance of all values, from those of groups of them.

    The variance is that within the groups and that of their means; an average of the
    groups' variances would leave out the second.

    Args:
      groups: of each its number of examples, and mean and unbiased variance [2, K].
      values: of a channel that an example has, [K].

    Returns:
      [2, K] float64.

    Source: Wu & Johnson 2021 (arXiv:2105.07576), section 3.
    Differs: groups count by their values, and the variance is unbiased, the convention of
      all running statistics here.
    """

    def moments(group: tuple[int, np.ndarray]) -> Moments:
        size, (mean, var) = group[0], np.asarray(group[1], np.float64)
        count = size * np.asarray(values, np.float64)
        return Moments(count, mean, var * (count - 1))

    total = functools.reduce(join, map(moments, groups))
    return np.stack([total.mean, total.deviation / (total.count - 1)])


def split(num_examples: int, group: int) -> tuple[int, int]:
    """How so many examples are divided into groups, each of them in one.

    What does not fill a group joins the one before: alone it would be normalised by fewer
    values than any group of training.

    Returns:
      The number of groups of that size, and the size of the last if it is another, else 0.
    """
    whole, rest = divmod(num_examples, group)
    if not rest:
        return whole, 0
    return max(whole - 1, 0), min(num_examples, group + rest)


def make_group_step(
    model: nn.Module, prepare: Transform
) -> Callable[[Variables, Batch], jax.Array]:
    """The statistics of the groups of all devices, to be run under the mapped axis `AXIS`.

    Apart from its norms the network does what it does in evaluation, for which the
    statistics are: stochastic depth drops no branch, and scales all.

    Args:
      model: of `create_model`, with `BatchNorm`.
      prepare: the device's batch -> normalised images.

    Returns:
      (variables, batch) -> mean and unbiased variance of each device's batch, one group,
      [devices, 2, K] float32, where K counts the channels of all norms. The statistics in
      the variables have no influence.

    Raises:
      UsageError: the model has no batch norm.
    """
    model = model.clone(norm=functools.partial(_group_norm, _batch_norm(model)))

    def group_step(variables: Variables, batch: Batch) -> jax.Array:
        unused = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
        _, updates = model.apply(
            {"params": variables["params"], "batch_stats": unused},
            prepare(batch),
            train=False,
            update_stats=True,
            mutable=["batch_stats"],
        )
        trees = [_take(name, updates["batch_stats"]) for name in ("mean", "var")]
        own = jnp.stack([jnp.concatenate(jax.tree.leaves(tree)) for tree in trees])
        return lax.all_gather(own, AXIS)

    return group_step


def _batch_norm(model: nn.Module) -> Layer:
    """What makes the norms of a model; raises if they have no statistics."""
    if not isinstance(model, ResNet):
        raise UsageError(f"model: {type(model).__name__} is no model of create_model")
    norm = getattr(model.norm, "func", model.norm)  # of a partial
    if not (isinstance(norm, type) and issubclass(norm, BatchNorm)):
        raise UsageError(
            f"norm: the model has {getattr(norm, '__name__', norm)}, which has no "
            "statistics; precise batch norm needs BatchNorm"
        )
    return model.norm


def _group_norm(norm: Layer, name: str) -> Callable[..., jax.Array]:
    """A norm that normalises by its whole input, and keeps the statistics of that alone."""
    module = norm(name=name, virtual_batch_size=0, axis_name=None, decay=0.0)

    def normalize(x: jax.Array, *, train: bool, update_stats: bool | None) -> jax.Array:
        return module(x, train=True, update_stats=update_stats)

    return normalize


def _take(name: str, batch_stats: Any) -> Any:
    """The "mean" or "var" of every norm, in a tree of the norms."""
    return jax.tree.map(
        lambda norm: norm[name], batch_stats, is_leaf=lambda node: name in node
    )


def count_values(model: nn.Module, variables: Variables, image_size: int) -> np.ndarray:
    """The values that an image adds to each channel of each norm, [K] int.

    Args:
      model: of `create_model`.
      variables: of it; shapes are enough.
      image_size: side of the images, in pixels.
    """
    places: dict[tuple[str, ...], int] = {}

    def note(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            places[context.module.path] = math.prod(args[0].shape[1:-1])
        return call(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(note):  # outside of loops, where paths are whole
        jax.eval_shape(model.clone(remat="none").init, jax.random.key(0), images)
    means = _take("mean", variables["batch_stats"])
    each = traverse_util.unflatten_dict(places)
    counts = jax.tree.map(lambda mean, count: np.full(mean.shape, count), means, each)
    return np.concatenate(jax.tree.leaves(counts))


def to_batch_stats(statistics: np.ndarray, like: Any) -> Any:
    """Means and variances [2, K] as the `batch_stats` of a model, numpy float32.

    Args:
      statistics: from `pool`.
      like: the structure, arrays or shapes.
    """
    leaves, structure = jax.tree.flatten(_take("mean", like))
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    mean, var = (
        jax.tree.unflatten(structure, np.split(row.astype(np.float32), ends))
        for row in statistics
    )
    return jax.tree.map(lambda m, v: {"mean": m, "var": v}, mean, var)


def fetch_late(outputs: Iterable[Any]) -> Iterator[Any]:
    """Fetches each output when the next is under way, so that the devices never wait."""
    before = None
    for output in outputs:
        if before is not None:
            yield jax.device_get(before)
        before = output
    if before is not None:
        yield jax.device_get(before)
