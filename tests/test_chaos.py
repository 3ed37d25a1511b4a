"""Runs of train.py killed at random moments and started again, each as if it was not."""

import contextlib
import signal
import subprocess

import numpy as np
import pytest
from test_resume import assert_same_run

# One worker runs all that share the two references.
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.xdist_group("chaos")]

NUM_STEPS = 28
FLAGS = (
    f"--config.num_epochs={NUM_STEPS * 128 / 1437}",
    "--config.eval_every_epochs=0.6",  # an evaluation every 7 steps
    "--config.log_every_steps=3",  # windows that end between two checkpoints
    "--config.checkpoint.every_steps=2",
    "--config.checkpoint.keep=3",
)

# A config file whose runs take a second to write a checkpoint, file after file.
SLOW_WRITER = """
import time
from resjax import checkpoint
from configs.digits import get_config

to_files = checkpoint.to_files


class Slow(dict):
    def items(self):
        for name, content in super().items():
            yield name, content[: len(content) // 2]  # then written again, in full
            time.sleep(0.2)
            yield name, content
            time.sleep(0.2)


checkpoint.to_files = lambda record, arrays: Slow(to_files(record, arrays))
"""


@pytest.fixture(scope="module")
def reference(command, tmp_path_factory):
    """reference(devices) -> the workdir of a run that nobody stopped."""
    done = {}

    def run(devices):
        if devices not in done:
            done[devices] = tmp_path_factory.mktemp("reference") / "run"
            words = *FLAGS, f"--workdir={done[devices]}"
            finished = command("train.py", *words, devices=devices)
            assert (finished.returncode, finished.stderr) == (0, "")
        return done[devices]

    return run


def checkpoints(workdir):
    return sorted(path.name for path in workdir.glob("checkpoints/*"))


left = []  # in the folders of checkpoints by each kill of a run that writes slowly


@pytest.mark.parametrize("seed", range(25), ids="seed{:02}".format)
def test_a_run_killed_at_a_random_moment_ends_as_if_it_was_not(
    command, spawn, reference, tmp_path, seed
):
    devices = 4 if seed % 5 == 4 else 1
    expected, moments = reference(devices), np.random.RandomState(seed)
    (tmp_path / "slow.py").write_text(SLOW_WRITER)
    slow = seed % 2 == 1
    words = *FLAGS, f"--workdir={tmp_path / 'run'}"
    if slow:
        words = f"--config={tmp_path / 'slow.py'}", *words

    for _ in range(1 + seed % 3):
        with spawn("train.py", *words, devices=devices) as process:
            for line in process.stdout:
                if "compiling" in line:
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0, 20 if slow else 8))
            process.kill()
        if slow and process.returncode == -signal.SIGKILL:
            left.append(checkpoints(tmp_path / "run"))

    done = command("train.py", *FLAGS, f"--workdir={tmp_path / 'run'}", devices=devices)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", expected, NUM_STEPS)
    assert checkpoints(tmp_path / "run") == checkpoints(expected)


def test_some_of_them_were_killed_while_they_wrote():
    assert len(left) < 5 or any("tmp" in name for names in left for name in names)
