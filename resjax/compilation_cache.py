"""Compiled programs on disk, so that a run of a config that ran before starts sooner.

jax has the cache; here it is given a folder, a rule of what is worth keeping, and a bound.
"""

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
from jax._src import compilation_cache as jax_cache  # what unpacks has no public name

from resjax import records
from resjax.data.workers import num_cores

_OLDEST_JAXLIB = (0, 10, 2)  # those before cry out at every program that a CPU loads
_MAX_BYTES = 5 * 2**30  # of all machines that see the folder
_STAMP = ".tidied"  # a file: when a folder was last looked through
_CPU_INFO = Path("/proc/cpuinfo")
_CPU_FIELDS = {
    *("vendor_id", "cpu family", "model", "model name", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),
}


def use_compilation_cache() -> None:
    """Keeps what this process compiles, and takes what is kept; for commands to call.

    All programs are kept, however small: a new run has a hundred of them for its first
    weights, each of which takes several times longer to compile than to load.

    A folder that is set already, as by `JAX_COMPILATION_CACHE_DIR`, is used as it is, and
    `JAX_ENABLE_COMPILATION_CACHE=false` is for none. Several processes have none of their
    own accord: only the first writes, and by keys that others need not share, so that it
    alone would find a program while the others compile it. On GPUs they may wait for ever
    for its part in that: XLA divides the search for the fastest kernels among them.
    """
    config: Any = jax.config
    is_set = config.jax_compilation_cache_dir is not None
    if is_set or not config.jax_enable_compilation_cache:
        return
    if jaxlib.version.__version_info__ < _OLDEST_JAXLIB or jax.process_count() > 1:
        return
    try:
        folder = _folder()
        _tidy(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        records.warn(f"compiled programs are not kept: {error}")
        return
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # As where another process is writing what this one reads: it compiles, no less.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")


def _folder() -> Path:
    """That of this user and machine; made if need be."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = given if given.is_absolute() else Path.home() / ".cache"
    folder = home / "resjax" / "compiled" / _machine()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is executed
    return folder


def _machine() -> str:
    """A name that machines share if they compile the same programs for their CPUs.

    jax's own keys leave out the number of cores, between which XLA:CPU divides its loops.
    """
    try:
        first = _CPU_INFO.read_text().partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        cpu = [value.strip() for name, _, value in pairs if name.strip() in _CPU_FIELDS]
    except OSError:  # as where the system is not Linux
        cpu = [platform.processor()]
    known = "\n".join([*cpu, f"{num_cores()} cores"])
    return f"{platform.machine()}-{hashlib.sha256(known.encode()).hexdigest()[:10]}"


def _tidy(folder: Path) -> None:
    """Deletes what was not written to its end, and the least recently used over the bound.

    jax writes in place, and would neither read such a program nor replace it. Its own
    bound, `jax_compilation_cache_max_size`, needs a package more (filelock) and a lock for
    every program that is read.

    Raises:
      OSError: the folder cannot be written.
    """
    stamp = folder / _STAMP
    since = stamp.stat().st_mtime_ns if stamp.exists() else 0
    stamp.write_bytes(bytes(4096))  # a full disk has room for the name alone
    if folder.stat().st_mtime_ns < since:  # nothing was added
        return
    files = {}
    for path in folder.parent.rglob("*"):
        with contextlib.suppress(OSError):  # another process has deleted it
            if path.is_file():
                files[path] = path.stat()
    for path in [path for path in files if path.parent == folder]:
        if files[path].st_mtime_ns >= since and path.name.endswith("-cache"):
            with contextlib.suppress(OSError):
                if _is_broken(path):
                    path.unlink()
                    del files[path]
    size = sum(stat.st_size for stat in files.values())
    for path, stat in sorted(files.items(), key=lambda file: _last_use(file[1])):
        if size <= _MAX_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        size -= stat.st_size


def _is_broken(path: Path) -> bool:
    try:
        jax_cache.decompress_executable(path.read_bytes())
    except OSError:
        raise
    except (AttributeError, ImportError):  # another jax: nothing is known of the file
        return False
    except Exception:  # of one of several libraries
        return True
    return False


def _last_use(stat: os.stat_result) -> int:
    """In nanoseconds; to a day, as most file systems note that a file is read."""
    return max(stat.st_atime_ns, stat.st_mtime_ns)
