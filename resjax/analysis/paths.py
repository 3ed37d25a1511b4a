"""A residual network as the sum of its paths, and the gradient that each brings back.

A pre-activation block is y = s + b, of its shortcut and of its branch. Multiplied out, n
blocks are 2^n paths; one that goes through k branches has length k. To differentiate along
one path, the forward pass stays as it is, and on the way back each block passes the
gradient to its branch or to its shortcut alone.

Source: Veit, Wilber & Belongie 2016 (arXiv:1605.06431), sections 3 and 5.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resjax.config import UsageError
from resjax.losses import cross_entropy
from resjax.models.blocks import PreActBlock
from resjax.models.resnet import ResNet

Variables = dict[str, Any]


class PathGradients(NamedTuple):
    """What the paths of each length contribute to the gradient; all [n + 1] float64.

    Attributes:
      lengths: blocks whose branch a path goes through, 0 to n.
      probability: the fraction of all paths that have this length.
      mean: norm of the gradient along one path of this length, over paths and images.
      std: of that norm between the paths that were drawn, each averaged over the images.
      share: of the length in the whole gradient: probability * mean, normalised to 1.
    """

    lengths: np.ndarray
    probability: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    share: np.ndarray


def path_length_distribution(blocks: int) -> np.ndarray:
    """The fraction of paths that go through k of n branches: Binomial(n, 1/2).

    Returns:
      [n + 1] float64.

    Source: Veit et al. 2016, section 5, figure 6a.
    """
    paths = 2**blocks  # in whole numbers, which do not overflow
    return np.array([math.comb(blocks, length) / paths for length in range(blocks + 1)])


def gradient_by_path(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    path: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Each image's loss, and the gradient that comes back to the image along one path.

    The network is in evaluation mode: with running statistics it is a function of one
    image, and no gradient returns through the others of the batch. Under `vmap` over paths
    the forward pass, the same for all, is computed once.

    Args:
      model: a pre-activation residual net.
      variables: {"params", "batch_stats"}.
      images: [B, H, W, 3] float.
      labels: [B] int.
      path: [n] bool, for each block from input to output, whether the path goes through
        its branch; otherwise through its shortcut.

    Returns:
      Cross-entropies [B] in nats, and gradients [B, H, W, 3]. Added up over all 2^n paths
      they are the gradient of the loss.

    Raises:
      UsageError: a net whose blocks are no sums, or a path of another length.

    Source: Veit et al. 2016, section 5.
    """
    if not model.preactivation or model.shortcut == "none":
        raise UsageError(
            "model: only a pre-activation net with shortcuts is a sum of paths; "
            f"preactivation={model.preactivation}, shortcut={model.shortcut!r}"
        )
    blocks = sum(model.stage_sizes)
    if jnp.shape(path) != (blocks,):
        raise UsageError(f"path: shape {jnp.shape(path)}, but there are {blocks} blocks")
    unrolled = model.clone(remat="none")  # a loop over blocks would hide which is which

    def total_loss(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        with nn.intercept_methods(_along(iter(path))):
            logits: Any = unrolled.apply(variables, images, train=False)
        losses = cross_entropy(logits, labels)
        return losses.sum(), losses

    gradients, losses = jax.grad(total_loss, has_aux=True)(images)
    return losses, gradients


def gradient_by_length(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    *,
    rng: np.random.Generator,
    samples: int = 16,
) -> PathGradients:
    """Samples the gradient at the image along paths of each length.

    Args:
      model: a pre-activation residual net.
      variables: {"params", "batch_stats"}, of a trained net.
      images: [B, H, W, 3] float, normalised as in training.
      labels: [B] int.
      rng: draws the blocks whose branches a path goes through.
      samples: paths of each length, differentiated together; memory grows with their
        number times B.

    Raises:
      UsageError: a net whose blocks are no sums.

    Source: Veit et al. 2016, section 5, figure 6.
    Differs: norms are Euclidean, one an image, and all paths see the same images.
    """
    blocks = sum(model.stage_sizes)
    norms = np.array(
        [
            _norms(
                model, variables, images, labels, sample_paths(blocks, length, samples, rng)
            )
            for length in range(blocks + 1)
        ],
        np.float64,
    ).mean(axis=2)  # [n + 1, samples], over images
    probability = path_length_distribution(blocks)
    mean, std = norms.mean(axis=1), norms.std(axis=1)
    total = probability * mean
    return PathGradients(np.arange(blocks + 1), probability, mean, std, total / total.sum())


def sample_paths(
    blocks: int, length: int, samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Random paths of one length, each drawn from all of them; [samples, n] bool."""
    return rng.permuted(np.tile(np.arange(blocks) < length, (samples, 1)), axis=1)


def central_range(share: np.ndarray, mass: float = 0.95) -> tuple[int, int]:
    """The lengths, first and last, between which that mass lies.

    Args:
      share: [n + 1], adds up to 1.
      mass: at least what the range holds; what remains outside is cut off in equal parts,
        at most (1 - mass) / 2 at either end.
    """
    tail = (1 - mass) / 2
    first = np.flatnonzero(np.cumsum(share) > tail)[0]
    last = np.flatnonzero(np.cumsum(share[::-1]) > tail)[0]
    return int(first), len(share) - 1 - int(last)


@partial(jax.jit, static_argnums=0)
def _norms(
    model: ResNet,
    variables: Variables,
    images: jax.Array,
    labels: jax.Array,
    paths: jax.Array,
) -> jax.Array:
    """Euclidean norms of the gradients along paths [M, n], [M, B]."""

    def along(path: jax.Array) -> jax.Array:
        _, gradients = gradient_by_path(model, variables, images, labels, path)
        gradients = gradients.reshape(len(gradients), -1)
        # Squares of what long paths bring back would round to 0.
        largest = jnp.abs(gradients).max(axis=1, keepdims=True)
        scaled = gradients / jnp.where(largest > 0, largest, 1)
        return largest[:, 0] * jnp.linalg.norm(scaled, axis=1)

    return jax.vmap(along)(paths)


def _along(path: Iterator[jax.Array]) -> Callable[..., Any]:
    """An interceptor that takes the gradient back along a path, block after block."""
    branch: list[jax.Array] = []

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        y = call(*args, **kwargs)
        if context.module.name == "conv_out":
            branch.append(y)
        elif isinstance(context.module, PreActBlock) and context.method_name == "__call__":
            *_, scale = args  # of the branch, under stochastic depth
            b = branch.pop() if scale is None else (branch.pop() * scale).astype(y.dtype)
            y = _one_way(y, b, next(path))
        return y

    return intercept


@jax.custom_vjp
def _one_way(y: jax.Array, b: jax.Array, through_branch: jax.Array) -> jax.Array:
    """The sum y = s + b, whose gradient goes to b or to s alone."""
    return y


def _one_way_forward(
    y: jax.Array, b: jax.Array, through_branch: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return y, through_branch


def _one_way_back(through_branch: jax.Array, gradient: jax.Array) -> tuple[Any, ...]:
    # What y gets reaches s and b alike: b's own takes it back, exactly.
    to_branch = jnp.where(through_branch, gradient, 0)
    to_y = gradient - to_branch
    return to_y, to_branch - to_y, None


_one_way.defvjp(_one_way_forward, _one_way_back)
