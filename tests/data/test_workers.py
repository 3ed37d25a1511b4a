"""Work is handed over in order, and its processes end with the run, however that does."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_tfds import encode, pixels

from resjax.config import RunError, UsageError
from resjax.data import workers


def test_results_come_in_order_and_few_of_them_wait():
    started, lock = [], threading.Lock()

    def square(i):
        with lock:
            started.append(i)
        return i * i

    results = workers.in_order(square, range(1000), 4, 63)
    assert next(results) == 0
    assert len(started) <= 64
    assert list(results) == [i * i for i in range(1, 1000)]


def test_error_of_a_thread_is_raised_in_its_turn():
    def reciprocal(i):
        return 1 / (3 - i)

    results = workers.in_order(reciprocal, range(10), 2, 4)
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory is elsewhere")
def test_shared_memory_is_asked_for():
    assert workers.can_share(2, 2**20)
    assert not workers.can_share(1000, 2**50)


def fail(i):
    raise UsageError(f"item {i} is wrong")


def test_error_in_a_process_is_the_same_error_here():
    wrong = pytest.raises(UsageError, match="item 0 is wrong")
    with workers.processes(fail, 10, 1) as take, wrong:
        take()


def die(i):
    os._exit(3)


def test_process_that_ends_is_one_line():
    ended = pytest.raises(RunError, match="data: a decoding process has ended; out of mem")
    with workers.processes(die, 10, 1) as take, ended:
        take()


_ENDLESS = """
import multiprocessing, signal, sys
from resjax.data import pipeline
from resjax.data.datasets import DATASETS
from resjax.data.recipes import RECIPES

def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    source = [{"image": bytes.fromhex(sys.argv[1]), "label": 0}]
    reader = pipeline.Reader(DATASETS["digits"], source, 4, 1, num_workers=2)
    batches = pipeline.train_batches(
        reader, RECIPES["none"], seed=0, batch_size=2, start_step=0, num_steps=10**6
    )
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look into")
@pytest.mark.parametrize("end", ["exit", signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_run_and_quietly(end, tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    png = encode(pixels(0, 4, 4), ".png").hex()
    run = subprocess.Popen(
        [sys.executable, script, png],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that the signal goes to its processes alone
    )
    pids = run.stdout.readline().split()
    assert len(pids) == 2 and all(map(is_running, pids))
    if end == signal.SIGINT:
        os.killpg(run.pid, end)  # as Ctrl-C does
    elif end != "exit":
        run.send_signal(end)
    _, err = run.communicate()
    # Of a script that is interrupted, its own traceback alone.
    assert err.count("Traceback") == (end == signal.SIGINT)
    assert end == signal.SIGKILL or "leaked" not in err
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_while_processes_start_ends_the_run(signum, tiny_config, tmp_path):
    flags = [f"--config={tiny_config}", f"--workdir={tmp_path / 'run'}"]
    flags += ["--config.data.on_device=false", "--config.data.num_workers=2"]
    run = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags, "--config.num_epochs=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "compiling" not in run.stdout.readline():
        pass
    time.sleep(0.5)
    os.killpg(run.pid, signum)
    out, err = run.communicate()
    # Python itself may count the semaphores of a process that had only begun to start.
    told = re.sub(
        r".*resource_tracker: There appear to be .*\n( +warnings\.warn.*\n)?", "", err
    )
    assert (run.returncode, told) == (128 + signum, "")
    assert f"stopped by signal {signum}; nothing was saved yet" in out


def test_batches_end_when_a_stop_is_wanted_while_one_is_waited_for():
    wanted, never = threading.Event(), threading.Event()

    def source():
        yield 1
        yield 2
        wanted.set()
        never.wait(60)  # as reading from a disk that is gone
        yield 3

    start = time.monotonic()
    assert list(workers.until(wanted.is_set, source())) == [1, 2]
    assert time.monotonic() - start < 5
    never.set()


def test_batches_all_come_and_errors_with_them_if_no_stop_is_wanted():
    assert list(workers.until(lambda: False, range(1, 40))) == list(range(1, 40))

    def fails():
        yield 1
        raise UsageError("damaged")

    batches = workers.until(lambda: False, fails())
    assert next(batches) == 1
    with pytest.raises(UsageError, match="damaged"):
        next(batches)
