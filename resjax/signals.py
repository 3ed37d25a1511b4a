"""SIGTERM and SIGINT (Ctrl-C): a run saves what it has, and ends.

Before the first update there is nothing to save, and a signal ends the process at once,
also in a compilation. Later it is noted for the next step boundary, and ends waiting for
data. A second signal ends the process at once.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_WORDS = 2.0  # seconds


@dataclasses.dataclass
class StopSignals:
    """The signals that this process got.

    Attributes:
      received: their numbers.
      has_news: an update was made.
      tell: called with a signal's number before it ends a process that has no news.
    """

    received: list[int] = dataclasses.field(default_factory=list)
    has_news: bool = False
    tell: Callable[[int], None] = lambda signum: None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Inside, signals do as the module says; the process must be a command's own."""
    stop = StopSignals()

    def note(signum: int, frame: Any) -> None:  # in the main thread, between two steps
        stop.received.append(signum)

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watch = threading.Thread(target=_watch, args=(ours, stop), daemon=True)
    watch.start()
    before = {signum: signal.signal(signum, note) for signum in _SIGNALS}
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        theirs.close()  # which ends the thread


def _watch(signals: socket.socket, stop: StopSignals) -> None:
    """Ends the process where a signal is to, until the other end is closed.

    Python writes the number of a signal to the socket in the moment it comes, also while
    the main thread computes or compiles.
    """
    count = 0
    with signals:
        while received := signals.recv(1):
            (signum,) = received
            count += signum in _SIGNALS
            if count > 1:
                leave(128 + signum)
            if count and not stop.has_news:
                leave(128 + signum, functools.partial(stop.tell, signum))


def leave(code: int, tell: Callable[[], None] = lambda: None) -> NoReturn:
    """Ends the process without waiting for its threads or for other processes.

    Args:
      code: its exit code.
      tell: last words, for which there are two seconds.
    """

    def say() -> None:  # which fails, or waits for ever, where nobody reads
        with contextlib.suppress(Exception):
            tell()
            sys.stdout.flush()
            sys.stderr.flush()

    words = threading.Thread(target=say, daemon=True)
    words.start()
    words.join(_LAST_WORDS)
    os._exit(code)
