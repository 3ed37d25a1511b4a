"""Blocks of trained networks deleted or moved, as functions variables -> variables.

The model stays what it is: a lesion sets the variables of blocks so that the same forward
pass computes the damaged network, and one compiled program serves all lesions. Blocks are
named by their paths, "stage1/block1".

Source: Veit, Wilber & Belongie 2016 (arXiv:1605.06431), section 4.
"""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from resjax.config import UsageError, unknown_name
from resjax.metrics import classification_sums, summarize

Variables = dict[str, Any]  # {"params", "batch_stats"}, of a network or of a block

# A norm that is the identity, whatever its epsilon: beside such a variance it rounds away.
_IDENTITY = {"scale": 2.0**20, "bias": 0.0, "mean": 0.0, "var": 2.0**40}


def list_blocks(variables: Variables) -> list[str]:
    """The names of the blocks from input to output, ["stage1/block1", ...]."""
    params = variables["params"]
    stages = _in_order("stage", params)
    return [
        f"{stage}/{block}"
        for stage in stages
        for block in _in_order("block", params[stage])
    ]


def changes_shape(variables: Variables, name: str) -> bool:
    """Whether what the block puts out has other channels than what it takes.

    Every block that strides does; in a plain net such a block cannot be deleted.

    Raises:
      UsageError: no block of that name.
    """
    shapes = _kernel_shapes(_block(variables, name)["params"])
    return bool(shapes[0][2] != shapes[-1][3])


def delete_blocks(variables: Variables, *names: str) -> Variables:
    """The variables of the network in which these blocks are their shortcuts.

    In a residual net the last layer of the branch is zero. A block that changes the shape
    is left with what its shortcut does about it. In a plain net the block becomes the
    identity of what comes out of a ReLU: delta kernels between neutral norms; exact in
    evaluation (`train=False`), whose statistics are those of the variables, but for the
    rounding of products.

    Args:
      variables: {"params", "batch_stats"} of any of the models; not changed.
      *names: of blocks, see `list_blocks`.

    Returns:
      Variables of the same shapes.

    Raises:
      UsageError: no block of that name, or the block of a plain net that changes the
        number of channels on its way, or stands in a pre-activation net.

    Source: Veit et al. 2016, sections 4.1 and 4.2.
    """
    for name in names:
        block = _block(variables, name)
        if {"conv_out", "norm_out"} & set(block["params"]):
            deleted = {**block, "params": _without_branch(block["params"])}
        else:
            _check_plain(variables, name)
            deleted = _identity(block)
        variables = _replaced(variables, name, deleted)
    return variables


def swap_blocks(variables: Variables, first: str, second: str) -> Variables:
    """The variables of the network in which two blocks have changed places.

    Args:
      variables: {"params", "batch_stats"} of any of the models; not changed.
      first: name of a block, see `list_blocks`.
      second: name of another whose variables have the same shapes.

    Raises:
      UsageError: no block of that name, or other shapes.

    Source: Veit et al. 2016, section 4.3.
    Differs: variables move, the rest of a block stays; the first block of a pre-activation
      net keeps its activated shortcut.
    """
    one, other = _block(variables, first), _block(variables, second)
    if _shapes(one) != _shapes(other):
        raise UsageError(f"blocks: {first!r} and {second!r} have variables of other shapes")
    return _replaced(_replaced(variables, first, other), second, one)


def swap_random_blocks(
    variables: Variables, swaps: int, rng: np.random.Generator
) -> tuple[Variables, float]:
    """Swaps random pairs of blocks of the same shapes, one pair after another.

    Args:
      variables: {"params", "batch_stats"} of any of the models; not changed.
      swaps: how many pairs are drawn; a pair may be drawn again.
      rng: draws them, each with the same probability.

    Returns:
      The variables and Kendall's rank correlation between the new order of all blocks and
      the old one, 1 for the old order and -1 for the reverse.

    Raises:
      UsageError: no two blocks have the same shapes.

    Source: Veit et al. 2016, section 4.3.
    """
    names = list_blocks(variables)
    shapes = [_shapes(_block(variables, name)) for name in names]
    pairs = [
        (i, j) for i, j in combinations(range(len(names)), 2) if shapes[i] == shapes[j]
    ]
    if not pairs:
        raise UsageError(f"blocks: no two of {names} have variables of the same shapes")
    order = list(range(len(names)))
    for i, j in rng.choice(pairs, swaps):
        variables = swap_blocks(variables, names[i], names[j])
        order[i], order[j] = order[j], order[i]
    every_pair = list(combinations(order, 2))
    discordant = sum(before > after for before, after in every_pair)
    return variables, 1 - 2 * discordant / len(every_pair)


def make_top1_error(
    model: nn.Module, images: np.ndarray, labels: np.ndarray, batch_size: int = 256
) -> Callable[[Variables], float]:
    """Makes the function that measures a network's lesions, all in one compiled program.

    Args:
      model: of the network.
      images: [N, H, W, 3] float, normalised as in training.
      labels: [N] int.
      batch_size: images a forward pass, at most.

    Returns:
      variables -> top-1 error over the N images in evaluation mode, in percent.
    """

    @jax.jit
    def sums(variables: Variables, images: Any, labels: Any, mask: Any) -> Any:
        logits: Any = model.apply(variables, images, train=False)
        return classification_sums(logits, labels, mask)

    size = -(-len(labels) // -(-len(labels) // batch_size))  # equal parts
    positions = np.arange(-(-len(labels) // size) * size).reshape(-1, size)
    batches = [
        (images[rows % len(labels)], labels[rows % len(labels)], rows < len(labels))
        for rows in positions
    ]

    def top1_error(variables: Variables) -> float:
        return 100 - summarize(sums(variables, *batch) for batch in batches)["top1"]

    return top1_error


def _in_order(prefix: str, tree: dict[str, Any]) -> list[str]:
    """The keys made of `prefix` and a number, by that number."""
    names = [key for key in tree if key.removeprefix(prefix).isdecimal()]
    return sorted(names, key=lambda name: int(name.removeprefix(prefix)))


def _block(variables: Variables, name: str) -> Variables:
    """The subtrees of a block; no "batch_stats" in a net without norms."""
    known = list_blocks(variables)
    if name not in known:
        raise unknown_name("block", name, known)
    stage, block = name.split("/")
    return {key: tree[stage][block] for key, tree in variables.items() if stage in tree}


def _replaced(variables: Variables, name: str, block: Variables) -> Variables:
    """The variables with other subtrees for a block."""
    stage, key = name.split("/")
    own = {
        collection: {
            **variables[collection],
            stage: {**variables[collection][stage], key: tree},
        }
        for collection, tree in block.items()
    }
    return {**variables, **own}


def _shapes(block: Variables) -> dict[str, tuple[int, ...]]:
    return {
        path: leaf.shape
        for path, leaf in traverse_util.flatten_dict(block, sep="/").items()
    }


def _convs(params: dict[str, Any]) -> list[str]:
    """The names of a branch's convolutions, in order."""
    return _in_order("conv", params) + ["conv_out"] * ("conv_out" in params)


def _kernel_shapes(params: dict[str, Any]) -> list[tuple[int, ...]]:
    return [params[conv]["kernel"].shape for conv in _convs(params)]


def _without_branch(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a residual block whose branch puts out zeros."""
    if "conv_out" in params:
        closing = ["conv_out"]
    elif "scale" in params["norm_out"]:
        closing = ["norm_out"]
    else:
        closing = [_convs(params)[-1], "norm_out"]
    return {
        **params,
        **{name: jax.tree.map(jnp.zeros_like, params[name]) for name in closing},
    }


def _check_plain(variables: Variables, name: str) -> None:
    """Raises where no variables make the block of a plain net the identity."""
    if "norm" in variables["params"]:
        raise UsageError(
            f"block: {name!r} of a plain pre-activation net cannot be deleted: its ReLUs "
            "have negative inputs and nothing goes round them"
        )
    shapes = _kernel_shapes(_block(variables, name)["params"])
    if any(inputs != outputs for *_, inputs, outputs in shapes):
        raise UsageError(
            f"block: {name!r} of a plain net cannot be deleted: it changes the number of "
            "channels and has no shortcut"
        )


def _identity(block: Variables) -> Variables:
    """Variables of a plain block that keeps what comes out of a ReLU."""
    leaves = traverse_util.flatten_dict(block)
    for path, leaf in leaves.items():
        if path[-1] == "kernel":
            k, _, channels, _ = leaf.shape
            leaves[path] = jnp.zeros_like(leaf).at[k // 2, k // 2].set(jnp.eye(channels))
        else:
            leaves[path] = jnp.full_like(leaf, _IDENTITY[path[-1]])
    return traverse_util.unflatten_dict(leaves)
