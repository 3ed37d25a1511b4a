"""What a run writes down: each step once after a resume, readable by its tools."""

import json
import os
from contextlib import nullcontext

import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from resjax import records
from resjax.config import UsageError


def record(step, split="train", loss=1.0):
    return {
        "step": step,
        "epoch": step / 4,
        "split": split,
        "loss": loss,
        "top1": 50.0,
        "top5": 90.0,
        "lr": 0.1,
        "images_per_second": 9.0,
    }


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_a_resumed_run_writes_each_step_once(workdir):
    with records.open_metrics(workdir, 0) as write:
        for step in (2, 4, 6):
            write(record(step))
    with records.open_metrics(workdir, 4) as write:  # the last checkpoint was of step 4
        for step in (6, 8):
            write(record(step, loss=2.0))
    kept = [(r["step"], r["loss"]) for r in records.read_metrics(workdir)]
    assert kept == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)]


def test_a_line_cut_off_by_a_kill_is_dropped(workdir):
    with records.open_metrics(workdir, 0) as write:
        write(record(2))
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo')
    assert [r["step"] for r in records.read_metrics(workdir)] == [2]
    with records.open_metrics(workdir, 2) as write:
        write(record(4))
    assert [r["step"] for r in records.read_metrics(workdir)] == [2, 4]


def test_tensorboard_events_hold_the_scalars(workdir):
    with records.open_metrics(workdir, 0) as write:
        write(record(3, "test", loss=0.5))
    (path,) = workdir.glob("events.out.tfevents.*")
    data, scalars = path.read_bytes(), {}
    while data:  # TFRecord framing: length (8), its CRC (4), data, CRC (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        scalars |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        data = data[size + 16 :]
    assert scalars[("test/loss", 3)] == 0.5
    assert scalars[("test/top1", 3)] == 50.0


def test_json_is_written_whole(workdir):
    path = workdir / "x.json"
    records.write_json(path, {"a": [1]})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1]}
    assert [p.name for p in workdir.iterdir()] == ["x.json"]


def test_curves_are_a_picture_whatever_records_there_are(workdir):
    for rows in (
        [record(1)],
        [record(2), record(2, "test")],
        [record(3), record(3, "test_ema"), record(3, "test")],
    ):
        with records.open_metrics(workdir, rows[0]["step"]) as write:
            for row in rows:
                write(row)
        records.plot_curves(workdir, "title")
        assert (workdir / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


EVALUATIONS = [
    {**record(2, "test", loss=0.9), "top1": 50.0},
    {**record(4, "test", loss=0.2), "top1": 70.0},
    {**record(6, "test", loss=0.3), "top1": 80.0},
    {**record(8, "test", loss=0.1), "top1": 80.0},
]


@pytest.mark.parametrize(
    "metric, steps, best",
    [
        ("top1", [2, 4, 6, 8], 6),  # the first of equals
        ("top1", [2, 4, 8], 8),  # of those that have a checkpoint
        ("loss", [2, 4, 6, 8], 8),
        ("loss", [2, 4, 6], 4),
        ("none", [2, 4], None),
        ("top1", [3, 5], None),
        ("loss", [], None),
    ],
)
def test_the_best_is_the_highest_accuracy_or_the_lowest_loss(metric, steps, best):
    assert records.best_step(EVALUATIONS, metric, steps) == best


def test_evaluations_are_those_up_to_a_step(workdir):
    with records.open_metrics(workdir, 0) as write:
        for row in (*EVALUATIONS, record(4), record(9)):
            write(row)
    assert [r["step"] for r in records.read_evaluations(workdir, 5)] == [2, 4]
    assert [r["step"] for r in records.read_evaluations(workdir)] == [2, 4, 6, 8]
    assert records.read_evaluations(workdir, split="test_ema") == []


def test_a_workdir_is_held_by_one_at_a_time(workdir):
    with records.lock(workdir):
        said = f"in use by process {os.getpid()} on {os.uname().nodename}; stop that, or"
        before = (workdir / ".lock").read_bytes()
        for other in (records.lock(workdir), nullcontext()):
            with pytest.raises(UsageError, match=said), other:
                records.check_unlocked(workdir)
        assert (workdir / ".lock").read_bytes() == before
    records.check_unlocked(workdir)
    with records.lock(workdir):
        pass


def test_looking_whether_a_workdir_is_held_makes_nothing(workdir):
    records.check_unlocked(workdir)
    records.check_unlocked(workdir / "nowhere")
    assert list(workdir.iterdir()) == []
