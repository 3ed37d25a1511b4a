"""Init schemes: their distributions, their keys by path, and the errors of their rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import resjax
from resjax.config import UsageError
from resjax.initializers import SCHEMES, get_scheme, scheme_from_rules
from resjax.models.blocks import BottleneckBlock
from resjax.models.resnet import MODELS, ResNet

BASES = ["msra_fan_out", "msra_fan_in", "xavier"]
KEY = jax.random.key(0)
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


def bottleneck():
    return ResNet((2,), BottleneckBlock, width=4)


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
@pytest.mark.parametrize("make", [bottleneck, MODELS["cifar_resnet20"]])
def test_zero_gamma_changes_the_scale_of_every_norm_out_and_nothing_else(make, scheme):
    base, variant = init(make(), scheme), init(make(), f"{scheme}_zero_gamma")
    changed = {path for path in base if (base[path] != variant[path]).any()}
    assert changed == {path for path in base if path.endswith("/norm_out/scale")}
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
def test_zero_gamma_of_a_net_without_branches_is_an_error(scheme):
    plain = {k.replace("norm_out", "norm1"): shape for k, shape in WIDE.items()}
    SCHEMES[scheme](KEY, abstract(plain))
    with pytest.raises(UsageError, match="norm_out/scale"):
        SCHEMES[f"{scheme}_zero_gamma"](KEY, abstract(plain))


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

    variables = resjax.init(bottleneck(), KEY, scheme)
    leaves = jax.tree.leaves(variables["params"])
    assert len(leaves) > 20
    for leaf in leaves:
        np.testing.assert_array_equal(leaf, jax.random.uniform(KEY))


def test_an_unknown_scheme_offers_the_nearest():
    with pytest.raises(UsageError, match=r"'msra_fanout'.*did you mean msra_fan_out"):
        resjax.init(bottleneck(), KEY, "msra_fanout")


@pytest.mark.parametrize("image_size", [32, 45])
def test_init_has_the_tree_of_the_module_whatever_the_image_size(image_size):
    model = bottleneck()
    variables = resjax.init(model, KEY, image_size=image_size)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    expected = jax.eval_shape(model.init, KEY, images)
    assert jax.eval_shape(lambda: variables) == expected
    for path, leaf in flat(variables["batch_stats"]).items():
        np.testing.assert_array_equal(leaf, float(path.endswith("var")))


def test_msra_fan_out_is_the_default():
    default = flat(resjax.init(bottleneck(), KEY)["params"])
    for path, leaf in init(bottleneck(), "msra_fan_out").items():
        np.testing.assert_array_equal(leaf, default[path])
