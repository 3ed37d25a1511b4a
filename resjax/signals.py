"""SIGTERM and SIGINT (Ctrl-C): a run saves what it has, and ends.

While it has nothing to save, a signal ends the process at once, also in a compilation. Once
there are updates that no checkpoint has, the signal is noted for the next step boundary,
and only waiting for data is broken off. A second signal ends the process at once.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A signal came while `StopSignals.waiting`."""


@dataclasses.dataclass
class StopSignals:
    """The signals that this process got, and what they may do.

    Attributes:
      received: their numbers.
      has_news: there are updates that no checkpoint has.
      tell: called with a signal's number before it ends a process that has no news.
      is_waiting: what happens now may be broken off.
    """

    received: list[int] = dataclasses.field(default_factory=list)
    has_news: bool = False
    tell: Callable[[int], None] = lambda signum: None
    is_waiting: bool = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What waits inside is broken off by a signal, with `Stopped`."""
        self.is_waiting = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self.is_waiting = False


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Inside, signals do as the module says; the process must be a command's own."""
    stop = StopSignals()

    def note(signum: int, frame: Any) -> None:  # in the main thread, between two steps
        stop.received.append(signum)
        # Elsewhere, as in a callback of the garbage collector, it would be lost with noise.
        if stop.is_waiting and frame.f_code.co_filename == threading.__file__:
            raise Stopped

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
        watch.join()


def _watch(signals: socket.socket, stop: StopSignals) -> None:
    """Ends the process where a signal is to, until the other end is closed.

    Python writes the number of a signal to the socket in the moment it comes, also while
    the main thread computes or compiles.
    """
    count = 0
    with signals:
        while received := signals.recv(1):
            (signum,) = received
            if signum not in _SIGNALS:
                continue
            count += 1
            if not stop.has_news:
                stop.tell(signum)
            if count > 1 or not stop.has_news:
                leave(128 + signum)


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for its threads or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
