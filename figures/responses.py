"""How strong the responses of layers are, in plain and in residual nets.

  python -m figures.responses
  python -m figures.responses --config=configs/cifar10_resnet20.py
  python -m figures.responses --vary model=cifar_resnet20,cifar_resnet110

The response of a layer is what its norm puts out, before ReLU and addition; its strength
is the standard deviation over images, positions and channels. All layers of a CIFAR net
count, of which every one is 3x3: that before the first stage, too, and no projection. The
nets are those of `python -m resjax.sweep depth`, in evaluation mode, on test images, and
are trained if they are not.

Source: He et al. 2015 (arXiv:1512.03385), section 4.2 and figure 7, which does not say on
which images.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from matplotlib.figure import Figure

import figures
from resjax import report
from resjax.analysis.lesions import make_top1_error
from resjax.comparisons import outcome
from resjax.config import UsageError, run_command
from resjax.models.resnet import ResNet

MODELS = ("cifar_plain20", "cifar_plain56", "cifar_resnet20", "cifar_resnet56")
CLAIM = (
    "He et al. 2015, figure 7: residual nets have smaller responses than plain ones, and "
    "deeper residual nets smaller ones than shallower."
)


def response_stds(
    model: ResNet, variables: dict[str, Any], images: jax.Array
) -> dict[str, float]:
    """Standard deviation of each layer's response, from input to output.

    Args:
      model: of which every convolution has a norm behind it.
      variables: {"params", "batch_stats"}.
      images: [N, H, W, 3] float, normalised as in training.

    Returns:
      {path of the norm: standard deviation}.

    Raises:
      UsageError: a pre-activation net, whose norms do not follow the convolutions.
    """
    if model.preactivation:
        raise UsageError(
            "model: a pre-activation net has norms before its convolutions; He et al. "
            "2015, figure 7, measures nets that have them behind"
        )
    unrolled = model.clone(remat="none")  # a loop over blocks would hide which is which
    order: list[str] = []

    @jax.jit
    def measure(variables: dict[str, Any], images: jax.Array) -> dict[str, jax.Array]:
        stds = {}

        def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = call(*args, **kwargs)
            if (context.module.name or "").startswith("norm"):
                path = "/".join(context.module.path)
                stds[path] = jnp.std(y.astype(jnp.float32))
            return y

        with nn.intercept_methods(keep):
            unrolled.apply(variables, images, train=False)
        order.extend(stds)  # which jax would sort
        return stds

    stds = measure(variables, images)
    return {path: float(stds[path]) for path in order}


def draw(measured: dict[str, np.ndarray], dashes: dict[str, str], title: str) -> Figure:
    """Standard deviations in the order of the layers, and by magnitude.

    Args:
      measured: [seeds, layers] by model.
      dashes: the line style of each.
      title: of the picture.
    """
    figure = Figure(figsize=(9.5, 7), layout="constrained")
    figure.suptitle(f"Responses of layers (He et al. 2015, figure 7)\n{title}")
    panels = figure.subplots(2, 1, sharey=True)
    for model, stds in measured.items():
        layers = np.arange(1, stds.shape[1] + 1)
        style = {"label": model, "linestyle": dashes[model], "marker": ".", "markersize": 4}
        report.draw_band(panels[0], layers, stds, **style)
        by_size = -np.sort(-stds, axis=1)
        report.draw_band(panels[1], layers, by_size, **style)
    panels[0].set_xlabel("layer, from input to output")
    panels[1].set_xlabel("layer, by magnitude, each seed on its own")
    for panel in panels:
        panel.set(ylabel="std of the response", ylim=(0, None))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=9)
    return figure


def verdict(measured: dict[str, np.ndarray], plain: set[str], untrained: set[str]) -> str:
    """The mean over layers of each net, +- over seeds.

    Args:
      measured: [seeds, layers] by model.
      plain: those of the models that have no shortcuts.
      untrained: those that have hardly trained, which are told, and not judged.
    """
    means = {model: stds.mean(axis=1) for model, stds in measured.items()}
    trained = measured.keys() - untrained
    residual = sorted(trained - plain, key=lambda name: measured[name].shape[1])
    signs = [
        report.order(means[other], means[model])
        for model in residual
        for other in trained & plain
    ]
    # Of residual nets, each deeper one against the one before it.
    signs += [report.order(means[a], means[b]) for a, b in itertools.pairwise(residual)]
    said = ", ".join(
        f"{model} {figures.text(each, 3)}"
        + (" (it has hardly trained)" if model in untrained else "")
        for model, each in means.items()
    )
    return (
        f"{outcome(signs)}the mean over layers of the standard deviation of the "
        f"response is {said}."
    )


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = figures.make_parser("responses", __doc__, images=1000)
    flags, words = parser.parse_known_args(arguments)
    nets, output = figures.trained_nets(flags, words, "depth", MODELS, preactivation=False)
    config = figures.config_of(nets)
    images, labels = figures.load_images(config, flags.images)
    chance = figures.chance_error(config.num_classes)
    rows, measured, untrained = [], {}, set()
    for model, runs in nets.items():
        each = [response_stds(run.model, run.variables, images) for run in runs]
        measured[model] = np.array([list(stds.values()) for stds in each])
        top1_error = make_top1_error(runs[0].model, np.asarray(images), np.asarray(labels))
        if figures.hardly_trained([top1_error(run.variables) for run in runs], chance):
            untrained.add(model)
        means, deviations = report.spread(measured[model])
        for i, path in enumerate(each[0]):
            row = {"model": model, "layer": i + 1, "path": path}
            rows.append({**row, "mean": means[i], "std": deviations[i]})
    plain = {model for model, (run, *_) in nets.items() if run.model.shortcut == "none"}
    dashes = {model: "--" if model in plain else "-" for model in nets}
    seeds = max(map(len, nets.values()))
    title = figures.describe(config, len(images), seeds)
    said = f"{CLAIM}\n{verdict(measured, plain, untrained)}"
    figures.save(output, "responses", draw(measured, dashes, title), rows, said)
    return 0


if __name__ == "__main__":
    run_command(main)
