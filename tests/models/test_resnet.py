"""Parameter counts and trees, map sizes, and that every branch of every model trains.

The trees in tests/golden/ are public; where a change of them is meant, write them with
`PYTHONPATH=. python tests/models/test_resnet.py`.
"""

import functools
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util

import resjax
from resjax.config import UsageError
from resjax.initializers import MSRA_FAN_OUT, SCHEMES, scheme_from_rules
from resjax.models.blocks import BottleneckBlock
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv
from resjax.models.resnet import MODELS, ResNet, Stage, Stem

# ImageNet: docs.pytorch.org/vision/stable/models.html, whose nets have the same layers.
# CIFAR: He et al. 2015 (arXiv:1512.03385), table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 M.
COUNTS = {
    ("resnet18", None): 11_689_512,
    ("resnet18", "A"): 11_515_688,
    ("resnet18", "C"): 12_043_816,
    ("resnet34", None): 21_797_672,
    ("resnet34", "A"): 21_623_848,
    ("resnet34", "C"): 22_716_840,
    ("resnet50", None): 25_557_032,
    ("resnet50", "C"): 40_128_552,
    ("resnet101", None): 44_549_160,
    ("resnet152", None): 60_192_808,
    ("cifar_resnet20", None): 269_722,
    ("cifar_resnet32", None): 464_154,
    ("cifar_resnet44", None): 658_586,
    ("cifar_resnet56", None): 853_018,
    ("cifar_resnet56", "B"): 855_770,
    ("cifar_resnet110", None): 1_727_962,
    ("cifar_resnet110", "B"): 1_730_714,
    ("cifar_resnet110", "C"): 1_826_202,
}
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GOLDEN_MODELS = ["resnet18", "resnet50", "cifar_resnet20"]
PATH = re.compile(
    r"(stem/conv|stage[1-9]\d*/block[1-9]\d*/(conv[123]|shortcut_conv)|head)/kernel"
    r"|(stem/norm|stage[1-9]\d*/block[1-9]\d*/(norm[12]|norm_out|shortcut_norm))/"
    r"(scale|bias|mean|var)"
    r"|head/bias"
)


@functools.cache
def shapes(name, shortcut=None):
    """{"params/stem/conv/kernel": shape and dtype, ...} of a model's variables."""
    model = resjax.create_model(name, **({"shortcut": shortcut} if shortcut else {}))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return traverse_util.flatten_dict(variables, sep="/")


def tree(name):
    return {
        path: f"{'x'.join(map(str, leaf.shape))} {leaf.dtype}"
        for path, leaf in sorted(shapes(name).items())
    }


def test_every_model_has_an_expected_count():
    assert {name for name, shortcut in COUNTS if shortcut is None} == set(MODELS)


@pytest.mark.parametrize("name, shortcut", COUNTS)
def test_parameter_count(name, shortcut):
    leaves = shapes(name, shortcut).items()
    count = sum(leaf.size for path, leaf in leaves if path.startswith("params/"))
    assert count == COUNTS[name, shortcut]


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_tree_is_the_golden_one(name):
    assert tree(name) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_paths_are_those_of_the_public_grammar(name):
    for path, leaf in shapes(name).items():
        collection, rest = path.split("/", 1)
        assert PATH.fullmatch(rest), path
        is_statistic = rest.endswith(("/mean", "/var"))
        assert collection == ("batch_stats" if is_statistic else "params")
        assert leaf.dtype == jnp.float32


@pytest.mark.parametrize("name", MODELS)
def test_every_residual_branch_ends_in_norm_out(name):
    blocks = {p.rsplit("/", 2)[0] for p in shapes(name) if "/block" in p}
    ends = {p.rsplit("/", 2)[0] for p in shapes(name) if p.endswith("/norm_out/scale")}
    assert ends and ends == {b for b in blocks if b.startswith("params/")}


def forward(model, variables, images, **flags):
    """Logits and the outputs of the stem and the stages."""
    logits, captured = model.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: isinstance(module, Stem | Stage),
        mutable=["intermediates", "batch_stats"],
        **flags,
    )
    outputs = captured["intermediates"]
    return logits, {name: outputs[name]["__call__"][0] for name in sorted(outputs)}


def trace(model, size, **flags):
    """What `forward` gives for two square images, as shapes and dtypes."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    return jax.eval_shape(functools.partial(forward, model, **flags), variables, images)


# He et al. 2015, table 1, at 224; an odd side is rounded up at every halving.
@pytest.mark.parametrize("size, sides", [(224, [56, 28, 14, 7]), (225, [57, 29, 15, 8])])
@pytest.mark.parametrize("name, expansion", [("resnet18", 1), ("resnet50", 4)])
def test_map_sizes_of_imagenet_models(name, expansion, size, sides):
    logits, maps = trace(resjax.create_model(name), size)
    assert maps.pop("stem").shape == (2, sides[0], sides[0], 64)
    widths = [64 * expansion * 2**i for i in range(4)]
    expected = [(2, side, side, c) for side, c in zip(sides, widths, strict=True)]
    assert [leaf.shape for leaf in maps.values()] == expected
    assert logits.shape == (2, 1000)


@pytest.mark.parametrize("size, sides", [(32, [32, 16, 8]), (33, [33, 17, 9])])
def test_map_sizes_of_cifar_models(size, sides):
    logits, maps = trace(resjax.create_model("cifar_resnet20"), size)
    assert maps.pop("stem").shape == (2, size, size, 16)
    expected = [(2, side, side, c) for side, c in zip(sides, [16, 32, 64], strict=True)]
    assert [leaf.shape for leaf in maps.values()] == expected
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_activations_give_float32_logits(train):
    model = resjax.create_model("resnet18", dtype=jnp.bfloat16)
    logits, maps = trace(model, 32, train=train)
    assert {leaf.dtype for leaf in maps.values()} == {jnp.dtype(jnp.bfloat16)}
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_the_classifier_of_the_mean_of_the_last_map_in_float32(dtype):
    model = ResNet((2,), BottleneckBlock, width=4, dtype=dtype)
    images = jnp.array(np.random.RandomState(0).randn(2, 20, 28, 3), jnp.float32)
    variables = resjax.init(model, jax.random.key(0))
    head = {"kernel": np.random.RandomState(1).randn(16, 1000), "bias": np.arange(1000)}
    variables["params"]["head"] = jax.tree.map(jnp.float32, head)
    logits, maps = forward(model, variables, images)
    pooled = np.array(maps["stage1"], np.float64).mean(axis=(1, 2))
    expected = pooled @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-4)


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


def test_num_classes_is_the_number_of_logits():
    logits, _ = trace(resjax.create_model("cifar_resnet20", num_classes=7), 8)
    assert logits.shape == (2, 7)


def test_list_models_is_sorted_and_complete():
    assert resjax.list_models() == sorted(MODELS)


@pytest.mark.parametrize(
    "name, options, parts",
    [
        ("resnet51", {}, ["'resnet51'", "resnet50"]),
        ("nothing_like_it", {}, ["'nothing_like_it'", "cifar_resnet20", "resnet152"]),
        ("resnet18", {"shortcuts": "A"}, ["resnet18", "'shortcuts'", "mean shortcut?"]),
        ("resnet18", {"stage_sizes": (1,)}, ["'stage_sizes'"]),
        ("resnet18", {"shortcut": "D"}, ["shortcut", "'D'", "A, B, C"]),
        ("cifar_resnet20", {"shortcut": "a"}, ["shortcut", "'a'", "A, B, C"]),
    ],
)
def test_create_model_names_what_is_wrong_and_what_is_allowed(name, options, parts):
    with pytest.raises(UsageError) as error:
        resjax.create_model(name, **options)
    assert isinstance(error.value, ValueError)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_plain_init_draws_the_default_scheme():
    model = ResNet((1,), BottleneckBlock, width=16)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items():
        if path.endswith("kernel"):
            fan_out = np.prod(leaf.shape[:2]) * leaf.shape[-1]
            std = 0.01 if path == "head/kernel" else np.sqrt(2 / fan_out)
            # Five standard errors of a measured standard deviation.
            np.testing.assert_allclose(
                np.std(leaf), std, rtol=5 / np.sqrt(2 * leaf.size), err_msg=path
            )
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")))
    for path, leaf in traverse_util.flatten_dict(variables["batch_stats"]).items():
        np.testing.assert_array_equal(leaf, float(path[-1] == "var"))


# --- every branch trains --------------------------------------------------------------


def part(path):
    """stem, head, or stage1/block1: the part of the network that a parameter trains."""
    return re.match(r"stage\d+/block\d+|\w+", path)[0]


def dead_parts(before, after):
    """The parts of which no weight moved."""
    before, after = (traverse_util.flatten_dict(p, sep="/") for p in (before, after))
    # A shortcut is no branch. A bias moves even where nothing of the input gets through.
    paths = [p for p in before if "/shortcut_" not in p and not p.endswith("/bias")]
    moved = {part(p) for p in paths if (np.array(before[p]) != np.array(after[p])).any()}
    return {part(p) for p in paths} - moved


@functools.lru_cache(maxsize=1)  # the schemes of one model share one compilation
def make_step(make_model, size):
    """variables -> parameters after one SGD step on four images."""
    model = make_model()
    images = jnp.array(np.random.RandomState(0).randn(4, size, size, 3), jnp.float32)
    labels = jnp.arange(4)

    def loss(params, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits = model.apply(variables, images, train=True, update_stats=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    # Only what moves counts, not how fast: half the time to compile.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(variables):
        gradients = jax.grad(loss)(variables["params"], variables["batch_stats"])
        return jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)

    return step


SMALL = {
    "cifar_resnet20": (MODELS["cifar_resnet20"], 8),
    "bottleneck": (functools.partial(ResNet, (2,), BottleneckBlock, width=4), 16),
}
ALL = {name: (make, 8 if "cifar" in name else 32) for name, make in MODELS.items()}


def check_one_step(make_model, size, scheme):
    variables = resjax.init(make_model(), jax.random.key(0), scheme)
    after = make_step(make_model, size)(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert dead_parts(variables["params"], after) == set()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SMALL)
def test_one_step_moves_every_branch(name, scheme):
    check_one_step(*SMALL[name], scheme)


@pytest.mark.slow  # the deepest takes a minute to compile
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ALL)
def test_one_step_moves_every_branch_of_every_model(name, scheme):
    check_one_step(*ALL[name], scheme)


def test_a_zero_in_the_wrong_place_is_seen_to_be_dead():
    rules = [
        (r".*/norm1/scale", nn.initializers.zeros),
        (r".*/scale", nn.initializers.ones),
        (r".*/bias", nn.initializers.zeros),
        (r".*/kernel", MSRA_FAN_OUT),
    ]
    make_model, size = SMALL["bottleneck"]
    variables = resjax.init(make_model(), jax.random.key(0), scheme_from_rules(rules))
    after = make_step(make_model, size)(variables)
    assert dead_parts(variables["params"], after) == {"stage1/block1", "stage1/block2"}


if __name__ == "__main__":
    for name in GOLDEN_MODELS:
        (GOLDEN / f"{name}.json").write_text(json.dumps(tree(name), indent=1) + "\n")
