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
from resjax.initializers import (
    BRANCH_END,
    MSRA_FAN_OUT,
    SCHEMES,
    delta_orthogonal,
    get_scheme,
    make_scheme,
    orthogonal,
    scheme_from_rules,
)
from resjax.models.blocks import basic, bottleneck
from resjax.models.norm import Bias
from resjax.models.resnet import MODELS, ResNet

KEY = jax.random.key(0)
IMAGES = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
# He et al. 2015 (arXiv:1502.01852), equations 14 and 10; Glorot & Bengio 2010, equations 12
# and 16; LeCun et al. 1998, equation 16; Krizhevsky et al. 2012, section 5.
VARIANCE = {
    "msra_fan_out": lambda fan_in, fan_out: 2 / fan_out,
    "msra_fan_in": lambda fan_in, fan_out: 2 / fan_in,
    "xavier": lambda fan_in, fan_out: 2 / (fan_in + fan_out),
    "xavier_uniform": lambda fan_in, fan_out: np.sqrt(6 / (fan_in + fan_out)) ** 2 / 3,
    "lecun": lambda fan_in, fan_out: 1 / fan_in,
    "normal": lambda fan_in, fan_out: 0.01**2,
}
ORTHOGONAL = ["orthogonal", "delta_orthogonal"]
BASES = [*VARIANCE, *ORTHOGONAL]
TRAINED = ["msra_fan_out", "msra_fan_in", "xavier"]  # in full, where a test takes long
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


def small(**options):
    return ResNet((2,), bottleneck, width=4, **options)


def small_preact(**options):
    return ResNet((1, 2), bottleneck, width=4, preactivation=True, **options)


def small_plain():
    return ResNet((1, 1), basic, width=4, shortcut="none")


def test_every_base_scheme_has_a_zero_gamma_variant():
    assert set(SCHEMES) == {*BASES, *(f"{name}_zero_gamma" for name in BASES)}


def formula(scheme, path, shape):
    """Variance of a kernel, and the kurtosis E[w^4] / E[w^2]^2 of its distribution."""
    *window, inputs, outputs = shape
    if path == "head/kernel":
        return 0.01**2, 3
    taps = np.prod(window)
    variance = VARIANCE[scheme](taps * inputs, taps * outputs)
    return variance, 9 / 5 if "uniform" in scheme else 3


def check_variances(net, scheme, keys, count):
    """Compares the mean square of each kernel with its formula, in standard errors."""
    params = flat(jax.eval_shape(MODELS[net]().init, KEY, IMAGES)["params"])
    shapes = {path: leaf.shape for path, leaf in params.items()}
    draws = [draw(scheme, shapes, jax.random.key(key)) for key in range(keys)]
    z = {}
    for path, shape in shapes.items():
        if path.endswith("kernel"):
            variance, kurtosis = formula(scheme, path, shape)
            weights = np.stack([params[path] for params in draws])
            measured = np.square(weights, dtype=np.float64).mean()
            z[path] = (measured / variance - 1) / np.sqrt((kurtosis - 1) / weights.size)
    assert len(z) == count
    far = {path: x for path, x in z.items() if abs(x) > 3}
    assert not far
    # An error that all kernels share moves all of them one way.
    assert abs(sum(z.values())) < 3 * np.sqrt(count)


# One draw has a leaf at -3.2 (the 640 weights of the classifier): over 4,000 keys that leaf
# is beyond 3 as often as chance has it, and eight draws measure each more sharply.
@pytest.mark.parametrize("scheme", VARIANCE)
def test_the_variance_of_every_kernel_is_that_of_the_formula(scheme):
    check_variances("cifar_resnet20", scheme, keys=8, count=20)


@pytest.mark.slow  # 25 million weights each
@pytest.mark.parametrize("scheme", VARIANCE)
@pytest.mark.parametrize("net", ["resnet50", "resnext50_32x4d"])
def test_the_variance_of_every_kernel_of_imagenet_nets(net, scheme):
    check_variances(net, scheme, keys=1, count=54)


@pytest.mark.parametrize("scheme", VARIANCE)
def test_kernels_are_normal_or_uniform_and_not_truncated(scheme):
    for path, leaf in draw(scheme).items():
        assert leaf.shape == WIDE[path] and leaf.dtype == np.float32
        if not path.endswith("kernel"):
            continue
        variance, kurtosis = formula(scheme, path, leaf.shape)
        z = (leaf / np.sqrt(variance)).ravel()
        assert abs(z.mean()) < 5 / np.sqrt(z.size), path
        # A normal that is cut at two deviations has kurtosis 2.4.
        assert abs((z**4).mean() - kurtosis) < 5 * np.sqrt(24 / z.size), path
        if kurtosis == 3:
            assert np.abs(z).max() > 3.5, path
        else:
            assert 0.999 * np.sqrt(3) < np.abs(z).max() <= 1.00001 * np.sqrt(3), path


def test_fan_out_draws_the_deviations_that_he_et_al_print():
    """Their section 2.2: the 3x3 layers of VGG's model B."""
    printed = {64: 0.059, 128: 0.042, 256: 0.029, 512: 0.021}
    shapes = {f"conv{width}/kernel": (3, 3, 64, width) for width in printed}
    shapes |= {"head/bias": (1,)}
    params = draw("msra_fan_out", shapes)
    measured = {width: float(params[f"conv{width}/kernel"].std()) for width in printed}
    assert measured == pytest.approx(printed, abs=0.0006)


@pytest.mark.parametrize("shape", [(3, 3, 4, 16), (1, 1, 8, 32), (1, 1, 32, 8)])
def test_orthogonal_kernels_have_one_singular_value(shape):
    kernel = np.array(orthogonal(1.5)(KEY, shape), np.float64)
    matrix = kernel.reshape(-1, shape[-1])
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), 1.5, rtol=1e-5)
    assert (np.abs(matrix) > 1e-6).mean() > 0.99  # and is no permutation


@pytest.mark.parametrize(
    "shape", [(3, 3, 8, 32), (3, 3, 32, 8), (7, 7, 8, 32), (1, 1, 8, 32)]
)
def test_delta_orthogonal_kernels_are_orthogonal_at_the_centre_and_zero_elsewhere(shape):
    kernel = np.array(delta_orthogonal(1.5)(KEY, shape), np.float64)
    middle = shape[0] // 2
    centre = kernel[middle, middle]
    np.testing.assert_allclose(np.linalg.svd(centre, compute_uv=False), 1.5, rtol=1e-5)
    assert np.count_nonzero(kernel) == np.count_nonzero(centre) == centre.size


def test_a_linear_layer_of_delta_orthogonal_kernels_keeps_the_norm_of_every_pixel():
    """Xiao et al. 2018 (arXiv:1806.05393), where C_in <= C_out."""
    x = np.random.RandomState(0).randn(2, 5, 6, 8).astype(np.float32)
    kernel = delta_orthogonal(1.0)(KEY, (3, 3, 8, 32))
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    norms = [np.linalg.norm(maps, axis=-1) for maps in (x, y)]
    np.testing.assert_allclose(*norms, rtol=1e-4)


@pytest.mark.parametrize("scheme", ORTHOGONAL)
def test_orthogonal_schemes_make_up_for_a_relu(scheme):
    params = draw(scheme, {"conv/kernel": (3, 3, 4, 16), "head/bias": (1,)})
    # 2 for each of the 16 columns of 36 weights, or of the 4 rows of the centre.
    power = {"orthogonal": 2 * 16, "delta_orthogonal": 2 * 4}[scheme]
    assert np.square(params["conv/kernel"]).sum() == pytest.approx(power, rel=1e-5)


def test_of_an_orthogonal_grouped_kernel_a_tall_one_is_orthogonal_by_group():
    for shape, groups, power in [((3, 3, 4, 16), 4, 1), ((3, 3, 4, 128), 32, 36 / 128)]:
        matrix = np.array(orthogonal(1.0)(KEY, shape), np.float64).reshape(-1, shape[-1])
        grams = [g.T @ g for g in np.split(matrix, groups, axis=1)]
        identity = np.eye(shape[-1] // groups)
        assert np.allclose(grams, identity, atol=1e-5) == (power == 1)
        assert np.square(matrix).sum(axis=0).mean() == pytest.approx(power)


@pytest.mark.parametrize("scheme", TRAINED)
def test_biases_start_at_zero_and_scales_at_one(scheme):
    for path, leaf in draw(scheme).items():
        if not path.endswith("kernel"):
            np.testing.assert_array_equal(leaf, float(path.endswith("scale")), path)


@pytest.mark.parametrize(
    "make, end, scheme",
    [
        *((small, "/norm_out/scale", scheme) for scheme in TRAINED),
        *((small_preact, "/conv_out/kernel", scheme) for scheme in TRAINED),
        (MODELS["cifar_resnet20"], "/norm_out/scale", "msra_fan_out"),
    ],
)
def test_zero_gamma_zeros_the_end_of_every_branch_and_nothing_else(make, end, scheme):
    base, variant = init(make(), scheme), init(make(), f"{scheme}_zero_gamma")
    changed = {path for path in base if (base[path] != variant[path]).any()}
    assert changed == {path for path in base if path.endswith(end)}
    blocks = {path.rsplit("/", 2)[0] for path in base if "/block" in path}
    assert len(changed) == len(blocks)
    assert not any(variant[path].any() for path in changed)


@pytest.mark.parametrize("scheme", ["msra_fan_in", "xavier", "lecun", "normal"])
def test_normal_schemes_differ_by_a_factor_a_leaf(scheme):
    base, other = draw("msra_fan_out"), draw(scheme)
    for path, leaf in base.items():
        factor = 1.0
        if path.endswith("kernel") and path != "head/kernel":
            *window, inputs, outputs = leaf.shape
            fans = np.array([inputs, outputs]) * np.prod(window)
            factor = np.sqrt(VARIANCE[scheme](*fans) / VARIANCE["msra_fan_out"](*fans))
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


@pytest.mark.parametrize(
    "make, scheme",
    [
        *((small_plain, scheme) for scheme in BASES),
        (MODELS["cifar_plain20"], "msra_fan_out"),
    ],
)
def test_zero_gamma_of_a_net_without_branches_is_an_error(make, scheme):
    params = jax.eval_shape(make().init, KEY, IMAGES)["params"]
    assert jax.eval_shape(SCHEMES[scheme], KEY, params) == params
    with pytest.raises(UsageError, match="norm_out/scale"):
        jax.eval_shape(SCHEMES[f"{scheme}_zero_gamma"], KEY, params)


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


@pytest.mark.parametrize(
    "scheme",
    [BASES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in BASES[1:])],
)
@pytest.mark.parametrize("preact", [False, True])
def test_a_zero_gamma_net_is_its_shortcut_path(preact, scheme):
    """A net of identity shortcuts computes what its stem and classifier do alone."""
    whole = ResNet((3,), basic, 4, downsample=False, preactivation=preact)
    empty = ResNet((), basic, 4, downsample=False)
    images = np.random.RandomState(0).randn(2, 6, 6, 3).astype(np.float32)
    expected = jax.jit(empty.apply)(resjax.init(empty, KEY, scheme), images)
    run = jax.jit(whole.apply)
    scale = np.abs(expected).max()
    logits = run(resjax.init(whole, KEY, f"{scheme}_zero_gamma"), images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)
    with_branches = run(resjax.init(whole, KEY, scheme), images)
    assert np.abs(with_branches - expected).max() > 1e-3 * scale


ROLES = {"conv": 1, "classifier": 2, "scale": 3, "bias": 4, "branch_end": 5}


@pytest.mark.parametrize(
    "make, absent, branch_end",
    [
        (small, set(), "norm_out/scale"),
        (small_preact, set(), "conv_out/kernel"),
        (small_plain, {"branch_end"}, None),
        (functools.partial(small_preact, norm=Bias), {"scale"}, "conv_out/kernel"),
        (functools.partial(small, norm=Bias), {"scale", "branch_end"}, None),
    ],
)
def test_a_scheme_is_made_of_an_initializer_for_each_role(make, absent, branch_end):
    values = {name: ROLES[name] for name in ROLES if name != "branch_end" or branch_end}
    constants = {name: jax.nn.initializers.constant(x) for name, x in values.items()}
    params = init(make(), make_scheme(**constants))
    for path, leaf in params.items():
        name = {"kernel": "conv"}.get(path.split("/")[-1], path.split("/")[-1])
        if path == "head/kernel":
            name = "classifier"
        if branch_end and path.endswith(branch_end):
            name = "branch_end"
        np.testing.assert_array_equal(leaf, ROLES[name], path)
    assert {int(leaf.flat[0]) for leaf in params.values()} == {
        ROLES[name] for name in ROLES if name not in absent
    }


def test_a_made_scheme_is_the_default_but_for_what_it_changes():
    mine = make_scheme(MSRA_FAN_OUT, classifier=jax.nn.initializers.normal(0.001))
    default = init(small(), "msra_fan_out")
    for path, leaf in init(small(), mine).items():
        factor = 0.1 if path == "head/kernel" else 1
        np.testing.assert_allclose(leaf, factor * default[path], rtol=1e-5, err_msg=path)


def test_rules_for_single_layers_go_before_those_for_roles():
    scheme = scheme_from_rules(
        [
            ("stem/.*", jax.nn.initializers.constant(7)),
            (BRANCH_END, jax.nn.initializers.zeros),
            (".*", jax.nn.initializers.ones),
        ]
    )
    for path, leaf in init(small(), scheme).items():
        value = 7 if path.startswith("stem/") else float("norm_out/scale" not in path)
        np.testing.assert_array_equal(leaf, value, path)


@pytest.mark.parametrize("scheme", BASES)
def test_a_net_without_norms_takes_every_scheme(scheme):
    model = small(norm=Bias)
    variables = jax.eval_shape(lambda: resjax.init(model, KEY, scheme))
    expected = jax.eval_shape(model.init, KEY, IMAGES)
    assert variables == {"params": expected["params"], "batch_stats": {}}
    with pytest.raises(UsageError, match="norm_out/scale"):
        jax.eval_shape(lambda: resjax.init(model, KEY, f"{scheme}_zero_gamma"))


# jax draws in the shape of the leaf what we draw flat.
ORACLES = {
    "msra_fan_out": jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "xavier": jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal"),
    "xavier_uniform": jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
}


@pytest.mark.parametrize(
    "scheme",
    [
        "msra_fan_out",
        *(
            pytest.param(f"xavier{kind}", marks=pytest.mark.slow)
            for kind in ("", "_uniform")
        ),
    ],
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


def fitting(names, bases):
    """(name, scheme), less zero branches of plain nets, which have none."""
    return [
        (name, scheme)
        for name in names
        for scheme in [*bases, *(f"{base}_zero_gamma" for base in bases)]
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
        for name, scheme in fitting(SMALL, BASES)
    ],
)
def test_one_step_moves_every_branch(name, scheme):
    check_one_step(*SMALL[name], scheme)


@pytest.mark.slow  # the deepest takes a minute to compile
@pytest.mark.parametrize("name, scheme", fitting(REAL, TRAINED))
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
