"""The folder of a run, before the run goes on there: whose it is, and what it holds."""

import contextlib
import dataclasses
import json
import zlib

import jax
from etils import epath

from resjax import checkpoint, hosts, records
from resjax import config as configs
from resjax.checkpoint import Checkpoint
from resjax.config import Config, UsageError


def check_agreement(config: Config, workdir: epath.Path) -> None:
    """Raises `UsageError` if the processes of a run are not about to do the same."""
    flat = configs.flatten(config)
    own = ("data.dir", "data.num_workers", "data.num_threads", "data.prefetch")
    shared = json.dumps({name: flat[name] for name in flat if name not in own})
    if not hosts.is_same(zlib.crc32(shared.encode())):
        raise UsageError("--config: the processes of the run have different configs")
    if not hosts.is_same((workdir / "checkpoints").is_dir()):
        raise other_workdir(workdir)


def check_workdir(
    workdir: epath.Path, config: Config
) -> tuple[Checkpoint | None, dict[int, checkpoint.DamagedError]]:
    """What `checkpoint.read_latest` finds in a workdir, once it is known to be this run's.

    Raises:
      UsageError: the workdir holds a run of another config, or records of something else,
        or is in use.
    """
    folder = workdir / "checkpoints"
    there = next((p for p in (folder, *folder.parents) if p.exists()), folder.parent)
    if "://" not in str(workdir) and not there.is_dir():
        raise UsageError(f"--workdir: {workdir} cannot be written: {there} is no directory")
    records.check_unlocked(workdir)
    if (workdir / "config.json").exists():
        _check_same(workdir, records.read_config(workdir), config)
    elif (workdir / "metrics.jsonl").exists():
        raise UsageError(
            f"--workdir: {workdir} holds metrics.jsonl of something else, no config.json"
        )
    records.read_metrics(workdir)  # a damaged file is found before anything is done
    latest, damaged = checkpoint.read_latest(workdir)
    if latest:
        _check_same(workdir, configs.from_dict(latest.record["config"]), config)
    return latest, damaged


def is_finished(workdir: epath.Path, latest: Checkpoint) -> bool:
    """Whether a run has made all its steps, and evaluated the last."""
    evaluated = {row["step"] for row in records.read_evaluations(workdir, latest.step)}
    is_last = latest.step == latest.record["derived"]["num_steps"]
    return is_last and (latest.step in evaluated or latest.step == 0)


def make_workdir(workdir: epath.Path) -> None:
    """Makes the folder of a run; raises `UsageError` if it cannot be written."""
    probe = workdir / f".writable{jax.process_index()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))  # a full disk has room for the name alone
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise UsageError(f"--workdir: {workdir} cannot be written: {error}") from error


def put_aside(workdir: epath.Path, damaged: dict[int, checkpoint.DamagedError]) -> None:
    """Renames damaged checkpoints, so that new ones can take their places, and says so."""
    for step, error in damaged.items():
        path = checkpoint.directory(workdir, step)
        aside = path.with_name(f"{step}.damaged")
        try:
            if hosts.is_main():
                if aside.is_dir():
                    aside.rmtree()
                path.rename(aside)
        except OSError as failure:
            raise UsageError(f"{error}; it cannot be renamed: {failure}") from failure
        records.warn(f"{error}; it is now {aside.name}, and the one before is used")
    hosts.is_same(0)  # waits for all


def write_config(workdir: epath.Path, config: Config) -> None:
    """Writes `config.json`; raises `UsageError` if that cannot be done."""
    try:
        records.write_json(workdir / "config.json", dataclasses.asdict(config))
    except OSError as error:
        raise UsageError(f"--workdir: {workdir} cannot be written: {error}") from error


def check_shared(workdir: epath.Path) -> None:
    """Raises `UsageError` if a process does not see what the main one has written."""
    hosts.is_same(0)  # waits for all
    if not (workdir / "config.json").exists():
        raise other_workdir(workdir)


def _check_same(workdir: epath.Path, stored: Config, config: Config) -> None:
    different = configs.differences(stored, config)
    if different:
        raise UsageError(
            f"{workdir} holds a run of another config: {'; '.join(different)}; "
            f"put it back, or choose another --workdir (--config.init_from={workdir} "
            "starts there from these weights)"
        )


def other_workdir(workdir: epath.Path) -> UsageError:
    """The error of a process that looks into another folder than the others."""
    return UsageError(
        f"--workdir: {workdir} of process {jax.process_index()} is not that of the others; "
        "all must see one folder"
    )
