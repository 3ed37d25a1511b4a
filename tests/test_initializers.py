"""Init schemes: distributions, keys by path, errors of rules, and that branches train."""

import functools
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import resjax
from resjax.config import UsageError
from resjax.initializers import MSRA_FAN_OUT, SCHEMES, get_scheme, scheme_from_rules
from resjax.models.blocks import basic, bottleneck
from resjax.models.resnet import MODELS, ResNet

BASES = ["msra_fan_out", "msra_fan_in", "xavier"]
KEY = jax.random.key(0)
IMAGES = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
# He et al. 2015 (arXiv:1502.01852), equations 14 and 10; Glorot & Bengio 2010, equation 12.
STD = {
    "msra_fan_out": lambda fan_in, fan_out: np.sqrt(2 / fan_out),
    "msra_fan_in": lambda fan_in, fan_out: np.sqrt(2 / fan_in),
    "xavier": lambda fan_in, fan_out: np.sqrt(2 / (fan_in + fan_out)),
}
WIDE = {
    "stem/conv/kernel": (7, 7, 3, 512),
    "stage1/block1/conv1/kernel": (3, 3, 64, 128),
    "stage1/block1/norm_out/scale": (128,),
    "stage1/block1/norm_out/bias": (128,),
    "stage1/block1/shortcut_conv/kernel": (1, 1, 128, 512),
    "head/kernel": (512, 100),
    "head/bias": (100,),
}


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def abstract(shapes):
    leaves = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def draw(scheme, shapes=WIDE, key=KEY):
    return jax.tree.map(np.array, flat(get_scheme(scheme)(key, abstract(shapes))))


def init(model, scheme, key=KEY):
    return jax.tree.map(np.array, flat(resjax.init(model, key, scheme)["params"]))


def small():
    return ResNet((2,), bottleneck, width=4)


def small_preact():
    return ResNet((1, 2), bottleneck, width=4, preactivation=True)


def small_plain():
    return ResNet((1, 1), basic, width=4, shortcut="none")


def test_every_base_scheme_has_a_zero_gamma_variant():
    assert set(SCHEMES) == {*BASES, *(f"{name}_zero_gamma" for name in BASES)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_measured_deviation_is_that_of_the_formula(scheme):
    formula = STD[scheme.removesuffix("_zero_gamma")]
    for path, leaf in draw(scheme).items():
        assert leaf.shape == WIDE[path] and leaf.dtype == np.float32
        if not path.endswith("kernel"):
            continue
        *window, inputs, outputs = leaf.shape
        taps = int(np.prod(window))
        std = 0.01 if path == "head/kernel" else formula(taps * inputs, taps * outputs)
        error = 1 / np.sqrt(leaf.size)  # of a mean, as a share of the deviation
        np.testing.assert_allclose(leaf.std(), std, rtol=4 * error, err_msg=path)
        assert abs(leaf.mean()) < 5 * std * error, path


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_are_normal_and_not_truncated(scheme):
    for path, leaf in draw(scheme).items():
        if path.endswith("kernel"):
            z = (leaf / leaf.std()).ravel()
            # A normal that is cut at two deviations has kurtosis 2.4, a uniform one 1.8.
            assert abs((z**4).mean() - 3) < 5 * np.sqrt(24 / z.size), path
            assert np.abs(z).max() > 3.5, path


@pytest.mark.parametrize("scheme", BASES)
def test_biases_start_at_zero_and_scales_at_one(scheme):
    for path, leaf in draw(scheme).items():
        if not path.endswith("kernel"):
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")), path)


@pytest.mark.parametrize("scheme", BASES)
@pytest.mark.parametrize(
    "make, end",
    [
        (small, "/norm_out/scale"),
        (MODELS["cifar_resnet20"], "/norm_out/scale"),
        (small_preact, "/conv_out/kernel"),
    ],
)
def test_zero_gamma_zeros_the_end_of_every_branch_and_nothing_else(make, end, scheme):
    base, variant = init(make(), scheme), init(make(), f"{scheme}_zero_gamma")
    changed = {path for path in base if (base[path] != variant[path]).any()}
    assert changed == {path for path in base if path.endswith(end)}
    blocks = {path.rsplit("/", 2)[0] for path in base if "/block" in path}
    assert len(changed) == len(blocks)
    assert not any(variant[path].any() for path in changed)


@pytest.mark.parametrize("scheme", ["msra_fan_in", "xavier"])
def test_schemes_differ_by_a_factor_a_leaf(scheme):
    base, other = draw("msra_fan_out"), draw(scheme)
    for path, leaf in base.items():
        factor = 1.0
        if path.endswith("kernel") and path != "head/kernel":
            *window, inputs, outputs = leaf.shape
            fans = np.array([inputs, outputs]) * np.prod(window)
            factor = STD[scheme](*fans) / STD["msra_fan_out"](*fans)
        np.testing.assert_allclose(other[path], factor * leaf, rtol=1e-5, err_msg=path)


def test_leaves_of_one_shape_draw_different_values():
    params = init(resjax.create_model("cifar_resnet20"), "msra_fan_out")
    kernels = [v.ravel() for v in params.values() if v.shape == (3, 3, 16, 16)]
    assert len(kernels) == 6
    correlation = np.abs(np.corrcoef(kernels)) - np.eye(6)
    assert correlation.max() < 5 / np.sqrt(kernels[0].size)


def test_a_leaf_does_not_depend_on_the_rest_of_the_network():
    small, large = (
        init(resjax.create_model(name), "msra_fan_out")
        for name in ("cifar_resnet20", "cifar_resnet32")
    )
    assert set(small) < set(large)
    for path, leaf in small.items():
        np.testing.assert_array_equal(leaf, large[path], path)


def test_the_key_decides_every_kernel():
    first, again, other = (draw("xavier", key=jax.random.key(k)) for k in (0, 0, 1))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
        assert (leaf != other[path]).any() == path.endswith("kernel"), path


def test_fan_in_keeps_the_signal_through_a_deep_stack_of_relus():
    depth, width = 30, 256
    shapes = {f"conv{i}/kernel": (1, 1, width, width) for i in range(depth)}
    shapes |= {"norm1/scale": (1,), "head/kernel": (1, 1), "head/bias": (1,)}
    power = {}
    for scheme in ("msra_fan_in", "xavier"):
        params = draw(scheme, shapes)
        x = np.random.RandomState(0).randn(64, width)
        for i in range(depth):
            x = np.maximum(x, 0) @ params[f"conv{i}/kernel"][0, 0]
        power[scheme] = (x**2).mean()
    # The first of the two starts from a signal that no ReLU has halved: 2 * 1/2 = 1.
    assert 1 / 4 < power["msra_fan_in"] < 4
    assert 1 / 4 < power["xavier"] * 2**depth < 4


def test_a_parameter_that_no_rule_matches_is_named():
    params = abstract({**WIDE, "stage1/block1/gate/weight": (3,)})
    with pytest.raises(UsageError, match="stage1/block1/gate/weight"):
        SCHEMES["msra_fan_out"](KEY, params)


def test_a_rule_must_match_the_whole_path():
    scheme = scheme_from_rules([("head", jax.nn.initializers.zeros)])
    with pytest.raises(UsageError, match="head/kernel"):
        scheme(KEY, abstract({"head/kernel": (2, 2)}))


@pytest.mark.parametrize("scheme", BASES)
@pytest.mark.parametrize("make", [small_plain, MODELS["cifar_plain20"]])
def test_zero_gamma_of_a_net_without_branches_is_an_error(make, scheme):
    params = jax.eval_shape(make().init, KEY, IMAGES)["params"]
    assert jax.tree.structure(SCHEMES[scheme](KEY, params)) == jax.tree.structure(params)
    with pytest.raises(UsageError, match="norm_out/scale"):
        resjax.init(make(), KEY, f"{scheme}_zero_gamma")


@pytest.mark.parametrize(
    "make, scheme",
    [
        (small, "msra_fan_in_zero_gamma"),
        (small_preact, "msra_fan_out_zero_gamma"),
        (small_plain, "xavier"),
    ],
)
def test_a_net_without_a_classifier_is_initialised_like_one_with_it(make, scheme):
    whole, body = init(make(), scheme), init(make().clone(num_classes=0), scheme)
    assert set(whole) - set(body) == {"head/kernel", "head/bias"}
    for path, leaf in body.items():
        np.testing.assert_array_equal(leaf, whole[path], path)


# jax draws in the shape of the leaf what we draw flat.
ORACLES = {
    "msra_fan_out": jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "xavier": jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal"),
}


@pytest.mark.parametrize(
    "scheme", ["msra_fan_out", pytest.param("xavier", marks=pytest.mark.slow)]
)
def test_a_leaf_draws_the_numbers_of_jax_from_the_key_of_its_path(scheme):
    for path, leaf in draw(scheme).items():
        if path.endswith("kernel"):
            is_head = path == "head/kernel"
            oracle = jax.nn.initializers.normal(0.01) if is_head else ORACLES[scheme]
            key = jax.random.fold_in(KEY, zlib.crc32(path.encode()))
            expected = oracle(key, leaf.shape, jnp.float32)
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=path)


def test_the_first_rule_that_matches_wins():
    rules = [(r"head/bias", jax.nn.initializers.ones), (r".*", jax.nn.initializers.zeros)]
    shapes = {"head/bias": (2,), "head/kernel": (2,)}
    head = scheme_from_rules(rules)(KEY, abstract(shapes))["head"]
    np.testing.assert_array_equal(head["bias"], 1)
    np.testing.assert_array_equal(head["kernel"], 0)


def test_init_takes_a_scheme_of_the_user():
    def scheme(key, abstract_params):
        fill = jax.random.uniform(key)
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, fill), abstract_params)

    variables = resjax.init(small(), KEY, scheme)
    leaves = jax.tree.leaves(variables["params"])
    assert len(leaves) > 20
    for leaf in leaves:
        np.testing.assert_array_equal(leaf, jax.random.uniform(KEY))


def test_an_unknown_scheme_offers_the_nearest():
    with pytest.raises(UsageError, match=r"'msra_fanout'.*did you mean msra_fan_out"):
        resjax.init(small(), KEY, "msra_fanout")


@pytest.mark.parametrize("image_size", [32, 45])
def test_init_has_the_tree_of_the_module_whatever_the_image_size(image_size):
    model = small()
    variables = resjax.init(model, KEY, image_size=image_size)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    expected = jax.eval_shape(model.init, KEY, images)
    assert jax.eval_shape(lambda: variables) == expected
    for path, leaf in flat(variables["batch_stats"]).items():
        np.testing.assert_array_equal(leaf, float(path.endswith("var")))


def test_msra_fan_out_is_the_default():
    default = flat(resjax.init(small(), KEY)["params"])
    for path, leaf in init(small(), "msra_fan_out").items():
        np.testing.assert_array_equal(leaf, default[path])


def test_plain_init_draws_the_default_scheme():
    model = ResNet((1,), bottleneck, width=16)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    for path, leaf in flat(variables["params"]).items():
        if path.endswith("kernel"):
            fan_out = np.prod(leaf.shape[:2]) * leaf.shape[-1]
            std = 0.01 if path == "head/kernel" else np.sqrt(2 / fan_out)
            # Five standard errors of a measured standard deviation.
            np.testing.assert_allclose(
                np.std(leaf), std, rtol=5 / np.sqrt(2 * leaf.size), err_msg=path
            )
        else:
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")))
    for path, leaf in flat(variables["batch_stats"]).items():
        np.testing.assert_array_equal(leaf, float(path.endswith("var")))


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
    "bottleneck": (small, 16),
    "preact": (small_preact, 16),
    "preact_basic": (
        functools.partial(ResNet, (1, 1), basic, 4, shortcut="A", preactivation=True),
        16,
    ),
    "plain": (small_plain, 16),
    "resnext": (
        functools.partial(
            ResNet, (2,), functools.partial(bottleneck, groups=2, group_width=32), 4
        ),
        16,
    ),
}
REAL = [
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    *("plain18", "cifar_plain20", "resnext50_32x4d", "wide_resnet50_2"),
    *("preact_resnet18", "preact_resnet50", "cifar_preact_resnet110"),
    "cifar_resnext29_8x64d",
]


def fitting(names):
    """(name, scheme), less zero branches of plain nets, which have none."""
    return [
        (name, scheme)
        for name in names
        for scheme in SCHEMES
        if not ("plain" in name and "zero_gamma" in scheme)
    ]


def check_one_step(make_model, size, scheme):
    variables = resjax.init(make_model(), KEY, scheme)
    after = make_step(make_model, size)(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert dead_parts(variables["params"], after) == set()


@pytest.mark.parametrize(
    "name, scheme",
    [
        # The others differ only in the scale of what they draw.
        (name, scheme)
        if scheme == "msra_fan_out_zero_gamma" and name != "cifar_resnet20"
        else pytest.param(name, scheme, marks=pytest.mark.slow)
        for name, scheme in fitting(SMALL)
    ],
)
def test_one_step_moves_every_branch(name, scheme):
    check_one_step(*SMALL[name], scheme)


@pytest.mark.slow  # the deepest takes a minute to compile
@pytest.mark.parametrize("name, scheme", fitting(REAL))
def test_one_step_moves_every_branch_of_real_models(name, scheme):
    check_one_step(MODELS[name], 8 if "cifar" in name else 32, scheme)


@pytest.mark.parametrize(
    "name, norm, dead",
    [
        ("bottleneck", "norm1", {"stage1/block1", "stage1/block2"}),
        # The zero before the last convolution that a zero `norm_out` would be here.
        ("preact", "norm3", {"stage2/block2"}),
    ],
)
def test_a_zero_in_the_wrong_place_is_seen_to_be_dead(name, norm, dead):
    rules = [
        (rf".*/{norm}/scale", jax.nn.initializers.zeros),
        (r".*/scale|norm/scale", jax.nn.initializers.ones),
        (r".*/bias", jax.nn.initializers.zeros),
        (r".*/kernel", MSRA_FAN_OUT),
    ]
    make_model, size = SMALL[name]
    variables = resjax.init(make_model(), KEY, scheme_from_rules(rules))
    after = make_step(make_model, size)(variables)
    assert dead_parts(variables["params"], after) == dead
