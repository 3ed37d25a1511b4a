"""What the features of a trained net are worth for other classes, by images of each.

  python -m figures.transfer                                   # digits, in minutes
  python -m figures.transfer --workdir=runs/resnet50 --data_dir=DIR
  python -m figures.transfer --workdir=runs/resnet50 --data_dir=DIR --train_at=5,10,20

The net of --workdir, of train.py or `python -m resjax.convert`, meets the classes of
DIR/train/CLASS, tested on DIR/val/CLASS. Three ways: a logistic regression on its frozen
features (probe); all of it trained further (fine-tuned); its model trained from the start
(from scratch). Of each number of images of a class, the same random ones are taken for all
three, a seed a draw, and those of a smaller number are among those of a larger.

The two ways of training differ in `init_from`, and in the learning rate: of --rates each
takes the best, on average over the numbers in one more draw, tested on the images of train
that were not drawn. So nothing is chosen by the images that are tested on. Minibatch,
updates, augmentation, decay and schedule (cosine) are the same for both and all numbers.

Without --workdir, ResNet-20 is first trained on a folder of the digits 0 to 4 by the recipe
of configs/digits.py. The other classes are the digits 5 to 9: 50 of each to draw from, and
all others to test on. The deviations are over draws, with one pre-trained net.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import figures
import resjax
from figures import transfer_nets as nets
from figures.transfer_nets import Row
from resjax import checkpoint, records, report, training
from resjax import config as configs
from resjax.analysis import probe
from resjax.comparisons import outcome
from resjax.compilation_cache import use_compilation_cache
from resjax.config import ArgumentParser, UsageError, run_command
from resjax.data.folder import open_folder

CLAIM = (
    "Yosinski et al. 2014 (arXiv:1411.1792): a net that starts from the features of other "
    "classes generalises better than one that starts at random, also when it is fine-tuned."
)
PROBE_AT = (1, 2, 5, 10, 20, 50)  # images per class, as far as there are so many
TRAIN_AT = (5, 10, 20)
# What is another for each net, and so no word of the command line.
_OWN = (
    *("seed", "num_classes", "init_from", "freeze_at", "data.name", "data.dir"),
    *("batch_size", "lr_per_256", "num_epochs"),
)


def probe_curve(
    run: Any, data_dir: Path, counts: Sequence[int], seeds: Sequence[int]
) -> list[Row]:
    """Test accuracies of logistic regressions on the features of a run.

    Args:
      run: of `resjax.restore`.
      data_dir: of the folder of other classes.
      counts: images of each class that they are fitted to.
      seeds: of the draws.
    """
    train, test = (
        probe.extract_features(run, "folder", split, str(data_dir))
        for split in ("train", "test")
    )
    rows = probe.learning_curve(train, test, counts, seeds)
    return [
        nets.make_row(nets.PROBE, row["images_per_class"], row["seed"], row["top1"])
        for row in rows
    ]


# --- what it came to ----------------------------------------------------------------


def values_of(rows: Sequence[Row], method: str) -> dict[int, np.ndarray]:
    """{images per class: accuracy of each seed} of a method."""
    mine = [row for row in rows if row["method"] == method]
    counts = dict.fromkeys(row["images_per_class"] for row in mine)
    return {
        count: np.array([row["top1"] for row in mine if row["images_per_class"] == count])
        for count in counts
    }


def format_table(rows: Sequence[Row]) -> str:
    """Mean +- standard deviation over seeds, a line for each number of images."""
    methods = [m for m in nets.METHODS if values_of(rows, m)]
    lines = ["images per class" + "".join(f"{method:>18}" for method in methods)]
    for count in sorted({row["images_per_class"] for row in rows}):
        found = [values_of(rows, method).get(count) for method in methods]
        cells = ("" if each is None else figures.text(each) for each in found)
        lines.append(f"{count:>16}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Whether nets that start from features beat those that start at random."""
    tuned, scratch = (
        values_of(rows, method) for method in (nets.FINE_TUNED, nets.FROM_SCRATCH)
    )
    signs = [report.order(tuned[count], scratch[count]) for count in tuned]
    said = [
        f"of {count} images per class, {figures.text(tuned[count])} % fine-tuned and "
        f"{figures.text(scratch[count])} % from scratch"
        for count in tuned
    ]
    probed = values_of(rows, nets.PROBE)
    said += [
        f"a probe has {figures.text(probed[count])} % of {count}"
        for count in sorted({min(probed), max(probed)})
    ]
    return f"{outcome(signs) if signs else ''}top-1, {'; '.join(said)}."


def draw(rows: Sequence[Row], title: str, chance: float) -> Figure:
    """Accuracy against images per class, the mean and one standard deviation over seeds.

    Args:
      rows: of all methods.
      title: of the picture.
      chance: accuracy of guesses, percent.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panel = figure.subplots()
    for method, marker in zip(nets.METHODS, "os^", strict=True):
        values = values_of(rows, method)
        if values:
            counts = list(values)
            stacked = np.array([values[count] for count in counts]).T
            report.draw_band(panel, counts, stacked, label=method, marker=marker)
    panel.axhline(chance, color="grey", linestyle=":", label="guesses")
    ticks = sorted({row["images_per_class"] for row in rows})
    panel.set_xscale("log")
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set(xlabel="training images per class", ylabel="top-1 test accuracy, %")
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left")
    return figure


# --- the command --------------------------------------------------------------------


def _counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1, separated by commas."""
    return tuple(sorted({figures.positive(part) for part in text.split(",")}))


def _rates(text: str) -> tuple[float, ...]:
    """Numbers above 0, separated by commas."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0")
    return rates


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the `--config.FIELD=VALUE` of all nets."""
    parser = ArgumentParser(
        prog="python -m figures.transfer",
        description=__doc__,
        epilog="--config.FIELD=VALUE sets fields of all nets that are trained here",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="of the trained net (default: one is trained)"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="the folder of other classes")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("runs/transfer"),
        help="of the files and the nets (default: %(default)s)",
    )
    parser.add_argument(
        "--probe_at",
        metavar="N,...",
        type=_counts,
        help="images per class of probes (default: 1,2,5,10,20,50 as far as there are)",
    )
    parser.add_argument(
        "--train_at",
        metavar="N,...",
        type=_counts,
        help="images per class of trained nets (default: 5,10,20 of digits, else none, as "
        "each takes 2 x (rates + seeds) nets)",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=figures.positive, default=3, help="(%(default)s)"
    )
    parser.add_argument(
        "--updates",
        metavar="N",
        type=figures.positive,
        default=nets.Budget.updates,
        help="of each trained net (%(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        metavar="N",
        type=figures.positive,
        default=nets.Budget.batch_size,
        help="of each trained net (%(default)s)",
    )
    parser.add_argument(
        "--rates",
        metavar="RATE,...",
        type=_rates,
        default=nets.RATES,
        help="learning rates per 256 examples to choose among (default: 0.05,0.2,0.8,3.2)",
    )
    flags, words = parser.parse_known_args(arguments)
    if (flags.workdir is None) != (flags.data_dir is None):
        raise UsageError("--workdir and --data_dir: give both, or none for the digits")
    for word in words:
        name = word.removeprefix("--config.").partition("=")[0]
        if name in _OWN:
            raise UsageError(f"--config.{name}: this script sets it for each net")
    return flags, words


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    flags, words = _parse(arguments)
    configs.override(configs.load_config(nets.DIGITS), words)  # finds a wrong one at once
    use_compilation_cache()
    output, train_at = flags.output, flags.train_at
    training.make_workdir(checkpoint.to_path(output, "--output"))
    if flags.workdir:
        origin, data_dir = Path(flags.workdir), Path(flags.data_dir)
        title = f"{flags.data_dir}, from {flags.workdir}"
    else:
        old, data_dir = nets.write_digits(output)
        origin = output / "old_digits_run"
        train_at = train_at or TRAIN_AT
        title = "digits 5 to 9, from a net of the digits 0 to 4"
    pool, seeds = open_folder(str(data_dir), "train"), range(flags.seeds)
    sizes = np.bincount(pool.labels)
    counts = flags.probe_at or [count for count in PROBE_AT if count <= sizes.min()]
    probe.check_enough(pool.labels, counts, pool.class_names)
    nets.check_counts(pool, train_at or ())
    if not flags.workdir:
        nets.pretrain_digits(origin, old, words)
    run = resjax.restore(origin)
    if run.config is None:
        raise UsageError(f"--workdir: {origin} was trained by another version of resjax")
    rows = probe_curve(run, data_dir, counts, seeds)
    if train_at:
        budget = nets.Budget(flags.updates, flags.batch_size, flags.rates)
        rows += nets.train_curve(
            run.config, origin, data_dir, train_at, seeds, budget, output, words
        )
    records.say("\n" + format_table(rows))
    title = (
        f"{title}\n{run.config.model}; {flags.seeds} draws, mean and one standard deviation"
    )
    chance = 100 - figures.chance_error(len(sizes))
    said = f"{CLAIM}\n{verdict(rows)}"
    figures.save(output, "transfer", draw(rows, title, chance), rows, said)
    return 0


if __name__ == "__main__":
    run_command(main)
