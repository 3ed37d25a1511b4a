"""The page of a net: what stands on it is what the net says of what is shown."""

import numpy as np
import pytest
from conftest import random_variables
from PIL import Image

import resjax
from resjax import convert
from resjax.config import Config, DataConfig, ModelKwargs

SMALL = {
    "digits": Config(
        model="cifar_preact_resnet110",
        model_kwargs=ModelKwargs(stage_sizes=(1, 1), width=4),
        data=DataConfig("digits", image_size=8),
    ),
    "imagenet": Config(
        model="resnet18",
        model_kwargs=ModelKwargs(stage_sizes=(1, 1), width=8),
        dtype="bfloat16",
        num_classes=1000,
        data=DataConfig("imagenet2012", image_size=48),
    ),
}


@pytest.fixture(scope="module", params=SMALL)
def run(request, tmp_path_factory):
    """A workdir of a net with random weights, and it restored: (workdir, run)."""
    workdir = tmp_path_factory.mktemp("seeing") / request.param
    config = SMALL[request.param]
    model = resjax.create_model(
        config.model,
        stage_sizes=(1, 1),
        width=config.model_kwargs.width,
        num_classes=config.num_classes,
    )
    convert.write_checkpoint(workdir, random_variables(model), config)
    return workdir, resjax.restore(workdir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of image files of several sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for i, shape in enumerate([(50, 70, 3), (64, 64, 3), (90, 60)]):
        pixels = random.randint(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder
