"""Checkpoints of a run: what `checkpoints/<step>/state/` in the workdir holds.

`variables.safetensors` has params and batch_stats, `optimizer.safetensors` the step, the
buffers and, under `ema/`, averages of the variables, and `record.json` says what they are:
config, model, class names, preprocessing, versions, and of each array shape, type and CRC,
which is verified when it is read. Each process reads by itself, on any devices.
`checkpoint_writer.py` writes them.
"""

import dataclasses
import difflib
import json
import os
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from resjax.config import UsageError

# Later ones keep how record.json holds its format and digest.
FORMAT = 2  # 1: arrays as orbax writes them, whose flipped bytes nobody notices
ITEMS = ("variables", "optimizer")
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

Arrays = dict[str, np.ndarray]  # by path, such as params/stem/conv/kernel


class DamagedError(UsageError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step.

    Attributes:
      path: of its folder.
      step: updates finished.
      record: what `record.json` says.
      arrays: {"variables", "optimizer"}, or those that were asked for.
    """

    path: epath.Path
    step: int
    record: dict[str, Any]
    arrays: dict[str, Arrays]


# --- trees and arrays ---------------------------------------------------------------


def to_arrays(tree: Any) -> Arrays:
    """Copies of the arrays of a replicated tree, on the host, by their paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)

    def local(leaf: Any) -> Any:  # of an array of several processes, the copy of this one
        return leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf

    # On a CPU, what is fetched may be a view of what the next update overwrites.
    fetched = jax.device_get([local(leaf) for _, leaf in leaves])
    pairs = zip(leaves, fetched, strict=True)
    return {_name(path): np.array(array, order="C") for (path, _), array in pairs}


def to_tree(arrays: Arrays, like: Any, origin: Any) -> Any:
    """The tree of `arrays` that has the structure, shapes and types of `like`.

    Args:
      arrays: by path.
      like: tree of arrays, or of their shapes.
      origin: where the arrays are from, for the error.

    Raises:
      UsageError: the arrays are others; it names one.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    wanted = {_name(path): leaf for path, leaf in leaves}
    if set(arrays) != set(wanted):
        (name, *_) = odd = sorted(set(arrays) ^ set(wanted))
        said = "missing" if name in wanted else "unknown"
        raise UsageError(f"{origin}: {name} is {said}, the first of {len(odd)} arrays")
    for name, leaf in wanted.items():
        if (arrays[name].shape, arrays[name].dtype) != (leaf.shape, leaf.dtype):
            raise UsageError(
                f"{origin}: {name} is {arrays[name].dtype} {list(arrays[name].shape)}, not "
                f"{leaf.dtype} {list(leaf.shape)}"
            )
    return jax.tree.unflatten(structure, [arrays[name] for name in wanted])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --- files --------------------------------------------------------------------------


def to_files(record: dict[str, Any], arrays: dict[str, Arrays]) -> dict[str, bytes]:
    """The files of a checkpoint by their names; `record` gains what reading checks."""
    from safetensors import numpy as safetensors

    described = {item: _describe(arrays[item]) for item in ITEMS}
    record = {"format": FORMAT, **record, "arrays": described}
    record = {"digest": _digest(record), **record}
    files = {f"{item}.safetensors": safetensors.save(arrays[item]) for item in ITEMS}
    return files | {"record.json": (json.dumps(record, indent=1) + "\n").encode()}


def _describe(arrays: Arrays) -> dict[str, Any]:
    return {
        name: {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "crc32": zlib.crc32(np.ravel(array).view(np.uint8).data),
        }
        for name, array in sorted(arrays.items())
    }


def _digest(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def read_directory(path: epath.Path, items: Sequence[str] = ITEMS) -> Checkpoint:
    """Reads the checkpoint in a directory and verifies it.

    Args:
      path: `checkpoints/<step>`, or a copy of it.
      items: of `ITEMS`, those wanted.

    Raises:
      DamagedError: a file is missing, cut off or changed.
      UsageError: it is of a newer format, or cannot be read at the moment.
    """
    from safetensors import numpy as safetensors

    try:
        if (path / "record").is_dir():
            return _read_format_1(path, items)
        record = json.loads((path / "state" / "record.json").read_text())
        if _digest({k: v for k, v in record.items() if k != "digest"}) != record["digest"]:
            raise DamagedError(f"{path} is damaged: record.json does not match its digest")
        if record["format"] > FORMAT:
            raise UsageError(
                f"{path} is of format {record['format']}, and this version of resjax reads "
                f"formats up to {FORMAT}; a newer version opens it"
            )
        saved = {item: record["arrays"][item] for item in items}
        arrays = {
            item: safetensors.load((path / "state" / f"{item}.safetensors").read_bytes())
            for item in items
        }
        if path.name.isdecimal() and int(path.name) != record["step"]:
            raise DamagedError(f"{path} is damaged: it holds step {record['step']}")
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # of many kinds
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if isinstance(error, OSError) and not isinstance(error, _MISSING):
            raise UsageError(f"{path} cannot be read: {text}") from error
        raise DamagedError(f"{path} is damaged: {text}") from error
    for item in items:
        found = _describe(arrays[item])
        for name in sorted(set(found) | set(saved[item])):
            if found.get(name) != saved[item].get(name):
                raise DamagedError(f"{path} is damaged: {item}: {name} is not as saved")
    return Checkpoint(path, record["step"], record, arrays)


def _read_format_1(path: epath.Path, items: Sequence[str]) -> Checkpoint:
    import orbax.checkpoint as ocp

    record = json.loads((path / "record" / "metadata").read_text())
    arrays, reader = {}, ocp.PyTreeCheckpointHandler()
    for item in items:
        tree = reader.metadata(path / item).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        arrays[item] = to_arrays(reader.restore(path / item, args=args))
    return Checkpoint(path, int(path.name), {"format": 1, **record}, arrays)


# --- workdirs -----------------------------------------------------------------------


def to_path(path: str | os.PathLike, name: str = "--workdir") -> epath.Path:
    """A path as the user gives it; raises `UsageError`, with its name, if it is none."""
    try:
        return epath.Path(path).expanduser()
    except (KeyError, TypeError) as error:
        raise UsageError(f"{name}: {path!r} is no path that is known here") from error


def directory(workdir: epath.Path, step: int) -> epath.Path:
    """Where a workdir has the checkpoint of a step."""
    return workdir / "checkpoints" / str(step)


def list_steps(workdir: epath.Path) -> list[int]:
    """The steps of which a workdir has checkpoints, also damaged ones, in order."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if path.name.isdecimal()]
    if "://" in str(workdir):  # where orbax cannot rename what it has written
        paths = [path for path in paths if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in paths)


def read_latest(
    workdir: epath.Path, items: Sequence[str] = ITEMS
) -> tuple[Checkpoint | None, dict[int, DamagedError]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones, by step.

    There is none in a workdir without any checkpoint.

    Raises:
      UsageError: all are damaged.
    """
    damaged: dict[int, DamagedError] = {}
    for step in reversed(list_steps(workdir)):
        try:
            return read_directory(directory(workdir, step), items), damaged
        except DamagedError as error:
            if directory(workdir, step).exists():  # a run beside this may have deleted it
                damaged[step] = error
    if damaged:
        newest, *others = damaged.values()
        so_are = f"; so are those of {[*damaged][1:]}" if others else ""
        raise UsageError(f"{newest}{so_are}; there is no other, so start in a new workdir")
    return None, {}


def read(
    path: epath.Path, step: int | None = None, items: Sequence[str] = ITEMS
) -> tuple[Checkpoint, dict[int, DamagedError]]:
    """A checkpoint; and if it was to be the latest, what is wrong with newer ones, by step.

    Args:
      path: a workdir, or a checkpoint in one.
      step: None = the latest that is not damaged.
      items: of `ITEMS`, those wanted.

    Raises:
      UsageError: no such folder, run or checkpoint, with what is there; or it is damaged.
    """
    if step is None and is_checkpoint(path):
        return read_directory(path, items), {}
    check_is_run(path, step)
    steps = list_steps(path)
    if not steps:
        raise UsageError(f"there is no checkpoint in {path / 'checkpoints'}")
    if step is None:
        latest, damaged = read_latest(path, items)
        assert latest
        return latest, damaged
    if step not in steps:
        raise UsageError(
            f"there is no checkpoint of step {step} in {path}, only of {steps}"
        )
    try:
        return read_directory(directory(path, step), items), {}
    except DamagedError as error:
        others = [other for other in steps if other != step]
        raise DamagedError(f"{error}; other steps there: {others}") from error


def is_checkpoint(path: epath.Path) -> bool:
    """Whether it is one, and not a workdir."""
    return any((path / name).exists() for name in ("state/record.json", "record/metadata"))


def check_is_directory(workdir: epath.Path) -> None:
    """Raises `UsageError` if it is none, with those beside it whose names are near."""
    if workdir.is_dir():
        return
    beside = workdir.parent.iterdir() if workdir.parent.is_dir() else ()
    names = [p.name for p in beside if p.is_dir() and not p.name.startswith(".")]
    near = difflib.get_close_matches(workdir.name, names) or sorted(names)[:10]
    is_file = ", it is a file" if workdir.exists() else ""
    told = f"; beside it there are {near}" if near else ""
    raise UsageError(f"there is no directory {workdir}{is_file}{told}")


def check_is_run(workdir: epath.Path, step: int | str | None) -> None:
    """Raises `UsageError` if there is no run, with what is there."""
    if is_checkpoint(workdir):
        raise UsageError(
            f"step: {step!r}, but {workdir} is one checkpoint; give its workdir"
        )
    check_is_directory(workdir)
    if not (workdir / "checkpoints").is_dir():
        there = sorted(path.name for path in workdir.iterdir())[:10]
        run = f"; give {workdir.parent}" if workdir.name == "checkpoints" else ""
        raise UsageError(f"{workdir} has no checkpoints; it holds {there}{run}")
