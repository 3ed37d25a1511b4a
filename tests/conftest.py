"""Shared by all tests: eight forced CPU devices, a data folder, and the two commands."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_FORCED = "--xla_force_host_platform_device_count"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{_FORCED}=8"  # before the first import of jax

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder of tfds data sets that the whole session shares; digits prepare into it."""
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(autouse=True)
def _use_data_dir(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


@pytest.fixture
def command(data_dir, tmp_path):
    """command("train.py", "--flag=...", devices=4) -> the finished process, its text kept.

    Runs in an empty folder, as a user would, with the interpreter of the tests.
    """

    def run(script, *flags, devices=1, **kwargs):
        environment = {**os.environ, "XLA_FLAGS": f"{_FORCED}={devices}"}
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, flags)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            **kwargs,
        )

    return run
