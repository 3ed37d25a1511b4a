"""SIGTERM and SIGINT (Ctrl-C): a run saves what it has, and ends.

At first it has nothing to save: a signal unwinds the process by an exception, and where
that takes long, as in a compilation, a thread ends it. Once there are updates that no
checkpoint has, the signal is noted for the next step boundary, and only waiting is broken
off. A second signal ends the process at once.
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
_UNWIND_SECONDS = 3.0


class Stopped(BaseException):
    """A signal came where nothing is lost by stopping."""


@dataclasses.dataclass
class StopSignals:
    """The signals that this process got, and what they may break off.

    Attributes:
      received: their numbers.
      has_news: there are updates that no checkpoint has.
      is_waiting: what happens now may be broken off nevertheless.
    """

    received: list[int] = dataclasses.field(default_factory=list)
    has_news: bool = False
    is_waiting: bool = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside is broken off by a signal, with `Stopped`."""
        self.is_waiting = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self.is_waiting = False


@contextlib.contextmanager
def stop_signals(tell: Callable[[int], None]) -> Iterator[StopSignals]:
    """Inside, signals do as the module says; outside, what they did before.

    Args:
      tell: called with a signal's number before it ends a process that cannot unwind.
    """
    stop = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the main thread's
        return

    def note(signum: int, frame: Any) -> None:  # in the main thread, between two steps
        stop.received.append(signum)
        if stop.is_waiting or not stop.has_news:
            raise Stopped

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    watch = threading.Thread(target=_watch, args=(ours, stop, tell), daemon=True)
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


def _watch(signals: socket.socket, stop: StopSignals, tell: Callable[[int], None]) -> None:
    """Ends the process where its main thread does not, until the other end is closed.

    Python writes the number of a signal to the socket in the moment it comes, also while
    the main thread computes or compiles.
    """
    signum = 0
    with signals:
        while True:
            try:
                received = signals.recv(1)
            except TimeoutError:
                tell(signum)
                leave(128 + signum)
            if not received:
                return
            if received[0] in _SIGNALS:
                if signum:
                    leave(128 + received[0])
                signum = received[0]
                signals.settimeout(None if stop.has_news else _UNWIND_SECONDS)


def leave(code: int) -> NoReturn:
    """Ends the process without waiting for its threads or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
