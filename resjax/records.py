"""What a run writes down: `metrics.jsonl`, TensorBoard events, `curves.png`.

With several processes all of them call these functions, and the main one writes.
"""

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import IO, Any

from etils import epath

from resjax import config as configs
from resjax import hosts
from resjax.config import Config, UsageError

Record = dict[str, Any]


def say(text: str) -> None:
    """Prints a line to standard output, above a progress bar if there is one."""
    if not hosts.is_main():
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def warn(text: str) -> None:
    """Prints a line to standard error, above a progress bar if there is one."""
    if hosts.is_main():
        from tqdm import tqdm

        tqdm.write(f"warning: {text}", file=sys.stderr)
        sys.stderr.flush()


def warn_of_damage(damaged: Mapping[int, Exception], used_step: int) -> None:
    """Says which newer checkpoints are damaged, and of which step the one used is."""
    for error in damaged.values():
        warn(f"{error}; the one of step {used_step} is used")


def write_json(path: epath.Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    if not hosts.is_main():
        return
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.replace(path)


def read_config(workdir: epath.Path) -> Config:
    """The config of `config.json`; raises `UsageError` if it is none of this version."""
    path = workdir / "config.json"
    try:
        return configs.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:  # also a UsageError: a field of another version
        raise UsageError(f"{path} is no config of this version: {error}") from error


def read_metrics(workdir: epath.Path) -> list[Record]:
    """The records of `metrics.jsonl`, without a last line that was cut off.

    Raises:
      UsageError: a damaged line.
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    for i, row in enumerate(rows):
        known = isinstance(row, dict) and type(row.get("step")) is int and "split" in row
        if not known:
            raise UsageError(f"{path} is damaged: line {i + 1} is no record of a step")
    return rows


def read_evaluations(
    workdir: epath.Path, last_step: float = math.inf, split: str = "test"
) -> list[Record]:
    """The records of the test split up to a step; of averaged weights with "test_ema"."""
    rows = [row for row in read_metrics(workdir) if row["split"] == split]
    return [row for row in rows if row["step"] <= last_step]


def best_step(
    evaluations: Sequence[Record], metric: str, steps: Collection[int]
) -> int | None:
    """The step, of `steps`, that evaluated best, the first of equals; None if none was.

    Args:
      evaluations: records of the test split.
      metric: "top1", "top5", "loss", or "none", of which none is best.
      steps: that have a checkpoint.
    """
    rows = [row for row in evaluations if row["step"] in steps]
    rows = [row for row in rows if row.get(metric) is not None]  # as a diverged loss is
    if metric == "loss":
        return min(rows, key=lambda row: row["loss"])["step"] if rows else None
    return max(rows, key=lambda row: row[metric])["step"] if rows else None


@contextlib.contextmanager
def lock(workdir: epath.Path) -> Iterator[None]:
    """Holds a workdir; the system lets go of it when the process ends, however it does.

    A file system that cannot lock, such as an object store, does not hold it.

    Raises:
      UsageError: another run holds it; by each process of this one.
    """
    with _locked(workdir) as file:
        if file:
            holder = f"process {os.getpid()} on {socket.gethostname()}\n"
            with contextlib.suppress(OSError):  # of a full disk
                file.truncate(0)
                os.write(file.fileno(), holder.encode())
        yield


def check_unlocked(workdir: epath.Path) -> None:
    """Raises `UsageError` if another run holds a workdir; leaves everything as it is."""
    with _locked(workdir, create=False):
        pass


@contextlib.contextmanager
def _locked(workdir: epath.Path, create: bool = True) -> Iterator[IO | None]:
    path, file, holder = workdir / ".lock", None, None
    if hosts.is_main() and "://" not in str(workdir) and (create or path.exists()):
        import fcntl  # which Windows does not have

        try:
            file = open(path, "a+" if create else "r")  # noqa: SIM115, closed below
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert file
            file.seek(0)
            holder = file.read().strip() or "another process"
        except OSError as error:
            if create and not file:
                raise UsageError(f"--workdir: {path} cannot be opened: {error}") from error
            if create:
                warn(f"{workdir} cannot be locked ({error}); start no second run in it")
    with file or contextlib.nullcontext():
        if hosts.is_same(holder is not None) and holder is None:
            yield file
            return
    raise UsageError(
        f"--workdir: {workdir} is in use by {holder or 'another run'}; stop that, or "
        "choose another --workdir"
    )


@contextlib.contextmanager
def open_metrics(
    workdir: epath.Path, start_step: int
) -> Iterator[Callable[[Record], None]]:
    """Gives a function that appends a record to `metrics.jsonl` and to TensorBoard.

    Records after `start_step`, left by an interrupted run that will write them again,
    are removed.
    """
    # Not SummaryWriter, whose thread dies on a full disk, and the run with it, silently.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    if not hosts.is_main():
        yield lambda record: None
        return
    path = workdir / "metrics.jsonl"
    kept = [record for record in read_metrics(workdir) if record["step"] <= start_step]
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
    draft.replace(path)
    events = EventsWriter(str(workdir / "events"))
    start = SessionLog(status=SessionLog.START)  # TensorBoard drops what came after
    events.write_event(Event(step=start_step + 1, session_log=start, wall_time=time.time()))

    def write(record: Record) -> None:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            if "://" not in str(path):  # the machine may be lost, too
                file.flush()
                os.fsync(file.fileno())
        values = [
            Summary.Value(tag=f"{record['split']}/{name}", simple_value=value)
            for name, value in record.items()
            if name not in ("step", "split")
        ]
        event = Event(step=record["step"], summary=Summary(value=values))
        event.wall_time = time.time()
        events.write_event(event)
        events.flush()

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which `write` has told
            events.close()


def plot_curves(workdir: epath.Path, title: str) -> None:
    """Draws `curves.png` from `metrics.jsonl`: loss, top-1 error and learning rate."""
    from matplotlib.figure import Figure

    if not hosts.is_main():
        return
    records = read_metrics(workdir)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3)
    for split, marker in (("train", ""), ("test", "."), ("test_ema", ".")):
        rows = [record for record in records if record["split"] == split]
        if split == "test_ema" and not rows:  # a run without averages
            continue
        epochs = [row["epoch"] for row in rows]
        losses, errors = [row["loss"] for row in rows], [100 - row["top1"] for row in rows]
        panels[0].plot(epochs, losses, label=split, marker=marker)
        panels[1].plot(epochs, errors, label=split, marker=marker)
    train = [record for record in records if record["split"] == "train"]
    panels[2].plot([row["epoch"] for row in train], [row["lr"] for row in train], c="k")
    panels[0].set(ylabel="loss (nats)", yscale="log")
    panels[1].set(ylabel="top-1 error (%)", yscale="symlog", ylim=(0, 100))
    panels[1].set_yticks([0, 1, 2, 5, 10, 20, 50, 100], [0, 1, 2, 5, 10, 20, 50, 100])
    panels[2].set(ylabel="learning rate")
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    panels[0].legend()
    panels[1].legend()
    with (workdir / "curves.png").open("wb") as file:
        figure.savefig(file, dpi=120)
