"""How long the paths are through which the gradient of a residual net comes back.

  python -m figures.paths
  python -m figures.paths --config=configs/cifar10_resnet110.py --images=128

The net of 54 blocks is that of `python -m resjax.sweep preact`, and is trained if it is
not. Of each length, paths are drawn and the gradient of the loss is taken back to the test
images along each of them alone; its norm times the number of such paths is the length's
share. A seed takes about a minute on two cores.

Source: Veit, Wilber & Belongie 2016 (arXiv:1605.06431), section 5 and figure 6.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import figures
from resjax import report, sweep
from resjax.analysis.paths import PathGradients, central_range, gradient_by_length
from resjax.comparisons import outcome, sign
from resjax.config import UsageError, run_command

MODELS = ("cifar_preact_resnet110",)
EFFECTIVE, COMMON = (5, 17), (19, 35)  # lengths of the paper, in blocks
CLAIM = (
    "Veit et al. 2016, section 5: of 54 blocks, more than 95 % of the paths go through 19 "
    "to 35, and almost all of the gradient comes through 5 to 17, 0.45 % of the paths."
)


def part(values: np.ndarray, lengths: tuple[int, int]) -> float:
    """What paths of these lengths, first to last, have of a whole by length, in percent."""
    first, last = lengths
    return float(100 * values[first : last + 1].sum())


def draw(measured: list[PathGradients], title: str) -> Figure:
    """Distribution of lengths, gradient by length (geometric means), and their product.

    Args:
      measured: of each seed.
      title: of the picture.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    figure.suptitle(f"Paths and their gradients (Veit et al. 2016, figure 6)\n{title}")
    left, middle, right = figure.subplots(1, 3)
    lengths = measured[0].lengths
    left.bar(lengths, 100 * measured[0].probability, color="C0")
    left.set_ylabel("share of all paths (%)")
    norms = np.array([one.mean for one in measured])
    logs = np.log10(np.where(norms > 0, norms, np.nan))
    mean, std = report.spread(logs)
    middle.plot(lengths, 10**mean, color="C1")
    if len(measured) > 1:
        middle.fill_between(lengths, 10 ** (mean - std), 10 ** (mean + std), alpha=0.2)
        middle.collections[-1].set_color("C1")
    middle.set(ylabel="norm of the gradient at the image, one path", yscale="log")
    shares = 100 * np.array([one.share for one in measured])
    report.draw_band(right, lengths, shares, color="C2", label="measured")
    right.axvspan(
        EFFECTIVE[0] - 0.5,
        EFFECTIVE[1] + 0.5,
        color="0.85",
        zorder=0,
        label=f"the paper's {EFFECTIVE[0]} to {EFFECTIVE[1]}",
    )
    first, last = np.mean([central_range(one.share) for one in measured], axis=0)
    for end, label in ((first, "95 % of the measured"), (last, None)):
        right.axvline(end, color="C2", linestyle="--", linewidth=1, label=label)
    right.set(ylabel="share of the gradient (%)", ylim=(0, None))
    right.legend(fontsize=8)
    for panel in (left, middle, right):
        panel.set(xlabel="length of the path (blocks)", xlim=(-0.5, lengths[-1] + 0.5))
        panel.grid(alpha=0.3)
    return figure


def verdict(measured: list[PathGradients]) -> str:
    """The paper's probabilities, and what was measured, +- over seeds."""
    blocks, probability = len(measured[0].lengths) - 1, measured[0].probability
    shares = [part(one.share, EFFECTIVE) for one in measured]
    firsts, lasts = zip(*(central_range(one.share) for one in measured), strict=True)
    means = [one.share @ one.lengths for one in measured]
    # "Almost all" of the gradient, in each seed, by few of the paths.
    signs = [sign(share > 90 > part(probability, EFFECTIVE)) for share in shares]
    effective = f"{EFFECTIVE[0]} to {EFFECTIVE[1]}"
    return (
        f"{outcome(signs)}of {blocks} blocks, "
        f"{part(probability, COMMON):.1f} % of the paths go through {COMMON[0]} to "
        f"{COMMON[1]} and {part(probability, EFFECTIVE):.4f} % through {effective}; paths "
        f"of {effective} bring {figures.text(shares)} % of the gradient, its central 95 % "
        f"come through {figures.text(firsts, 1)} to {figures.text(lasts, 1)}, and the mean "
        f"length, weighted by gradient, is {figures.text(means, 1)}."
    )


def rows_of(seed: int, gradients: PathGradients) -> list[dict[str, Any]]:
    """The rows of the table that a seed has."""
    return [
        {"seed": seed, **dict(zip(PathGradients._fields, values, strict=True))}
        for values in zip(*gradients, strict=True)
    ]


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = figures.make_parser("paths", __doc__, images=32)
    parser.add_argument(
        "--samples",
        metavar="N",
        type=figures.positive,
        default=16,
        help="paths of each length (%(default)s)",
    )
    flags, words = parser.parse_known_args(arguments)
    if len(sweep.parse_vary(flags.vary).get("model", MODELS)) > 1:
        raise UsageError("--vary: more than one model; give one")
    nets, output = figures.trained_nets(flags, words, "preact", MODELS, preactivation=True)
    config = figures.config_of(nets)
    images, labels = figures.load_images(config, flags.images)
    rows, measured = [], []
    (runs,) = nets.values()
    for run in tqdm(runs, desc="seeds", leave=False, disable=None):
        gradients = gradient_by_length(
            run.model,
            run.variables,
            images,
            labels,
            rng=np.random.default_rng(run.config.seed),
            samples=flags.samples,
        )
        measured.append(gradients)
        rows += rows_of(run.config.seed, gradients)
    title = f"{config.model}, {figures.describe(config, len(images), len(measured))}"
    said = f"{CLAIM}\n{verdict(measured)}"
    figures.save(output, "paths", draw(measured, title), rows, said)
    return 0


if __name__ == "__main__":
    run_command(main)
