"""Work done ahead of its use and handed over in order, by threads or by processes."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import grain
from absl import flags

from resjax.config import RunError, UsageError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_SHARED = Path("/dev/shm")  # where processes put what they hand over, on Linux
_HELD = 8  # results of a process that exist at once; Grain was seen to hold 6


def num_cores() -> int:
    """Those that this process may use."""
    mine = getattr(os, "sched_getaffinity", None)  # where the system has it
    return len(mine(0)) if mine else os.cpu_count() or 1


def in_order(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    num_threads: int,
    ahead: int,
) -> Generator[_Result, None, None]:
    """function(item) of all items, in order.

    Args:
      function: called in threads, several at once.
      items: may be endless.
      num_threads: that call it.
      ahead: results made, or in the making, beside the one that is waited for.
    """
    waiting: deque[Future[_Result]] = deque()
    threads = ThreadPoolExecutor(num_threads, initializer=_block_signals)
    try:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _block_signals() -> None:
    """Signals are the main thread's, and not of processes that this thread starts."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def until(wants_stop: Callable[[], bool], batches: Iterable[Any]) -> Iterator[Any]:
    """The batches until wants_stop() while one is waited for, which is then abandoned.

    They are taken in a thread, since what reads them may not come back.
    """
    source = iter(batches)
    thread = ThreadPoolExecutor(1, initializer=_block_signals)
    try:
        while True:
            coming = thread.submit(next, source, None)
            while not coming.done():
                if wants_stop():
                    return
                wait([coming], timeout=0.1)
            batch = coming.result()
            if batch is None:
                return
            yield batch
    finally:
        thread.shutdown(wait=False)


def can_share(num_workers: int, num_bytes: int) -> bool:
    """Whether there is shared memory for processes that hand over so much at a time."""
    if not _SHARED.is_dir():
        return True
    return shutil.disk_usage(_SHARED).free >= num_workers * _HELD * num_bytes


@contextlib.contextmanager
def processes(
    function: Callable[[int], Any], count: int, num_workers: int
) -> Iterator[Callable[[], Any]]:
    """Inside, each call gives the next of function(0), ..., function(count - 1).

    Args:
      function: can be pickled; its results are dicts of arrays.
      count: of the results.
      num_workers: processes. They start at the first call and end with this process,
        however that does.

    Raises:
      RunError: by a call, if a process was killed.
      UsageError: by a call, if the function raises it.
    """
    resource_tracker.ensure_running()  # which unblocks signals where it is first called
    if not flags.FLAGS.is_parsed():  # Grain has flags of its own, nobody sets them
        flags.FLAGS.mark_as_parsed()
    dataset: Any = grain.MapDataset.range(count).map(functools.partial(_caught, function))
    dataset = dataset.to_iter_dataset(grain.ReadOptions(1, 1))
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=1)
    dataset = dataset.mp_prefetch(options, _start_process)
    ending = contextlib.ExitStack()
    atexit.register(ending.close)  # where a traceback keeps what is open

    @functools.cache
    def results() -> Iterator[Any]:  # in the thread of the first call, whose signals count
        iterator = iter(dataset)
        ending.callback(iterator.close)
        return iterator

    def take() -> Any:
        try:
            result = next(results())
        except RuntimeError as error:  # so says Grain
            why = f"out of memory, or of {_SHARED}? {error}"
            raise RunError(f"data: a decoding process has ended; {why}") from error
        if "error" in result:
            raise UsageError(result["error"])
        return result

    with ending:
        yield take


def _caught(function: Callable[[int], Any], i: int) -> Any:
    """function(i), or {"error"}: a process that raises leaves its shared memory behind."""
    try:
        return function(i)
    except UsageError as error:
        return {"error": str(error)}


def _start_process(index: int, count: int) -> None:
    """Has a process end when the run was killed."""
    run: Any = multiprocessing.parent_process()

    def wait() -> None:
        run.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
