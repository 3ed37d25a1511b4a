"""What of the config decides how the data of a run is fed."""

import jax
import pytest

from resjax import build_data
from resjax.config import Config, DataConfig, UsageError


def with_data(batch_size=128, dtype="float32", **fields):
    return Config(batch_size=batch_size, dtype=dtype, data=DataConfig(**fields))


@pytest.mark.parametrize(
    "num_examples, fields, held",
    [
        (1437, {}, True),
        (1437, {"on_device": False}, False),
        (174_762, {"image_size": 32}, True),  # 512 MiB and 1,024 bytes less
        (174_763, {"image_size": 32}, False),
        (174_763, {"image_size": 32, "on_device": True}, True),
        (100, {"name": "imagenet2012"}, False),  # cropped anew each time
        (100, {"name": "imagenet2012", "recipe": "cifar"}, True),
        (100, {"recipe": "goyal"}, False),
    ],
)
def test_small_sets_without_random_crops_are_held_by_the_devices(
    num_examples, fields, held
):
    assert build_data.build_on_device(with_data(**fields), num_examples) is held


@pytest.mark.parametrize(
    "processes, fields, named",
    [(1, {"name": "imagenet2012"}, "crops"), (2, {}, "2 processes")],
)
def test_data_that_cannot_be_on_the_device_is_named(processes, fields, named, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    assert not build_data.build_on_device(with_data(**fields), 100)
    with pytest.raises(UsageError, match=rf"config\.data\.on_device: true, .*{named}"):
        build_data.build_on_device(with_data(on_device=True, **fields), 100)


@pytest.mark.parametrize(
    "backend, asked, dtype, on_device, expected",
    [
        ("cpu", 0, "float32", True, 1),
        ("gpu", 0, "float32", True, 8),
        ("tpu", 0, "bfloat16", True, 8),
        ("gpu", 0, "float16", True, 1),
        ("gpu", 0, "float32", False, 1),
        ("cpu", 5, "float32", True, 5),
        ("gpu", 1, "float32", True, 1),
    ],
)
def test_updates_of_a_dispatch(backend, asked, dtype, on_device, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    config = with_data(steps_per_dispatch=asked, dtype=dtype)
    assert build_data.build_steps_per_dispatch(config, on_device) == expected


@pytest.mark.parametrize("dtype, on_device", [("float32", False), ("float16", True)])
def test_several_updates_a_dispatch_where_each_needs_the_host_are_refused(dtype, on_device):
    config = with_data(steps_per_dispatch=2, dtype=dtype)
    with pytest.raises(
        UsageError, match=r"config\.data\.steps_per_dispatch: 2, but .*0 or 1"
    ):
        build_data.build_steps_per_dispatch(config, on_device)
