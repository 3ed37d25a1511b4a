"""The papers' figures that are no comparison of sweeps, one script each.

Here is what they share: flags, nets trained by `resjax.sweep`, held-out images, files.
"""

import argparse
import contextlib
import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import resjax
from resjax import build_data, checkpoint, records, report, sweep
from resjax.config import ArgumentParser, Config, UsageError
from resjax.models.resnet import create_model

_SEEDS = ["0", "1", "2"]
Nets = dict[str, list[Any]]  # by model the `resjax.restore` of each seed


def make_parser(name: str, description: str | None, images: int) -> ArgumentParser:
    """The flags that all scripts have.

    Args:
      name: of the script.
      description: its help text.
      images: how many of the test split are taken by default.
    """
    parser = ArgumentParser(prog=f"python -m figures.{name}", description=description)
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="of the nets (default: digits)"
    )
    parser.add_argument(
        "--vary",
        metavar="FIELD=VALUE,...",
        action="append",
        default=[],
        help="other models (model=...) or seeds (seed=...)",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the workdirs (default: the sweep's)"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="of the files written (default: that folder)"
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=positive,
        default=images,
        help="the first N of the test split, at most (%(default)s)",
    )
    return parser


def positive(text: str) -> int:
    """A flag's whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def trained_nets(
    flags: argparse.Namespace,
    words: Sequence[str],
    comparison: str,
    models: Sequence[str],
    preactivation: bool | None = None,
) -> tuple[Nets, Path]:
    """Trains the nets that are not yet trained; gives all, and the folder of the files.

    Workdirs and configs are those of `python -m resjax.sweep COMPARISON`.

    Args:
      flags: from `make_parser`.
      words: `--config.FIELD=VALUE`, of all nets.
      comparison: the sweep that trains them.
      models: if the flags name no others.
      preactivation: whether all must be pre-activation nets, or none may; None: either.

    Raises:
      UsageError: a flag or field that does not fit, or a net that diverged or did not
        finish.
    """
    vary = {"model": list(models), "seed": _SEEDS} | sweep.parse_vary(flags.vary)
    for name in vary.keys() - {"model", "seed"}:
        raise UsageError(f"--vary: {name!r} cannot vary here; model and seed can")
    members, folder = sweep.plan(comparison, vary, flags.config, words, flags.workdir)
    for model in vary["model"]:
        if preactivation not in (None, create_model(model).preactivation):
            kind = "one of" if preactivation else "none with"
            raise UsageError(f"--vary: model={model}; allowed: {kind} pre-activation")
    output = checkpoint.to_path(flags.output or folder, "--output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be a folder: {error}") from error
    sweep.train(members)
    nets: Nets = {}
    for member in members:
        if not math.isfinite(report.read_run(member.workdir).test_loss):
            raise UsageError(f"{member.workdir}: the net diverged; take a lower lr_per_256")
        nets.setdefault(member.config.model, []).append(resjax.restore(member.workdir))
    return nets, output


def config_of(nets: Nets) -> Config:
    """The config of the first net, of which the data is that of all."""
    return next(iter(nets.values()))[0].config


def chance_error(num_classes: int) -> float:
    """Top-1 error of guesses, in percent."""
    return 100 * (1 - 1 / num_classes)


def hardly_trained(errors: Any, chance: float) -> bool:
    """Whether the mean error over seeds is over half of that of guesses."""
    return float(np.mean(errors)) > chance / 2


def load_images(config: Config, count: int) -> tuple[jax.Array, jax.Array]:
    """The first images of the test split, less what is damaged.

    Returns:
      Images [N, S, S, 3] float32, normalised as in evaluation, and labels [N] int32.
    """
    from resjax.data import pipeline

    reader = build_data.build_reader(config, build_data.build_source(config, "test"))
    batches = pipeline.eval_batches(reader, batch_size=count, num_shards=1)
    with contextlib.closing(batches):  # type: ignore[type-var]
        batch = next(batches)
    _, prepare = build_data.build_transforms(config)
    kept = batch["mask"]
    return prepare(batch)[kept], jnp.asarray(batch["label"][kept])


def text(values: Any, digits: int = 2) -> str:
    """Mean +- standard deviation of a number over seeds."""
    mean, std = report.spread(values)
    return report.format_spread((float(mean), float(std)), digits)


def describe(config: Config, images: int, seeds: int) -> str:
    """What a picture's title says of its nets and data."""
    nets = "one seed" if seeds == 1 else f"{seeds} seeds, mean and one standard deviation"
    return f"{config.data.name}, {images:,} test images; {nets}"


def save(
    output: Any, name: str, figure: Any, rows: Iterable[dict[str, Any]], verdict: str
) -> None:
    """Writes NAME.png, NAME.csv and NAME.txt, and says the verdict.

    Args:
      output: the folder.
      name: of the files.
      figure: of matplotlib.
      rows: of the table, all with the same columns.
      verdict: what was measured, in a sentence.
    """
    rows = list(rows)
    picture, table = io.BytesIO(), io.StringIO()
    figure.savefig(picture, dpi=120, format="png")
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (output / f"{name}.png").write_bytes(picture.getvalue())
    (output / f"{name}.csv").write_text(table.getvalue())
    (output / f"{name}.txt").write_text(verdict + "\n")
    records.say(f"\n{verdict}\nsee {output / name}.png and {output / name}.csv")
