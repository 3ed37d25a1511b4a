"""Trains a run for every combination of some fields' values, and compares them.

python -m resjax.sweep --vary init=xavier,msra_fan_out --vary seed=0,1,2
python -m resjax.sweep depth                              # a comparison of the papers
python -m resjax.sweep shortcuts --config=configs/cifar10_resnet20.py

Runs that differ only in seed, init, learning rate and its schedule, momentum or weight
decay are trained at once, if the devices hold their data; the others one after another.
Each has a workdir of its own, as of train.py. The same command again goes on where it was
stopped.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from etils import epath

from resjax import (
    build_members,
    checkpoint,
    checkpoint_writer,
    comparisons,
    hooks,
    metrics,
    records,
    report,
    signals,
    training,
)
from resjax import config as configs
from resjax.analysis.sweeps import Segment, train_members
from resjax.build_members import Members
from resjax.config import Config, RunError, UsageError
from resjax.steps import TrainState

_DIGITS = Path("configs/digits.py")


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of a sweep: its workdir and its config."""

    workdir: epath.Path
    config: Config


def parse_vary(words: Sequence[str]) -> dict[str, list[str]]:
    """{field: values as text} of FIELD=VALUE,VALUE,...; a list as a value is in brackets.

    Raises:
      UsageError: a word of another form, an unknown field, something that comes twice.
    """
    vary: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.removeprefix("config.").partition("=")
        if name not in configs.fields():
            raise configs.unknown_name("--vary", name, configs.fields())
        if not text:
            raise UsageError(f"--vary {word}: write --vary {name}=VALUE,VALUE,...")
        values = [value.strip("()") for value in re.split(r",(?![^(]*\))", text)]
        if name in vary or len(set(values)) < len(values):
            raise UsageError(f"--vary {word}: the field or one of its values comes twice")
        vary[name] = values
    return vary


def make_members(
    config: Config, vary: dict[str, list[str]], folder: epath.Path
) -> list[Member]:
    """A member for every combination of values.

    Raises:
      UsageError: a value that is not allowed.
    """
    members = []
    for values in itertools.product(*vary.values()):
        pairs = list(zip(vary, values, strict=True))
        own = configs.override(config, [f"--config.{name}={text}" for name, text in pairs])
        short = [
            (name.rpartition(".")[2], re.sub(r"[^\w.+-]", "-", text))
            for name, text in pairs
        ]
        members.append(Member(folder / ",".join(map("=".join, short)), own))
    return members


def plan(
    name: str | None,
    vary: dict[str, list[str]],
    config_file: Path | None = None,
    words: Sequence[str] = (),
    workdir: str | None = None,
) -> tuple[list[Member], epath.Path]:
    """The members of a sweep, and the folder of their workdirs.

    Args:
      name: of a comparison, or None.
      vary: values as text by field, in place of those of the comparison.
      config_file: of what the members share; None: the digits, as the comparison has them.
      words: `--config.FIELD=VALUE`, of all members.
      workdir: the folder; None: runs/sweep_NAME.

    Raises:
      UsageError: something that does not fit.
    """
    base = configs.load_config(config_file or _DIGITS)
    if name is not None:
        comparison = comparisons.get_comparison(name)
        vary = parse_vary([f"{k}={v}" for k, v in comparison.vary.items()]) | vary
        if not config_file:
            own = [f"--config.{k}={v}" for k, v in comparison.digits.items()]
            base = configs.override(base, own)
    if not vary:
        raise UsageError("--vary: missing; write --vary FIELD=VALUE,... or a COMPARISON")
    default = f"runs/sweep_{name or (config_file or _DIGITS).stem}"
    folder = checkpoint.to_path(workdir or default)
    return make_members(configs.override(base, words), vary, folder), folder


def train(members: list[Member]) -> None:
    """Trains what is not finished, on all cores; SIGTERM and Ctrl-C end the process.

    Raises:
      UsageError: a workdir that holds something else, or a field that does not fit.
    """
    use_all_cores(members)
    with signals.stop_signals() as stop:
        folder = members[0].workdir.parent

        def tell(signum: int) -> None:
            records.say(
                f"stopped by signal {signum}; the same command goes on from the last "
                f"evaluation saved in {folder}"
            )

        stop.tell = tell
        code = _train_all(members, stop)
        if code:
            signals.leave(code)  # what computes may not end well with the interpreter


def _train_all(members: list[Member], stop: signals.StopSignals) -> int:
    """0, or 128 + n after it was stopped by signal n."""
    todo = [member for member in members if not _is_finished(member)]
    if len(todo) < len(members):
        records.say(f"{len(members) - len(todo)} of {len(members)} runs are finished")
    groups = build_members.group([member.config for member in todo])
    for i, places in enumerate(groups):
        own = [todo[place] for place in places]
        names = " ... ".join(dict.fromkeys(m.workdir.name for m in (own[0], own[-1])))
        records.say(f"part {i + 1} of {len(groups)}, {len(own)} at once: {names}")
        if not build_members.can_train_together(own[0].config):
            try:
                code = training.train(own[0].config, own[0].workdir, stop)
            except RunError as error:
                records.warn(f"{own[0].workdir.name}: {error}")
                code = 0
        else:
            code = _train_group(own, stop)
        if code:
            return code
    return 0


def _is_finished(member: Member) -> bool:
    """Whether the run was evaluated after its last update."""
    training.check_workdir(member.workdir, member.config)
    if not (member.workdir / "config.json").exists():
        return False
    try:
        report.read_run(member.workdir)
    except report.NotFinishedError:
        return False
    return True


def _train_group(group: list[Member], stop: signals.StopSignals) -> int:
    """Trains runs at once, from the last evaluation that all of them have saved."""
    members = build_members.build_members([member.config for member in group])
    states, start_step, windows = _first_states(group, members)
    with contextlib.ExitStack() as stack:
        for member in group:
            training.make_workdir(member.workdir)
            stack.enter_context(records.lock(member.workdir))
            training.write_config(member.workdir, member.config)
        writes = [
            stack.enter_context(records.open_metrics(member.workdir, start_step))
            for member in group
        ]
        logs = [
            _Log(member, members, i, write, windows[i])
            for i, (member, write) in enumerate(zip(group, writes, strict=True))
        ]
        for segment in train_members(
            members, states, start_step, lambda: bool(stop.received)
        ):
            stop.has_news = True  # a signal waits until all is written
            for log in logs:
                log.write_segment(segment)
            _tell(segment, members)
            stop.has_news = False
        if stop.received:
            stop.tell(stop.received[0])
            return 128 + stop.received[0]
    for member in group:
        title = f"{member.config.model} on {member.config.data.name}"
        records.plot_curves(member.workdir, title)
    return 0


def _first_states(
    group: list[Member], members: Members
) -> tuple[TrainState, int, list[dict[str, float]]]:
    """States, the updates they have seen, and what the logs had summed by then."""
    start = members.init_states()
    found = [checkpoint.read_latest(member.workdir)[0] for member in group]
    latest = [one for one in found if one]
    if len(latest) < len(group) or len({one.step for one in latest}) > 1:
        return start, 0, [{} for _ in group]
    like = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), start)
    states = [
        TrainState(
            **checkpoint.to_tree(one.arrays["variables"], like.variables, one.path),
            **checkpoint.to_tree(one.arrays["optimizer"], like.optimizer, one.path),
        )
        for one in latest
    ]
    return members.shard(states), latest[0].step, [one.record["window"] for one in latest]


class _Log:
    """What one member of a group writes down."""

    def __init__(
        self,
        member: Member,
        members: Members,
        place: int,
        write: Callable[[records.Record], None],
        window: dict[str, float],
    ):
        config = member.config
        self.workdir, self.record, self.place = (
            member.workdir,
            members.records[place],
            place,
        )
        self.num_steps, self.window = members.num_steps, window
        self.log = hooks.TrainLog(
            write=write,
            every=config.log_every_steps,
            epochs_per_step=config.batch_size / members.num_examples,
            learning_rates=members.learning_rates[place],
            images_per_step=config.batch_size,
        )

    def write_segment(self, segment: Segment) -> None:
        """Writes the records of the updates and the evaluation, and a checkpoint."""
        train = {name: sums[self.place] for name, sums in segment.train.items()}
        num_updates = len(train["loss"])
        speed = num_updates * self.log.images_per_step / segment.seconds
        for i in range(num_updates):
            step = segment.step - num_updates + i + 1
            sums = {name: float(values[i]) for name, values in train.items()}
            self.window = metrics.add_up([self.window, sums] if self.window else [sums])
            if step % self.log.every == 0 or step == self.num_steps:
                self._write(step, "train", self.window, speed)
                self.window = {}
        test = {name: float(sums[self.place]) for name, sums in segment.test.items()}
        evaluation = self._write(segment.step, "test", test, speed)
        state = jax.tree.map(lambda x: np.asarray(x[self.place]), segment.states)
        record = {**self.record, "evaluation": evaluation, "window": self.window}
        with (
            contextlib.suppress(
                FloatingPointError
            ),  # of a run that diverged: none is saved
            checkpoint_writer.open_writer(
                self.workdir, lambda steps: {steps[-1]}
            ) as writer,
        ):
            checkpoint_writer.save(
                writer, segment.step, state.variables, state.optimizer, record
            )

    def _write(
        self, step: int, split: str, sums: dict[str, float], speed: float
    ) -> records.Record:
        record = self.log.record(step, split, metrics.summarize([sums]), speed)
        if not math.isfinite(record["loss"]):
            record["loss"] = None
        self.log.write(record)
        return record


def _tell(segment: Segment, members: Members) -> None:
    """Says how a group stands after an evaluation."""
    test = segment.test
    top1 = 100 * test["top1"] / test["num_examples"]
    diverged = int((~np.isfinite(test["loss"])).sum())
    epoch = segment.step * members.configs[0].batch_size / members.num_examples
    images = segment.train["num_examples"].sum() / segment.seconds
    records.say(
        f"step {segment.step:>6,}/{members.num_steps:,}  epoch {epoch:6.2f}  test top-1 "
        f"from {top1.min():.2f} to {top1.max():.2f} %, median {np.median(top1):.2f} %  "
        f"{images:,.0f} images/s" + (f"  {diverged} diverged" if diverged else "")
    )


def use_all_cores(members: list[Member]) -> None:
    """Makes a device of every core where the platform is a CPU, unless XLA_FLAGS does.

    To be called before jax has looked for devices. Members do not wait for each other, so
    one a core is faster than all cores for one.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    sizes = [member.config.batch_size for member in members]
    fitting = (n for n in range(os.cpu_count() or 1, 0, -1) if math.gcd(n, *sizes) == n)
    with contextlib.suppress(RuntimeError):  # jax has looked for devices already
        jax.config.update("jax_num_cpu_devices", next(fitting))


def compare(members: list[Member], name: str | None, folder: epath.Path) -> None:
    """Tabulates the finished runs, in text, CSV and a picture, and says the verdict.

    Raises:
      UsageError: there is no finished run.
    """
    comparison = comparisons.get_comparison(name) if name else None
    rows = report.summarize([member.workdir for member in members])
    records.say("\n" + report.format_table(rows))
    picture = comparisons.draw(rows, comparison)
    files = {"compare.csv": report.format_csv(rows).encode(), "compare.png": picture}
    if comparison and len(rows) == len({*map(_without_seed, members)}):
        text = f"{comparison.claim}\n{comparison.verdict(comparisons.Table(rows))}\n"
        records.say(f"\n{text}")
        files["compare.txt"] = text.encode()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    records.say(f"see {folder / 'compare.png'} and {folder / 'compare.csv'}")


def _without_seed(member: Member) -> Config:
    return dataclasses.replace(member.config, seed=0)


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = configs.ArgumentParser(
        prog="python -m resjax.sweep",
        description=__doc__,
        epilog=comparisons.describe() + "\n\n" + configs.fields_help(),
    )
    parser.add_argument(
        "comparison", metavar="COMPARISON", nargs="?", help="a row of the table below"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="what the runs share (default: digits)"
    )
    parser.add_argument(
        "--vary",
        metavar="FIELD=VALUE,...",
        action="append",
        default=[],
        help="again for each further field; the runs are all combinations",
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the workdirs (default: runs/sweep_NAME)"
    )
    flags, words = parser.parse_known_args(args)
    for name in ("comparison", "workdir"):
        if getattr(flags, name) == "":
            raise UsageError(f"{name}: '' is empty; leave it out")
    vary = parse_vary(flags.vary)
    members, folder = plan(flags.comparison, vary, flags.config, words, flags.workdir)
    train(members)
    compare(members, flags.comparison, folder)
    return 0


if __name__ == "__main__":
    configs.run_command(main)
