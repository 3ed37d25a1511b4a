"""What the features of a trained net are worth for other classes, by images of each.

  python -m figures.transfer                                   # digits, in minutes
  python -m figures.transfer --workdir=runs/resnet50 --data_dir=DIR
  python -m figures.transfer --workdir=runs/resnet50 --data_dir=DIR --train_at=5,10,20

The net of --workdir, of train.py or `python -m resjax.convert`, meets the classes of
DIR/train/CLASS, tested on DIR/val/CLASS. Three ways: a logistic regression on its frozen
features (probe); all of it trained further (fine-tuned); its model trained from the start
(from scratch). Of each number of images of a class, the same random ones are taken for all
three, a seed a draw, and those of a smaller number are among those of a larger.

The two ways of training differ in `init_from`, and in the learning rate: for each of
--updates each takes the best of --rates, on average over the numbers of images in one more
draw, tested on the images of train that were not drawn. So nothing is chosen by the images
that are tested on. Minibatch, updates, augmentation, decay and schedule (cosine) are the
same for both and all numbers.

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
from resjax import checkpoint, records, report, workdirs
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
UPDATES = (40, 200)
_METHODS = (nets.PROBE, nets.FINE_TUNED, nets.FROM_SCRATCH)
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


def curves_of(rows: Sequence[Row]) -> dict[str, dict[int, np.ndarray]]:
    """{method and updates: {images per class: accuracy of each seed}}."""
    curves: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        label = name_of(row["method"], row["updates"])
        values = curves.setdefault(label, {})
        values.setdefault(row["images_per_class"], []).append(row["top1"])
    return {
        label: {count: np.array(each) for count, each in values.items()}
        for label, values in curves.items()
    }


def name_of(method: str, updates: Any) -> str:
    """What a curve is called."""
    return f"{method}, {updates} updates" if updates else method


def format_table(rows: Sequence[Row]) -> str:
    """Mean +- standard deviation over seeds, a column for each number of images."""
    counts = sorted({row["images_per_class"] for row in rows})
    lines = [f"{'images per class':<26}" + "".join(f"{count:>15}" for count in counts)]
    for label, values in curves_of(rows).items():
        cells = (figures.text(values[n]) if n in values else "" for n in counts)
        lines.append(f"{label:<26}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """Whether nets that start from features beat those that start at random."""
    curves, signs, said = curves_of(rows), [], []
    for updates in sorted({row["updates"] for row in rows if row["updates"]}):
        tuned, scratch = (
            curves[name_of(method, updates)]
            for method in (nets.FINE_TUNED, nets.FROM_SCRATCH)
        )
        signs += [report.order(tuned[count], scratch[count]) for count in tuned]
        each = (
            f"{figures.text(tuned[count])} fine-tuned and {figures.text(scratch[count])} "
            f"from scratch of {count} images per class"
            for count in tuned
        )
        said.append(f"after {updates} updates {', '.join(each)}")
    probed = curves[nets.PROBE]
    ends = sorted({min(probed), max(probed)})
    each = (f"{figures.text(probed[count])} of {count}" for count in ends)
    said.append(f"a probe has {' and '.join(each)}")
    return f"{outcome(signs) if signs else ''}top-1 in percent, {'; '.join(said)}."


def draw(rows: Sequence[Row], title: str, chance: float) -> Figure:
    """Accuracy against images per class, the mean and one standard deviation over seeds.

    Args:
      rows: of all methods.
      title: of the picture.
      chance: accuracy of guesses, percent.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    panel = figure.subplots()
    colours = dict(zip(_METHODS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    markers = dict(zip(_METHODS, "os^", strict=True))
    budgets = sorted({row["updates"] for row in rows if row["updates"]})
    for label, values in curves_of(rows).items():
        method, _, rest = label.partition(", ")
        is_longest = not rest or rest.startswith(f"{budgets[-1]} ")
        report.draw_band(
            panel,
            list(values),
            np.array(list(values.values())).T,
            label=label,
            color=colours[method],
            marker=markers[method],
            linestyle="-" if is_longest else "--",
        )
    panel.axhline(chance, color="grey", linestyle=":", label="guesses")
    ticks = sorted({row["images_per_class"] for row in rows})
    panel.set_xscale("log")
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.set_xticks([], minor=True)
    panel.set(xlabel="training images per class", ylabel="top-1 test accuracy, %")
    panel.set_title(title, fontsize=10)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.08))
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
        "each takes 2 x (rates + seeds) nets for each budget)",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=figures.positive, default=3, help="(%(default)s)"
    )
    parser.add_argument(
        "--updates",
        metavar="N,...",
        type=_counts,
        default=UPDATES,
        help="of each trained net, one or more budgets (default: 40,200)",
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
    workdirs.make_workdir(checkpoint.to_path(output, "--output"))
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
    for updates in flags.updates if train_at else ():
        budget = nets.Budget(updates, flags.batch_size, flags.rates)
        where = output / f"{updates}_updates"
        rows += nets.train_curve(
            run.config, origin, data_dir, train_at, seeds, budget, where, words
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
