"""Parameter trees, maps of stages, options, and nets that are equal by construction.

The trees in tests/golden/ are public; where a change of them is meant, write them with
`PYTHONPATH=.:tests python tests/models/test_resnet.py`.
"""

import functools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import print_saved_residuals

import resjax
from resjax.config import UsageError
from resjax.initializers import MSRA_FAN_OUT, scheme_from_rules
from resjax.models.blocks import basic, bottleneck
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv
from resjax.models.resnet import MODELS, ResNet, Stage, Stem, frozen_layers

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GOLDEN_MODELS = [
    "resnet18",
    "resnet50",
    "plain18",
    "preact_resnet18",
    "preact_resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "cifar_resnet20",
    "cifar_plain20",
    "cifar_preact_resnet164",
    "cifar_resnext29_8x64d",
]
LEAF = "(scale|bias|mean|var)"
BLOCK = r"stage[1-4]/block[1-9]\d*"
# The public paths of the three kinds of nets, and where a residual branch ends.
GRAMMAR = {
    "residual": rf"(stem/conv|{BLOCK}/(conv[123]|shortcut_conv))/kernel"
    rf"|(stem/norm|{BLOCK}/(norm[12]|norm_out|shortcut_norm))/{LEAF}",
    "preact": rf"(stem/conv|{BLOCK}/(conv[12]|conv_out|shortcut_conv))/kernel"
    rf"|(norm|{BLOCK}/norm[123])/{LEAF}",
    "plain": rf"(stem/conv|{BLOCK}/conv[12])/kernel|(stem/norm|{BLOCK}/norm[12])/{LEAF}",
}
ENDS = {"residual": "norm_out/scale", "preact": "conv_out/kernel", "plain": None}
EXTRA = [("resnet18", {"shortcut": kind}) for kind in ("A", "C")] + [
    ("preact_resnet18", {"shortcut": "C"}),
    ("preact_resnet18", {"remat": "blocks"}),
    ("preact_resnet18", {"remat": "convs"}),
]


def abstract(model, size=32):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


def tree(name):
    return {
        path: f"{'x'.join(map(str, leaf.shape))} {leaf.dtype}"
        for path, leaf in sorted(flat(abstract(resjax.create_model(name))).items())
    }


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_tree_is_the_golden_one(name):
    assert tree(name) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name, options", [(name, {}) for name in MODELS] + EXTRA)
def test_paths_are_those_of_the_public_grammar(name, options):
    model = resjax.create_model(name, **options)
    # A stage of two blocks has every path of a longer one but the number of the block.
    model = model.clone(stage_sizes=(2,) * len(model.stage_sizes))
    leaves = flat(abstract(model))
    kind = next((kind for kind in ("preact", "plain") if kind in name), "residual")
    for path, leaf in leaves.items():
        collection, rest = path.split("/", 1)
        assert re.fullmatch(rf"{GRAMMAR[kind]}|head/(kernel|bias)", rest), path
        is_statistic = rest.endswith(("/mean", "/var"))
        assert collection == ("batch_stats" if is_statistic else "params")
        assert leaf.dtype == jnp.float32
    blocks = {path.rsplit("/", 2)[0] for path in leaves if "/block" in path}
    blocks = {block for block in blocks if block.startswith("params/")}
    assert len(blocks) == 2 * len(model.stage_sizes)
    if ENDS[kind]:
        assert {f"{block}/{ENDS[kind]}" for block in blocks} <= set(leaves)


NETS = {
    "residual": functools.partial(ResNet, (1, 2), basic, 4, num_classes=5),
    "preact": functools.partial(
        ResNet, (1, 2), bottleneck, 4, preactivation=True, num_classes=5
    ),
    "plain": functools.partial(ResNet, (1, 2), basic, 4, shortcut="none", num_classes=5),
}
# Stages of more than two blocks, which rematerialisation runs as a loop.
DEEP = {
    "residual": functools.partial(ResNet, (6,), basic, 4, num_classes=5),
    "preact": functools.partial(
        ResNet, (3,), bottleneck, 4, preactivation=True, num_classes=5
    ),
}
IMAGES = np.random.RandomState(0).randn(2, 20, 28, 3).astype(np.float32)


def variables_of(model, seed=0):
    """Variables of which no leaf is a default."""
    rng = np.random.RandomState(seed)

    def draw(path, leaf):
        if path[-1] in ("scale", "var"):
            return jnp.array(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
        scale = np.sqrt(2 / np.prod(leaf.shape[:-1])) if path[-1] == "kernel" else 1
        return jnp.array(scale * rng.randn(*leaf.shape), jnp.float32)

    return traverse_util.path_aware_map(draw, abstract(model))


def forward(model, variables, images, **flags):
    """What `apply` returns, and the outputs of the stem and the stages."""
    result, captured = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: isinstance(module, Stem | Stage),
        mutable=["intermediates", "batch_stats"],
        **flags,
    )
    outputs = captured["intermediates"]
    return result, {name: outputs[name]["__call__"][0] for name in sorted(outputs)}


def trace(model, size, **flags):
    """What `forward` gives for two square images, as shapes and dtypes."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    run = functools.partial(forward, model, **flags)
    return jax.eval_shape(run, abstract(model), images)


# --- maps and logits ------------------------------------------------------------------


# He et al. 2015, table 1, at 224; an odd side is rounded up at every halving.
@pytest.mark.parametrize(
    "name, size, sides, width",
    [
        ("resnet18", 224, [56, 28, 14, 7], 64),
        ("resnet18", 225, [57, 29, 15, 8], 64),
        ("resnet50", 224, [56, 28, 14, 7], 256),
        ("resnet50_v1", 225, [57, 29, 15, 8], 256),
        ("plain18", 225, [57, 29, 15, 8], 64),
        ("preact_resnet18", 224, [56, 28, 14, 7], 64),
        ("preact_resnet50", 225, [57, 29, 15, 8], 256),
        ("resnext50_32x4d", 224, [56, 28, 14, 7], 256),
        ("cifar_resnet20", 32, [32, 16, 8], 16),
        ("cifar_resnet20", 33, [33, 17, 9], 16),
        ("cifar_resnext29_8x64d", 32, [32, 16, 8], 256),
    ],
)
def test_stages_halve_the_map_and_double_the_width(name, size, sides, width):
    model = resjax.create_model(name, num_classes=7)
    (logits, stages), maps = trace(model, size, return_stages=True)
    expected = {
        f"stage{i}": (2, side, side, width * 2 ** (i - 1))
        for i, side in enumerate(sides, start=1)
    }
    assert {name: leaf.shape for name, leaf in stages.items()} == expected
    assert list(stages) == list(expected)
    assert maps.pop("stem").shape[1:3] == (sides[0], sides[0])
    assert {name: leaf.shape for name, leaf in maps.items()} == expected
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_bfloat16_activations_give_float32_logits(name, train):
    model = NETS[name](dtype=jnp.bfloat16)
    (logits, stages), _ = trace(model, 32, train=train, return_stages=True)
    assert {leaf.dtype for leaf in stages.values()} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_logits_are_the_classifier_of_the_mean_of_the_last_stage_in_float32(name, dtype):
    model = NETS[name](dtype=dtype)
    variables = variables_of(model)
    logits, stages = model.apply(variables, IMAGES, return_stages=True)
    head = variables["params"]["head"]
    pooled = np.array(stages["stage2"], np.float64).mean(axis=(1, 2))
    expected = pooled @ np.array(head["kernel"], np.float64) + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(model.apply(variables, IMAGES), logits)


@pytest.mark.parametrize("name", NETS)
def test_stages_are_what_the_blocks_put_out_and_the_last_is_activated(name):
    model = NETS[name]()
    variables = variables_of(model)
    (_, stages), maps = forward(model, variables, IMAGES, return_stages=True)
    np.testing.assert_array_equal(stages["stage1"], maps["stage1"])
    last = maps["stage2"]
    if name == "preact":
        last = relu_of_norm(variables, ("norm",), last)
    np.testing.assert_allclose(stages["stage2"], last, rtol=1e-5, atol=1e-5)


class Detector(nn.Module):
    backbone: nn.Module

    def __call__(self, x, **flags):
        return self.backbone(x, return_stages=True, **flags)


UPDATE = {"train": True, "mutable": ["batch_stats"]}


@pytest.mark.parametrize(
    "make, flags",
    [(NETS[name], flags) for name in NETS for flags in ({}, UPDATE)]
    + [
        (functools.partial(DEEP["residual"], remat=remat), UPDATE)
        for remat in ("blocks", "convs")
    ],
)
def test_a_submodule_returns_the_stages_of_the_net_alone(make, flags):
    model = make()
    variables = variables_of(model)
    nested = {collection: {"backbone": tree} for collection, tree in variables.items()}
    alone = model.apply(variables, IMAGES, return_stages=True, **flags)
    inside = Detector(model).apply(nested, IMAGES, **flags)
    if flags:
        inside[1]["batch_stats"] = inside[1]["batch_stats"]["backbone"]
        before = flat(variables["batch_stats"])
        after = flat(inside[1]["batch_stats"])
        assert all((after[path] != before[path]).any() for path in before)
    assert jax.tree.structure(inside) == jax.tree.structure(alone)
    jax.tree.map(np.testing.assert_array_equal, inside, alone)


@pytest.mark.parametrize("name", NETS)
def test_without_a_classifier_a_net_returns_the_mean_of_its_last_stage(name):
    body = NETS[name](num_classes=0)
    variables = variables_of(body)
    full = abstract(NETS[name]())
    assert set(full["params"]) - set(variables["params"]) == {"head"}
    features, stages = body.apply(variables, IMAGES, return_stages=True)
    assert features.dtype == jnp.float32
    pooled = np.array(stages["stage2"], np.float64).mean(axis=(1, 2))
    np.testing.assert_allclose(features, pooled, rtol=1e-5, atol=1e-6)
    assert jax.eval_shape(body.init, jax.random.key(0), IMAGES) == abstract(body)


@pytest.mark.parametrize("name", NETS)
def test_a_head_of_another_size_fits_a_trained_body(name):
    trained, model = variables_of(NETS[name]()), NETS[name](num_classes=3)
    new = variables_of(model, seed=1)["params"]
    body = {part: tree for part, tree in trained["params"].items() if part != "head"}
    variables = {"params": {**new, **body}, "batch_stats": trained["batch_stats"]}
    features = NETS[name](num_classes=0).apply({**trained, "params": body}, IMAGES)
    head = jax.tree.map(np.float64, new["head"])
    expected = np.array(features) @ head["kernel"] + head["bias"]
    logits = model.apply(variables, IMAGES)
    assert logits.shape == (2, 3)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


# --- options --------------------------------------------------------------------------


def assert_trees_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        close = np.abs(leaf - other).max() <= 1e-3 * np.abs(other).max() + 1e-6
        assert close, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("preact", "residual")]
)
def test_rematerialisation_keeps_less_and_changes_no_number(name):
    def run(remat):
        model = DEEP[name](remat=remat, downsample=False)
        variables = variables_of(model)

        def loss(params):
            result = model.apply(
                {**variables, "params": params}, IMAGES, train=True, mutable=["batch_stats"]
            )
            return (result[0] ** 2).mean(), result

        def backward(params):
            return jax.vjp(loss, params)[1]

        kept = jax.tree.leaves(jax.eval_shape(backward, variables["params"]))
        options = {"xla_backend_optimization_level": 0}  # half the time to compile
        step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=options)
        compiled = step.lower(variables["params"]).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return (
            compiled(variables["params"]),
            memory,
            sum(x.size * x.dtype.itemsize for x in kept),
        )

    expected, memory, all_kept = run("none")
    by_convs, less, convs_kept = run("convs")
    by_blocks, least, blocks_kept = run("blocks")
    assert_trees_close(by_convs, expected)
    assert_trees_close(by_blocks, expected)
    assert blocks_kept < 0.9 * convs_kept and convs_kept < 0.5 * all_kept
    # XLA:CPU drops the barriers before it orders the program, and may compute early what
    # is to be computed late; not so in a loop.
    assert least < 0.9 * less and least < 0.9 * memory and less < 1.1 * memory


@pytest.mark.parametrize("remat", ["blocks", "convs"])
@pytest.mark.parametrize(
    "name, train",
    [pytest.param("residual", True, marks=pytest.mark.slow), ("preact", False)],
)
def test_rematerialisation_keeps_the_survival_and_the_draw_of_every_block(
    name, train, remat
):
    net = functools.partial(DEEP[name], stochastic_depth=0.9)
    variables = variables_of(net())
    flags = {"train": train, "update_stats": False, "rngs": {"dropout": jax.random.key(3)}}
    expected, actual = (
        net(remat=policy).apply(variables, IMAGES[:, :8, :8], **flags)
        for policy in ("none", remat)
    )
    assert_trees_close(actual, expected)


# --- frozen layers ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, freeze_at, expected",
    [
        ("resnet50", 0, ""),
        ("resnet50", 1, "stem"),
        ("resnet50", 2, "stem stage1"),  # Detectron2's default
        ("resnet50", 5, "stem stage1 stage2 stage3 stage4"),
        ("cifar_resnet20", 4, "stem stage1 stage2 stage3"),
        ("preact_resnet18", 4, "stem stage1 stage2 stage3"),
        ("preact_resnet18", 5, "stem stage1 stage2 stage3 stage4 norm"),
    ],
)
def test_freeze_at_counts_the_stem_and_the_stages(name, freeze_at, expected):
    model = resjax.create_model(name)
    assert frozen_layers(model, freeze_at) == tuple(expected.split())
    if freeze_at == len(model.stage_sizes) + 1:  # all that has parameters but the head
        assert {*expected.split(), "head"} == set(abstract(model)["params"])


@pytest.mark.parametrize("freeze_at", [-1, 4])
def test_freeze_at_says_how_far_it_goes(freeze_at):
    model = NETS["residual"]()
    match = rf"^freeze_at: {freeze_at} is not from 0 \(nothing\) to 3 \(stem to stage2\)"
    with pytest.raises(UsageError, match=match):
        model.apply(abstract(model), IMAGES, freeze_at=freeze_at)


@pytest.mark.parametrize(
    "name, remat",
    [
        ("residual", "blocks"),
        ("plain", "none"),
        pytest.param("preact", "none", marks=pytest.mark.slow),
        pytest.param("preact", "blocks", marks=pytest.mark.slow),
    ],
)
def test_frozen_layers_evaluate_and_let_no_gradient_pass(name, remat):
    model = NETS[name](downsample=False, remat=remat).clone(stage_sizes=(3, 1))
    variables, images = variables_of(model), IMAGES[:, :8, :8]
    apply = functools.partial(model.apply, return_stages=True)
    _, evaluated = apply(variables, images)

    def loss(params, freeze_at):
        own = {**variables, "params": params}
        (logits, stages), updates = apply(
            own, images, train=True, freeze_at=freeze_at, mutable=["batch_stats"]
        )
        # Also of the maps below, through which nothing passes, either.
        total = sum((x**2).mean() for x in [logits, *stages.values()])
        return total, (stages, updates["batch_stats"])

    options = {"xla_backend_optimization_level": 0}  # half the time to compile
    grad_fn = jax.jit(
        jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=options
    )
    for freeze_at in (2, 3):
        grads, (stages, stats) = grad_fn(variables["params"], freeze_at)
        frozen = frozen_layers(model, freeze_at)
        for path, grad in flat(grads).items():
            assert (np.abs(grad).max() == 0) == (path.split("/")[0] in frozen), path
        for path, moved in flat(stats).items():
            same = np.array_equal(moved, flat(variables["batch_stats"])[path])
            assert same == (path.split("/")[0] in frozen), path
        for stage, x in stages.items():
            if stage in frozen:
                np.testing.assert_allclose(x, evaluated[stage], rtol=1e-5, atol=1e-5)
            else:
                assert np.abs(x - evaluated[stage]).max() > 0.1


def test_a_frozen_stage_drops_no_branch():
    model = NETS["residual"](downsample=False, stochastic_depth=0.7)
    variables, images = variables_of(model), IMAGES[:, :8, :8]
    expected = model.apply(variables, images)
    # It needs no key, and takes each branch as often as evaluation does.
    logits = model.apply(variables, images, train=True, update_stats=False, freeze_at=3)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before, now", [(True, "blocks"), (False, "none"), (None, "none")])
def test_what_remat_was_called_before_is_understood(before, now):
    model = resjax.create_model("resnet18", remat=before)
    assert model == resjax.create_model("resnet18", remat=now)
    assert model.clone(remat=True).remat == "blocks"
    assert ResNet((1,), basic, remat=before).remat == now


def test_what_convs_keeps_of_blocks_are_their_convolutions_and_moments(capsys):
    model = DEEP["residual"](remat="convs", downsample=False)
    variables = variables_of(model)

    def run(params):
        own = {**variables, "params": params}
        return model.apply(own, IMAGES, train=True, update_stats=False).sum()

    print_saved_residuals(run, variables["params"])
    kept = capsys.readouterr().out
    # Six blocks of two layers; for the sum, which is activated, what the next block takes.
    names = Counter(re.findall(r"named '(\w+)'", kept))
    assert names == {"conv": 12, "moments": 24}
    assert len(re.findall(r"custom_jvp_call .*blocks\.py", kept)) == 5


@pytest.mark.parametrize("remat", ["none", "blocks", "convs"])
def test_looking_inside_sees_every_block(remat):
    model = DEEP["residual"](remat=remat)
    variables = abstract(model)
    apply = functools.partial(
        model.apply, capture_intermediates=True, mutable=["intermediates"]
    )
    seen = jax.eval_shape(apply, variables, IMAGES)[1]["intermediates"]
    assert {"block1", "block6"} <= set(seen["stage1"])


class Scale(nn.Module):
    """A norm without statistics."""

    @nn.compact
    def __call__(self, x, *, train=False, update_stats=None):
        return x * self.param("scale", nn.initializers.ones, x.shape[-1:])


@pytest.mark.parametrize("remat", ["none", "blocks", "convs"])
def test_a_norm_may_have_no_statistics(remat):
    model = DEEP["residual"](remat=remat, norm=Scale)
    rules = [(r".*/scale", jax.nn.initializers.ones), (r".*", MSRA_FAN_OUT)]
    scheme = scheme_from_rules([(r".*bias", jax.nn.initializers.zeros), *rules])
    variables = jax.eval_shape(lambda: resjax.init(model, jax.random.key(0), scheme))
    assert not variables["batch_stats"]
    logits = jax.eval_shape(functools.partial(model.apply, train=True), variables, IMAGES)
    assert logits.shape == (2, 5)


def test_depth_and_width_of_a_named_net_are_options():
    deep = resjax.create_model("cifar_plain20", stage_sizes=(3, 3, 4), width=8)
    depth = sum("conv" in path for path in flat(abstract(deep)["params"]))
    assert (depth, deep.shortcut) == (21, "none")  # and the classifier: 22 layers
    rows = [resjax.create_model(f"cifar_resnet{depth}") for depth in (20, 32)]
    assert rows[0].clone(stage_sizes=(5, 5, 5)) == rows[1]
    assert resjax.create_model("resnet50", width=32).width == 32


@pytest.mark.parametrize(
    "name, blocks, rate, remat",
    [
        ("cifar_resnet110", 54, 0.5, "none"),  # the net of Huang et al. 2016
        ("resnet18", 8, 0.2, "blocks"),
        ("preact_resnet18", 8, 0.3, "none"),
        ("resnet50", 16, 0.0, "none"),
    ],
)
def test_survival_falls_linearly_with_the_block(name, blocks, rate, remat):
    survival = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, Stage):
            survival[context.module.path] = context.module.survivals
        return call(*args, **kwargs)

    model = resjax.create_model(name, stochastic_depth=rate, remat=remat)
    with nn.intercept_methods(record):
        abstract(model)
    expected = [1 - block / blocks * rate for block in range(1, blocks + 1)]
    survival = [p for stage in survival.values() for p in stage]
    assert survival == pytest.approx(expected)
    if rate == 0.5:  # the paper's expected depth, (3L - 1) / 4
        assert sum(survival) == pytest.approx((3 * blocks - 1) / 4)


@pytest.mark.parametrize("remat", ["none", "blocks", "convs"])
def test_each_block_draws_for_itself(remat):
    model = ResNet(
        (3,), basic, 4, downsample=False, num_classes=3, stochastic_depth=0.8, remat=remat
    )
    variables = variables_of(model)
    run = jax.jit(
        jax.vmap(
            lambda key: model.apply(
                variables,
                IMAGES[:, :6, :6],
                train=True,
                update_stats=False,
                rngs={"dropout": key},
            )
        )
    )
    logits = run(jax.random.split(jax.random.key(0), 400)).reshape(400, -1)
    # Blocks that share a draw never keep the later, less likely one alone.
    assert len(np.unique(np.round(logits, 3), axis=0)) == 2**3


_ONE_STEP = """
import jax, jax.numpy as jnp, resource, sys
import resjax
from resjax.losses import cross_entropy
model = resjax.create_model(sys.argv[1], remat="blocks")
variables = resjax.init(model, jax.random.key(0))
images = jax.random.normal(jax.random.key(1), (16, 32, 32, 3))
def loss_fn(params):
    own = {**variables, "params": params}
    logits, updates = model.apply(own, images, train=True, mutable=["batch_stats"])
    return cross_entropy(logits, jnp.arange(16) % 10).mean(), updates
(loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(variables["params"])
assert jnp.isfinite(loss) and all(jnp.any(g) for g in jax.tree.leaves(grads))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["cifar_resnet1202", "cifar_preact_resnet1001"])
def test_a_step_of_a_very_deep_net_takes_less_than_8_gigabytes(name):
    words = [sys.executable, "-c", _ONE_STEP, name]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 8


# --- nets that are equal by construction ----------------------------------------------


def relu_of_norm(variables, path, x):
    params, stats = (variables[name] for name in ("params", "batch_stats"))
    for part in path:
        params, stats = params[part], stats[part]
    std = np.sqrt(np.array(stats["var"], np.float64) + 1e-5)
    x = (x - stats["mean"]) / std * params["scale"] + params["bias"]
    return np.maximum(x, 0)


DEEPER = {
    "residual_a": (basic, {"shortcut": "A"}),
    "residual_b": (bottleneck, {"shortcut": "B"}),
    "preact": (bottleneck, {"preactivation": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPER)
def test_blocks_added_with_zero_gamma_change_no_logit(name):
    """He et al. 2015, section 1: the solution by construction."""
    branch, options = DEEPER[name]
    shallow, deep = (
        ResNet(sizes, branch, 4, downsample=False, num_classes=5, **options)
        for sizes in ((1, 2), (3, 3))
    )
    trained = variables_of(shallow)
    fresh = resjax.init(deep, jax.random.key(0), "msra_fan_out_zero_gamma")
    variables = traverse_util.unflatten_dict(flat(fresh) | flat(trained), sep="/")
    images = IMAGES[:, :8, :9]
    expected = shallow.apply(trained, images)
    np.testing.assert_allclose(deep.apply(variables, images), expected, rtol=1e-6)
    # With a branch that is not zero the same blocks change them.
    fresh = resjax.init(deep, jax.random.key(0), "msra_fan_out")
    variables = traverse_util.unflatten_dict(flat(fresh) | flat(trained), sep="/")
    assert np.abs(deep.apply(variables, images) - expected).max() > 0.01


@pytest.mark.parametrize("preact", [False, True])
def test_a_net_of_zero_branches_is_its_shortcut_path(preact):
    model = ResNet((2, 2), basic, 4, downsample=False, shortcut="A", preactivation=preact)
    variables = flat(variables_of(model))
    for path, leaf in variables.items():
        if "/norm_out/" in path or "/conv_out/" in path:
            variables[path] = jnp.zeros_like(leaf)
    variables = traverse_util.unflatten_dict(variables, sep="/")
    images = IMAGES[:, :6, :7]
    (_, stages), maps = forward(model, variables, images, return_stages=True)
    first = np.array(maps["stem"])
    if preact:
        first = relu_of_norm(variables, ("stage1", "block1", "norm1"), first)
    # A pre-activation block that changes the shape takes its input activated.
    last = first
    if preact:
        last = relu_of_norm(variables, ("stage2", "block1", "norm1"), last)
    last = np.pad(last[:, ::2, ::2], [(0, 0)] * 3 + [(0, 4)])
    if preact:
        last = relu_of_norm(variables, ("norm",), last)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    compare = close if preact else np.testing.assert_array_equal
    compare(stages["stage1"], first)
    compare(stages["stage2"], last)


# --- names and options ----------------------------------------------------------------


def test_own_conv_and_norm_reach_every_layer():
    class OwnConv(Conv):
        pass

    class OwnNorm(BatchNorm):
        pass

    calls = Counter()

    def count(call, args, kwargs, context):
        calls[type(context.module)] += context.method_name == "__call__"
        return call(*args, **kwargs)

    model = resjax.create_model("cifar_resnet20", shortcut="C", conv=OwnConv, norm=OwnNorm)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jax.random.key(0), images)
    # The stem, nine blocks of two layers, nine projections.
    assert calls[OwnConv] == calls[OwnNorm] == 1 + 18 + 9
    assert Conv not in calls and BatchNorm not in calls


def test_list_models_is_sorted_and_complete():
    assert resjax.list_models() == sorted(MODELS)


@pytest.mark.parametrize(
    "name, options, parts",
    [
        ("resnet51", {}, ["'resnet51'", "resnet50"]),
        ("nothing_like_it", {}, ["'nothing_like_it'", "cifar_resnet20", "resnet152"]),
        ("resnet18", {"shortcuts": "A"}, ["resnet18", "'shortcuts'", "mean shortcut?"]),
        ("resnet18", {"downsample": False}, ["'downsample'"]),
        ("resnet18", {"stage_sizes": (2, 0)}, ["stage_sizes", "(2, 0)", "above 0"]),
        ("resnet18", {"stage_sizes": ()}, ["stage_sizes", "()", "above 0"]),
        ("resnet18", {"stage_sizes": 2}, ["stage_sizes", "2", "tuple"]),
        ("resnet18", {"width": 0}, ["width", "0", "above 0"]),
        ("resnet18", {"width": 1.5}, ["width", "1.5", "whole"]),
        ("resnet18", {"shortcut": "D"}, ["shortcut", "'D'", "A, B, C"]),
        ("cifar_resnet20", {"shortcut": "a"}, ["shortcut", "'a'", "A, B, C, none"]),
        ("plain18", {"shortcut": None}, ["shortcut", "None", "none"]),
        ("resnet18", {"num_classes": -1}, ["num_classes", "-1", "0 or more"]),
        ("resnet18", {"stochastic_depth": "0.5"}, ["stochastic_depth", "'0.5'", "below 1"]),
        ("resnet18", {"stochastic_depth": 1.0}, ["stochastic_depth", "1.0", "below 1"]),
        ("resnet18", {"stochastic_depth": -0.1}, ["stochastic_depth", "-0.1", "0"]),
        ("plain18", {"stochastic_depth": 0.2}, ["stochastic_depth", "0.2", "shortcut"]),
        ("resnet18", {"remat": "conv"}, ["remat", "'conv'", "none, blocks, convs"]),
        ("resnet18", {"remat": 1}, ["remat", "1", "none, blocks, convs"]),
        (
            "preact_resnet18",
            {"stochastic_depth": 0.2, "shortcut": "none"},
            ["stochastic_depth", "0.2", "shortcut"],
        ),
    ],
)
def test_create_model_names_what_is_wrong_and_what_is_allowed(name, options, parts):
    with pytest.raises(UsageError) as error:
        resjax.create_model(name, **options)
    assert isinstance(error.value, ValueError)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_pixels_that_nobody_normalised_are_refused(dtype):
    model = resjax.create_model("cifar_resnet20", stage_sizes=(1,), width=4)
    variables = resjax.init(model, jax.random.key(0))
    images = np.ones((2, 8, 8, 3), dtype)
    with pytest.raises(UsageError, match=f"images: {np.dtype(dtype)} is no float"):
        model.apply(variables, images, train=False)
    model.apply(variables, images.astype(np.float64), train=False)


if __name__ == "__main__":
    for name in GOLDEN_MODELS:
        (GOLDEN / f"{name}.json").write_text(json.dumps(tree(name), indent=1) + "\n")
