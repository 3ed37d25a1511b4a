"""Several processes, one a host or one a GPU, as one run: how they meet and part.

Every process runs the same program on its own devices and its own slice of each batch.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; orbax uses it too
from jax.experimental import multihost_utils

from resjax.config import EXPECTED_ERRORS, RunError, UsageError, report_error
from resjax.signals import leave

_MEET_SECONDS = 300  # to wait for the others at the start
_LOST_SECONDS = 45  # without a sign of life; jax gives up after 100, with many more words
_CLUSTERS = {  # a variable -> whether its value speaks of other processes
    "SLURM_STEP_NUM_TASKS": lambda count: int(count) > 1,
    "OMPI_COMM_WORLD_SIZE": lambda count: int(count) > 1,
    "TPU_WORKER_HOSTNAMES": lambda names: "," in names,
    "MEGASCALE_COORDINATOR_ADDRESS": bool,
    "JAX_COORDINATOR_ADDRESS": bool,
    "JOB_COMPLETION_INDEX": lambda index: "KUBERNETES_SERVICE_HOST" in os.environ,
}


def run_together(
    run: Callable[[], int],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Joins the processes of a run, if there are several, and returns the code of `run()`.

    A process that fails, or that finds another lost, says so in one line and ends at once:
    the orderly end of JAX would wait for the others, and they for it.

    Args:
      run: the program; it must be the first to use a device.
      coordinator_address: host:port of process 0. With the other two: start so. Without
        all three: from the environment (`_CLUSTERS`, TPU machines), alone if it names no
        other process.
      num_processes: of the run.
      process_id: of this process, from 0.

    Raises:
      UsageError: only some of the three, values that do not fit, or no process 0.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    _check_place(given)
    missing = coordinator_address is None
    shown = ", ".join(f"--{name}={value}" for name, value in given.items())
    if missing:
        set_here = {name: os.environ[name] for name in _CLUSTERS if name in os.environ}
        found = [name for name, value in set_here.items() if _CLUSTERS[name](value)]
        if not found and not _is_tpu_machine():
            return _run_alone(run)
        shown = f"{' and '.join(found) or 'a TPU'}, which would be of several processes"
    try:
        if process_id and coordinator_address:
            _wait_for(coordinator_address)
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=_slurm_devices(),
            initialization_timeout=_MEET_SECONDS,
        )
    except (ValueError, RuntimeError, OSError) as error:
        if missing and not found and "coordinator_address" in str(error):
            return _run_alone(run)  # a TPU machine that knows of no other
        hint = "" if not missing else "; the three flags of --help say it directly"
        raise UsageError(f"{shown}: cannot start: {error}{hint}") from error
    if jax.process_count() == 1:
        return _run_alone(run)
    done = threading.Event()
    threading.Thread(target=_watch, args=(done,), daemon=True).start()
    try:
        _check_devices()
        code = run()
    except EXPECTED_ERRORS as error:
        code = report_error(error)
    except jax.errors.JaxRuntimeError as error:
        _fail(" ".join(str(error).split())[:200])
    except Exception:
        traceback.print_exc()
        code = 1
    done.set()
    if 0 < code < 128:  # not done, and not stopped by a signal after saving together
        leave(code)
    return code


def _check_place(given: dict[str, Any]) -> None:
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if missing:
        raise UsageError(f"{', '.join(missing)}: missing; several hosts need all three")
    address, num_processes, process_id = given.values()
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--coordinator_address: {address!r} is not HOST:PORT")
    if num_processes < 1:
        raise UsageError(f"--num_processes: {num_processes} is not 1 or more")
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"--process_id: {process_id} is not from 0 to {num_processes - 1}, of "
            f"--num_processes={num_processes}"
        )


def _run_alone(run: Callable[[], int]) -> int:
    """`run()`; after a signal the process ends, whatever still computes or reads."""
    code = run()
    if code > 128:
        leave(code)
    return code


def _wait_for(address: str) -> None:
    """Returns when process 0 listens; jax would end this process where nobody does."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _MEET_SECONDS
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=10):
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _is_tpu_machine() -> bool:
    """Whether there are TPUs, whose metadata then tell jax of other processes."""
    return any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))


def _slurm_devices() -> list[int] | None:
    """All GPUs of the node for the only task on it; JAX would take one a task."""
    env = os.environ
    tasks, gpus = env.get("SLURM_STEP_NUM_TASKS"), env.get("SLURM_GPUS_ON_NODE")
    others = {"OMPI_COMM_WORLD_SIZE", "JAX_LOCAL_DEVICE_IDS"} & set(env)  # have their say
    if others or not tasks or not gpus or tasks != env.get("SLURM_STEP_NUM_NODES"):
        return None
    return list(range(int(gpus)))


def _check_devices() -> None:
    local, count = jax.local_device_count(), jax.process_count()
    if local * count != jax.device_count():
        raise UsageError(
            f"process {jax.process_index()} has {local} of {jax.device_count()} devices; "
            f"all {count} processes must have as many"
        )


def _watch(done: threading.Event) -> None:
    """Gives signs of life, and ends this process if those of another stay away.

    A collective that waits for a lost process waits for ever on most platforms.
    """
    client: Any = distributed.global_state.client
    key = f"resjax/alive/{jax.process_index()}"
    seen: dict[str, tuple[str, float]] = {}  # of each process its last sign, and when
    for count in range(sys.maxsize):
        if done.is_set():  # the others may take longer
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(key, "done", allow_overwrite=True)
            return
        alarm = threading.Timer(_LOST_SECONDS, _fail, ["process 0 does not answer"])
        alarm.daemon = True
        alarm.start()
        try:
            client.key_value_set(key, str(count), allow_overwrite=True)
            signs = dict(client.key_value_dir_get("resjax/alive/"))
        except jax.errors.JaxRuntimeError:
            time.sleep(1)  # what the run itself says of it tells more
            _fail("process 0 cannot be reached")
        alarm.cancel()
        now = time.monotonic()
        for name, sign in signs.items():
            last, since = seen.get(name, ("", now))
            seen[name] = (sign, since if sign == last else now)
            if sign != "done" and now - seen[name][1] > _LOST_SECONDS:
                _fail(f"no sign of process {name.rpartition('/')[2]}")
        done.wait(5)


def _fail(text: str) -> NoReturn:
    """Says in one line that the run has lost a process, and ends this one."""
    if "RESOURCE_EXHAUSTED" in text:
        line = f"out of memory ({text}); a smaller --config.microbatch needs less"
    else:
        line = (
            f"lost another process of the run, or failed ({text}); see what the others "
            "say, and start all of them again to go on from the last checkpoint"
        )
    leave(report_error(RunError(f"process {jax.process_index()} {line}")))


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def is_same(number: int) -> bool:
    """Whether all processes, each of which must call this, hold the same number."""
    if jax.process_count() == 1:
        return True
    mine = np.int32(number % 2**31)
    return bool((np.asarray(multihost_utils.process_allgather(mine)) == mine).all())


def is_preempted(step: int) -> bool:
    """Whether the cloud has told one of several processes that it will end it.

    All must ask after each step, and hear of it after the same one. (SIGTERM is noticed by
    `signals.py`.)
    """
    if distributed.global_state.preemption_sync_manager is None:
        return False
    return multihost_utils.reached_preemption_sync_point(step)
