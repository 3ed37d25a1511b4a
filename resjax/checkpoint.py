"""Checkpoints of a run: orbax directories `checkpoints/<step>/` in the workdir.

Each holds `variables` (params and batch_stats), `optimizer` (step and buffers) and
`record` (JSON: the resolved config, what was derived from it, class names). Who wants the
variables needs to know nothing of the optimizer or the data.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding

from resjax.config import UsageError
from resjax.loss_scale import all_finite


@contextlib.contextmanager
def open_checkpoints(
    workdir: epath.Path, keep: int | None = None
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints of a workdir; on leaving, waits until all are written.

    After an error in one of several processes it does not: the others may be gone.

    Args:
      workdir: of the run; `checkpoints/` is made in it at the first save.
      keep: how many of the latest are kept; None = opened only to read.
    """
    writes = keep is not None
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=writes, cleanup_tmp_directories=writes
    )
    manager = ocp.CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=options,
        item_names=("variables", "optimizer", "record"),
    )
    try:
        yield manager
    except BaseException:
        if jax.process_count() == 1:
            manager.close()
        raise
    manager.close()


def save(
    manager: ocp.CheckpointManager,
    step: int,
    variables: Any,
    optimizer: Any,
    record: dict[str, Any],
) -> None:
    """Writes a checkpoint in the background; the arrays may be reused when this returns.

    Raises:
      FloatingPointError: a variable that is not finite; nothing is written.
    """
    if not jax.jit(all_finite)(variables):
        raise FloatingPointError(f"the parameters are not finite after step {step}")
    manager.save(
        step,
        args=ocp.args.Composite(
            variables=ocp.args.StandardSave(variables),
            optimizer=ocp.args.StandardSave(optimizer),
            record=ocp.args.JsonSave(record),
        ),
    )


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
    """The JSON record of a checkpoint; raises `UsageError` if it cannot be read."""
    return _restore(manager, step, record=ocp.args.JsonRestore())["record"]


def restore_arrays(manager: ocp.CheckpointManager, step: int, **like: Any) -> Any:
    """The items of a checkpoint that `like` names, `variables` or `optimizer`.

    Args:
      manager: from `open_checkpoints`.
      step: of the checkpoint.
      **like: for each item, its tree with the shapes, dtypes and shardings wanted.

    Returns:
      {name: tree of arrays}.

    Raises:
      UsageError: the checkpoint cannot be read, or does not fit `like`.
    """
    args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    return _restore(manager, step, **args)


def _restore(manager: ocp.CheckpointManager, step: int, **args: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # of many kinds: missing, cut off or foreign files
        others = sorted(set(manager.all_steps()) - {step})
        text = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the checkpoint of step {step} in {manager.directory} cannot be read "
            f"({type(error).__name__}: {text}); other steps there: {others}"
        ) from error


def abstract(tree: Any, sharding: Sharding) -> Any:
    """Shapes, dtypes and one sharding for all arrays of a tree, to restore like."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
