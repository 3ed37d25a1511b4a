"""`python -m resjax.sweep`: members are runs like train.py's, go on, and are compared."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, saved

import resjax
from resjax import build, checkpoint, sweep, training, workdirs
from resjax.config import Config, RunError, UsageError

# One worker runs all that share `swept`.
pytestmark = pytest.mark.xdist_group("sweep")


def read_metrics(workdir):
    return [
        json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def swept(tiny_config, tmp_path_factory, data_dir):
    """Two schemes by two seeds of the tiny net: (folder, flags)."""
    folder = tmp_path_factory.mktemp("sweep")
    flags = [
        f"--config={tiny_config}",
        f"--workdir={folder}",
        "--vary=init=xavier,msra_fan_out",
        "--vary=config.seed=0,1",
        "--config.num_epochs=0.2",
        "--config.model_kwargs.stage_sizes=1,1",
        "--config.eval_every_epochs=0.05",
        "--config.checkpoint.every_steps=8",
        "--config.checkpoint.keep=99",
        "--config.ema_decay=0.9",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        assert sweep.main(flags) == 0
    return folder, flags


def test_a_member_is_the_run_that_train_makes_of_its_config(swept, tmp_path):
    folder, flags = swept
    members, _ = sweep.plan(
        None, sweep.parse_vary(["init=xavier", "seed=1"]), *plan_of(flags)
    )
    (member,) = members
    assert member.workdir == folder / "init=xavier,seed=1"
    assert training.train(member.config, tmp_path) == 0
    steps = checkpoint.list_steps(member.workdir)
    assert steps == checkpoint.list_steps(tmp_path)
    ours, own = read_metrics(member.workdir), read_metrics(tmp_path)
    evaluated = {row["step"] for row in ours if row["split"] == "test"}
    assert {8, 16} < set(steps) and not evaluated < set(steps)  # those that were the best
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in own
    ]
    for a, b in zip(ours, own, strict=True):
        assert set(b) - set(a) <= {"data_wait"}
        for name in ("epoch", "loss", "top1", "top5", "lr"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    step = max(row["step"] for row in own)
    for item in ("variables", "optimizer"):
        a, b = saved(member.workdir, step, item), saved(tmp_path, step, item)
        assert set(a) == set(b)
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert training.train(member.config, member.workdir) == 0  # finished, for train.py, too


def plan_of(flags):
    """config_file, words and workdir of `plan` from the flags of the command."""
    config, workdir = (flag.partition("=")[2] for flag in flags[:2])
    return Path(config), [flag for flag in flags if flag.startswith("--config.")], workdir


def test_the_table_the_csv_and_the_picture_are_of_all_runs(swept, capsys):
    folder, flags = swept
    assert sweep.main(flags) == 0  # nothing is trained again
    out = capsys.readouterr().out
    assert "4 of 4 runs are finished" in out and "at once" not in out
    one, two = csv.DictReader((folder / "compare.csv").read_text().splitlines())
    assert (one["init"], two["init"], one["seeds"]) == ("xavier", "msra_fan_out", "0 1")
    errors = []
    for seed in (0, 1):
        rows = read_metrics(folder / f"init=msra_fan_out,seed={seed}")
        errors.append([100 - row["top1"] for row in rows if row["split"] == "test"][-1])
    assert float(two["error"]) == pytest.approx(np.mean(errors))
    assert float(two["error_std"]) == pytest.approx(np.std(errors, ddof=1))
    assert f"{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}" in out
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_member_opens_like_any_run(swept):
    folder, _ = swept
    run = resjax.restore(folder / "init=xavier,seed=0")
    rows = read_metrics(folder / "init=xavier,seed=0")
    tests = [row for row in rows if row["split"] == "test"]
    assert run.evaluation == tests[-1] and run.config.seed == 0
    averaged = resjax.restore(folder / "init=xavier,seed=0", ema=True)
    tests = [row for row in rows if row["split"] == "test_ema"]
    assert averaged.evaluation == tests[-1] and averaged.step == run.step
    assert run.predict(np.zeros((8, 8, 3), np.uint8)).shape == (1, 10)


@pytest.mark.slow
@pytest.mark.long
def test_one_more_value_trains_what_is_missing_alone(swept, capsys, tmp_path):
    _, flags = swept
    folder = tmp_path / "more"
    flags = [flags[0], f"--workdir={folder}", *flags[4:], "--vary=seed=0"]
    assert sweep.main(flags) == 0
    before = (folder / "seed=0" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert sweep.main([*flags[:-1], "--vary=seed=0,1"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 runs are finished" in out and "1 at once: seed=1" in out
    assert (folder / "seed=0" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_runs_that_diverge_are_a_row_of_the_table_and_stop_nobody(swept, capsys, tmp_path):
    _, flags = swept
    flags = [
        flags[0],
        f"--workdir={tmp_path}",
        "--config.num_epochs=0.3",
        "--config.eval_every_epochs=0.1",
        "--config.norm.kind=none",
        "--vary=lr_per_256=1e30,0.1",
        "--vary=seed=0,1",
    ]
    assert sweep.main(flags) == 0
    out = capsys.readouterr().out
    assert "2 diverged" in out
    row = next(line for line in out.splitlines() if line.startswith("lr_per_256=1e+30"))
    assert row.split()[2:5] == ["100.00", "+-", "0.00"] and row.split()[-1] == "nan"
    workdirs = {path.name: path for path in tmp_path.iterdir() if path.is_dir()}
    lost, whole = workdirs["lr_per_256=1e30,seed=0"], workdirs["lr_per_256=0.1,seed=0"]
    last = read_metrics(lost)[-1]
    assert last["loss"] is None and last["top1"] == 0
    assert not list(lost.glob("checkpoints/*/state"))
    # One whose last checkpoint is gone makes it again, from the one before it.
    steps = sorted(int(path.parent.name) for path in whole.glob("checkpoints/*/state"))
    before = saved(whole, steps[-1])
    for name in workdirs:
        if name != "lr_per_256=0.1,seed=1":
            shutil.rmtree(
                workdirs[name] / "checkpoints" / str(steps[-1]), ignore_errors=True
            )
        rows = (workdirs[name] / "metrics.jsonl").read_text().splitlines()[:-2]
        (workdirs[name] / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert sweep.main(flags) == 0
    out = capsys.readouterr().out
    assert "3 at once" in out and f"after step {steps[-2]}," in out
    assert f"after step {steps[-1]}," in out  # saved, but its evaluation is not written
    assert all(
        (before[name] == again).all() for name, again in saved(whole, steps[-1]).items()
    )


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["--vary", "FIELD=VALUE", "COMPARISON"]),
        (["dept"], ["COMPARISON", "'dept'", "depth"]),
        (["--vary", "sed=1"], ["--vary", "'sed'", "seed"]),
        (["--vary", "seed"], ["--vary seed", "seed=VALUE"]),
        (["--vary", "seed=0,0"], ["seed=0", "one run"]),
        (
            ["--vary", "lr_per_256=0.1,0.10"],
            ["lr_per_256=0.10", "lr_per_256=0.1", "one run"],
        ),
        (["--vary", "init_from=runs/a,runs-a"], ["init_from=runs-a", "one workdir"]),
        (["--vary", "parallel=pmap,shard_map"], ["parallel", "changes no number"]),
        (
            ["--vary", "seed=0", "--config.seed=1"],
            ["config.seed", "varies", "--vary seed="],
        ),
        (["bn", "--config.init=xavier"], ["config.init", "msra_fan_in in bn"]),
        (["bn", "--vary", "init=xavier"], ["config.init", "msra_fan_in in bn"]),
        # The last of them, before the first is trained.
        (["--vary", "model=cifar_resnet20,resnet51"], ["model", "'resnet51'"]),
        (
            [
                "--vary=model=cifar_resnet20,cifar_plain20",
                "--config.init=msra_fan_out_zero_gamma",
            ],
            ["config.init=msra_fan_out_zero_gamma", "cifar_plain20"],
        ),
        (["depth", "--config=configs/imagenet_resnet50.py"], ["depth", "224", "64"]),
        (["--vary", "seed=0", "--vary", "seed=1"], ["seed=1", "twice"]),
        (["--vary", "seed=0,-1"], ["config.seed", "-1"]),
        (["--vary", "model=resnet51"], ["model", "'resnet51'", "resnet50"]),
        (["--vary", "init=xaver"], ["init", "'xaver'", "xavier"]),
        (["--vary", "model_kwargs.stage_sizes=(1,0)"], ["stage_sizes", "(1, 0)"]),
        (["--vary", "seed=0", "--config.modl=x"], ["config", "'modl'", "model"]),
        (["--vary", "seed=0", "--workdir="], ["workdir", "empty"]),
        (["--vary", "seed=0", "--config=nothing.py"], ["--config", "nothing.py"]),
        (["--vary", "seed=0", "stray=1"], ["COMPARISON", "'stray=1'"]),
        (
            ["--vary", "drop_epochs=10,20"],
            ["config.drop_epochs", "no run reads it", "config.schedule=step"],
        ),
        (
            ["--vary=warmup_epochs=1,2", "--config.warmup=goyal"],
            ["config.warmup_epochs", "no run reads it", "config.batch_size over 256"],
        ),
    ],
)
def test_a_mistake_is_one_line(flags, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if not any(flag.startswith("--workdir") for flag in flags):
        flags = [*flags, f"--workdir={tmp_path / 'new'}"]
    with pytest.raises(UsageError) as error:
        sweep.main(flags)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_sweep_of_the_digits_can_be_planned_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members, folder = sweep.plan("depth", {})
    assert members[0].config.data.name == "digits" and str(folder) == "runs/sweep_depth"


def test_a_field_may_vary_that_some_of_the_runs_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["drop_epochs=10,20", "schedule=cosine,step"]
    assert len(sweep.plan(None, sweep.parse_vary(words))[0]) == 4


@pytest.fixture
def half_done(swept, tmp_path):
    """Flags of the sweep in a copy of its folder, without the last checkpoints."""
    folder, (config, _, *flags) = swept
    for workdir in shutil.copytree(folder, tmp_path / "copy").glob("*/"):
        shutil.rmtree(workdir / "checkpoints" / str(checkpoint.list_steps(workdir)[-1]))
    return [config, f"--workdir={tmp_path / 'copy'}", *flags]


def test_a_sweep_does_not_go_on_with_other_data(half_done, monkeypatch):
    build_record = build.build_record

    def one_less(config, derived, class_names):
        return build_record(config, {**derived, "num_examples": 1436}, class_names)

    monkeypatch.setattr(build, "build_record", one_less)
    with pytest.raises(UsageError, match=r"1,436 training examples.* trained on 1,437"):
        sweep.main(half_done)


def test_a_sweep_does_not_go_on_where_another_has_just_written(half_done, monkeypatch):
    make_workdir = workdirs.make_workdir

    def beside_another(workdir):
        steps = workdir / "checkpoints"
        last = checkpoint.list_steps(workdir)[-1]
        shutil.copytree(steps / str(last), steps / str(last + 1))
        make_workdir(workdir)

    monkeypatch.setattr(workdirs, "make_workdir", beside_another)
    with pytest.raises(UsageError, match="another run has just written"):
        sweep.main(half_done)


@pytest.mark.slow
def test_a_full_disk_ends_a_sweep_in_one_line(half_done, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweep.checkpoint_writer, "save", full)
    with pytest.raises(RunError, match="No space left on device; the same command"):
        sweep.main(half_done)


@pytest.mark.parametrize(
    "sizes, cores, devices", [([128], 6, 4), ([8, 128], 12, 8), ([96], 6, 6), ([5], 2, 1)]
)
def test_a_core_is_a_device_if_every_minibatch_can_be_divided(
    sizes, cores, devices, monkeypatch, tmp_path
):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(sweep, "num_cores", lambda: cores)
    found = {}
    monkeypatch.setattr(sweep.jax.config, "update", found.__setitem__)
    sweep.use_all_cores([sweep.Member(tmp_path, Config(batch_size=n)) for n in sizes])
    assert found == {"jax_num_cpu_devices": devices}


def test_a_workdir_of_another_config_is_left_alone(swept):
    folder, flags = swept
    with pytest.raises(UsageError, match=r"another config: config\.weight_decay"):
        sweep.main([*flags, "--config.weight_decay=0.5"])
    assert json.loads((folder / "init=xavier,seed=0" / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_that_is_stopped_saves_and_goes_on_bitwise_with_more_seeds(
    swept, spawn, command, tmp_path
):
    _, flags = swept
    flags = [
        flags[0],
        flags[2],
        "--config.num_epochs=6",
        "--config.eval_every_epochs=3",
        "--config.checkpoint.every_steps=500",
        "--config.checkpoint.keep=9",
        "--config.ema_decay=0.99",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first, more = "--vary=seed=0,1", "--vary=seed=0,1,2"
    done = command("-m", "resjax.sweep", *flags, more, f"--workdir={whole}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    last = [*flags, f"--workdir={stopped}"]
    with spawn("-m", "resjax.sweep", *last, first, cwd=ROOT) as process:
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    steps = {
        max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        for workdir in stopped.glob("*/")
    }
    (step,) = steps
    assert 269 < step < 500  # where nothing else would have saved
    done = command("-m", "resjax.sweep", *last, more, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "4 at once: init=xavier,seed=0 ... init=msra_fan_out,seed=1" in done.stdout
    assert f"after step {step}," in done.stdout and "from the start," in done.stdout
    for workdir in whole.glob("*/"):
        other = stopped / workdir.name
        rows, again = (
            [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
            for rows in (read_metrics(workdir), read_metrics(other))
        )
        assert rows == again
        assert checkpoint.list_steps(workdir) == [269, 500, 539]  # 269 was the best, once
        for step in (500, max(row["step"] for row in rows)):
            for item in ("variables", "optimizer"):
                a, b = saved(workdir, step, item), saved(other, step, item)
                assert all((a[name] == b[name]).all() for name in a)
