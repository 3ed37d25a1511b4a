"""A run that was interrupted and started again is bitwise the run that was not."""

import dataclasses
import json
import shutil
import signal
import time
from functools import partial

import jax
import numpy as np
import pytest
from conftest import saved
from flax import traverse_util

from resjax import build, training
from resjax import config as configs
from resjax.config import UsageError

# One worker runs all that share the uninterrupted runs.
pytestmark = pytest.mark.xdist_group("resume")

NUM_STEPS = 5  # of 320 examples; an epoch of 1,437 ends within the last


def read_metrics(workdir):
    return [
        json.loads(line)
        for line in (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    ]


def without_speed(records):
    timings = "images_per_second", "data_wait"
    return [{k: v for k, v in r.items() if k not in timings} for r in records]


def saved_state(workdir, step):
    """All arrays of a checkpoint: parameters, statistics, and those of the optimizer."""
    variables, optimizer = (saved(workdir, step, i) for i in ("variables", "optimizer"))
    kinds = {name.split("/")[0] for name in variables}
    assert kinds == {"params", "batch_stats"} and optimizer["step"] == step
    assert len(optimizer) > len([name for name in variables if name.startswith("params")])
    return variables | optimizer


def assert_same_run(workdir, expected, step):
    """Bitwise the same state, and each record once, the same but for the speed."""
    found, wanted = saved_state(workdir, step), saved_state(expected, step)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert all(found[name].dtype == wanted[name].dtype for name in wanted)
    found, wanted = (without_speed(read_metrics(run)) for run in (workdir, expected))
    assert len({(record["step"], record["split"]) for record in found}) == len(found)
    assert found == wanted


# --- in this process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_config):
    words = (
        "--config.batch_size=320",
        f"--config.num_epochs={NUM_STEPS * 320 / 1437}",
        "--config.eval_every_epochs=0.6",  # after steps 3 and 5
        "--config.dtype=float16",  # its loss scale is part of the state
        "--config.ema_decay=0.9",  # and so are averages
        "--config.label_smoothing=0.1",
        "--config.head_lr_multiplier=2",
    )
    return configs.override(configs.load_config(tiny_config), words)


@pytest.fixture(scope="module")
def uninterrupted(config, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    words = (
        "--config.checkpoint.every_steps=1",
        "--config.checkpoint.keep=9",
        f"--config.data.dir={data_dir}",  # this fixture is older than the environment
    )
    assert training.train(configs.override(config, words), workdir) == 0
    for split in ("test", "test_ema"):
        assert {r["step"] for r in read_metrics(workdir) if r["split"] == split} == {3, 5}
    averages = {name for name in saved_state(workdir, 5) if name.startswith("ema/")}
    assert averages == {f"ema/{name}" for name in saved(workdir, 5)}
    return workdir


def killed_after(step, run, workdir):
    """The workdir as SIGKILL leaves it just before the checkpoint after `step`."""
    shutil.copytree(run, workdir)
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    records = [r for r in read_metrics(workdir) if r["step"] <= step + 1]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (workdir / "metrics.jsonl").write_text(text + '{"step": 4, "epo')  # cut off in a line
    return workdir


@pytest.mark.parametrize(
    "step",
    [pytest.param(s, marks=[pytest.mark.slow] * (s % 2)) for s in range(1, NUM_STEPS)],
)
def test_a_run_killed_after_any_step_ends_as_if_it_was_not(
    config, uninterrupted, tmp_path, step, capsys
):
    workdir = killed_after(step, uninterrupted, tmp_path / "run")
    assert training.train(config, workdir) == 0
    assert f"resuming after step {step}," in capsys.readouterr().out
    assert_same_run(workdir, uninterrupted, NUM_STEPS)


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    config, uninterrupted, tmp_path, capsys
):
    workdir = killed_after(0, uninterrupted, tmp_path / "run")
    assert training.train(config, workdir) == 0
    assert "from the start," in capsys.readouterr().out
    assert_same_run(workdir, uninterrupted, NUM_STEPS)


def test_the_seed_decides_the_parameters(config):
    first, again, other = (
        build.build_run(dataclasses.replace(config, seed=seed)).init_state().params
        for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for name in ("stem/conv", "stage1/block1/conv2", "head"):
        ours, theirs = (
            traverse_util.flatten_dict(params, sep="/")[f"{name}/kernel"]
            for params in (first, other)
        )
        assert np.abs(ours - theirs).max() > 0.01


@pytest.mark.slow
def test_fields_that_cannot_change_the_numbers_may_differ(
    config, uninterrupted, data_dir, tmp_path
):
    workdir = killed_after(NUM_STEPS - 1, uninterrupted, tmp_path / "run")
    shutil.copytree(data_dir / "digits", tmp_path / "moved" / "digits")
    words = (
        "--config.parallel=shard_map",
        "--config.log_every_steps=5",
        f"--config.data.dir={tmp_path / 'moved'}",
        "--config.data.on_device=false",
        "--config.data.num_threads=1",
        "--config.data.prefetch=1",
        "--config.data.skip_errors=3",
        "--config.checkpoint.every_steps=3",
        "--config.checkpoint.keep=1",
    )
    assert training.train(configs.override(config, words), workdir) == 0
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(NUM_STEPS)]
    found, wanted = (saved_state(run, NUM_STEPS) for run in (workdir, uninterrupted))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, wanted)


@pytest.mark.parametrize(
    "word",
    [
        "seed=1",
        "batch_size=160",
        "num_epochs=2",
        "dtype=bfloat16",
        "norm.virtual_batch_size=4",
        "label_smoothing=0",
        "ema_decay=0",
        "head_lr_multiplier=1",
    ],
)
def test_any_other_field_stops_a_resume(config, uninterrupted, word):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match=rf"config\.{word.split('=')[0]} was .* --workdir"):
        training.train(configs.override(config, [f"--config.{word}"]), uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


# --- the command, stopped by signals ------------------------------------------------

LAST_STEP = 200
LONG_RUN = f"--config.num_epochs={LAST_STEP * 16 / 1437}"


def latest_step(workdir):
    return max(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def stop_after(process, workdir, step, signum):
    """Sends a signal when the records have come to a step; returns what was printed."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") > step:
            process.send_signal(signum)
            break
        time.sleep(0.01)
    out, err = process.communicate()
    assert err == ""
    return out


@pytest.fixture(scope="module")
def long_run(command, tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("long") / "run"
    done = command("train.py", f"--config={tiny_config}", LONG_RUN, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert latest_step(workdir) == LAST_STEP
    return workdir


@pytest.mark.slow  # half a minute
def test_a_run_stopped_by_every_signal_ends_as_if_it_was_not(
    command, spawn, tiny_config, long_run, tmp_path
):
    workdir = tmp_path / "run"
    flags = f"--config={tiny_config}", LONG_RUN, f"--workdir={workdir}"

    first = spawn("train.py", *flags)
    out = stop_after(first, workdir, 20, signal.SIGTERM)
    assert first.returncode == 128 + signal.SIGTERM
    saved = latest_step(workdir)
    assert out.splitlines()[-1] == f"stopped by signal 15; step {saved} is saved"
    assert 20 < saved < LAST_STEP

    second = spawn("train.py", *flags)
    out = stop_after(second, workdir, saved + 20, signal.SIGINT)
    assert f"resuming after step {saved}," in out
    assert second.returncode == 128 + signal.SIGINT
    saved = latest_step(workdir)
    assert out.splitlines()[-1] == f"stopped by signal 2; step {saved} is saved"

    third = spawn("train.py", *flags, "--config.checkpoint.every_steps=5")
    out = stop_after(third, workdir, saved + 20, signal.SIGKILL)
    assert f"resuming after step {saved}," in out
    assert third.returncode == -signal.SIGKILL
    assert saved < latest_step(workdir) < LAST_STEP
    saved = latest_step(workdir)

    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {saved}," in done.stdout
    assert_same_run(workdir, long_run, LAST_STEP)
