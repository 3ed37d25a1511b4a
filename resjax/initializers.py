"""Init schemes: functions (key, abstract_params) -> params, made of rules over paths.

A rule is (pattern, initializer); the first pattern that matches the whole parameter path
wins. Each leaf draws from its own key, folded from its path, so two schemes differ only
in the leaves whose rule differs. Knows nothing of models but their parameter paths.

To add a scheme, add a row to `SCHEMES`, or pass your own function to `init`.
"""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.nn import initializers as jax_init

from resjax.config import UsageError, unknown_name

Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> weights
Params = dict[str, Any]
Scheme = Callable[[jax.Array, Params], Params]
Rule = tuple[str, Initializer]


def normal(variance: Callable[[int, int], float]) -> Initializer:
    """Draws every weight from N(0, variance(fan_in, fan_out)).

    Args:
      variance: of the fans of a kernel [..., C_in, C_out], k * k * C_in and
        k * k * C_out for a k x k window.
    """

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        *window, inputs, outputs = shape
        taps = math.prod(window)
        std = math.sqrt(variance(taps * inputs, taps * outputs))
        # Drawn flat: the same numbers, compiled in a third of the time.
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return draw


# Keeps the gradient's variance through a ReLU.
# Source: He et al. 2015 (arXiv:1502.01852), equation 14.
# Differs: in a grouped convolution an input reaches only its group's outputs, while fan_out
# counts all, as in PyTorch and fb.resnet.torch.
MSRA_FAN_OUT = normal(lambda fan_in, fan_out: 2 / fan_out)
# Keeps the signal's variance. Source: equation 10.
MSRA_FAN_IN = normal(lambda fan_in, fan_out: 2 / fan_in)
# Source: Glorot & Bengio 2010, equation 12.
# Differs: drawn from a normal, not a uniform, distribution of that variance.
XAVIER = normal(lambda fan_in, fan_out: 2 / (fan_in + fan_out))
# N(0, 0.01^2). Source: Goyal et al. 2017 (arXiv:1706.02677), section 5.1.
CLASSIFIER = normal(lambda fan_in, fan_out: 0.01**2)

# The last layer of every residual branch: a norm, or in a pre-activation branch a
# convolution (a zero norm before a ReLU would never move).
ZERO_BRANCH: Rule = (r".*/(norm_out/scale|conv_out/kernel)", jax_init.zeros)


HEAD_KERNEL = r"(.*/)?head/kernel"


def _with_convs(conv_init: Initializer) -> list[Rule]:
    return [
        (r"(.*/)?\w*conv\w*/kernel", conv_init),
        (HEAD_KERNEL, CLASSIFIER),
        (r"(.*/)?(\w*norm\w*/|head/)bias", jax_init.zeros),
        (r"(.*/)?\w*norm\w*/scale", jax_init.ones),
    ]


def scheme_from_rules(
    rules: Sequence[Rule], optional: Sequence[str] = (HEAD_KERNEL,)
) -> Scheme:
    """A scheme that initialises each leaf by the first rule that fits its path.

    Args:
      rules: (pattern, initializer) pairs; a pattern is a regular expression that must
        match the whole path, e.g. "stage1/block1/norm_out/scale".
      optional: patterns that may match nothing; a net may have no classifier.

    Returns:
      (key, abstract_params) -> params, float32. It raises `UsageError` for a leaf that
      no rule matches and for a rule that matches no leaf, such as one for the ends of
      residual branches on a plain net.
    """

    def scheme(key: jax.Array, abstract_params: Params) -> Params:
        unused = {pattern for pattern, _ in rules} - set(optional)
        params = {}
        for path, leaf in traverse_util.flatten_dict(abstract_params, sep="/").items():
            fits = [rule for rule in rules if re.fullmatch(rule[0], path)]
            if not fits:
                raise UsageError(f"init: no rule matches the parameter {path}")
            unused -= {pattern for pattern, _ in fits}
            leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            params[path] = fits[0][1](leaf_key, leaf.shape, jnp.float32)
        if unused:
            raise UsageError(
                f"init: no parameter of the model matches the rules {sorted(unused)} of "
                "the scheme"
            )
        return traverse_util.unflatten_dict(params, sep="/")

    return scheme


_CONV_INITS = {
    "msra_fan_out": MSRA_FAN_OUT,
    "msra_fan_in": MSRA_FAN_IN,
    "xavier": XAVIER,
}

SCHEMES: dict[str, Scheme] = {
    name: scheme_from_rules(_with_convs(conv_init))
    for name, conv_init in _CONV_INITS.items()
} | {
    # Every residual block starts as its shortcut. Source: Goyal et al. 2017, section 5.1.
    f"{name}_zero_gamma": scheme_from_rules([ZERO_BRANCH, *_with_convs(conv_init)])
    for name, conv_init in _CONV_INITS.items()
}


def get_scheme(name: str) -> Scheme:
    """The scheme of that name; raises `UsageError` with the nearest ones."""
    if name not in SCHEMES:
        raise unknown_name("init scheme", name, SCHEMES)
    return SCHEMES[name]


def init(
    model: nn.Module,
    key: jax.Array,
    scheme: str | Scheme = "msra_fan_out",
    image_size: int = 32,
) -> dict[str, Any]:
    """Variables of a model: parameters drawn by a scheme, statistics at 0 and 1.

    Args:
      model: a linen Module that takes images [B, H, W, 3].
      key: from `jax.random.key`.
      scheme: a name in `SCHEMES`, or a function (key, abstract_params) -> params.
      image_size: side of the images used to trace shapes; parameters do not depend on it.

    Returns:
      {"params": ..., "batch_stats": ...}, float32.

    Raises:
      UsageError: an unknown scheme, or one whose rules do not fit the model.
    """
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    abstract = jax.eval_shape(model.init, key, images)
    stats = traverse_util.path_aware_map(
        lambda path, leaf: jnp.full(leaf.shape, float(path[-1] == "var"), leaf.dtype),
        abstract.get("batch_stats", {}),
    )
    return {"params": scheme(key, abstract["params"]), "batch_stats": stats}
