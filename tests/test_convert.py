"""`python -m resjax.convert` makes a workdir that opens like that of a run."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

import resjax

pytestmark = pytest.mark.xdist_group("converted")
NAME = "cifar_resnet20"


@pytest.fixture(scope="module")
def variables():
    """With another number in every place."""
    model = resjax.create_model(NAME)
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.float32(random.uniform(0.1, 0.9, leaf.shape)),
        resjax.init(model, jax.random.key(0)),
    )


@pytest.fixture(scope="module")
def weights(variables, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(resjax.to_torch(variables, NAME), path)
    return path


@pytest.fixture(scope="module")
def convert_command(command):
    return partial(command, "-m", "resjax.convert", cwd=ROOT)


@pytest.fixture(scope="module")
def converted(convert_command, weights, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("converted") / "run"
    done = convert_command(weights, f"--model={NAME}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def test_a_converted_workdir_predicts_as_the_weights_do(converted, variables):
    run = resjax.restore(converted)
    assert run.step == 0
    assert (run.config.model, run.config.data.name) == (NAME, "cifar10")
    assert len(run.class_names) == 10
    images = np.float32(np.random.default_rng(1).standard_normal((2, 32, 32, 3)))
    model = resjax.create_model(NAME)
    logits = model.apply(variables, images)
    np.testing.assert_allclose(run.predict(images), jax.nn.softmax(logits), atol=1e-6)


def test_a_converted_workdir_is_not_trained_further(converted, command, tmp_path):
    before = sorted(converted.rglob("*"))
    config = tmp_path / "config.py"
    config.write_text(
        "import json, pathlib\n"
        "from resjax import config\n"
        f"path = pathlib.Path({str(converted / 'config.json')!r})\n"
        "get_config = lambda: config.from_dict(json.loads(path.read_text()))\n"
    )
    same = command("train.py", f"--config={config}", f"--workdir={converted}")
    assert (same.returncode, same.stdout.count("\n")) == (0, 1), same.stderr
    assert "finished: step 0 of 0" in same.stdout
    other = command("train.py", f"--workdir={converted}")  # digits
    assert (other.returncode, other.stderr.count("\n")) == (2, 1), other.stderr
    assert sorted(converted.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=resnet50"], "do not fit resnet50"),
        ([], "--model"),
        ([f"--model={NAME}", "--config.nothing=1"], "nothing"),
        ([f"--model={NAME}", "--config.num_classes=3"], "num_classes: 3, but"),
        ([f"--model={NAME}", "--workdir=FULL"], "not empty"),
        ([f"--model={NAME}", "--workdir=FILE"], "not empty"),
    ],
)
def test_bad_words_of_the_command_are_one_line(
    words, message, convert_command, weights, converted, tmp_path
):
    words = [word.replace("FULL", str(converted)) for word in words]
    words = [word.replace("FILE", str(weights)) for word in words]
    if not any(word.startswith("--workdir") for word in words):
        words.append(f"--workdir={tmp_path / 'run'}")
    done = convert_command(weights, *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
