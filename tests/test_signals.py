"""SIGTERM and SIGINT: noted, breaking off what may be, or ending the process."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from resjax import signals


def send(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


def test_with_something_to_save_signals_are_noted_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals.stop_signals() as stop:
        stop.has_news = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


# As in a compilation, the main thread is in C, without the lock of the interpreter.
SCRIPT = f"""
import hashlib, runpy, sys, threading
signals = runpy.run_path({str(ROOT / "resjax" / "signals.py")!r})
with signals["stop_signals"]() as stop:
    stop.tell = {{
    "nothing": lambda signum: print("told", signum),
        "blocks": lambda signum: threading.Event().wait(),
        "fails": lambda signum: 1 / 0,
        "news": print,
    }}[sys.argv[1]]
    stop.has_news = sys.argv[1] == "news"
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(
    "state, sent, told",
    [
        ("nothing", [signal.SIGTERM], "told 15\n"),
        ("nothing", [signal.SIGINT], "told 2\n"),
        ("blocks", [signal.SIGTERM], ""),
        ("fails", [signal.SIGTERM], ""),
        ("news", [signal.SIGINT, signal.SIGTERM], ""),  # the second ends it
    ],
)
def test_a_process_that_computes_for_long_is_ended(state, sent, told):
    words = [sys.executable, "-c", SCRIPT, state]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        for signum in sent:
            process.send_signal(signum)
            time.sleep(0.2)
        assert process.wait(20) == 128 + sent[-1]
        assert time.monotonic() - start < 5
        assert process.stdout.read() == told
