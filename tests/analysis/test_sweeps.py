"""Members of a sweep are the runs of their configs, however many devices hold them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import resjax
from resjax import build, build_members, parallel
from resjax import config as configs
from resjax.analysis import sweep
from resjax.analysis.sweeps import train_members
from resjax.config import DataConfig, UsageError
from resjax.initializers import get_scheme

SCHEMES = ["msra_fan_out", "msra_fan_in", "xavier", "msra_fan_out_zero_gamma"]
DIGITS = configs.load_config(ROOT / "configs" / "digits.py")


def small(num_steps=30, **fields):
    """One block, a low rate: what rounding does stays small."""
    epochs = num_steps * 64 / 1437
    shape = configs.ModelKwargs(stage_sizes=(1,), width=4)
    return dataclasses.replace(
        DIGITS,
        **{"model_kwargs": shape, "batch_size": 64, "lr_per_256": 0.1, **fields},
        num_epochs=epochs,
        eval_every_epochs=epochs,
        warmup_epochs=epochs / 4,
    )


def train_alone(config):
    """Loss of every update, and the state after the last, by `build_run`."""
    run = build.build_run(config)
    state, all_sums = run.init_state(), []
    for batch in run.train_batches(0):
        state, sums = run.train_step(state, batch)
        all_sums += sums if isinstance(sums, tuple) else (sums,)
    losses = np.array([float(sums["loss"]) for sums in all_sums]) / config.batch_size
    return losses, jax.device_get(state)


def check_member(result, i, config):
    losses, state = train_alone(config)
    assert abs(result.train_loss[i, 0] / losses[0] - 1) < 1e-6
    np.testing.assert_allclose(result.train_loss[i], losses, rtol=1e-4)
    pairs = [(result.variables[i], state.variables)]
    if config.ema_decay:
        pairs.append((result.ema[i], state.ema))
        assert result.test_error_ema.shape == result.test_loss_ema.shape
        assert result.test_loss_ema.shape == result.test_loss.shape
    for mine, own in pairs:
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-3 * max(np.abs(b).max(), 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("in_turns", [False, True], ids=["vmap", "in_turns"])
def test_members_are_the_runs_of_their_configs_done_one_by_one(in_turns, monkeypatch):
    # Three on two devices, of which the second repeats the last.
    monkeypatch.setattr(parallel, "_devices", lambda: jax.devices()[:2])
    monkeypatch.setattr(parallel, "members_take_turns", lambda: in_turns)
    fields = {"ema_decay": 0.9, "label_smoothing": 0.1, "head_lr_multiplier": 2.0}
    config = small(num_steps=12, **fields)
    result = sweep(config, {"seed": [7], "lr_per_256": [0.1, 0.05, 0.02]})
    assert result.members[1] == {"seed": 7, "lr_per_256": 0.05}
    assert result.train_loss.shape == result.learning_rates.shape == (3, 12)
    monkeypatch.undo()
    for i in (1, 2):
        own = dataclasses.replace(config, **result.members[i])
        check_member(result, i, own)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_member_of_four_schemes_by_three_seeds_is_its_lone_run(scheme, big_sweep):
    config, result = big_sweep
    for i, own in enumerate(result.members):
        if own["init"] == scheme:
            check_member(result, i, dataclasses.replace(config, **own))


@pytest.fixture(scope="module")
def big_sweep():
    config = small(model_kwargs=configs.ModelKwargs(stage_sizes=(1, 1, 1)))
    return config, sweep(config, {"init": SCHEMES, "seed": [0, 1, 2]})


@pytest.mark.slow
@pytest.mark.long
def test_momentum_and_decay_vary_within_a_program_and_batches_can_be_shared():
    config = small(num_steps=3, nesterov=False)
    vary = {"momentum": [0.0, 0.9], "weight_decay": [0.0, 0.1], "seed": [0, 5]}
    result = sweep(config, vary, batch_seed=3)
    first = result.train_loss[:, 0].reshape(2, 2, 2)
    # One loss a seed before the first update, on the minibatch of seed 3.
    assert np.ptp(first, axis=(0, 1)).max() == 0 and first[0, 0, 0] != first[0, 0, 1]
    alone, _ = train_alone(dataclasses.replace(config, seed=3))
    variables = resjax.init(build.build_model(config), jax.random.key(5), config.init)
    assert jax.tree.structure(variables) == jax.tree.structure(result.variables[0])
    assert len(np.unique(result.train_loss[:, 2])) == 8
    same = sweep(config, {"momentum": [0.9], "seed": [3]})
    np.testing.assert_allclose(same.train_loss[0], alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_scheme_of_ones_own_is_a_function():
    def halved(key, abstract_params):
        params = get_scheme("msra_fan_out")(key, abstract_params)
        return jax.tree.map(lambda x: x / 2, params)

    config = small(num_steps=1, norm=configs.NormConfig(kind="none"))
    vary = {"init": ["msra_fan_out", "halved", "silent"]}
    schemes = {"halved": halved, "silent": lambda k, p: jax.tree.map(zeros, p)}
    result = sweep(config, vary, schemes)
    full, half, silent = result.train_loss[:, 0]
    assert silent == pytest.approx(np.log(10), rel=1e-6)
    assert abs(half - np.log(10)) < abs(full - np.log(10))


def zeros(leaf):
    return jnp.zeros(leaf.shape, leaf.dtype)


@pytest.mark.slow
def test_a_member_that_diverges_leaves_the_others_alone():
    config = small(num_steps=6, norm=configs.NormConfig(kind="none"))
    result = sweep(config, {"lr_per_256": [1e20, 0.05], "warmup": ["none"]})
    lone = sweep(config, {"lr_per_256": [0.05], "warmup": ["none"]})
    assert not np.isfinite(result.train_loss[0, -1]) and result.test_error[0, -1] == 100
    np.testing.assert_array_equal(result.train_loss[1], lone.train_loss[0])


@pytest.mark.slow
def test_segments_end_at_evaluations_checkpoints_and_where_they_are_to_stop():
    often = configs.CheckpointConfig(every_steps=3)
    config = small(num_steps=8, checkpoint=often)
    config = dataclasses.replace(config, eval_every_epochs=4 * 64 / 1437)
    members = build_members.build_members([config])

    def train(start_step=0, is_evaluated=True, stop_at=99):
        states = members.init_states()
        return [
            (
                s.step,
                s.num_updates,
                s.train.get("loss", np.zeros((1, 0))).size,
                bool(s.test),
            )
            for s in train_members(
                members, states, start_step, is_evaluated, lambda step: step >= stop_at
            )
        ]

    ends = [(3, 3, 3, False), (4, 1, 1, True), (6, 2, 2, False), (8, 2, 2, True)]
    assert train() == ends
    assert train(stop_at=5) == [*ends[:2], (5, 1, 1, False)]
    assert train(stop_at=4) == ends[:2]  # nothing is done after the last
    assert train(start_step=4) == ends[2:]
    assert train(start_step=4, is_evaluated=False) == [(4, 0, 0, True), *ends[2:]]
    assert train(start_step=8, is_evaluated=False) == [(8, 0, 0, True)]


def test_a_batch_seed_out_of_range_is_named():
    with pytest.raises(UsageError, match="batch_seed: -1 is not from 0"):
        sweep(small(), {"seed": [0]}, batch_seed=-1)


def test_images_too_small_for_a_net_are_named_with_a_scheme_of_ones_own():
    def of_numpy(key, abstract_params):  # which cannot be traced
        params = get_scheme("xavier")(key, abstract_params)
        return jax.tree.map(lambda x: x / np.asarray(x).std(), params)

    config = small(data=DataConfig(image_size=1), batch_size=1)
    with pytest.raises(UsageError, match=r"config.data.image_size: 1 is too small"):
        sweep(config, {"init": ["mine"]}, {"mine": of_numpy})


@pytest.mark.parametrize(
    "fields, vary, parts",
    [
        ({}, {"batch_size": [1]}, ["vary", "'batch_size'", "weight_decay"]),
        ({}, {"sed": [1]}, ["vary", "'sed'", "seed"]),
        ({}, {"seed": [-1]}, ["config.seed", "-1"]),
        ({}, {"init": ["xaver"]}, ["init", "'xaver'", "xavier"]),
        ({}, {"seed": []}, ["vary", "[]"]),
        ({}, {"drop_epochs": [(9,), (8,)]}, ["drop_epochs", "no run", "schedule=step"]),
        ({"dtype": "float16"}, {"seed": [1]}, ["at once", "float16"]),
        ({"data": DataConfig(on_device=False)}, {"seed": [1]}, ["config.data.on_device"]),
    ],
)
def test_what_cannot_be_swept_is_one_line(fields, vary, parts):
    with pytest.raises(UsageError) as error:
        sweep(dataclasses.replace(DIGITS, **fields), vary)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)
