"""Writes checkpoints: orbax does it in the background, whole or not at all.

The files are ours (`checkpoint.py`), since an array costs orbax a millisecond of processor
time, and a small net has hundreds: with a checkpoint after every epoch, a run on the digits
took a third longer, and now takes a hundredth (benchmarks/checkpoints.py).
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

import resjax
from resjax import checkpoint, hosts
from resjax.loss_scale import all_finite


class _FilesHandler(ocp.AsyncCheckpointHandler):
    """Writes files that a function makes, both in the background."""

    async def async_save(self, directory: epath.Path, args: "_Files") -> list[Any]:
        async def write() -> None:
            if hosts.is_main():
                for name, content in args.make().items():
                    with (directory / name).open("wb") as file:
                        file.write(content)
                        if "://" not in str(directory):  # the machine may be lost, too
                            file.flush()
                            os.fsync(file.fileno())

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="files")]

    def save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # orbax calls async_save

    def restore(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # checkpoint.py does


@ocp.args.register_with_handler(_FilesHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _Files(ocp.args.CheckpointArgs):
    make: Callable[[], dict[str, bytes]]


class _Preserve(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps that a function chooses among those there are."""

    def __init__(self, choose: Callable[[Sequence[int]], set[int]]):
        self.choose = choose

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        chosen = self.choose(steps)
        return [step in chosen for step in steps]


def _step_back() -> None:
    """Leaves the cores to what computes on them; on Linux for this thread and its own."""
    if sys.platform == "linux":
        os.nice(10)


class Writer:
    """Writes checkpoints one after another, beside the training.

    Attributes:
      latest_step: of the last that was begun, None if there is none.
    """

    def __init__(self, manager: ocp.CheckpointManager):
        self.latest_step = manager.latest_step()
        self._manager = manager
        # What orbax does before it goes to the background takes as long as what it does
        # there. Several processes meet in it, which is safe in their main threads alone.
        is_alone = jax.process_count() == 1
        self._thread = ThreadPoolExecutor(1, initializer=_step_back) if is_alone else None
        self._begun: Future | None = None

    def save(self, step: int, make: Callable[[], dict[str, bytes]]) -> None:
        """Begins the checkpoint of a step; raises what went wrong with the one before."""
        self.wait_until_finished()
        args = ocp.args.Composite(state=_Files(make))
        begin = functools.partial(self._manager.save, step, args=args, force=True)
        self.latest_step = step
        if self._thread:
            self._begun = self._thread.submit(begin)
        else:
            begin()

    def wait_until_finished(self) -> None:
        """Returns when all is written; raises what went wrong."""
        begun, self._begun = self._begun, None
        if begun:
            begun.result()
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        try:
            self.wait_until_finished()
        finally:
            self._manager.close()
            if self._thread:
                self._thread.shutdown()


@contextlib.contextmanager
def open_writer(
    workdir: epath.Path, keep: Callable[[Sequence[int]], set[int]]
) -> Iterator[Writer]:
    """What `save` writes with; on leaving, waits until all is written.

    After an error in one of several processes it does not: the others may be gone.

    Args:
      workdir: of the run; `checkpoints/` is made in it.
      keep: steps there are, the newest last -> those to keep; the others are deleted
        after the newest is written.
    """
    _versions()  # which takes a moment
    log = logging.getLogger("absl")  # where orbax also puts the errors that it raises
    level = log.level
    log.setLevel(logging.CRITICAL)
    manager = ocp.CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=_Preserve(keep), cleanup_tmp_directories=True
        ),
    )
    writer = Writer(manager)
    try:
        yield writer
        writer.close()
    except BaseException:
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):  # it may be the error itself
                writer.close()
        raise
    finally:
        log.setLevel(level)


def save(
    writer: Writer,
    step: int,
    variables: Any,
    optimizer: Any,
    record: dict[str, Any],
) -> None:
    """Writes a checkpoint in the background; the arrays may be reused when this returns.

    Args:
      writer: from `open_writer`.
      step: updates finished.
      variables: {"params", "batch_stats"}, replicated.
      optimizer: tree of the rest, replicated.
      record: JSON of what they are.

    Raises:
      FloatingPointError: a variable that is not finite; nothing is written.
    """
    check_finite(variables, step)
    arrays = {
        "variables": checkpoint.to_arrays(variables),
        "optimizer": checkpoint.to_arrays(optimizer),
    }
    record = {"step": step, "versions": _versions(), **record}
    writer.save(step, lambda: checkpoint.to_files(record, arrays))


def check_finite(variables: Any, step: int) -> None:
    """Raises `FloatingPointError` if not all variables are finite."""
    if not jax.jit(all_finite)(variables):
        raise FloatingPointError(f"the parameters are not finite after step {step}")


@functools.cache
def _versions() -> dict[str, str]:
    """Those of what computes, and the commit if the code is in a git repository."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions |= {"python": platform.python_version(), "resjax": resjax.__version__}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        here = Path(__file__).resolve()

        def git(*words: str) -> str:
            words = "git", "-C", str(here.parent), *words
            done = subprocess.run(words, capture_output=True, timeout=2, check=True)
            return done.stdout.decode().strip()

        git("ls-files", "--error-unmatch", here.name)  # not a repository around this code
        describe = "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"
        versions["commit"] = git(*describe)
    return versions
