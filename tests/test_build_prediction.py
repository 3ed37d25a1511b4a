"""What a protocol makes of a config: batches of how many images, in which shapes."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import random_variables
from tiny_tfds import write_imagenet

from resjax import build, build_data, build_prediction, parallel
from resjax.build_prediction import Protocol
from resjax.config import Config, DataConfig, ModelKwargs, UsageError
from resjax.data import decode

SIZE, N = 28, 13


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder, num_train=1, num_validation=N)
    return Config(
        model="cifar_resnet20",
        model_kwargs=ModelKwargs(stage_sizes=(1,), width=4),
        num_classes=5,
        data=DataConfig("imagenet2012", dir=str(folder), image_size=SIZE),
    )


def predict(config, batch_size, *args, **kwargs):
    model = build.build_model(config)
    protocol = Protocol(*args, **kwargs)
    return build_prediction.build_prediction(config, "test", batch_size, model, protocol)


def shapes_of(start):
    """The shapes of all batches, without the axis of the eight devices."""
    batches = list(start())
    assert all(batch["image"].shape[0] == 8 for batch in batches)
    return [batch["image"].shape[1:] for batch in batches]


def test_the_plain_protocol_has_the_batches_asked_for(config):
    prediction = predict(config, 6)
    ((indices, start),) = prediction.passes
    assert shapes_of(start) == 3 * [(1, SIZE, SIZE, 3)]
    assert indices.tolist() == list(range(N)) and prediction.num_examples == N


@pytest.mark.parametrize(("batch_size", "of_device"), [(240, 2), (80, 1), (3, 1)])
def test_ten_crops_have_no_more_pixels_than_the_plain_batches(
    config, batch_size, of_device
):
    ((indices, start),) = predict(config, batch_size, 10).passes
    assert set(shapes_of(start)) == {(of_device, 5, SIZE, SIZE, 3)}
    assert sorted(indices) == list(range(N))


def test_a_scale_has_a_pass_with_a_batch_for_each_shape(config):
    passes = predict(config, 40, scales=(56, 28)).passes
    assert len(passes) == 2
    first, second = (shapes_of(start) for _, start in passes)
    for shapes, scale in ((first, 56), (second, 28)):  # the largest first
        assert {min(shape[1:3]) for shape in shapes} == {scale}
        pixels = [shape[1] * shape[2] for shape in shapes]
        assert pixels == sorted(pixels, reverse=True)
    for indices, _ in passes:
        assert sorted(indices) == list(range(N))


def test_images_are_read_as_they_are_evaluated(config):
    source = build_data.build_source(config, "test")
    plain, crops = predict(config, 4), predict(config, 4, 10)
    dense = predict(config, 4, scales=(60, 30))
    for i in (1, 4):
        image = decode.decode(source[i]["image"])
        crop = decode.center_crop(image, SIZE)
        for prediction in (plain, crops):
            np.testing.assert_array_equal(prediction.read_image(i), crop)
        whole = dense.read_image(i)
        height, width = whole.shape[:2]
        assert min(height, width) == 30
        np.testing.assert_array_equal(whole, decode.resize(image, height, width))


def test_other_class_names_are_refused(config):
    model, names = build.build_model(config), ["cat", "dog", "cow", "pig", "emu"]
    with pytest.raises(UsageError, match="class 0 is 'n00000000', and was 'cat'"):
        build_prediction.build_prediction(config, "test", 4, model, class_names=names)


def test_hosts_with_images_of_other_sizes_are_refused(config, monkeypatch):
    monkeypatch.setattr(build_prediction.hosts, "is_same", lambda number: False)
    with pytest.raises(UsageError, match="images of other sizes"):
        predict(config, 4, scales=(28,))


@pytest.mark.parametrize("runner", ["pmap", "shard_map"])
def test_the_step_runs_in_both_ways(config, runner):
    config = dataclasses.replace(config, parallel=runner)
    model = build.build_model(config)
    variables = random_variables(model)
    prediction = predict(config, 16)
    ((_, start),) = prediction.passes
    (batch,) = start()
    found = jax.device_get(prediction.step(parallel.replicate(variables), batch))
    assert found["index"].tolist() == [*range(N), -1, -1, -1]
    assert found["log_probs"].shape == (16, 5)
    np.testing.assert_allclose(np.exp(found["log_probs"]).sum(axis=1), 1, rtol=1e-5)


def test_protocols_say_what_is_not_plain():
    assert Protocol().described == {}
    assert Protocol(10).described == {"crops": 10}
    assert Protocol(scales=(224, 256)).described == {"scales": [224, 256]}
