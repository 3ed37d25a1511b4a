"""What the benchmarks of speed time is what they say, and what they print is arithmetic."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import jax
import pytest
from conftest import ROOT
from jax import numpy as jnp

import resjax
from benchmarks import contenders, turns
from resjax.config import UsageError
from resjax.models import resnet

SPEC = {
    "task": "train",
    "model": "cifar_resnet20",
    "batch_size": 4,
    "image_size": 16,
    "dtype": "float32",
    "virtual_batch_size": 0,
    "flax_example": None,
}
SCRIPTS = ("train_step", "inference", "memory", "compile_time", "cifar_epoch")


@pytest.mark.parametrize("name", [*SCRIPTS, "dispatch_overhead"])
def test_the_help_has_an_example(name, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    assert f"python -m benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--contenders", "tensorflow"], "--contenders: 'tensorflow' is not one of resjax"),
        (["--rounds=0"], "--rounds: 0 is not 1 or more"),
        (["--batch_size", "32", "0"], "--batch_size: 0 is not 1 or more"),
        (
            ["--batch_size=32", "--virtual_batch_size=24"],
            "--virtual_batch_size: 24 does not divide 32 images",
        ),
        (["--json=nowhere/x.json"], "--json: there is no folder nowhere"),
        (["--models", "resnet5"], "--models: there is no 'resnet5'; did you mean"),
    ],
)
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_user_gets_wrong_is_one_line(name, words, said):
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(UsageError) as error:
        script.main(words)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.long
def test_two_contenders_take_turns(tmp_path):
    path = tmp_path / "times.json"
    words = ["--models", "cifar_resnet20", "--batch_size=4", "--image_size=16"]
    words += ["--rounds=2", "--contenders", "resjax", "flax modules", "flax example"]
    command = [sys.executable, "-m", "benchmarks.train_step", *words, f"--json={path}"]
    one_device = {**os.environ, "XLA_FLAGS": ""}
    pipes = {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=one_device, **pipes)
    assert not done.returncode, done.stderr
    assert "flax example: --flax_example=DIR says where it is (skipped)" in done.stdout
    (results,) = json.loads(path.read_text()).values()
    assert list(results) == ["resjax", "flax modules"]
    for facts in results.values():
        assert len(facts["all_seconds"]) == 2
        assert facts["seconds"] == sum(facts["all_seconds"]) / 2
        assert facts["launch_seconds"] > facts["first_seconds"] > facts["seconds"]
        assert facts["peak_bytes"] > 2**26
    floor = results["resjax"]["floor"]
    macs = resjax.count_macs(resjax.create_model("cifar_resnet20"), 16)
    assert floor["gflop"] == pytest.approx(3 * 2 * 4 * macs / 1e9)


def test_convolutions_read_and_write_what_a_count_by_hand_says():
    model = resjax.create_model("cifar_resnet20", stage_sizes=(1, 1))
    # 16 px: the stem 3 -> 16 and two of 16 -> 16; 8 px: 16 -> 32 from 16 px, 32 -> 32.
    read = 256 * (3 + 16 + 16 + 16) + 64 * 32
    written = 256 * (16 + 16 + 16) + 64 * (32 + 32)
    assert contenders._conv_values(model, 16) == (read, written)


def test_the_net_of_flax_modules_computes_what_resjax_does(monkeypatch):
    monkeypatch.setattr(resnet, "max_pool", resnet.max_pool)  # is put back afterwards
    ours, theirs = contenders._resjax_model(SPEC), contenders._flax_model(SPEC)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = theirs.init(jax.random.key(1), images)
    flat = jax.tree.leaves(ours.init(jax.random.key(1), images)["params"])
    given = jax.tree.leaves(variables["params"])
    assert sorted(a.shape for a in flat) == sorted(a.shape for a in given)

    def strip(tree):
        if not isinstance(tree, dict):
            return tree
        inner = next((tree[k] for k in ("Conv_0", "BatchNorm_0") if k in tree), None)
        return strip(inner) if inner else {k: strip(v) for k, v in tree.items()}

    own = {name: strip(variables[name]) for name in ("params", "batch_stats")}
    actual, _ = ours.apply(own, images, train=True, mutable=["batch_stats"])
    expected, _ = theirs.apply(variables, images, train=True, mutable=["batch_stats"])
    assert jnp.abs(actual - expected).max() < 1e-4 * jnp.abs(expected).max()


def test_the_commands_of_the_readme_parse(monkeypatch):
    monkeypatch.setattr(turns, "compare_each", lambda *args, **kwargs: [])
    monkeypatch.setattr(turns, "say", lambda text: None)
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python -m benchmarks\.(\w+)(.*)$", text, re.MULTILINE)
    own = [(name, words) for name, words in commands if name in SCRIPTS]
    assert {name for name, _ in own} == set(SCRIPTS)
    for name, words in own:
        script = importlib.import_module(f"benchmarks.{name}")
        assert script.main(shlex.split(words)) == 0
    assert turns.MALLOC in text
