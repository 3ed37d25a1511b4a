"""How far signals and gradients reach: their size at each layer, beside what theory says.

Theory follows mean squares through the network, all weights taken as independent and
symmetric about 0. A convolution of n inputs an output multiplies them by n E[w^2], on the
way back by n^ E[w^2], n^ outputs an input; a ReLU of responses symmetric about 0 halves
them. Zeros around the map hold nothing: with padding, theory follows a map of mean squares.

Where papers end, it goes on so: at a sum, mean squares add. What a ReLU takes in is normal;
its mean is 0 unless a rectified shortcut was added to it, and on the way back it opens
independently of the ReLU before that shortcut (they open together: without norms gradients
grow by up to a third a block more). A batch norm puts out its squared scale, and divides
the gradient by the variance over the batch; examples that it has normalised are independent
of each other. With padding that is rough on the way back: behind many norms the prediction
is several times too large, and the one without padding is nearer. Biases are 0, as at the
start of training. There is no theory of the classifier's response, which depends on how
positions correlate, nor beyond a max-pool: NaN.

Source: Glorot & Bengio 2010, equations 5 to 6; He et al. 2015 (arXiv:1502.01852), equations
  5 to 14; batch norm: Yang et al. 2019 (arXiv:1902.08129).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from resjax import initializers
from resjax.initializers import Scheme
from resjax.models.blocks import ConvSpec
from resjax.models.resnet import ResNet

Variables = dict[str, Any]
Back = Callable[[np.ndarray], np.ndarray]  # gradient at the output -> at the input

_erf = np.vectorize(math.erf)


class Propagation(NamedTuple):
    """Responses of each layer and their gradients, measured and predicted; [L] float64.

    Predictions forward start from the first response as measured, backward from the
    kernel of the classifier. `relu` and `linear` are the papers' products over layers.

    Attributes:
      layers: paths of all convolutions, as they are called, and of the classifier.
      forward: mean square over images, positions and channels.
      forward_variance: variance over the same.
      forward_theory: predicted mean square, with zero padding.
      forward_relu: the same without padding: products of n E[w^2] / 2.
      forward_linear: the same without ReLUs: products of n E[w^2].
      backward: mean square of the gradient, as `forward`, and so on.
    """

    layers: tuple[str, ...]
    forward: np.ndarray
    forward_variance: np.ndarray
    forward_theory: np.ndarray
    forward_relu: np.ndarray
    forward_linear: np.ndarray
    backward: np.ndarray
    backward_variance: np.ndarray
    backward_theory: np.ndarray
    backward_relu: np.ndarray
    backward_linear: np.ndarray


def signal_propagation(
    model: ResNet, variables: Variables, images: jax.Array, *, key: jax.Array | None = None
) -> Propagation:
    """Mean squares and variances of all responses and of the gradients at them.

    The response is what a convolution or the classifier puts out. Gradients are those of
    the sum of all outputs times random signs, drawn independently: of unit variance at the
    top. Norms use the batch's statistics, and stochastic depth keeps all branches.

    Args:
      model: from `create_model`.
      variables: {"params", "batch_stats"}, of a new or a trained net.
      images: [B, H, W, 3] float, normalised as in training.
      key: of the random signs; None = jax.random.key(0).

    Source: He et al. 2015 (arXiv:1502.01852), section 2.2.
    """
    key = jax.random.key(0) if key is None else key
    model = model.clone(remat="none", stochastic_depth=0.0)  # a loop would hide blocks
    measured, first = _measure(model, variables, images, key)
    theories = [
        _predict(model, variables, np.asarray(first, np.float64), **kind)
        for kind in ({}, {"padded": False}, {"padded": False, "rectified": False})
    ]
    layers = tuple(theories[0][0])
    columns: list[np.ndarray] = []
    for way in (0, 1):  # forward, backward
        moments = [_unscaled(measured[layer][way]) for layer in layers]
        columns += map(np.array, zip(*moments, strict=True))
        columns += [np.array([theory[way][name] for name in layers]) for theory in theories]
    return Propagation(layers, *columns)


def mean_propagation(
    model: ResNet, images: jax.Array, scheme: str | Scheme, keys: Iterable[jax.Array]
) -> Propagation:
    """`signal_propagation` of new nets, each of its own key: the mean of every column.

    The arithmetic mean of mean squares is what theory predicts. It converges slowly where
    the network is deep and narrow, for then few nets have most of it: over L layers of n
    inputs, their standard deviation is a fraction sqrt(exp(5 L / n) - 1) of it in a fully
    connected ReLU net, n = k * k * C_in at best in a convolutional one, C_in at worst.

    Source: Hanin & Rolnick 2018 (arXiv:1803.01719), for how mean squares spread with L / n.
    """
    nets = []
    for key in keys:
        variables = initializers.init(model, key, scheme)
        nets.append(signal_propagation(model, variables, images, key=key))
    layers, *columns = zip(*nets, strict=True)
    return Propagation(layers[0], *(np.mean(column, axis=0) for column in columns))


@partial(jax.jit, static_argnums=0)
def _measure(
    model: ResNet, variables: Variables, images: jax.Array, key: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """Moments of each layer's response and gradient; the first's mean square [H, W]."""

    def respond(shifts: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Outputs and responses, to each of which its shift is added."""
        responses: dict[str, jax.Array] = {}

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = call(*args, **kwargs)
            module = context.module
            if context.method_name == "__call__" and module.has_variable(
                "params", "kernel"
            ):
                path = "/".join(module.path)
                y = responses[path] = y + shifts[path] if shifts else y
            return y

        with nn.intercept_methods(intercept):
            outputs: Any = model.apply(variables, images, train=True, update_stats=False)
        return outputs, responses

    shapes = jax.eval_shape(lambda: respond({})[1])
    shifts = {path: jnp.zeros(y.shape, y.dtype) for path, y in shapes.items()}
    outputs, back, responses = jax.vjp(respond, shifts, has_aux=True)
    (gradients,) = back(jax.random.rademacher(key, outputs.shape, outputs.dtype))
    moments = {
        path: (_moments(y), _moments(gradients[path])) for path, y in responses.items()
    }
    return moments, jnp.square(responses["stem/conv"]).mean(axis=(0, 3))


def _moments(y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest magnitude, and mean square and variance in units of its square."""
    y = y.astype(jnp.float32)
    largest = jnp.abs(y).max()  # squares of what is left after many layers would round to 0
    y = y / jnp.where(largest > 0, largest, 1)
    return largest, jnp.square(y).mean(), y.var()


def _unscaled(moments: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[float, float]:
    largest, square, variance = map(float, moments)
    return square * largest**2, variance * largest**2


class _Signal(NamedTuple):
    """What theory knows of activations or responses, at each position; all [H, W]."""

    mean: np.ndarray
    square: np.ndarray
    shared: np.ndarray  # mean product of two examples


def _predict(
    model: ResNet,
    variables: Variables,
    first: np.ndarray,
    *,
    padded: bool = True,
    rectified: bool = True,
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean squares of responses and of gradients by layer, in the order of the calls.

    Args:
      model: from `create_model`.
      variables: {"params", ...}.
      first: mean square of the first response, [H, W].
      padded: maps end in zeros; otherwise they go on for ever, all alike.
      rectified: there are ReLUs.
    """
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    walk = _Walk(model, params, padded, rectified)
    strides = 2 ** (len(model.stage_sizes) - 1) * (2 if model.downsample else 1)
    positions = math.prod(-(-side // strides) for side in first.shape)  # of the last map
    first = first if padded else first.mean(keepdims=True)
    walk.forward["stem/conv"] = first.mean()
    x = _Signal(0 * first, first, 0 * first)
    backs: list[Back] = [partial(_note, walk.backward, "stem/conv")]
    if not model.preactivation:
        x = walk.norm_relu(x, params["stem"].get("norm"), backs)
    if model.downsample:
        x = walk.pool(x, backs)
    for i, size in enumerate(model.stage_sizes):
        for j in range(size):
            x = walk.block(x, i, j, backs)
    if model.preactivation:
        x = walk.norm_relu(x, params["norm"], backs)
    gradient = 1.0  # mean square at the averaged map
    if "head" in params:
        walk.forward["head"], walk.backward["head"] = math.nan, 1.0
        gradient = np.square(params["head"]["kernel"]).sum(axis=1).mean()
    _back_through(backs, np.full_like(x.square, gradient / positions**2))
    return walk.forward, walk.backward


def _note(squares: dict[str, float], path: str, d: np.ndarray) -> np.ndarray:
    squares[path] = d.mean()
    return d


def _back_through(backs: list[Back], d: np.ndarray) -> np.ndarray:
    for back in reversed(backs):
        d = back(d)
    return d


@dataclasses.dataclass(frozen=True)
class _Walk:
    """The layers of a network as functions of what theory knows of their inputs.

    Each appends to `backs` what it does to a mean square gradient [H, W] on the way back.
    """

    model: ResNet
    params: dict[str, Any]
    padded: bool
    rectified: bool
    forward: dict[str, float] = dataclasses.field(default_factory=dict)
    backward: dict[str, float] = dataclasses.field(default_factory=dict)

    def block(self, x: _Signal, i: int, j: int, backs: list[Back]) -> _Signal:
        """Block j of stage i, both counted from 0."""
        model, path = self.model, f"stage{i + 1}/block{j + 1}"
        specs = model.branch(model.width * 2**i, 2 if i and not j else 1)
        params = self.params[f"stage{i + 1}"][f"block{j + 1}"]
        inputs = params["conv1"]["kernel"].shape[2] * specs[0].groups
        strides = math.prod(spec.strides for spec in specs)
        plain, before = model.shortcut == "none", model.preactivation
        branch: list[Back] = []
        y = x
        for k, spec in enumerate(specs, start=1):
            last = k == len(specs) and not plain
            norm = params.get(f"norm{k}" if before or not last else "norm_out")
            if before:
                y = self.norm_relu(y, norm, branch)
            if before and k == 1:
                activated, activate = y, list(branch)
            name = "conv_out" if before and last else f"conv{k}"
            y = self.conv(y, f"{path}/{name}", params[name], spec, branch)
            if not before:
                y = self.norm(y, norm, branch)
                y = y if last else self.relu(y, branch)
        if plain:
            backs += branch
            return y
        shortcut: list[Back] = []
        features = specs[-1].features
        # The rules of `shortcut_path` and of `PreActBlock`.
        same = model.shortcut != "C" and strides == 1 and inputs == features
        if before and (not i + j or not same):
            x, shortcut = activated, activate
        if "shortcut_conv" in params:
            name, spec = "shortcut_conv", ConvSpec(features, 1, strides)
            x = self.conv(x, f"{path}/{name}", params[name], spec, shortcut)
            x = x if before else self.norm(x, params["shortcut_norm"], shortcut)
        elif not same:
            # Option A: appended channels are 0, and what they get back is lost.
            kept, one = np.full((1, 1), inputs / features), np.ones((1, 1))
            x = self.window(x, kept, one, strides, shortcut)
        backs.append(lambda d: _back_through(branch, d) + _back_through(shortcut, d))
        total = _Signal(*(a + b for a, b in zip(x, y, strict=True)))
        return total if before else self.relu(total, backs)

    def conv(
        self, x: _Signal, path: str, params: Any, spec: ConvSpec, backs: list[Back]
    ) -> _Signal:
        squares = np.square(params["kernel"])
        inputs, outputs = squares.sum(axis=2).mean(axis=2), squares.sum(axis=3).mean(axis=2)
        y = self.window(x, inputs, outputs / spec.groups, spec.strides, backs)
        backs.append(partial(_note, self.backward, path))
        self.forward[path] = y.square.mean()
        return y._replace(mean=0 * y.mean)

    def window(
        self,
        x: _Signal,
        taps: np.ndarray,
        back: np.ndarray,
        strides: int,
        backs: list[Back],
    ) -> _Signal:
        """Sums over a window [k, k] with these factors forward, those on the way back."""
        if not self.padded:
            backs.append(lambda d: d * back.sum() / strides**2)
            return _Signal(*(each * taps.sum() for each in x))
        shape = x.square.shape
        backs.append(lambda d: _spread(d, back, strides, shape))
        return _Signal(*(_gather(each, taps, strides) for each in x))

    def norm(self, x: _Signal, params: Any, backs: list[Back]) -> _Signal:
        if "scale" not in params:
            return x
        square = np.square(params["scale"]).mean()
        variance = (x.square - x.shared).mean()
        backs.append(lambda d: d * square / variance)
        zero = np.zeros_like(x.square)
        return _Signal(zero, zero + square, zero)

    def relu(self, x: _Signal, backs: list[Back]) -> _Signal:
        """Moments of the positive part of a normal distribution."""
        if not self.rectified:
            return x
        std = np.sqrt(np.maximum(x.square - x.mean**2, 0))
        steps = np.divide(x.mean, std, out=np.full_like(std, np.inf), where=std != 0)
        positive = (1 + _erf(steps / math.sqrt(2))) / 2
        density = np.exp(-(steps**2) / 2) / math.sqrt(2 * math.pi)
        backs.append(lambda d: d * positive)
        mean = x.mean * positive + std * density
        return _Signal(mean, x.square * positive + x.mean * std * density, mean**2)

    def norm_relu(self, x: _Signal, params: Any, backs: list[Back]) -> _Signal:
        return self.relu(self.norm(x, params, backs), backs)

    def pool(self, x: _Signal, backs: list[Back]) -> _Signal:
        """The max-pool, of which there is no theory."""
        strides = 2 if self.padded else 1
        backs.append(lambda d: np.full_like(x.square, math.nan))
        return _Signal(*(math.nan * each[::strides, ::strides] for each in x))


def _gather(x: np.ndarray, taps: np.ndarray, strides: int) -> np.ndarray:
    """A map [H, W] convolved with a window [k, k], zeros around it as in `ops.conv`."""
    k, (rows, columns) = len(taps), x.shape
    x = np.pad(x, (k - 1) // 2)
    return sum(
        taps[i, j] * x[i : i + rows : strides, j : j + columns : strides]
        for i, j in np.ndindex(k, k)
    )


def _spread(
    d: np.ndarray, taps: np.ndarray, strides: int, shape: tuple[int, ...]
) -> np.ndarray:
    """The transpose of `_gather`, back to a map of that shape."""
    k, (rows, columns) = len(taps), shape
    pad = (k - 1) // 2
    x = np.zeros((rows + 2 * pad, columns + 2 * pad))
    for i, j in np.ndindex(k, k):
        x[i : i + rows : strides, j : j + columns : strides] += taps[i, j] * d
    return x[pad : pad + rows, pad : pad + columns]


def draw_propagation(runs: Mapping[str, Propagation]) -> Any:
    """A picture of mean squares by layer: measured as dots, theory as lines.

    Forward, what remains of the first response; backward, of the last convolution's
    gradient. The line is the theory with padding; dashes are the ReLU product without.

    Args:
      runs: what `signal_propagation` or `mean_propagation` found, by their names.

    Returns:
      A `matplotlib.figure.Figure`; its `savefig` writes it.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, (name, run) in enumerate(runs.items()):
        convs = np.array([layer != "head" for layer in run.layers])
        numbers = np.flatnonzero(convs) + 1
        for panel, way, end in zip(panels, ("forward", "backward"), (0, -1), strict=True):
            styles = {way: ".", f"{way}_theory": "-", f"{way}_relu": "--"}
            for column, style in styles.items():
                squares = getattr(run, column)[convs]
                label = name if style == "." else None
                relative = squares / squares[end]
                panel.plot(numbers, relative, style, color=f"C{i}", label=label)
    panels[0].set(title="responses", ylabel="mean square / that of the first layer")
    panels[1].set(title="gradients", ylabel="mean square / that of the last layer")
    for panel in panels:
        panel.set(xlabel="convolution, from the input", yscale="log")
        panel.grid(alpha=0.3)
    dots, _ = panels[0].get_legend_handles_labels()
    gray = partial(Line2D, [], [], color="gray")
    lines = [gray(ls="-", label="theory"), gray(ls="--", label="theory without padding")]
    panels[0].legend(handles=[*dots, *lines])
    return figure
