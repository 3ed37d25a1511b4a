"""train.py: what a run prints and leaves, how it ends, and that devices do not matter."""

import dataclasses
import json
import math
import re
import shutil
from functools import partial

import cv2
import jax
import numpy as np
import pytest
from conftest import ROOT, saved

from resjax import build, training
from resjax import config as configs
from resjax.config import RunError

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")

TRAIN_EXAMPLES, BATCH_SIZE, NUM_STEPS = 1437, 128, 22  # 2 epochs are 22.45 steps
RECORD = ["step", "epoch", "split", "loss", "top1", "top5", "lr", "images_per_second"]
RECORD += ["data_wait"]  # of the training


def read_metrics(workdir):
    return [
        json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def rows(workdir, split="train"):
    return [row for row in read_metrics(workdir) if row["split"] == split]


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- a short run --------------------------------------------------------------------


def test_a_run_says_what_it_does_and_how_it_stands(digits_run):
    done = digits_run.done
    assert (done.returncode, done.stderr) == (0, "")
    data, size, *reports, end = done.stdout.replace("compiling ...\n", "").splitlines()
    assert data.startswith(
        "cifar_resnet20 on digits (1,437 examples, 10 classes), from the"
    )
    assert data.endswith(str(digits_run.workdir))
    assert size.startswith("22 steps of 128, 2 epochs, on 4 cpu devices (pmap); peak learn")
    assert size.endswith("rate 0.1, gradual warmup of 6 steps")
    test = rows(digits_run.workdir, "test")
    assert len(reports) == len(test) == 2
    for line, row in zip(reports, test, strict=True):
        assert f"{row['step']}/22" in line and "images/s" in line
        assert f"test loss {row['loss']:.4f} top-1 {row['top1']:6.2f} %" in line
    ended = r"finished in \d+ min \d\d s \(waited \d+ s for data, \d+ s for the devices\);"
    assert re.match(ended, end) and end.endswith("curves.png")


def test_a_run_leaves_its_files_and_nothing_else(digits_run):
    workdir = digits_run.workdir
    names = {p.name for p in workdir.iterdir() if not p.name.startswith("eval_")}
    (events,) = (name for name in names if name.startswith("events.out.tfevents."))
    files = {"config.json", "metrics.jsonl", "curves.png", "checkpoints", ".lock"}
    assert names == {events} | files
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [10, 20, 22]


def test_the_config_is_stored_with_what_the_command_line_set(digits_run):
    config = json.loads((digits_run.workdir / "config.json").read_text())
    assert (config["num_epochs"], config["warmup_epochs"]) == (2.0, 0.5)  # set by flags
    assert (config["lr_per_256"], config["schedule"]) == (0.2, "cosine")  # by the file
    assert (config["momentum"], config["seed"]) == (0.9, 0)  # by default
    assert config["checkpoint"] == {
        "every_steps": 10,
        "keep": 3,
        "keep_every_steps": 0,
        "best_metric": "none",
    }


def test_metrics_have_one_full_record_for_every_step_and_evaluation(digits_run):
    metrics = read_metrics(digits_run.workdir)
    for row in metrics:
        assert list(row) == [name for name in RECORD if name in row]
        assert set(RECORD) - set(row) == (
            {"data_wait"} if row["split"] == "test" else set()
        )
        assert row["epoch"] == pytest.approx(
            row["step"] * BATCH_SIZE / TRAIN_EXAMPLES, abs=1e-4
        )
        assert all(math.isfinite(value) for value in row.values() if value != row["split"])
        assert 0 <= row["top1"] <= row["top5"] <= 100
    train = [row["step"] for row in metrics if row["split"] == "train"]
    test = [row["step"] for row in metrics if row["split"] == "test"]
    assert train == list(range(1, NUM_STEPS + 1))
    assert test == [11, 22]  # an epoch is 11.2 steps


def test_a_training_top1_is_a_count_out_of_the_minibatch(digits_run):
    hits = np.array([row["top1"] for row in rows(digits_run.workdir)]) * BATCH_SIZE / 100
    np.testing.assert_allclose(hits, hits.round(), atol=1e-4)


def test_the_model_learns(digits_run):
    train, test = rows(digits_run.workdir), rows(digits_run.workdir, "test")
    assert abs(train[0]["loss"] - math.log(10)) < 0.1  # the classifier starts near 0
    assert train[-1]["loss"] < 1.0 and test[-1]["top1"] > 50


def test_learning_rates_warm_up_and_then_follow_the_cosine(digits_run):
    step = np.arange(NUM_STEPS)
    start, peak, warmup = 0.01, 0.2 * 128 / 256, round(0.5 * TRAIN_EXAMPLES / BATCH_SIZE)
    warm = start + (peak - start) * step / warmup
    cosine = peak * (1 + np.cos(np.pi * (step - warmup) / (NUM_STEPS - warmup))) / 2
    rates = [row["lr"] for row in rows(digits_run.workdir)]
    np.testing.assert_allclose(rates, np.where(step < warmup, warm, cosine), rtol=1e-5)


def test_curves_are_a_picture(digits_run):
    picture = cv2.imread(str(digits_run.workdir / "curves.png"))
    height, width, _ = picture.shape
    assert width > 2 * height > 500
    assert len(np.unique(picture @ [1, 256, 65536])) > 10  # colours: not a blank page


def test_a_finished_run_says_so_and_changes_nothing(digits_run, command):
    before = contents(digits_run.workdir)
    done = command("train.py", *digits_run.flags, devices=4)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    assert "finished" in line and "22" in line and str(digits_run.workdir) in line
    assert contents(digits_run.workdir) == before


def test_averages_are_told_beside_the_weights(capsys):
    row = {"step": 22, "epoch": 1.0, "loss": 0.5, "top1": 90.0, "images_per_second": 9.0}
    rows = [{**row, "split": split} for split in ("train", "test", "test_ema")]
    training.report(22, *rows[:2])
    training.report(22, *rows)
    plain, averaged = capsys.readouterr().out.splitlines()
    assert "test_ema" not in plain and plain.endswith("9 images/s")
    assert (
        "test loss 0.5000 top-1  90.00 %  test_ema loss 0.5000 top-1  90.00 %" in averaged
    )


def test_a_run_says_that_it_waits_for_data_only_if_it_waits_long(capsys):
    training.report_wait(20.0, "imagenet2012")
    assert capsys.readouterr().out == ""
    training.report_wait(36.6, "imagenet2012")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("waiting for data 37 % of the time; ")
    assert "--config.data.num_workers" in line
    assert "`python -m resjax.data imagenet2012 --shrink=512`" in line


@pytest.mark.parametrize(
    ("script", "fields"),
    [
        ("train.py", r"\n  batch_size = 128\n +the global minibatch, .*greater than 0\)\n"),
        ("eval.py", r"--batch_size N"),
    ],
)
def test_help_shows_an_example_and_what_can_be_set(command, script, fields):
    done = command(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\npython {script} " in done.stdout and "--workdir" in done.stdout
    assert re.search(fields, done.stdout)


# --- data on the device -------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_config, data_dir):
    """tiny(workdir, steps, *words): trains so many of 64 in this process; its variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        config = configs.load_config(tiny_config)

        def train(workdir, num_steps, *words):
            fields = "batch_size=64", f"num_epochs={num_steps * 64 / 1437}", *words
            words = [f"--config.{field}" for field in fields]
            assert training.train(configs.override(config, words), workdir) == 0
            return saved(workdir, num_steps)

        yield train


@pytest.mark.slow
@pytest.mark.long
def test_several_steps_a_dispatch_of_data_on_the_device_train_alike(tiny, tmp_path):
    evaluate = f"eval_every_epochs={13 * 64 / 1437}"
    on_device = "data.on_device=true", "data.steps_per_dispatch=4"
    host = tiny(tmp_path / "host", 30, evaluate, "data.on_device=false")
    several = tiny(tmp_path / "run", 30, evaluate, *on_device)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, several, host)
    expected, found = (read_metrics(tmp_path / name) for name in ("host", "run"))
    for a, b in zip(expected, found, strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        close([b["loss"], b["top1"]], [a["loss"], a["top1"]])
    assert [r["step"] for r in found if r["split"] == "test"] == [13, 26, 30]
    # Saved at the end of a dispatch, from which it goes on as if nothing had happened.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "30")
    again = tiny(tmp_path / "run", 30, evaluate, *on_device)
    jax.tree.map(np.testing.assert_array_equal, again, several)


def test_a_run_that_ends_within_its_schedule_says_so(tiny, tmp_path, capsys):
    tiny(tmp_path, 2, "warmup=gradual", "warmup_epochs=0.2", "drop_epochs=0.05,0.5,9")
    size = capsys.readouterr().out.splitlines()[1]
    assert "gradual warmup of 4 steps; the run ends before that peak" in size
    assert "config.warmup_epochs=0.2" in size
    assert size.endswith("ends before the drops of epochs 0.5, 9 (config.drop_epochs)")


# --- how a run ends -----------------------------------------------------------------


DIVERGES = "--config.lr_per_256=1e30"


@pytest.mark.slow
def test_parameters_that_are_not_finite_end_the_run_and_the_last_good_ones_are_kept(
    command, tiny_config, tmp_path
):
    flags = f"--config={tiny_config}", f"--workdir={tmp_path}", DIVERGES
    done = command("train.py", *flags, "--config.checkpoint.every_steps=1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    (*_, latest) = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert f"not finite after step {latest + 1}; " in line
    assert f"checkpoint of step {latest} is kept" in line
    assert "--config.lr_per_256" in line
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path))
    assert all(np.isfinite(array).all() for array in saved(tmp_path, latest).values())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(command, tiny_config, tmp_path):
    flags = f"--config={tiny_config}", f"--workdir={tmp_path}", DIVERGES
    done = command("train.py", *flags)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(r"the loss is (nan|inf) at step \d+ \(learning rate 6.25e\+28\)", line)
    assert "nothing was saved yet" in line
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path))


# --- devices ------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: a bug"])
def test_too_little_memory_ends_the_run_in_a_line_and_a_bug_in_a_traceback(
    told, tiny, monkeypatch, tmp_path
):
    def fail(state, batch):
        raise jax.errors.JaxRuntimeError(told)

    def build_run(config, build_run=build.build_run):
        return dataclasses.replace(build_run(config), train_step=fail)

    monkeypatch.setattr(build, "build_run", build_run)
    expected = RunError if "memory" in told else jax.errors.JaxRuntimeError
    with pytest.raises(expected) as caught:
        tiny(tmp_path, 2)
    if expected is RunError:
        line = str(caught.value)
        assert told in line and "nothing was saved yet" in line
        assert "--config.microbatch" in line and "\n" not in line


def train_on(command, workdir, devices, parallel, *flags, script="train.py"):
    """What is printed, and the loss and the hits of every record."""
    flags = *flags, f"--workdir={workdir}", f"--config.parallel={parallel}"
    done = command(script, *flags, devices=devices)
    assert done.returncode == 0, done.stderr
    assert f"on {devices} cpu device{'s'[: devices > 1]} ({parallel})" in done.stdout
    names = "loss", "top1", "top5"
    rows = [[row[name] for name in names] for row in read_metrics(workdir)]
    return done.stdout, np.array(rows)


@pytest.fixture(scope="module")
def on_four(command, tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("four") / "run"
    return train_on(command, workdir, 4, "pmap", f"--config={tiny_config}")[1]


@pytest.fixture(scope="module")
def on_one(command, tiny_config, tmp_path_factory):
    """One device, and a last printed line with modules that were loaded."""
    folder = tmp_path_factory.mktemp("one")
    script = folder / "train_and_look.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
code = train.main(sys.argv[1:])
print([m for m in ("tensorflow", "torch", "resjax.training") if m in sys.modules])
sys.exit(code)
""")
    flag = f"--config={tiny_config}"
    return train_on(command, folder / "run", 1, "pmap", flag, script=script)


@pytest.mark.slow
def test_pmap_and_shard_map_give_the_same_metrics(command, tiny_config, on_four, tmp_path):
    _, metrics = train_on(command, tmp_path, 4, "shard_map", f"--config={tiny_config}")
    assert len(metrics) == 51  # 50 steps and an evaluation
    np.testing.assert_allclose(metrics, on_four, rtol=1e-5)


@pytest.mark.slow
def test_one_device_gives_the_metrics_of_four(on_one, on_four):
    _, metrics = on_one
    # Sums in another order; training amplifies what that changes.
    np.testing.assert_allclose(metrics[:5, 0], on_four[:5, 0], rtol=1e-5)
    np.testing.assert_allclose(metrics[:, 0], on_four[:, 0], rtol=1e-2)


def test_training_loads_neither_tensorflow_nor_torch(on_one):
    printed, _ = on_one
    assert printed.splitlines()[-1] == "['resjax.training']"


@pytest.mark.slow  # a minute
@pytest.mark.long
def test_digits_train_alike_under_pmap_and_shard_map(command, tmp_path):
    flags = "--config.num_epochs=4.46", "--config.log_every_steps=1"
    pmap, shard_map = (
        train_on(command, tmp_path / parallel, 4, parallel, *flags)[1]
        for parallel in ("pmap", "shard_map")
    )
    assert len(pmap) == 51  # 50 steps and an evaluation
    np.testing.assert_allclose(shard_map, pmap, rtol=1e-5)


@pytest.mark.slow  # two whole runs
def test_the_default_command_learns_the_digits_and_twice_the_same(command, tmp_path):
    states = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        done = command("train.py", cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        workdir = folder / "runs" / "digits"
        assert rows(workdir, "test")[-1]["top1"] >= 98.0
        states.append(saved(workdir, 337))
    jax.tree.map(np.testing.assert_array_equal, *states)
