"""Checkpoints of a run: orbax directories `checkpoints/<step>/` in the workdir.

Each holds `variables` (params and batch_stats), `optimizer` (step and buffers) and
`record` (JSON: the resolved config and what else opens it without the training code's
data), so that a reader of the variables needs to know nothing of the optimizer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from resjax.config import UsageError
from resjax.steps import TrainState


@contextlib.contextmanager
def open_checkpoints(
    workdir: epath.Path, keep: int | None = None
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a workdir; on leaving, waits until all are written.

    Args:
      workdir: of the run; `checkpoints/` is made in it at the first save.
      keep: how many of the latest are kept; None = all.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
    with ocp.CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=options,
        item_names=("variables", "optimizer", "record"),
    ) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, state: TrainState, record: dict[str, Any]) -> None:
    """Writes `state` in the background; its memory may be reused when this returns.

    Raises:
      FloatingPointError: the state holds a value that is not finite; nothing is written.
    """
    step = int(state.step)
    if not all_finite(state.variables):
        raise FloatingPointError(f"the parameters are not finite after step {step}")
    optimizer = {"step": state.step, "opt_state": state.opt_state}
    manager.save(
        step,
        args=ocp.args.Composite(
            variables=ocp.args.StandardSave(state.variables),
            optimizer=ocp.args.StandardSave(optimizer),
            record=ocp.args.JsonSave(record),
        ),
    )


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """[] bool: no array of the tree holds an infinity or a NaN."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def pick_step(manager: ocp.CheckpointManager, step: int | None) -> int:
    """`step`, or the latest if None.

    Raises:
      UsageError: there is no such checkpoint; it lists what is there.
    """
    steps = sorted(manager.all_steps())
    if not steps:
        raise UsageError(f"there is no checkpoint in {manager.directory}")
    if step is not None and step not in steps:
        raise UsageError(
            f"there is no checkpoint of step {step} in {manager.directory}; "
            f"there are {steps}"
        )
    return steps[-1] if step is None else step


def restore_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The JSON record of a checkpoint."""
    args = ocp.args.Composite(record=ocp.args.JsonRestore())
    return manager.restore(step, args=args)["record"]


def restore_variables(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The variables of a checkpoint, as arrays of the shapes and shardings of `like`."""
    args = ocp.args.Composite(variables=ocp.args.StandardRestore(like))
    return manager.restore(step, args=args)["variables"]


def restore_state(
    manager: ocp.CheckpointManager, step: int, like: TrainState
) -> TrainState:
    """The whole state of a checkpoint, as arrays of the shapes and shardings of `like`."""
    optimizer = {"step": like.step, "opt_state": like.opt_state}
    args = ocp.args.Composite(
        variables=ocp.args.StandardRestore(like.variables),
        optimizer=ocp.args.StandardRestore(optimizer),
    )
    items = manager.restore(step, args=args)
    return TrainState(**items["variables"], **items["optimizer"])


def abstract(tree: Any, sharding: Sharding) -> Any:
    """Shapes, dtypes and one sharding for all arrays of a tree, to restore like."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
