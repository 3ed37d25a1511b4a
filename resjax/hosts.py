"""Several processes, one a host, as one run: how they meet and part.

Every process runs the same program on its own devices and its own slice of each batch.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from resjax.config import EXPECTED_ERRORS, RunError, UsageError, report_error

_LOST_AFTER_SECONDS = 60  # without a sign of life


def run_together(
    run: Callable[[], int],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> int:
    """Joins the processes of a run, if there are several, and returns the code of `run()`.

    A process that fails, or that loses another, says so in one line and ends at once: the
    orderly end of JAX would wait for the others, and they for it.

    Args:
      run: the program; it must be the first to use a device.
      coordinator_address: host:port of process 0. With the other two: start so. Without
        all three: from the environment (SLURM, Open MPI, TPU pods, GKE, or
        JAX_COORDINATOR_ADDRESS), and alone if that names no other process.
      num_processes: of the run.
      process_id: of this process, from 0.

    Raises:
      UsageError: only some of the three, values that do not fit, or nobody answers.
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UsageError(f"{', '.join(missing)}: missing; several hosts need all three")
    several = not missing or _is_one_of_several()
    if not several and not _is_tpu_machine():
        return run()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=_slurm_devices(),
            heartbeat_timeout_seconds=_LOST_AFTER_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if not several:  # a TPU machine that knows of no other
            return run()
        shown = ", ".join(f"--{name}={value}" for name, value in given.items())
        raise UsageError(f"{shown}: cannot start: {error}") from error
    if jax.process_count() == 1:
        return run()
    try:
        _check_devices()
        code = run()
    except EXPECTED_ERRORS as error:
        code = report_error(error)
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())[:200]
        line = (
            f"process {jax.process_index()} lost another of the run, or failed ({text}); "
            "start all of them again to go on from the last checkpoint"
        )
        code = report_error(RunError(line))
    except Exception:
        traceback.print_exc()
        code = 1
    if 0 < code < 128:  # not done, and not stopped by a signal after saving together
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_one_of_several() -> bool:
    """Whether the environment speaks of other processes."""
    env = os.environ
    counts = (env.get("SLURM_STEP_NUM_TASKS", "1"), env.get("OMPI_COMM_WORLD_SIZE", "1"))
    named = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
    return (
        any(int(count) > 1 for count in counts)
        or any(name in env for name in named)
        or "," in env.get("TPU_WORKER_HOSTNAMES", "")
        or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(env)
    )


def _is_tpu_machine() -> bool:
    """Whether there are TPUs, whose metadata then tell jax of other processes."""
    return any(Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))


def _slurm_devices() -> list[int] | None:
    """All GPUs of the node for the only task on it; JAX would take one a task."""
    env = os.environ
    alone = env.get("SLURM_STEP_NUM_TASKS") == env.get("SLURM_STEP_NUM_NODES")
    gpus = env.get("SLURM_GPUS_ON_NODE")
    return list(range(int(gpus))) if alone and gpus else None


def _check_devices() -> None:
    local, count = jax.local_device_count(), jax.process_count()
    if local * count != jax.device_count():
        raise UsageError(
            f"process {jax.process_index()} has {local} of {jax.device_count()} devices; "
            f"all {count} processes must have as many"
        )


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return jax.process_index() == 0


def is_same(number: int) -> bool:
    """Whether all processes, each of which must call this, hold the same number."""
    if jax.process_count() == 1:
        return True
    mine = np.int32(number % 2**31)
    return bool((np.asarray(multihost_utils.process_allgather(mine)) == mine).all())
