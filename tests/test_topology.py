"""One config is one training: on any number of devices, accumulated, on two hosts."""

import contextlib
import json
import shutil
import signal
import socket
import time
from functools import partial

import jax
import numpy as np
import pytest
from etils import epath

import resjax
from resjax import config as configs
from resjax import records

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("topology")]

_SMALL = """
from functools import partial

from resjax.config import CheckpointConfig, Config, NormConfig
from resjax.models.blocks import bottleneck
from resjax.models.resnet import MODELS, ResNet

MODELS["small"] = partial(ResNet, (1,), bottleneck, width=8, downsample=False)


def get_config():
    return Config(
        model="small",
        norm=NormConfig(virtual_batch_size=16),
        batch_size=64,
        lr_per_256=0.05,
        warmup="none",
        num_epochs=1.336,  # 30 steps
        eval_every_epochs=99,  # only at the end
        checkpoint=CheckpointConfig(every_steps=15),
        log_every_steps=1,
    )
"""
HOSTS = "two hosts"
SHARD_MAP, MICROBATCH = "--config.parallel=shard_map", "--config.microbatch=16"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(_SMALL)
    return path


@pytest.fixture(scope="session")
def two_hosts(spawn):
    """two_hosts(script, *flags) -> two processes of one device that find each other.

    `each` gives each a workdir of its own.
    """

    @contextlib.contextmanager
    def start(script, *flags, each=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2")
        own = [[f"--workdir={folder}"] for folder in each] if each else [[], []]
        processes = [
            spawn(script, *flags, *place, f"--process_id={i}", *own[i]) for i in range(2)
        ]
        try:
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()

    return start


def finish(processes):
    """Standard output of all, which must end well."""
    ends = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in ends]


@pytest.fixture(scope="session")
def train(small, command, two_hosts, tmp_path_factory):
    """train(devices, *flags) -> the workdir of a run that went to its end."""

    def run(devices, *flags, workdir=None):
        workdir = workdir or tmp_path_factory.mktemp("run") / "small"
        flags = (f"--config={small}", f"--workdir={workdir}", *flags)
        if devices == HOSTS:
            with two_hosts("train.py", *flags) as processes:
                finish(processes)
        else:
            done = command("train.py", *flags, devices=devices)
            assert done.returncode == 0, done.stderr
        return workdir

    return run


def losses(workdir):
    rows = records.read_metrics(epath.Path(workdir))
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 31))
    return np.array([row["loss"] for row in train])


@pytest.fixture
def final_variables(small):
    """What a run saved last, which holds running statistics that no loss has seen."""
    configs.load_config(small)
    return lambda workdir: resjax.restore(workdir).variables


@pytest.fixture(scope="session")
def one_device(train):
    return train(1)


@pytest.fixture(scope="session")
def eight_devices(train):
    return train(8)


@pytest.fixture(scope="session")
def both_hosts(train):
    return train(HOSTS)


@pytest.fixture
def assert_same(one_device, final_variables):
    def check(workdir):
        found, expected = losses(workdir), losses(one_device)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, *map(final_variables, (workdir, one_device)))

    return check


@pytest.mark.parametrize("runs", ["eight_devices", "both_hosts"])
def test_many_devices_and_hosts_train_as_one_device(runs, assert_same, request):
    assert_same(request.getfixturevalue(runs))


@pytest.mark.parametrize(
    "devices, flags",
    [(2, []), (4, []), (1, [MICROBATCH]), (2, [MICROBATCH, SHARD_MAP]), (8, [SHARD_MAP])],
)
def test_the_training_is_the_same_in_another_way(devices, flags, train, assert_same):
    assert_same(train(devices, *flags))


@pytest.mark.parametrize(
    "flag",
    [
        "--config.norm.virtual_batch_size=8",  # groups as eight devices hold them
        "--config.lr_per_256=0.4",  # the loss divided by the 8 examples of a device
    ],
)
def test_a_broken_rule_would_be_seen(flag, train, one_device):
    broken = losses(train(1, flag))
    assert np.abs(broken / losses(one_device) - 1).max() > 1e-3


@pytest.mark.long
def test_groups_reach_over_hosts(train):
    whole = "--config.norm.virtual_batch_size=0"
    one, two = (losses(train(devices, whole)) for devices in (1, HOSTS))
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("devices, flags", [(1, [MICROBATCH]), (2, [SHARD_MAP]), (4, [])])
def test_eight_devices_go_on_as_fewer(
    devices, flags, train, eight_devices, assert_same, tmp_path
):
    half = shutil.copytree(eight_devices, tmp_path / "small")
    shutil.rmtree(half / "checkpoints" / "30")
    train(devices, *flags, workdir=half)
    assert_same(half)


def test_what_two_hosts_saved_goes_on_as_one(train, both_hosts, assert_same, tmp_path):
    half = shutil.copytree(both_hosts, tmp_path / "small")
    shutil.rmtree(half / "checkpoints" / "30")
    train(1, workdir=half)
    assert_same(half)


@pytest.mark.parametrize("words", [(), ("--scales=8,12", "--details")])
def test_two_hosts_evaluate_each_example_once(
    words, digits_run, command, two_hosts, tmp_path
):
    workdir = shutil.copytree(digits_run.workdir, tmp_path / "digits")
    flags = (f"--workdir={workdir}", "--batch_size=7", *words)
    with two_hosts("eval.py", *flags) as processes:
        main, other = finish(processes)
    results = [line for line in (main + other).splitlines() if line.startswith("{")]
    alone = command("eval.py", *flags)
    expected, result = json.loads(alone.stdout), json.loads(results[0])
    assert len(results) == 1 and result.pop("num_examples") == 360
    for name, digits in (("loss", 1e-5), ("ece", 1e-4)):
        assert result.pop(name) == pytest.approx(expected.pop(name), rel=digits)
    assert result.pop("images_per_second") > 0
    assert result.items() <= expected.items()


@pytest.mark.long
@pytest.mark.parametrize("stopped", [0, 1])
def test_hosts_stop_together_when_one_is_told_to(stopped, small, two_hosts, tmp_path):
    workdir = tmp_path / "small"
    flags = (f"--config={small}", f"--workdir={workdir}", "--config.num_epochs=400")
    flags += ("--config.checkpoint.every_steps=9999",)
    with two_hosts("train.py", *flags) as processes:
        metrics = workdir / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):  # until it trains
            assert processes[0].poll() is None, processes[0].stderr.read()
            time.sleep(0.1)
        processes[stopped].send_signal(signal.SIGTERM)
        ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], ends
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert f"step {step} is saved" in ends[0][0]


def test_hosts_with_a_workdir_each_are_told_so(small, two_hosts, both_hosts, tmp_path):
    folders = [both_hosts, tmp_path / "other"]
    with two_hosts("train.py", f"--config={small}", each=folders) as processes:
        ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], ends
    for (_, err), folder in zip(ends, folders, strict=True):
        assert f"--workdir: {folder}" in err and "one folder" in err


@pytest.mark.long
@pytest.mark.parametrize("runner, killed", [("pmap", 1), ("shard_map", 0)])
def test_a_lost_host_ends_the_run_which_goes_on_when_started_again(
    runner, killed, small, two_hosts, tmp_path
):
    workdir = tmp_path / "small"
    flags = (
        f"--config={small}",
        f"--workdir={workdir}",
        f"--config.parallel={runner}",
        "--config.num_epochs=4.454",  # 100 steps
    )
    with two_hosts("train.py", *flags) as processes:
        while not (workdir / "checkpoints" / "15" / "commit_success.txt").exists():
            assert processes[0].poll() is None, processes[0].stderr.read()
            time.sleep(0.1)
        processes[killed].send_signal(signal.SIGKILL)
        _, err = processes[1 - killed].communicate(timeout=120)
    said = [line for line in err.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and "start all of them again" in said[0]
    # Where process 0 is gone jax has a say, too, and may abort before us.
    assert processes[1 - killed].returncode in (
        (1, -signal.SIGABRT) if killed == 0 else (1,)
    )
    assert killed == 0 or err.strip() == said[0]
    flags += ("--config.checkpoint.every_steps=50",)  # may differ, and takes less time
    with two_hosts("train.py", *flags) as processes:
        main, _ = finish(processes)
    assert "resuming after step" in main and "finished" in main
    assert f"on 2 cpu devices of 2 processes ({runner})" in main
    rows = records.read_metrics(epath.Path(workdir))
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == list(range(1, 101))
