"""What becomes of a trained net whose blocks are deleted or change places.

  python -m figures.lesion
  python -m figures.lesion --config=configs/cifar10_resnet20.py
  python -m figures.lesion --vary model=cifar_resnet20,cifar_plain20 --draws=10

Three lesions, without training after them: each block deleted alone; 1 to 25 random
blocks deleted; random pairs of blocks of the same shapes swapped, one pair after another.
A block of a plain net is deleted by making it the identity, which those that change the
shape cannot be; random blocks are drawn from the others in residual nets, too. The nets
are those of `python -m resjax.sweep depth`, and are trained if they are not.

Source: Veit, Wilber & Belongie 2016 (arXiv:1605.06431), section 4, figures 3 and 5.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import figures
from resjax import report
from resjax.analysis import lesions
from resjax.analysis.lesions import Variables
from resjax.comparisons import outcome, sign
from resjax.config import run_command

MODELS = ("cifar_resnet56", "cifar_plain20", "cifar_plain56")
DELETED = (1, 2, 3, 4, 6, 8, 10, 15, 20, 25)  # as far as there are so many
SWAPS = (1, 2, 3, 5, 8, 12, 18, 27)
CLAIM = (
    "Veit et al. 2016, section 4: deleting one block of a residual net changes little, but "
    "where the shape changes, and brings a plain net (VGG) to chance."
)
Row = dict[str, Any]


def make_lesions(
    variables: Variables, is_plain: bool, draws: int, rng: np.random.Generator
) -> Iterator[tuple[Row, Variables]]:
    """What is done, as columns of the table, and the variables after it.

    Args:
      variables: {"params", "batch_stats"} of a trained net.
      is_plain: whether it has no shortcuts.
      draws: of random lesions of each size.
      rng: draws them.
    """

    def row(lesion: str, count: int, block: str = "", tau: float = 1.0) -> Row:
        return {"lesion": lesion, "count": count, "block": block, "kendall_tau": tau}

    blocks = lesions.list_blocks(variables)
    same = [name for name in blocks if not lesions.changes_shape(variables, name)]
    yield row("none", 0), variables
    for name in same if is_plain else blocks:
        yield row("delete", 1, name), lesions.delete_blocks(variables, name)
    counts = [count for count in DELETED if count <= len(same)]
    for count in np.repeat(counts, draws):
        names = rng.choice(same, count, replace=False)
        yield row("delete random", count), lesions.delete_blocks(variables, *names)
    for swaps in np.repeat(SWAPS, draws):
        swapped, tau = lesions.swap_random_blocks(variables, swaps, rng)
        yield row("swap random", swaps, tau=tau), swapped


def measure(nets: figures.Nets, images: Any, labels: Any, draws: int) -> list[Row]:
    """The top-1 error in percent of every net after every lesion."""
    rows = []
    for model, runs in nets.items():
        top1_error = lesions.make_top1_error(runs[0].model, images, labels)
        is_plain = runs[0].model.shortcut == "none"
        for run in runs:
            seed = run.config.seed
            damaged = make_lesions(
                run.variables, is_plain, draws, np.random.default_rng(seed)
            )
            bar = tqdm(damaged, desc=f"{model}, seed {seed}", leave=False, disable=None)
            for row, variables in bar:
                error = top1_error(variables)
                rows.append({"model": model, "seed": seed, **row, "error": error})
    return rows


def by_seed(rows: list[Row], model: str, lesion: str, key: str) -> Any:
    """Values of a column, and the mean errors [seeds, values] over the draws."""
    own = [row for row in rows if (row["model"], row["lesion"]) == (model, lesion)]
    values = list(dict.fromkeys(row[key] for row in own))
    seeds = list(dict.fromkeys(row["seed"] for row in own))
    means = [
        [
            np.mean([r["error"] for r in own if (r["seed"], r[key]) == (seed, value)])
            for value in values
        ]
        for seed in seeds
    ]
    return values, np.array(means)


def by_correlation(rows: list[Row], model: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """Correlation and error of each net with swapped blocks, and the mean line of both.

    Its points are means over parts of equal width of the range of correlations.
    """
    own = [r for r in rows if (r["model"], r["lesion"]) == (model, "swap random")]
    taus, errors = (np.array([r[name] for r in own]) for name in ("kendall_tau", "error"))
    parts = np.digitize(taus, np.linspace(taus.min(), 1, 9))
    line = [(taus[parts == k].mean(), errors[parts == k].mean()) for k in np.unique(parts)]
    return taus, errors, np.transpose(line)


def draw(
    rows: list[Row],
    blocks: dict[str, list[str]],
    widening: dict[str, set[str]],
    chance: float,
    title: str,
) -> Figure:
    """Error by deleted block, by number of them, and by the correlation of the order.

    Args:
      rows: from `measure`.
      blocks: all of each model, from input to output.
      widening: of each residual net, those that change the shape.
      chance: error of guesses, in percent.
      title: of the picture.
    """
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    figure.suptitle(f"Lesions (Veit et al. 2016, figures 3 and 5)\n{title}")
    one, many, swapped = figure.subplots(1, 3, sharey=True)
    for i, (model, names) in enumerate(blocks.items()):
        style = {"color": f"C{i}", "marker": ".", "label": model}
        intact = by_seed(rows, model, "none", "count")[1].mean()
        deleted, errors = by_seed(rows, model, "delete", "block")
        places = np.array([names.index(name) + 1 for name in deleted])
        report.draw_band(one, places, errors, **style)
        wide = [k for k, name in enumerate(deleted) if name in widening.get(model, ())]
        one.plot(places[wide], errors.mean(axis=0)[wide], "o", color=f"C{i}", mfc="none")
        report.draw_band(many, *by_seed(rows, model, "delete random", "count"), **style)
        taus, errors, line = by_correlation(rows, model)
        swapped.scatter(taus, errors, color=f"C{i}", s=8, alpha=0.3, linewidths=0)
        swapped.plot(*line, **style)
        for panel in (one, many, swapped):
            panel.axhline(intact, color=f"C{i}", linestyle=":", linewidth=1)
    one.plot([], [], "o", color="0.4", mfc="none", label="changes the shape")
    one.plot([], [], ":", color="0.4", label="intact")
    one.set(xlabel="deleted block, from input to output", ylabel="top-1 test error (%)")
    many.set_xlabel("random blocks deleted")
    swapped.set_xlabel("Kendall's rank correlation, swapped and original order")
    swapped.invert_xaxis()
    for panel in (one, many, swapped):
        panel.axhline(chance, color="k", linestyle="--", linewidth=1, label="chance")
        panel.set_ylim(0, 100)
        panel.tick_params(labelleft=True)
        panel.grid(alpha=0.3)
    for panel in (one, many):
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles = one.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, fontsize=9)
    return figure


def verdict(rows: list[Row], widening: dict[str, set[str]], chance: float) -> str:
    """Error after one block is deleted, +- over seeds.

    Args:
      rows: from `measure`.
      widening: of each residual net, its blocks that change the shape; others are plain.
      chance: error of guesses, in percent.
    """
    said, rises, signs = [], dict[str, np.ndarray](), list[int]()
    for model in dict.fromkeys(row["model"] for row in rows):
        intact = by_seed(rows, model, "none", "count")[1][:, 0]
        deleted, errors = by_seed(rows, model, "delete", "block")
        medians, largest = np.median(errors, axis=1), errors.max(axis=1)
        is_wide = np.array([name in widening.get(model, ()) for name in deleted])
        told = (
            f"test error of {model} goes from {figures.text(intact)} % to a median of "
            f"{figures.text(medians)} and a maximum of {figures.text(largest)} over blocks"
        )
        has_both = 0 < is_wide.sum() < len(is_wide)
        if has_both:
            wide, others = (errors[:, part].mean(axis=1) for part in (is_wide, ~is_wide))
            told += (
                f", a mean of {figures.text(wide)} over those that change the shape and "
                f"{figures.text(others)} over the others"
            )
        if figures.hardly_trained(intact, chance):
            told += " (it has hardly trained)"
        else:
            rises[model] = medians - intact
            near_chance = medians.mean() > (intact.mean() + chance) / 2
            signs.append(sign(near_chance == (model not in widening)))
            if has_both:
                signs.append(report.order(wide, others))
        said.append(told)
    residual, of_plain = rises.keys() & widening, rises.keys() - widening
    signs += [report.order(rises[p], rises[r]) for r in residual for p in of_plain]
    comparable = residual and of_plain
    return (
        f"{outcome(signs if comparable else [])}after one block is deleted, "
        f"{'; '.join(said)}; chance is {chance:.0f} %."
    )


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = figures.make_parser("lesion", __doc__, images=1000)
    parser.add_argument(
        "--draws",
        metavar="N",
        type=figures.positive,
        default=3,
        help="random lesions of each size (%(default)s)",
    )
    flags, words = parser.parse_known_args(arguments)
    nets, output = figures.trained_nets(flags, words, "depth", MODELS)
    config = figures.config_of(nets)
    images, labels = figures.load_images(config, flags.images)
    rows = measure(nets, np.asarray(images), np.asarray(labels), flags.draws)
    firsts = {model: run for model, (run, *_) in nets.items()}
    blocks = {m: lesions.list_blocks(run.variables) for m, run in firsts.items()}
    widening = {
        model: {
            name for name in blocks[model] if lesions.changes_shape(run.variables, name)
        }
        for model, run in firsts.items()
        if run.model.shortcut != "none"
    }
    chance = figures.chance_error(config.num_classes)
    seeds = max(map(len, nets.values()))
    title = figures.describe(config, len(labels), seeds)
    figure = draw(rows, blocks, widening, chance, title)
    said = f"{CLAIM}\n{verdict(rows, widening, chance)}"
    figures.save(output, "lesion", figure, rows, said)
    return 0


if __name__ == "__main__":
    run_command(main)
