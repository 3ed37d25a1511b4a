"""The three equivalent forms of a ResNeXt branch, on the same parameters.

Adding what the paths put out, or concatenating them before one last convolution, is the
same: a 1x1 convolution of a concatenation is the sum of the 1x1 convolutions of its parts.

Source: Xie et al. 2016 (arXiv:1611.05431), figure 3; norms as in section 4 there, one after
  each convolution, the last after the sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from resjax.models.norm import BatchNorm
from resjax.models.ops import conv

Variables = dict[str, Any]
_INNER = ("conv1", "norm1", "conv2", "norm2")  # what each path has a part of


def split_transform_add(
    variables: Variables, x: jax.Array, groups: int, strides: int = 1, train: bool = False
) -> jax.Array:
    """Figure 3a: each path takes the input through 1x1, 3x3, 1x1; the paths are added.

    Args:
      variables: {"params", "batch_stats"} of a block with `branch=bottleneck`.
      x: [B, H, W, C].
      groups: the number of paths, the cardinality.
      strides: of the 3x3, in pixels.
      train: normalise with the batch's statistics.

    Returns:
      [B, H / strides, W / strides, D], the branch before the shortcut is added.
    """
    kernels = jnp.split(variables["params"]["conv3"]["kernel"], groups, axis=2)
    paths = _paths(variables, x, groups, strides, train)
    outputs = [conv(path, kernel) for path, kernel in zip(paths, kernels, strict=True)]
    return _norm(variables, "norm_out", jnp.stack(outputs).sum(axis=0), train)


def early_concatenation(
    variables: Variables, x: jax.Array, groups: int, strides: int = 1, train: bool = False
) -> jax.Array:
    """Figure 3b: each path ends after its 3x3; one 1x1 takes them all side by side.

    Arguments and result as those of `split_transform_add`.
    """
    paths = jnp.concatenate(_paths(variables, x, groups, strides, train), axis=-1)
    total = conv(paths, variables["params"]["conv3"]["kernel"])
    return _norm(variables, "norm_out", total, train)


def grouped_convolution(
    variables: Variables, x: jax.Array, groups: int, strides: int = 1, train: bool = False
) -> jax.Array:
    """Figure 3c: one 1x1, one 3x3 in groups, one 1x1; what the models compute.

    Arguments and result as those of `split_transform_add`.
    """
    params = variables["params"]
    y = conv(x, params["conv1"]["kernel"])
    y = nn.relu(_norm(variables, "norm1", y, train))
    y = conv(y, params["conv2"]["kernel"], strides, groups)
    y = nn.relu(_norm(variables, "norm2", y, train))
    return _norm(variables, "norm_out", conv(y, params["conv3"]["kernel"]), train)


def _paths(
    variables: Variables, x: jax.Array, groups: int, strides: int, train: bool
) -> list[jax.Array]:
    """What each path makes of the input up to its 3x3, [B, H, W, inner / groups]."""
    paths = []
    # Kernels, scales, biases and statistics all have their channels last.
    inner = {
        collection: {name: leaves for name, leaves in tree.items() if name in _INNER}
        for collection, tree in variables.items()
    }
    parts = jax.tree.map(lambda x: x.reshape(*x.shape[:-1], groups, -1), inner)
    for i in range(groups):
        own = jax.tree.map(lambda x, i=i: x[..., i, :], parts)
        y = conv(x, own["params"]["conv1"]["kernel"])
        y = nn.relu(_norm(own, "norm1", y, train))
        y = conv(y, own["params"]["conv2"]["kernel"], strides)
        paths.append(nn.relu(_norm(own, "norm2", y, train)))
    return paths


def _norm(variables: Variables, name: str, x: jax.Array, train: bool) -> jax.Array:
    own = {collection: tree[name] for collection, tree in variables.items()}
    y: Any = BatchNorm().apply(own, x, train=train, update_stats=False)
    return y
