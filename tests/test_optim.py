"""SGD and LARS against their rules written out in numpy, and the parameters they touch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import resjax
from resjax import optim, schedules
from resjax.initializers import init

SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "head/kernel": (4, 3),
    "head/bias": (3,),
    "norm1/scale": (4,),
}


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def nested(leaves):
    return traverse_util.unflatten_dict(leaves, sep="/")


def draw(*lead, seed=0):
    """{path: normal float64 array [*lead, *shape]} of `SHAPES`."""
    rng = np.random.RandomState(seed)
    return {path: rng.randn(*lead, *shape) for path, shape in SHAPES.items()}


def walk(tx, params, grads):
    """The parameters {path: [T, ...]} after each update by {path: [T, ...]} of `grads`."""

    def update(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    to_jax = partial(jax.tree.map, partial(jnp.asarray, dtype=jnp.float32))
    params, grads = to_jax(nested(params)), to_jax(nested(grads))
    return flat(jax.lax.scan(update, (params, tx.init(params)), grads)[1])


def constant(rate):
    return lambda step: jnp.float32(rate)


# --- the update rules ---------------------------------------------------------------


@pytest.mark.parametrize("nesterov, head", [(False, 1), (True, 1), (True, 5)])
@pytest.mark.parametrize("layerwise", [False, True], ids=["sgd", "lars"])
def test_updates_follow_the_rule_with_the_rate_outside_the_buffer(
    layerwise, nesterov, head
):
    rates, momentum, decay, trust = [0.5, 2.0, 0.1, 0.02, 0.3], 0.9, 1e-2, 0.2
    params, grads = draw(), draw(len(rates), seed=1)
    make = partial(optim.lars, trust_coefficient=trust) if layerwise else optim.sgd
    tx = make(lambda step: jnp.array(rates)[step], momentum, nesterov, decay)
    after = walk(optax.chain(tx, optim.scale_head(head)), params, grads)
    for path, w in params.items():
        u = np.zeros_like(w)
        for t, rate in enumerate(rates):
            grad = grads[path][t]
            g = grad + (0 if path == "norm1/scale" else decay * w)
            if layerwise and path.endswith("/kernel"):
                norm, grad_norm = np.sqrt((w**2).sum()), np.sqrt((grad**2).sum())
                g = trust * norm / (grad_norm + decay * norm) * g
            u = momentum * u + g
            rate *= head if path.startswith("head/") else 1
            w = w - rate * (g + momentum * u if nesterov else u)
            close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
            close(after[path][t], w, err_msg=f"{path} after update {t}")


@pytest.mark.peers
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_rate_of_the_head_is_that_of_a_parameter_group_of_pytorch(nesterov):
    import torch

    rates, momentum, decay, head = [0.5, 2.0, 0.1], 0.9, 1e-2, 10.0
    params, grads = draw(), draw(len(rates), seed=1)
    tx = optim.sgd(lambda step: jnp.array(rates)[step], momentum, nesterov, decay)
    after = walk(optax.chain(tx, optim.scale_head(head)), params, grads)
    theirs = {path: torch.tensor(w, requires_grad=True) for path, w in params.items()}
    groups = [
        {
            "params": [w],
            "lr": 1.0,
            "times": head if path.startswith("head/") else 1.0,
            "weight_decay": 0.0 if "norm" in path else decay,
        }
        for path, w in theirs.items()
    ]
    sgd = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov)
    for t, rate in enumerate(rates):
        for group in sgd.param_groups:
            group["lr"] = rate * group["times"]
        for path, w in theirs.items():
            w.grad = torch.tensor(grads[path][t])
        sgd.step()
        for path, w in theirs.items():
            found = after[path][t]
            np.testing.assert_allclose(found, w.detach().numpy(), rtol=1e-5, atol=2e-6)


def test_lars_is_that_of_optax_at_a_constant_rate_without_decay():
    rate, momentum = 500.0, 0.9  # moves a layer by half its norm
    mask = nested({path: path.endswith("/kernel") for path in SHAPES})
    theirs = optax.lars(
        rate,
        momentum=momentum,
        nesterov=True,
        trust_coefficient=0.001,
        trust_ratio_mask=mask,
    )
    ours = optim.lars(constant(rate), momentum, nesterov=True, weight_decay=0.0)
    params, grads = draw(), draw(3, seed=1)
    expected = walk(theirs, params, grads)
    for path, after in walk(ours, params, grads).items():
        np.testing.assert_allclose(after, expected[path], rtol=2e-5, err_msg=path)


@pytest.mark.parametrize(
    "w, grad, local",
    [
        ([0, 0], [3, 4], 1),
        ([3, 4], [0, 0], 1),
        ([0, 0], [0, 0], 1),
        ([3, 4], [0, 10], 0.001 * 5 / (10 + 0.5 * 5)),
    ],
)
def test_lars_takes_the_plain_rate_where_a_norm_is_zero(w, grad, local):
    params = {"conv": {"kernel": jnp.array(w, jnp.float32)}}
    grads = {"conv": {"kernel": jnp.array(grad, jnp.float32)}}
    tx = optim.lars(constant(0.1), 0.9, False, 0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = -0.1 * local * (np.array(grad) + 0.5 * np.array(w))
    np.testing.assert_allclose(updates["conv"]["kernel"], expected, rtol=1e-6)


# --- Goyal et al. 2017, section 3 ---------------------------------------------------


@pytest.mark.parametrize(
    "decay, expected",
    [
        (0.25, [0.1 * (8 * 0.5 + 0.25 * 2), 0.1 * 8 * (0.5 + 0.25 * 2)]),  # 0.45, 0.8
        (0.0, [0.1 * (8 * 0.5), 0.1 * 8 * 0.5]),
    ],
)
def test_scaling_the_loss_scales_the_rate_only_without_decay(decay, expected):
    # Remark 1, at w = 2, grad = 0.5, rate = 0.1, scaled by 8.
    w, grads = {"head/kernel": np.array([2.0])}, {"head/kernel": np.array([[0.5]])}
    scaled_grads = {"head/kernel": 8 * grads["head/kernel"]}
    loss_scaled = walk(optim.sgd(constant(0.1), 0.9, False, decay), w, scaled_grads)
    rate_scaled = walk(optim.sgd(constant(0.1 * 8), 0.9, False, decay), w, grads)
    moved = [2 - float(after["head/kernel"][0, 0]) for after in (loss_scaled, rate_scaled)]
    assert moved == pytest.approx(expected, rel=1e-5)


def rate_inside(w, grads, rates, nesterov, decay, corrected):
    """Equation 10: v = 0.9 v + rate * g, w -= v; w after each update.

    Corrected as in remark 2, v is first multiplied by rate / (the rate before).
    """
    v, before, after = np.zeros_like(w), rates[0], []
    for grad, rate in zip(grads, rates, strict=True):
        g = grad + decay * w
        v = 0.9 * (rate / before if corrected else 1) * v + rate * g
        w, before = w - (rate * g + 0.9 * v if nesterov else v), rate
        after.append(w)
    return np.stack(after)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_rate_outside_the_buffer_needs_no_momentum_correction(nesterov):
    # 10 updates of warmup from 0.1 to 3.2, and two drops.
    schedule = schedules.step_decay(3.2, [20, 30])
    schedule = schedules.warm_up(schedule, "gradual", start=0.1, peak=3.2, steps=10)
    rates = [0.1 + 0.31 * t for t in range(10)] + [3.2] * 10 + [0.32] * 10 + [0.032] * 10
    rng = np.random.RandomState(0)
    w, grads = rng.randn(50), rng.randn(40, 50)
    after = walk(
        optim.sgd(schedule, 0.9, nesterov, 1e-2), {"head/kernel": w}, {"head/kernel": grads}
    )["head/kernel"]
    inside = partial(rate_inside, w, grads, rates, nesterov, 1e-2)
    np.testing.assert_allclose(after, inside(corrected=True), rtol=1e-5, atol=2e-4)
    error = np.linalg.norm(inside(corrected=False) - after, axis=1)
    moved = np.linalg.norm(after - w, axis=1)
    assert error[0] < 1e-5  # no rate has changed yet
    assert (error[1:] > 0.15 * moved[1:]).all() and error[-1] > moved[-1]


@pytest.mark.parametrize(
    "before, rate, times",
    [(3.2, 0.32, 9.1), (0.1, 3.2, 0.128)],
    ids=["a tenfold drop", "the end of a constant warmup"],
)
def test_without_the_correction_a_step_is_nearly_that_of_the_rate_before(
    before, rate, times
):
    # Under a constant gradient the buffer holds 1 / (1 - 0.9) = 10 gradients: the first
    # step at the new rate should be 10 * rate; uncorrected it is 9 * before + rate.
    rates, grads = [before] * 200 + [rate], np.ones((201, 1))
    tx = optim.sgd(lambda step: jnp.array(rates)[step], 0.9, False, 0.0)
    after = walk(tx, {"head/kernel": np.zeros(1)}, {"head/kernel": grads})["head/kernel"]
    uncorrected = rate_inside(np.zeros(1), grads, rates, False, 0.0, corrected=False)
    step = float(after[-2, 0] - after[-1, 0])
    assert step == pytest.approx(10 * rate, rel=1e-3)
    wrong = uncorrected[-2, 0] - uncorrected[-1, 0]
    assert wrong == pytest.approx(9 * before + rate)
    assert wrong / step == pytest.approx(times, rel=2e-3)


# --- which parameters ---------------------------------------------------------------


def params_of(name):
    model = resjax.create_model(name)
    return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))["params"]


def expected_norms(stage_sizes, in_a_block, projected_stages, alone):
    """The paths of the norms, from the architecture."""
    blocks = [
        f"stage{i}/block{j}"
        for i, size in enumerate(stage_sizes, start=1)
        for j in range(1, size + 1)
    ]
    projections = {f"stage{i}/block1/shortcut_norm" for i in projected_stages}
    branches = {f"{block}/{norm}" for block in blocks for norm in in_a_block}
    return branches | projections | {alone}


BASIC, BOTTLENECK = ("norm1", "norm_out"), ("norm1", "norm2", "norm_out")


@pytest.mark.parametrize(
    "name, architecture, num_norms",
    [
        ("cifar_resnet20", ((3, 3, 3), BASIC, (), "stem/norm"), 19),
        ("resnet18", ((2, 2, 2, 2), BASIC, (2, 3, 4), "stem/norm"), 20),
        ("resnet50", ((3, 4, 6, 3), BOTTLENECK, (1, 2, 3, 4), "stem/norm"), 53),
        ("resnext50_32x4d", ((3, 4, 6, 3), BOTTLENECK, (1, 2, 3, 4), "stem/norm"), 53),
        # Its projections have no norm, nor has its stem; one follows the last block.
        (
            "preact_resnet50",
            ((3, 4, 6, 3), ("norm1", "norm2", "norm3"), (), "norm"),
            49,
        ),
    ],
)
def test_all_but_scale_and_bias_of_the_norms_is_decayed(name, architecture, num_norms):
    mask = flat(optim.decay_mask(params_of(name)))
    kept = {path for path, decays in mask.items() if not decays}
    norms = expected_norms(*architecture)
    assert kept == {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    assert len(kept) == 2 * num_norms
    assert mask["head/kernel"] and mask["head/bias"] and mask["stem/conv/kernel"]


def test_lars_adapts_the_20_kernels_of_resnet20_and_nothing_else():
    mask = flat(optim.adaptation_mask(params_of("cifar_resnet20")))
    blocks = [f"stage{i}/block{j}" for i in (1, 2, 3) for j in (1, 2, 3)]
    convs = {f"{block}/conv{k}/kernel" for block in blocks for k in (1, 2)}
    adapted = {path for path, adapts in mask.items() if adapts}
    assert adapted == convs | {"stem/conv/kernel", "head/kernel"} and len(adapted) == 20
