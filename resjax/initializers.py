"""Init schemes: functions (key, abstract_params) -> params, made of rules over paths.

A rule is (pattern, initializer); the first pattern that matches the whole parameter path
wins. Each leaf draws from its own key, folded from its path, so two schemes differ only
in the leaves whose rule differs. Knows nothing of models but their parameter paths.

To add a scheme, add an initializer to the table of `SCHEMES`; or pass `init` your own: what
`make_scheme` makes of a choice for each role that parameters play, what
`scheme_from_rules` makes of rules, or any function (key, abstract_params) -> params.
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
        std = math.sqrt(variance(*_fans(shape)))
        # Drawn flat: the same numbers, compiled in a third of the time.
        return std * jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)

    return draw


def uniform(variance: Callable[[int, int], float]) -> Initializer:
    """As `normal`, but uniformly from the interval around 0 that has the variance."""

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        bound = math.sqrt(3 * variance(*_fans(shape)))
        weights = jax.random.uniform(key, (math.prod(shape),), dtype, minval=-1)
        return bound * weights.reshape(shape)

    return draw


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    """Weights an output reads, and weights that read an input."""
    *window, inputs, outputs = shape
    taps = math.prod(window)
    return taps * inputs, taps * outputs


def orthogonal(gain: float) -> Initializer:
    """Draws a kernel that, as a matrix [k * k * C_in, C_out], is orthogonal times `gain`.

    Its columns are orthonormal, or its rows where they are fewer, so that the mean square
    of a weight is gain**2 / max(k * k * C_in, C_out).

    Args:
      gain: the singular values of the matrix; sqrt(2) makes up for a ReLU.

    Source: Saxe et al. 2013 (arXiv:1312.6120), section 3.
    Differs: a grouped kernel [k, k, C_in / g, C_out] is one such matrix, too. Where it is
      tall the columns of each group are orthonormal; where it is wide, as the 36 x 128 of
      ResNeXt 32x4d, they are not, and their mean square norm is gain**2 * 36 / 128.
    """
    return jax_init.orthogonal(gain)


def delta_orthogonal(gain: float) -> Initializer:
    """Draws a kernel that is 0 but for its centre tap, an `orthogonal` [C_in, C_out].

    Args:
      gain: the singular values of the centre tap; sqrt(2) makes up for a ReLU.

    Source: Xiao et al. 2018 (arXiv:1806.05393), algorithm 2.
    Differs: the paper has C_in <= C_out, where the rows are orthonormal and a linear layer
      keeps the norm of every pixel; with more inputs than outputs, as where a bottleneck
      narrows, the columns are. For groups see `orthogonal`.
    """

    def draw(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        centre = tuple((side - 1) // 2 for side in shape[:-2])
        tap = orthogonal(gain)(key, shape[-2:], dtype)
        return jnp.zeros(shape, dtype).at[centre].set(tap)

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
# Source: equation 16.
XAVIER_UNIFORM = uniform(lambda fan_in, fan_out: 2 / (fan_in + fan_out))
# Keeps the signal's variance without a ReLU.
# Source: LeCun et al. 1998, "Efficient BackProp", equation 16.
LECUN = normal(lambda fan_in, fan_out: 1 / fan_in)
# N(0, 0.01^2) at any width. Source: Krizhevsky et al. 2012 (AlexNet), section 5.
# Differs: AlexNet starts some biases at 1.
NORMAL = normal(lambda fan_in, fan_out: 0.01**2)
# With the gain of a ReLU: the mean square of `MSRA_FAN_IN` where the matrix is tall.
ORTHOGONAL = orthogonal(math.sqrt(2))
DELTA_ORTHOGONAL = delta_orthogonal(math.sqrt(2))
# N(0, 0.01^2). Source: Goyal et al. 2017 (arXiv:1706.02677), section 5.1.
CLASSIFIER = NORMAL

# The roles that parameters play, as patterns of their paths.
CONV_KERNEL = r"(.*/)?\w*conv\w*/kernel"
HEAD_KERNEL = r"(.*/)?head/kernel"
BIAS = r"(.*/)?(\w*norm\w*/|head/)bias"
NORM_SCALE = r"(.*/)?\w*norm\w*/scale"
# The last layer of every residual branch: a norm, or in a pre-activation branch a
# convolution (a zero norm before a ReLU would never move).
BRANCH_END = r".*/(norm_out/scale|conv_out/kernel)"


def make_scheme(
    conv: Initializer = MSRA_FAN_OUT,
    *,
    classifier: Initializer = CLASSIFIER,
    scale: Initializer = jax_init.ones,
    bias: Initializer = jax_init.zeros,
    branch_end: Initializer | None = None,
) -> Scheme:
    """A scheme from an initializer for each role, ours or one of jax.nn.initializers.

    make_scheme(XAVIER, classifier=jax.nn.initializers.normal(0.001)) is a scheme.

    Args:
      conv: of the kernels of convolutions, [k, k, C_in / groups, C_out].
      classifier: of the kernel of the last layer, [D, num_classes].
      scale: of norms, [C]; of no effect on a net without norms.
      bias: of norms, of what stands for them in a net without, and of the classifier.
      branch_end: of the last layer of every residual branch in the place of `conv` or
        `scale`: `norm_out/scale`, or `conv_out/kernel` in a pre-activation net; zeros make
        every block its shortcut. None: like the others.

    Returns:
      As `scheme_from_rules`. With `branch_end` it raises `UsageError` for a net that has
      no such layer: a plain one, or one without norms that is not pre-activation.
    """
    ends = [(BRANCH_END, branch_end)] if branch_end else []
    roles = [
        (CONV_KERNEL, conv),
        (HEAD_KERNEL, classifier),
        (BIAS, bias),
        (NORM_SCALE, scale),
    ]
    return scheme_from_rules([*ends, *roles])


def scheme_from_rules(
    rules: Sequence[Rule], optional: Sequence[str] = (HEAD_KERNEL, NORM_SCALE)
) -> Scheme:
    """A scheme that initialises each leaf by the first rule that fits its path.

    Args:
      rules: (pattern, initializer) pairs; a pattern is a regular expression that must
        match the whole path, e.g. "stage1/block1/norm_out/scale".
      optional: patterns that may match nothing; a net may have no classifier or no norms.

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
    "xavier_uniform": XAVIER_UNIFORM,
    "lecun": LECUN,
    "normal": NORMAL,
    "orthogonal": ORTHOGONAL,
    "delta_orthogonal": DELTA_ORTHOGONAL,
}

SCHEMES: dict[str, Scheme] = {
    name: make_scheme(conv) for name, conv in _CONV_INITS.items()
} | {
    # Every residual block starts as its shortcut. Source: Goyal et al. 2017, section 5.1.
    f"{name}_zero_gamma": make_scheme(conv, branch_end=jax_init.zeros)
    for name, conv in _CONV_INITS.items()
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
