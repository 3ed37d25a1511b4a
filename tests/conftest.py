"""Shared by all tests: eight forced CPU devices, a data folder, and the two commands."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
_FORCED = "--xla_force_host_platform_device_count"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{_FORCED}=8"  # before the first import of jax
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # whose threads wait for each other on busy cores

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

_TINY = """
from functools import partial

from resjax.config import Config
from resjax.models.blocks import basic
from resjax.models.resnet import MODELS, ResNet

MODELS["tiny"] = partial(
    ResNet, (1,), basic, width=8, downsample=False, shortcut="A"
)


def get_config():
    return Config(
        model="tiny",
        batch_size=16,
        warmup="none",
        num_epochs=0.557,  # 50 steps
        eval_every_epochs=99,  # only at the end
        log_every_steps=1,
    )
"""


def pytest_addoption(parser):
    parser.addoption(
        "--one-row", action="store_true", help="of a parametrised test only the first row"
    )


@pytest.hookimpl(trylast=True)  # after those that -m leaves out
def pytest_collection_modifyitems(config, items):
    if config.getoption("--one-row"):
        firsts = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        others = [item for item in items if item not in firsts.values()]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def saved(workdir, step, item="variables"):
    """The arrays of a checkpoint by their names, as any reader of safetensors sees them."""
    return load_file(workdir / "checkpoints" / str(step) / "state" / f"{item}.safetensors")


def random_variables(model):
    """Variables of a model, no leaf a default; activations neither vanish nor explode."""
    import jax

    rng = np.random.RandomState(1)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        std = np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return (std * rng.randn(*leaf.shape)).astype(np.float32)

    images = np.zeros((2, 8, 8, 3), np.float32)
    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), images))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of tfds data sets that the whole session shares; digits prepare into it."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(autouse=True)
def _use_data_dir(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


@pytest.fixture(scope="module", autouse=True)
def _keep_models():
    """Each module finds resjax's models alone; a loaded config file may add its own."""
    from resjax.models.resnet import MODELS

    with mock.patch.dict(MODELS):
        yield


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory):
    """What one process or test compiled is not compiled again; nothing in one's home is."""
    import jax

    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))  # of the processes that tests start
        yield


@pytest.fixture(scope="session")
def spawn(data_dir, tmp_path_factory):
    """spawn("train.py", "--flag=...", devices=4) -> the process, running.

    `script` may be "-m", and a module's name follow. It runs in a folder of its own, as a
    user would, with the interpreter of the tests. `variables` are of its environment; those
    that are None are not.
    """

    def start(script, *flags, devices=1, cwd=None, variables=None):
        environment = {
            **os.environ,
            "XLA_FLAGS": f"{_FORCED}={devices}",
            "TFDS_DATA_DIR": str(data_dir),
            **(variables or {}),
        }
        return subprocess.Popen(
            [sys.executable, script if script == "-m" else ROOT / script, *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd or tmp_path_factory.mktemp("cwd"),
            env={name: value for name, value in environment.items() if value is not None},
        )

    return start


@pytest.fixture(scope="session")
def command(spawn):
    """command("train.py", "--flag=...", devices=4) -> the process, finished."""

    def run(script, *flags, **kwargs):
        with spawn(script, *flags, **kwargs) as process:
            out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """A config file that adds a four-layer model: for properties of runs, not of models."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(_TINY)
    return path


@pytest.fixture(scope="session")
def digits_run(command, tmp_path_factory):
    """ResNet-20 after 22 steps on digits and four devices: .workdir .flags .done.

    Shared: read it, and copy the workdir to write in it.
    """
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    flags = (
        f"--workdir={workdir}",
        "--config.num_epochs=2",
        "--config.warmup_epochs=0.5",
        "--config.eval_every_epochs=1",
        "--config.log_every_steps=1",
        "--config.checkpoint.every_steps=10",
        "--config.checkpoint.keep=3",
        "--config.checkpoint.best_metric=none",
    )
    done = command("train.py", *flags, devices=4)
    return SimpleNamespace(workdir=workdir, flags=flags, done=done)
