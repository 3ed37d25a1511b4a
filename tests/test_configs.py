"""Every file in configs/ loads, builds and says how it is run; every field is read."""

import ast
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from resjax import build
from resjax import config as configs
from resjax.models.resnet import OPTIONS

FILES = sorted((ROOT / "configs").glob("*.py"))
NUM_EXAMPLES = {"digits": 1_437, "cifar10": 50_000, "imagenet2012": 1_281_167}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds_and_says_how_to_run_it(path):
    config = configs.load_config(path)
    module = ast.parse(path.read_text())
    docstring = ast.get_docstring(module)
    assert "python train.py" in docstring
    assert path.stem == "digits" or f"--config=configs/{path.name}" in docstring
    assert len(path.read_text().splitlines()) < 40
    model = build.build_model(config)
    size = config.data.image_size
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (2, config.num_classes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_is_in_the_readme(path):
    assert f"configs/{path.name}" in (ROOT / "README.md").read_text()


def rates_of(name):
    config = configs.load_config(ROOT / "configs" / f"{name}.py")
    num_examples = NUM_EXAMPLES[config.data.name]
    schedule, derived = build.build_schedule(config, num_examples)
    return config, derived["num_steps"], schedule


@pytest.mark.parametrize("name", ["cifar10_resnet20", "cifar10_resnet56"])
def test_cifar_recipe_is_that_of_the_paper(name):
    config, num_steps, rate = rates_of(name)
    assert num_steps == 64_000
    at = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    for step, expected in at.items():
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    assert (config.weight_decay, config.momentum) == (1e-4, 0.9)


def test_resnet110_warms_up_for_400_updates():
    _, num_steps, rate = rates_of("cifar10_resnet110")
    assert num_steps == 64_000
    for step, expected in {0: 0.01, 399: 0.01, 400: 0.1, 32_000: 0.01}.items():
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)


def test_imagenet_recipe_is_the_baseline_of_goyal():
    config, num_steps, rate = rates_of("imagenet_resnet50")
    assert num_steps == round(90 * 1_281_167 / 256)
    for epoch, expected in {0: 0.1, 29.9: 0.1, 30.1: 0.01, 60.1: 1e-3, 80.1: 1e-4}.items():
        step = math.floor(epoch * 1_281_167 / 256)
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)
    assert config.norm.virtual_batch_size == 32
    assert config.init == "msra_fan_out_zero_gamma"


def test_the_8k_recipe_differs_from_the_baseline_in_its_minibatch():
    small, _, _ = rates_of("imagenet_resnet50")
    large, num_steps, rate = rates_of("imagenet_resnet50_8k")
    changed = configs.differences(small, large)
    assert len(changed) == 1 and "batch_size was 256 and is now 8192" in changed[0]
    assert num_steps == round(90 * 1_281_167 / 8192)
    for epoch, expected in {0: 0.1, 5.1: 3.2, 29.9: 3.2, 30.1: 0.32, 80.1: 3.2e-3}.items():
        step = math.floor(epoch * 1_281_167 / 8192)
        np.testing.assert_allclose(rate(step), expected, rtol=1e-6)


# The modules that may read config fields.
DOORS = (
    "build",
    "build_data",
    "build_members",
    "training",
    "sweep",
    "comparisons",
    "build_prediction",
    "run_evaluation",
    "convert",
    "report",
    "config",
)


def test_every_config_field_is_read_and_only_by_the_doors():
    # config.a.b read as an attribute: the last name of a chain that begins with `config`.
    read = set()
    for path in (ROOT / "resjax").rglob("*.py"):
        found = set(re.findall(r"\bconfig\.([a-z_0-9.]+)", strip_strings(path.read_text())))
        found = {name.rstrip(".") for name in found} & set(configs.fields())
        read |= found
        if path.stem not in DOORS:
            assert not found, f"{path.name} reads {found}"
    by_a_loop = {f"model_kwargs.{option}" for option in OPTIONS}
    assert not set(configs.fields()) - read - by_a_loop


def strip_strings(source):
    return re.sub(r'"""(.|\n)*?"""|"[^"\n]*"', "", source)
