"""Tabulates finished runs: top-1 error of each configuration, mean +- std over its seeds.

python -m resjax.report runs/digits_seed*
python -m resjax.report runs/* --csv=runs.csv --plot=runs.png

The error of a run is the median of its evaluations in the last 5 epochs, of a run of less
than 50 in its last tenth. Runs are of one configuration if they differ in nothing but the
seed and fields that change no number.
"""

import csv
import dataclasses
import io
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from resjax import checkpoint, records
from resjax import config as configs
from resjax.config import Config, UsageError

_LAST_EPOCHS = 5  # at most a tenth of a run
_SAME_FIELDS = [  # of the runs of one configuration
    name for name in configs.fields() if name not in ("seed", *configs.FREE_FIELDS)
]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
      workdir: of the run.
      config: of the run.
      error: top-1 error, the median of the last epochs, in percent.
      num_evaluations: that the median is of.
      train_loss: mean over the last epoch, in nats, as finely as `config.log_every_steps`
        tells; not finite if the run diverged.
      train_error: likewise, top-1 in percent.
      test_loss: of the last evaluation, as `train_loss`.
      curve: {epoch: top-1 test error in percent} of every evaluation.
      train_curve: {epoch: top-1 training error in percent} of every training record.
    """

    workdir: epath.Path
    config: Config
    error: float
    num_evaluations: int
    train_loss: float
    train_error: float
    test_loss: float
    curve: dict[float, float]
    train_curve: dict[float, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """The finished runs of one configuration.

    Attributes:
      fields: {dotted name: value} of what tells it from the other rows; model and data
        set if there is no other.
      results: of its runs, one a seed.
      published_error: of the source, as the configs give it; "" if none does.
    """

    fields: dict[str, Any]
    results: list[Result]
    published_error: str

    @property
    def name(self) -> str:
        """The fields as `field=value`."""
        return " ".join(
            f"{name}={format_value(value)}" for name, value in self.fields.items()
        )

    def values(self, number: str) -> np.ndarray:
        """A number of `Result`, of each run."""
        return np.array([getattr(result, number) for result in self.results])

    def spread(self, number: str) -> tuple[float, float]:
        """Mean and sample standard deviation of a number of `Result` over the runs."""
        mean, std = spread(self.values(number))
        return float(mean), float(std)


def summarize(workdirs: Iterable[str | epath.Path]) -> list[Row]:
    """The runs by configuration, in the order given; says which are not finished.

    Args:
      workdirs: of the runs, finished or not.

    Raises:
      UsageError: a folder that holds no run, a configuration and seed that come twice, or
        no finished run.

    Source: Goyal et al. 2017, section 5.1: the median of the final 5 epochs, the mean and
      standard deviation of independent runs.
    """
    results = []
    for workdir in workdirs:
        try:
            results.append(read_run(workdir))
        except NotFinishedError as error:
            print(f"{workdir} is left out: {error}", file=sys.stderr)
    if not results:
        raise UsageError("RUN: none of the runs is finished")
    groups: dict[tuple[Any, ...], dict[int, Result]] = {}  # by configuration and seed
    for result in results:
        flat = configs.flatten(result.config)
        seeds = groups.setdefault(tuple(flat[name] for name in _SAME_FIELDS), {})
        twin = seeds.setdefault(flat["seed"], result)
        if twin is not result:
            raise UsageError(
                f"RUN: {twin.workdir} and {result.workdir} have the same configuration and "
                f"config.seed={flat['seed']}; leave one out"
            )
    columns = zip(_SAME_FIELDS, *groups, strict=True)
    names = [name for name, *values in columns if len(set(values)) > 1]
    names = names or ["model", "data.name"]
    return [_row(names, list(seeds.values())) for seeds in groups.values()]


class NotFinishedError(UsageError):
    """A run has not been evaluated at the end of its last epoch."""


def read_run(workdir: str | epath.Path) -> Result:
    """What a finished run came to.

    Raises:
      NotFinishedError: it is not finished; says where it stands.
      UsageError: the folder holds no run, or a damaged one; it lists what is there.
    """
    workdir = checkpoint.to_path(workdir)
    config = _read_config(workdir)
    rows = records.read_metrics(workdir)
    try:
        tests = [row for row in rows if row["split"] == "test"]
        curve = {row["epoch"]: 100 - row["top1"] for row in tests}
        reached = max(curve, default=0)
        # Steps are whole: an evaluation is up to half a step from the epoch it is due at,
        # and is written with four decimals.
        slack = 1e-4 + (reached / tests[-1]["step"] / 2 if tests else 0)
        if reached + slack < config.num_epochs:
            step = rows[-1]["step"] if rows else 0
            raise NotFinishedError(
                f"not finished, at step {step}, last evaluated at epoch {reached:g} of "
                f"{config.num_epochs:g}"
            )
        start = config.num_epochs - min(_LAST_EPOCHS, config.num_epochs / 10) + slack
        last = [error for epoch, error in curve.items() if epoch > start]
        last = last or [curve[reached]]
        trained = [row for row in rows if row["split"] == "train"]
        train_curve = {row["epoch"]: 100 - row["top1"] for row in trained}
        test_loss = _loss(tests[-1])
        # The records of the last epoch, by the updates of each that lie in it.
        ends = np.array([0, *(row["step"] for row in trained)])
        start = ends[-1] * (1 - 1 / max(trained[-1]["epoch"], 1))
        weights = np.diff(ends.clip(min=start))
        train_loss, train_error = (
            float(np.average(values, weights=weights))
            for values in zip(
                *((_loss(row), 100 - row["top1"]) for row in trained), strict=True
            )
        )
    except (LookupError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"{workdir / 'metrics.jsonl'} is damaged: {type(error).__name__}: {error}"
        ) from error
    return Result(
        workdir=workdir,
        config=config,
        error=statistics.median(last),
        num_evaluations=len(last),
        train_loss=train_loss,
        train_error=train_error,
        test_loss=test_loss,
        curve=curve,
        train_curve=train_curve,
    )


def _loss(record: records.Record) -> float:
    return math.nan if record["loss"] is None else float(record["loss"])  # it diverged


def _read_config(workdir: epath.Path) -> Config:
    checkpoint.check_is_directory(workdir)
    if not (workdir / "config.json").exists():
        there = sorted(path.name for path in workdir.iterdir())
        raise UsageError(f"{workdir} holds no run, no config.json; it holds {there[:10]}")
    return records.read_config(workdir)


def _row(names: list[str], results: list[Result]) -> Row:
    flat = configs.flatten(results[0].config)
    published = {result.config.published_error for result in results} - {None}
    return Row(
        fields={name: flat[name] for name in names},
        results=results,
        published_error=" or ".join(sorted(map(str, published))),
    )


def format_value(value: Any) -> str:
    """A value as `--config.FIELD=VALUE` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _evaluations(row: Row) -> str:
    """How many evaluations the median of each run is of."""
    counts = sorted({result.num_evaluations for result in row.results})
    return " or ".join(map(str, counts))


def order(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> int:
    """-1 if the mean of some seeds is less than that of others, 1 if it is more.

    0 if the means differ by no more than two standard errors of their difference, which is
    the noise, or there is only one seed to tell it.
    """
    if min(len(one), len(other)) < 2:
        return 0
    error = math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in (one, other)))
    difference = np.mean(one) - np.mean(other)
    if not abs(difference) > 2 * error:  # not a number if a run diverged
        return 0
    return 1 if difference > 0 else -1


def format_spread(spread: tuple[float, float], digits: int = 2) -> str:
    """`Row.spread` as text: 1.23 +- 0.45, or the mean alone of a single run."""
    mean, std = spread
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" +- {std:.{digits}f}")


def format_table(rows: list[Row]) -> str:
    """The rows as text, errors in percent with two decimals; ends with a line on terms."""
    lines = []
    for row in rows:
        lines.append(
            {
                "configuration": row.name,
                "seeds": str(len(row.results)),
                "error": format_spread(row.spread("error")),
                "evaluations": _evaluations(row),
                "train_error": format_spread(row.spread("train_error")),
                "train_loss": f"{row.spread('train_loss')[0]:.4f}",
                "published_error": row.published_error,
            }
        )
    columns = [name for name in lines[0] if any(line[name] for line in lines)]
    lines = [{name: name.replace("_", " ") for name in columns}, *lines]
    widths = {name: max(len(line[name]) for line in lines) for name in columns}
    text = ""
    for line in lines:
        first, *others = columns
        cells = [line[first].ljust(widths[first])]
        cells += [line[name].rjust(widths[name]) for name in others]
        text += "  ".join(cells) + "\n"
    return (
        f"{text}\nerror: top-1 in percent; of a run, the median of its evaluations in the "
        f"last {_LAST_EPOCHS} epochs,\nat most the last tenth; of a row, mean +- sample "
        "standard deviation over seeds"
    )


def format_csv(rows: list[Row]) -> str:
    """The rows as CSV, a column for each field in which they differ.

    Errors are in percent, losses in nats; `_std` is the sample standard deviation over
    seeds, empty for a single one.
    """
    lines = []
    for row in rows:
        numbers = dict[str, Any]()
        for name in ("error", "train_error", "train_loss", "test_loss"):
            mean, std = row.spread(name)
            numbers |= {name: mean, f"{name}_std": "" if math.isnan(std) else std}
        lines.append(
            {
                **{name: format_value(value) for name, value in row.fields.items()},
                "seeds": " ".join(str(result.config.seed) for result in row.results),
                **numbers,
                "evaluations": _evaluations(row),
                "published_error": row.published_error,
                "workdirs": " ".join(str(result.workdir) for result in row.results),
            }
        )
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def spread(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation over the first axis, runs; NaN for one run."""
    values = np.asarray(values, np.float64)
    lone = np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else lone


def align(curves: Sequence[dict[float, float]]) -> tuple[list[float], np.ndarray]:
    """The epochs that all curves have, [E] sorted, and their values there, [runs, E]."""
    epochs = sorted(set.intersection(*map(set, curves)))
    return epochs, np.array([[curve[epoch] for epoch in epochs] for curve in curves])


def draw_band(panel: Any, x: Any, values: Any, **style: Any) -> None:
    """A line of the mean over the first axis, runs, in a band of one deviation."""
    mean, std = spread(values)
    (line,) = panel.plot(x, mean, **style)
    if len(values) > 1:
        panel.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.2)


def draw_curves(rows: list[Row], suffix: str = "png") -> bytes:
    """A picture of test error by epoch: the mean of each row, one std above and below.

    Args:
      rows: from `summarize`.
      suffix: of the kind of picture, one that matplotlib writes.

    Raises:
      ValueError: a kind that matplotlib does not write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for row in rows:
        curves = [result.curve for result in row.results]
        draw_band(panel, *align(curves), marker=".", label=row.name)
    panel.set(xlabel="epoch", ylabel="top-1 test error (%)", yscale="symlog", ylim=(0, 100))
    ticks = [0, 1, 2, 5, 10, 20, 50, 100]
    panel.set_yticks(ticks, map(str, ticks))
    panel.grid(alpha=0.3)
    panel.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format=suffix)
    return file.getvalue()


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = configs.ArgumentParser(prog="python -m resjax.report", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="workdir of a run")
    parser.add_argument("--csv", metavar="FILE", help="the table as CSV, to be written")
    parser.add_argument(
        "--plot", metavar="FILE", help="test error by epoch, a .png, .pdf or .svg"
    )
    flags = parser.parse_args(args)
    for name in ("csv", "plot"):
        if getattr(flags, name) == "":
            raise UsageError(f"--{name}: '' is empty; give a file")
        folder = checkpoint.to_path(getattr(flags, name) or ".").parent
        if not folder.is_dir():
            path = getattr(flags, name)
            raise UsageError(
                f"--{name}: {path} cannot be written: there is no directory {folder}"
            )
    rows = summarize(flags.runs)
    files = {"csv": format_csv(rows).encode()} if flags.csv else {}
    if flags.plot:
        try:
            picture = draw_curves(rows, epath.Path(flags.plot).suffix[1:] or "png")
        except ValueError as error:
            raise UsageError(f"--plot: {flags.plot}: {error}") from error
        files["plot"] = picture
    for name, data in files.items():
        _write(name, getattr(flags, name), data)
    print(format_table(rows))
    return 0


def _write(flag: str, path: str, data: bytes) -> None:
    try:
        epath.Path(path).expanduser().write_bytes(data)
    except OSError as error:
        raise UsageError(f"--{flag}: {path} cannot be written: {error}") from error


if __name__ == "__main__":
    configs.run_command(main)
