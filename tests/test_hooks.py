"""Logging a step late, and checks before saving."""

import io

import numpy as np
import pytest
from tqdm import tqdm

from resjax import hooks, loop


def sums(loss, count=10):
    return {"loss": loss * count, "top1": count / 2, "top5": count, "num_examples": count}


def make_log(written, every=3, num_steps=7, waits=None):
    rates = np.arange(1, num_steps + 1) / 10
    return hooks.TrainLog(
        written.append,
        every,
        epochs_per_step=0.25,
        learning_rates=rates,
        images_per_step=10,
        waits=waits or loop.Waits(),
    )


def dispatch(log, *steps, loss=1.0):
    """The log's part of a dispatch of these steps."""
    state = object()
    for step in steps:
        log(step, state, sums(loss))


def test_records_average_their_window_and_come_one_step_late():
    written = []
    log = make_log(written)
    for step in range(1, 8):
        dispatch(log, step, loss=float(step))
        assert len(written) == (step - 1) // 3
    with log.paused():
        pass
    assert [r["step"] for r in written] == [3, 6, 7]
    assert [r["loss"] for r in written] == [2.0, 5.0, 7.0]
    assert [r["lr"] for r in written] == pytest.approx([0.3, 0.6, 0.7])
    assert [r["epoch"] for r in written] == [0.75, 1.5, 1.75]
    assert all(r["top1"] == 50 and r["top5"] == 100 for r in written)


def test_a_pause_inside_a_window_does_not_cut_it():
    written = []
    log = make_log(written)
    for step in range(1, 8):
        dispatch(log, step, loss=float(step))
        with log.paused():
            pass
    assert [(r["step"], r["loss"]) for r in written] == [(3, 2.0), (6, 5.0), (7, 7.0)]


def test_pauses_and_the_first_step_are_not_timed(clock):
    written = []
    log = make_log(written)
    for step in range(1, 8):
        clock[0] += 100 if step == 1 else 2  # compiling, then two seconds a step
        dispatch(log, step)
        if step in (2, 5):
            with log.paused():
                clock[0] += 1000
    assert written[1]["images_per_second"] == pytest.approx(5.0)
    assert written[0]["images_per_second"] == pytest.approx(20 / 6, abs=0.1)  # 2 of 3 steps


@pytest.fixture
def clock(monkeypatch):
    """[the seconds that have passed]."""
    now = [0.0]
    monkeypatch.setattr(hooks.time, "perf_counter", lambda: now[0])
    return now


def test_the_sums_of_a_dispatch_are_fetched_when_the_next_is_under_way(clock):
    written = []
    log = make_log(written, every=2, num_steps=99)
    fetched = []
    for first in (1, 5, 9):
        clock[0] += 3.0  # four steps of ten images
        dispatch(log, *range(first, first + 4))
        fetched.append([record["step"] for record in written])
    assert fetched == [[], [2, 4], [2, 4, 6, 8]]
    assert [record["images_per_second"] for record in written[2:]] == [13.3, 13.3]


def test_the_share_of_waiting_for_data_leaves_out_pauses_and_the_first_step(clock):
    written, waits = [], loop.Waits(data=500.0)
    log = make_log(written, num_steps=9, waits=waits)

    def pass_seconds(all_of_them, waiting):
        clock[0] += all_of_them
        waits.data += waiting

    for step in range(1, 8):
        pass_seconds(*((100, 90) if step == 1 else (4, 1 if step <= 4 else 3)))
        dispatch(log, step)
        if step == 5:
            with log.paused():
                pass_seconds(1000, 1000)
    assert [record["data_wait"] for record in written] == [25.0, 75.0]
    assert log.take_data_wait() == 50.0  # 3 + 9 of 24 seconds
    assert log.take_data_wait() == 0.0
    assert "data_wait" not in log.record(7, "test", written[0], 1.0)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_before_the_action(loss):
    done = []
    log = make_log([])
    save = hooks.make_hook(lambda step: True, lambda step, state: done.append(step), log)
    for hook in (log, save):
        hook(1, None, sums(1.0))
    log(2, None, sums(loss))
    with pytest.raises(FloatingPointError, match="step 2"):
        save(2, None, None)
    assert done == [1]


def test_a_hook_acts_only_when_due():
    done = []
    hook = hooks.make_hook({2, 3}.__contains__, lambda *a: done.append(a), make_log([]))
    for step in range(1, 5):
        hook(step, f"state{step}", None)
    assert done == [(2, "state2"), (3, "state3")]


def test_progress_counts_images_and_shows_the_last_record():
    log = make_log([])
    log.latest = {"loss": 0.25, "top1": 75.0}
    with tqdm(total=70, initial=10, file=io.StringIO()) as bar:
        hooks.make_progress_hook(bar, log)(2, None, None)
        assert bar.n == 20
        assert bar.postfix == "loss 0.250 top1 75.0%"
