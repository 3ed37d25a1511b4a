"""Which runs are trained at once, and that the devices they are on change no number."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import ROOT

from resjax import build_members, parallel
from resjax import config as configs
from resjax.config import DataConfig, UsageError

DIGITS = configs.load_config(ROOT / "configs" / "digits.py")


def variants(**fields):
    return [
        dataclasses.replace(DIGITS, **{name: v}) for name, vs in fields.items() for v in vs
    ]


def test_runs_that_differ_in_arrays_alone_are_trained_at_once():
    together = variants(seed=[1], init=["xavier"], lr_per_256=[0.3], warmup=["none"])
    apart = variants(batch_size=[64], num_epochs=[3.0], model=["cifar_plain20"])
    groups = build_members.group([DIGITS, *apart, *together, apart[0]])
    assert groups == [[0, 4, 5, 6, 7], [1, 8], [2], [3]]


def test_runs_that_need_the_host_are_alone():
    alone = variants(dtype=["float16"], init_from=["runs/x"]) + variants(
        data=[DataConfig(on_device=False), DataConfig(name="digits", recipe="resnet")],
        precise_bn_examples=[64],
    )
    assert not any(map(build_members.can_train_together, alone))
    seeds = [dataclasses.replace(alone[0], seed=seed) for seed in (0, 1)]
    assert build_members.group([DIGITS, *seeds]) == [[0], [1], [2]]


@pytest.mark.slow
def test_the_number_of_devices_changes_no_number(monkeypatch):
    shape = configs.ModelKwargs(stage_sizes=(1,), width=4)
    config = dataclasses.replace(DIGITS, model_kwargs=shape, batch_size=16, num_epochs=0.05)
    config = dataclasses.replace(config, eval_every_epochs=1)
    three = [dataclasses.replace(config, seed=seed) for seed in (0, 1, 2)]
    results = []
    for count in (1, 2):
        devices = jax.devices()[:count]
        monkeypatch.setattr(parallel, "_devices", lambda devices=devices: devices)
        members = build_members.build_members(three)
        states = members.init_states()
        for step in range(3):
            states, sums = members.train_step(states, step)
        tests = members.evaluate(states.variables)
        results.append(jax.device_get((states, sums, tests)))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert len(a) == 3 and len(b) == 4
        np.testing.assert_array_equal(a, b[:3])
        np.testing.assert_array_equal(b[2], b[3])


def test_a_minibatch_that_its_device_cannot_split_is_refused():
    config = dataclasses.replace(DIGITS, microbatch=48)
    with pytest.raises(UsageError, match=r"config\.microbatch: 48"):
        build_members.check([config])


def test_each_config_is_checked_and_not_only_the_first():
    often = dataclasses.replace(DIGITS, eval_every_epochs=0.01)
    with pytest.raises(UsageError, match=r"config\.eval_every_epochs: 0\.01"):
        build_members.check([DIGITS, often])
    closed = {"model": "cifar_plain20", "init": "msra_fan_out_zero_gamma"}
    with pytest.raises(UsageError, match="cifar_plain20"):
        build_members.check([DIGITS, dataclasses.replace(DIGITS, **closed)])
