"""The paper's protocol: median of the last epochs, mean and deviation over the seeds."""

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from resjax import config as configs
from resjax import report
from resjax.config import Config, DataConfig, UsageError

NUM_EXAMPLES = 1_437


def evaluated_steps(config, num_examples):
    """{step: epoch as written} of every evaluation that a run of the config makes."""
    per_epoch = num_examples / config.batch_size
    dues = np.arange(1, int(config.num_epochs / config.eval_every_epochs) + 1)
    steps = {round(due * config.eval_every_epochs * per_epoch) for due in dues}
    steps |= {round(config.num_epochs * per_epoch)}
    return {step: round(step / per_epoch, 4) for step in sorted(steps)}


@pytest.fixture
def write_run(tmp_path, monkeypatch):
    """write_run("a", config, top1s) -> its name, in the folder where the test runs.

    `top1s` are those of the evaluations, in order; a run of fewer is not finished.
    """
    monkeypatch.chdir(tmp_path)

    def write(name, config, top1s, num_examples=NUM_EXAMPLES):
        workdir = tmp_path / name
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
        evaluated = evaluated_steps(config, num_examples)
        lines = []
        for (step, epoch), top1 in zip(evaluated.items(), top1s, strict=False):
            where = {"step": step, "epoch": epoch}
            lines.append({**where, "split": "train", "loss": 1 / step, "top1": 10.0})
            lines.append({**where, "split": "test", "loss": 7.0, "top1": float(top1)})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / "metrics.jsonl").write_text(text)
        return name

    return write


def random_top1s(seed, number=10):
    return np.random.default_rng(seed).uniform(60, 70, number)


def test_error_is_the_median_of_five_epochs_and_its_mean_and_deviation(write_run):
    config = Config(num_epochs=50)
    top1s = [random_top1s(seed, 50) for seed in range(3)]
    names = [
        write_run(f"seed{seed}", dataclasses.replace(config, seed=seed), top1s[seed])
        for seed in range(3)
    ]
    (row,) = report.summarize(names)
    medians = [sorted(100 - t for t in top1s[seed][45:])[2] for seed in range(3)]
    mean = sum(medians) / 3
    std = (sum((median - mean) ** 2 for median in medians) / 2) ** 0.5
    np.testing.assert_allclose(row.spread("error"), [mean, std], rtol=1e-12)
    assert [result.num_evaluations for result in row.results] == [5, 5, 5]
    assert row.fields == {"model": "cifar_resnet20", "data.name": "digits"}
    line = report.format_table([row]).splitlines()[1]
    last_step = round(50 * NUM_EXAMPLES / 128)
    assert line.split() == [
        *("model=cifar_resnet20", "data.name=digits", "3"),
        *(f"{mean:.2f}", "+-", f"{std:.2f}", "5"),
        *("90.00", "+-", "0.00", f"{1 / last_step:.4f}"),
    ]


@pytest.mark.parametrize(
    ("num_epochs", "every", "batch_size", "number"),
    [
        (50, 2, 128, 3),  # at 46, 48 and 50
        (90, 0.5, 128, 10),
        (50.3, 1, 128, 6),  # at 46, ..., 50 and 50.3
        (20, 0.5, 128, 4),  # of the last two epochs
        (3, 1, 128, 1),
        (30, 20, 128, 1),
        (12, 12, 10 * NUM_EXAMPLES, 1),  # one step, of 10 epochs
    ],
)
def test_evaluations_that_the_median_is_of_are_counted(
    write_run, num_epochs, every, batch_size, number
):
    config = Config(num_epochs=num_epochs, eval_every_epochs=every, batch_size=batch_size)
    top1s = random_top1s(0, 200)[: len(evaluated_steps(config, NUM_EXAMPLES))]
    (row,) = report.summarize([write_run("run", config, top1s)])
    assert row.spread("error")[0] == pytest.approx(
        np.median(100 - top1s[-number:]), rel=1e-12
    )
    line = report.format_table([row]).splitlines()[1]
    assert line.split()[3:5] == [
        f"{row.spread('error')[0]:.2f}",
        str(number),
    ]  # one seed: no +-


@pytest.mark.parametrize("num_examples", [1_437, 50_000, 1_281_167])
@pytest.mark.parametrize("batch_size", [32, 96, 100, 128, 256])
@pytest.mark.parametrize("num_epochs", [50, 53, 70])
def test_whole_steps_leave_five_epochs_and_show_the_end(
    write_run, num_examples, batch_size, num_epochs
):
    # The same however the last step, and those of whole epochs, are rounded.
    config = Config(num_epochs=num_epochs, batch_size=batch_size)
    top1s = random_top1s(0, num_epochs)
    result = report.read_run(write_run("run", config, top1s, num_examples))
    assert result.num_evaluations == 5
    assert result.error == np.median(100 - top1s[-5:])
    with pytest.raises(report.NotFinishedError):
        report.read_run(write_run("short", config, top1s[:-1], num_examples))


def test_rows_are_named_by_the_fields_in_which_they_differ(write_run):
    base = Config(num_epochs=2, published_error="8.75 +- 0.12")
    large = dataclasses.replace(base, batch_size=256, published_error=None)
    other = dataclasses.replace(large, model="cifar_resnet56", drop_epochs=(1.0, 1.5))
    free = dataclasses.replace(base, seed=1, parallel="shard_map", microbatch=8)
    names = [
        write_run(name, config, [50.0, top1])
        for name, config, top1 in [
            ("large", large, 60.0),
            ("base", base, 80.0),
            ("other", other, 70.0),
            ("free", dataclasses.replace(free, data=DataConfig(dir="elsewhere")), 82.0),
        ]
    ]
    rows = report.summarize(names)
    assert [row.name for row in rows] == [
        "model=cifar_resnet20 batch_size=256 drop_epochs=30.0,60.0,80.0",
        "model=cifar_resnet20 batch_size=128 drop_epochs=30.0,60.0,80.0",
        "model=cifar_resnet56 batch_size=256 drop_epochs=1.0,1.5",
    ]
    for row in rows:  # the name sets the fields again
        words = [f"--config.{word}" for word in row.name.split()]
        config = configs.override(base, words)
        assert not configs.differences(
            dataclasses.replace(config, seed=0),
            dataclasses.replace(row.results[0].config, seed=0),
        )
    head, *lines = report.format_table(rows).splitlines()[:4]
    assert head.endswith("published error")
    assert [line.endswith("8.75 +- 0.12") for line in lines] == [False, True, False]
    assert lines[1].split()[3:7] == ["2", "19.00", "+-", "1.41"]  # of 20 and 18
    assert len({len(line) for line in [head, *lines]}) == 1


def test_unfinished_runs_are_named_and_left_out(write_run, capsys):
    config = Config(num_epochs=4)
    done = write_run("done", config, [60, 70, 80, 90])
    twin = write_run("twin", config, [60, 70, 80])  # the same seed, but it does not count
    (row,) = report.summarize([done, twin])
    assert [str(result.workdir) for result in row.results] == [done]
    line = capsys.readouterr().err
    step = round(3 * NUM_EXAMPLES / 128)
    assert line.count("\n") == 1 and line.startswith("twin ")
    assert f"step {step}," in line and "of 4\n" in line
    empty = write_run("empty", config, [])
    with pytest.raises(UsageError, match="finished"):
        report.summarize([twin, empty])
    assert "empty is left out: not finished, at step 0" in capsys.readouterr().err


def test_a_seed_is_not_counted_twice(write_run):
    config = Config(num_epochs=2, seed=5)
    names = [write_run(name, config, [50, 60]) for name in ("first", "second")]
    with pytest.raises(UsageError, match=r"first and second .*seed=5"):
        report.summarize(names)
    with pytest.raises(UsageError, match="first and first"):
        report.summarize(["first", "first"])


@pytest.fixture
def damaged(write_run, tmp_path):
    config = Config(num_epochs=2)
    for name in ("good", "line", "record", "number", "config", "field"):
        write_run(name, config, [50, 60])
    with (tmp_path / "line" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epo\n')
    (tmp_path / "record" / "metrics.jsonl").write_text('{"split": "test", "step": 3}\n')
    (tmp_path / "number" / "metrics.jsonl").write_text("3\n")
    (tmp_path / "config" / "config.json").write_text('{"batch')
    (tmp_path / "field" / "config.json").write_text('{"batchsize": 3}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], ["RUN"]),
        (["good", "nowhere"], ["no directory nowhere", "'good'"]),
        (["good", "notes/todo.txt"], ["no directory notes/todo.txt", "is a file"]),
        (["notes"], ["notes holds no run", "'todo.txt'"]),
        (["line"], ["line/metrics.jsonl is damaged"]),
        (["record"], ["record/metrics.jsonl is damaged", "'epoch'"]),
        (["number"], ["number/metrics.jsonl is damaged"]),
        (["config"], ["config/config.json"]),
        (["field"], ["field/config.json", "'batchsize'", "batch_size"]),
        (["good", "--csv="], ["--csv", "empty"]),
        (["good", "--csv=nowhere/x.csv"], ["--csv", "nowhere/x.csv"]),
        (["good", "--plot=x.bmpp"], ["--plot", "x.bmpp", "png"]),
        (["good", "--json=x"], ["--json=x"]),
    ],
)
def test_bad_words_of_the_command_are_one_line(
    words, message, damaged, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sys, "argv", ["report.py", *words])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        configs.run_command(report.main)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    for word in message:
        assert word in err
    assert sorted(tmp_path.rglob("*")) == before


def test_csv_holds_the_fields_and_numbers_of_each_row(write_run):
    base = Config(num_epochs=2)
    again = dataclasses.replace(base, seed=1)
    names = [write_run("a", base, [0, 60]), write_run("b", again, [0, 61])]
    other = dataclasses.replace(base, drop_epochs=(1.0, 2.0), published_error="3.57")
    names.append(write_run("other", other, [50, 90]))
    assert report.main([*names, "--csv=table.csv"]) == 0
    with open("table.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["drop_epochs"], second["drop_epochs"]) == ("30.0,60.0,80.0", "1.0,2.0")
    errors = [40, 39]  # of the last tenth
    np.testing.assert_allclose(float(first["error"]), np.mean(errors))
    np.testing.assert_allclose(float(first["error_std"]), np.std(errors, ddof=1))
    assert (first["seeds"], first["workdirs"]) == ("0 1", "a b")
    assert (second["error"], second["error_std"]) == ("10.0", "")
    assert (first["evaluations"], second["evaluations"]) == ("1", "1")
    assert (first["published_error"], second["published_error"]) == ("", "3.57")


def test_plot_draws_mean_and_deviation_of_the_curves(write_run, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    plot, fill = Axes.plot, Axes.fill_between
    monkeypatch.setattr(Axes, "plot", lambda *a, **k: drawn.append(a[1:]) or plot(*a, **k))
    monkeypatch.setattr(
        Axes, "fill_between", lambda *a, **k: drawn.append(a[1:]) or fill(*a, **k)
    )
    config = Config(num_epochs=2)
    for seed, top1s in enumerate([(50, 90), (60, 96)]):
        write_run(f"seed{seed}", dataclasses.replace(config, seed=seed), top1s)
    assert report.main(["seed0", "seed1", "--plot=curves.png"]) == 0
    with open("curves.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    (epochs, mean), (_, low, high) = drawn
    np.testing.assert_allclose(epochs, [1, 2], atol=0.05)
    np.testing.assert_allclose(mean, [45, 7])
    np.testing.assert_allclose(high - mean, [5 * 2**0.5, 3 * 2**0.5])
    np.testing.assert_allclose(mean - low, [5 * 2**0.5, 3 * 2**0.5])


def test_the_command_prints_the_table_of_a_run(command, write_run, tmp_path):
    write_run("run", Config(num_epochs=2), [50, 98.5])
    done = command("-m", "resjax.report", tmp_path / "run", cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[2:5] == ["1", "1.50", "1"]


@pytest.mark.parametrize(
    "num_epochs, losses, mean",
    [
        (2.0, {4: 1.0, 12: 2.0, 20: 3.0}, 0.2 * 2 + 0.8 * 3),  # updates 11 to 20
        (2.0, {20: 3.0}, 3.0),
        (0.5, {2: 1.0, 5: 2.0}, (2 * 1 + 3 * 2) / 5),
    ],
)
def test_training_numbers_are_those_of_the_updates_of_the_last_epoch(
    num_epochs, losses, mean, tmp_path
):
    config = Config(num_epochs=num_epochs, eval_every_epochs=num_epochs)
    rows = [
        {
            "step": step,
            "epoch": step / 10,
            "split": "train",
            "loss": loss,
            "top1": 100 - loss,
        }
        for step, loss in losses.items()
    ]
    rows.append({**rows[-1], "split": "test"})
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = report.read_run(epath.Path(tmp_path))
    assert run.train_loss == pytest.approx(mean) == run.train_error
