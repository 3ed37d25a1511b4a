"""SIGTERM in every phase of a run, and errors within it: nothing is lost by them."""

import json
import os
import signal
import time

import pytest
from test_resume import LAST_STEP, LONG_RUN, assert_same_run, latest_step, long_run

# One worker runs all that share the uninterrupted run.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]
__all__ = ["long_run"]  # a fixture

STREAMED = "--config.data.on_device=false"

# Config files: the tiny net, and a phase that lasts. Each prints when it comes to it.
FAULT = """
import itertools, runpy, threading, time
from resjax import checkpoint, loop
from resjax.config import UsageError
from resjax.data import pipeline

get_config = runpy.run_path({tiny!r})["get_config"]
"""
SLOW_EVALUATION = """
def slow(*args, batches=pipeline.eval_batches, **kwargs):
    print("evaluating", flush=True)
    for batch in batches(*args, **kwargs):
        time.sleep(3)
        yield batch

pipeline.eval_batches = slow
"""
SLOW_SAVE = """
def slow(record, arrays, to_files=checkpoint.to_files):
    print("saving", flush=True)
    time.sleep(3)
    return to_files(record, arrays)

checkpoint.to_files = slow
"""
NO_DATA = """
def stalls(*args, batches=pipeline.train_batches, **kwargs):
    yield from itertools.islice(batches(*args, **kwargs), 30)
    print("no data", flush=True)
    threading.Event().wait(100)

pipeline.train_batches = stalls
"""
DAMAGED_DATA = """
def fails(*args, batches=pipeline.train_batches, **kwargs):
    yield from itertools.islice(batches(*args, **kwargs), 30)
    raise UsageError("data: example 7 is damaged")

pipeline.train_batches = fails
"""


DAMAGED_TEST = """
calls = itertools.count()

def fails(*args, batches=pipeline.eval_batches, **kwargs):
    if next(calls):  # the first compiles
        raise UsageError("data: example 7 is damaged")
    yield from batches(*args, **kwargs)

pipeline.eval_batches = fails
"""


@pytest.fixture
def flags(tiny_config, tmp_path):
    return f"--config={tiny_config}", LONG_RUN, f"--workdir={tmp_path / 'run'}"


@pytest.fixture
def faulty(tiny_config, tmp_path):
    """The same with a fault."""

    def make(fault):
        path = tmp_path / "fault.py"
        path.write_text(FAULT.format(tiny=str(tiny_config)) + fault)
        return f"--config={path}", LONG_RUN, f"--workdir={tmp_path / 'run'}"

    return make


def terminate_at(process, word, after=0.0, nth=1):
    """Sends SIGTERM when a line with the word is printed; returns all lines and seconds."""
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            nth -= word in line
            if nth == 0:
                break
        time.sleep(after)
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        lines += process.stdout.readlines()
        err = process.stderr.read()
        assert "Traceback" not in err, err
        assert process.wait() == 143, lines
    return lines, time.monotonic() - start


def stopped(workdir):
    return f"stopped by signal 15; step {latest_step(workdir)} is saved\n"


def go_on(command, flags, long_run, tmp_path):
    done = command("train.py", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(tmp_path / "run", long_run, LAST_STEP)
    return done.stdout


def test_while_it_compiles(spawn, command, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    words = "--config.model=cifar_resnet110", f"--workdir={tmp_path / 'run'}"
    lines, seconds = terminate_at(spawn("train.py", *words), "compiling", after=3)
    assert lines[-1] == "stopped by signal 15; nothing was saved yet\n"
    assert seconds < 10
    assert not any((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.long
def test_while_it_evaluates(spawn, command, flags, faulty, long_run, tmp_path):
    often = f"--config.eval_every_epochs={50 * 16 / 1437}"  # after steps 50, 100, ...
    words = *faulty(SLOW_EVALUATION), often, STREAMED
    process = spawn("train.py", *words)
    # The first time is to compile it.
    lines, seconds = terminate_at(process, "evaluating", after=2, nth=2)
    assert lines[-1] == "stopped by signal 15; step 50 is saved\n"
    assert seconds < 10
    again = spawn("train.py", *words)  # it evaluates before the next update
    lines, _ = terminate_at(again, "evaluating", after=2)
    assert lines[-1] == "stopped by signal 15; step 50 is saved\n"
    done = command("train.py", *flags, often)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["step"] for r in rows if r["split"] == "test"] == [50, 100, 150, 200]
    assert [r["step"] for r in rows if r["split"] == "train"] == list(range(1, 201))


@pytest.mark.long
def test_while_it_evaluates_for_the_last_time(
    spawn, flags, command, faulty, long_run, tmp_path
):
    words = *faulty(SLOW_EVALUATION), STREAMED
    lines, _ = terminate_at(spawn("train.py", *words), "evaluating", after=2, nth=2)
    assert lines[-1] == f"stopped by signal 15; step {LAST_STEP} is saved\n"
    assert "finished in" in go_on(command, flags, long_run, tmp_path)


@pytest.mark.long
def test_while_it_saves(spawn, command, flags, faulty, long_run, tmp_path):
    words = *faulty(SLOW_SAVE), "--config.checkpoint.every_steps=20"
    lines, seconds = terminate_at(spawn("train.py", *words), "saving", after=0.5)
    assert seconds < 10
    assert lines[-1] == stopped(tmp_path / "run")
    assert latest_step(tmp_path / "run") < LAST_STEP
    go_on(command, flags, long_run, tmp_path)


def test_while_it_waits_for_data(spawn, command, flags, faulty, long_run, tmp_path):
    words = *faulty(NO_DATA), STREAMED
    lines, seconds = terminate_at(spawn("train.py", *words), "no data", after=1)
    assert lines[-1] == stopped(tmp_path / "run")
    assert seconds < 10 and latest_step(tmp_path / "run") >= 25
    go_on(command, (*flags, STREAMED), long_run, tmp_path)


def test_damaged_data_stops_it_after_what_was_trained_is_saved(
    command, flags, faulty, long_run, tmp_path
):
    done = command("train.py", *faulty(DAMAGED_DATA), STREAMED)
    assert done.returncode == 2
    assert done.stderr == "train.py: error: data: example 7 is damaged\n"
    assert latest_step(tmp_path / "run") >= 25
    go_on(command, (*flags, STREAMED), long_run, tmp_path)


def test_a_damaged_test_split_stops_it_after_what_was_trained_is_saved(
    command, flags, faulty, long_run, tmp_path
):
    done = command("train.py", *faulty(DAMAGED_TEST), STREAMED)
    assert done.returncode == 2
    assert done.stderr == "train.py: error: data: example 7 is damaged\n"
    assert latest_step(tmp_path / "run") == LAST_STEP
    go_on(command, flags, long_run, tmp_path)


def test_a_second_run_in_the_same_workdir_is_refused_and_a_killed_one_leaves_no_lock(
    spawn, command, flags, faulty, long_run, tmp_path
):
    words = *faulty(NO_DATA), STREAMED
    with spawn("train.py", *words) as first:
        for line in first.stdout:
            if "no data" in line:
                break
        second = command("train.py", *flags)
        assert (second.returncode, second.stdout) == (2, "")
        said = f"run is in use by process {first.pid} on {os.uname().nodename}; stop that"
        assert said in second.stderr and second.stderr.count("\n") == 1
        first.kill()
    go_on(command, (*flags, STREAMED), long_run, tmp_path)
