"""Trains a run for every combination of some fields' values, and compares them.

python -m resjax.sweep --vary init=xavier,msra_fan_out --vary seed=0,1,2
python -m resjax.sweep depth                              # a comparison of the papers
python -m resjax.sweep shortcuts --config=configs/cifar10_resnet20.py

Runs that differ only in seed, init, learning rate and its schedule, momentum or weight
decay are trained at once, if the devices of this host hold their data; the others one
after another. Each has a workdir of its own, as of train.py. Ctrl-C and SIGTERM save all of
them, and the same command again goes on there, also with more values.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from resjax import (
    build,
    build_members,
    checkpoint,
    checkpoint_writer,
    comparison_pictures,
    comparisons,
    hooks,
    metrics,
    records,
    report,
    signals,
    training,
    workdirs,
)
from resjax import config as configs
from resjax.analysis.sweeps import Segment, train_members
from resjax.build_members import Members
from resjax.compilation_cache import use_compilation_cache
from resjax.config import Config, RunError, UsageError
from resjax.data.workers import num_cores
from resjax.steps import TrainState

_DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"


@dataclasses.dataclass(frozen=True)
class Member:
    """A run of a sweep: its workdir and its config."""

    workdir: epath.Path
    config: Config


def parse_vary(words: Sequence[str]) -> dict[str, list[str]]:
    """{field: values as text} of FIELD=VALUE,VALUE,...; a list as a value is in brackets.

    Raises:
      UsageError: a word of another form, a field that is unknown or changes no number, a
        field that comes twice.
    """
    vary: dict[str, list[str]] = {}
    for word in words:
        name, _, text = word.removeprefix("config.").partition("=")
        if name not in configs.fields():
            raise configs.unknown_name("--vary", name, configs.fields())
        if name in configs.FREE_FIELDS:
            raise UsageError(f"--vary {word}: {name} changes no number of a run")
        if not text:
            raise UsageError(f"--vary {word}: write --vary {name}=VALUE,VALUE,...")
        if name in vary:
            raise UsageError(f"--vary {word}: {name} comes twice")
        vary[name] = comparisons.split_values(text)
    return vary


def make_members(
    config: Config, vary: dict[str, list[str]], folder: epath.Path
) -> list[Member]:
    """A member for every combination of values.

    Raises:
      UsageError: a value that is not allowed or comes twice, a field that no run reads.
    """
    members: dict[str, Member] = {}
    for values in itertools.product(*vary.values()):
        pairs = list(zip(vary, values, strict=True))
        own = configs.override(config, [f"--config.{name}={text}" for name, text in pairs])
        short = ((name.rpartition(".")[2], text) for name, text in pairs)
        safe = (f"{name}={re.sub(r'[^a-zA-Z0-9_.+-]', '-', text)}" for name, text in short)
        member = Member(folder / ",".join(safe), own)
        twin = next((m for m in members.values() if m.config == own), None)
        twin = members.setdefault(member.workdir.name, twin or member)
        if twin is not member:
            raise UsageError(
                f"--vary: {member.workdir.name} and {twin.workdir.name} are one run, or "
                "have one workdir; leave a value out"
            )
    configs.check_varied(vary, [member.config for member in members.values()])
    return list(members.values())


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
      workdir: the folder; None: runs/sweep_NAME, of the comparison, of the config, of both.

    Raises:
      UsageError: something that does not fit.
    """
    base = configs.load_config(config_file or _DIGITS)
    given = {word.removeprefix("--config.").partition("=")[0] for word in words}
    if name is not None:
        comparison = comparisons.get_comparison(name)
        own = comparison.fixed | ({} if config_file else comparison.digits)
        base = configs.override(base, [f"--config.{k}={v}" for k, v in own.items()])
        for field in sorted((given | vary.keys()) & comparison.fixed.keys()):
            raise UsageError(
                f"config.{field}: it is {comparison.fixed[field]} in {name}; leave it out"
            )
        vary = parse_vary([f"{k}={v}" for k, v in comparison.vary.items()]) | vary
    if not vary:
        raise UsageError("--vary: missing; write --vary FIELD=VALUE,... or a COMPARISON")
    for field in sorted(given & vary.keys()):
        raise UsageError(
            f"--config.{field}: it varies; give its values with --vary {field}="
        )
    parts = [name, config_file.stem if config_file else None]
    default = "_".join(["sweep", *filter(None, parts)]) if any(parts) else "sweep_digits"
    folder = checkpoint.to_path(workdir or f"runs/{default}")
    config = configs.override(base, words)
    if name is not None:
        comparisons.check_config(name, config)
    return make_members(config, vary, folder), folder


def train(members: list[Member]) -> None:
    """Trains what is not finished, on all cores; SIGTERM and Ctrl-C end the process.

    Raises:
      RunError: a run could not go on; it, and those after it, are not finished.
      UsageError: a workdir that holds something else, or a field that does not fit.
    """
    use_all_cores(members)
    use_compilation_cache()
    with signals.stop_signals() as stop:
        code = _train_all(members, stop)
        if code:
            signals.leave(code)  # what computes may not end well with the interpreter


def _train_all(members: list[Member], stop: signals.StopSignals) -> int:
    """0, or 128 + n after it was stopped by signal n."""
    folder = members[0].workdir.parent

    def tell(signum: int) -> None:
        records.say(
            f"stopped by signal {signum}; the same command goes on from what is saved in "
            f"{folder}"
        )

    todo = [member for member in members if not _is_finished(member)]
    if len(todo) < len(members):
        records.say(f"{len(members) - len(todo)} of {len(members)} runs are finished")
    build_members.check([member.config for member in todo])
    groups = _groups(todo)
    for i, own in enumerate(groups):
        names = " ... ".join(dict.fromkeys(m.workdir.name for m in (own[0], own[-1])))
        records.say(f"part {i + 1} of {len(groups)}, {len(own)} at once: {names}")
        stop.tell, stop.has_news = tell, False
        if build_members.can_train_together(own[0].config):
            try:
                _train_group(own, stop)
            except OSError as error:  # a full disk
                raise RunError(
                    f"training stopped: {' '.join(str(error).split())}; the same command "
                    f"goes on from what is saved in {folder}"
                ) from error
        elif code := _train_alone(own[0], stop):
            return code
        if stop.received:
            tell(stop.received[0])
            return 128 + stop.received[0]
    return 0


def _groups(members: list[Member]) -> list[list[Member]]:
    """Those that are trained at once, in order; they stand at the same update."""
    groups: list[list[Member]] = []
    for places in build_members.group([member.config for member in members]):
        by_start: dict[tuple[int, bool], list[Member]] = {}
        for place in places:
            start = _start(members[place])
            key = (start.step, start.is_evaluated)
            by_start.setdefault(key, []).append(members[place])
        groups += by_start.values()
    return groups


def _train_alone(member: Member, stop: signals.StopSignals) -> int:
    """As `train.py` does; a run that diverges is told and left as it is."""
    try:
        return training.train(member.config, member.workdir, stop)
    except RunError as error:
        if not isinstance(error.__cause__, FloatingPointError):
            raise
        records.warn(f"{member.workdir.name}: {error}")
        return 0


def _is_finished(member: Member) -> bool:
    """Whether the run was evaluated after its last update, and saved unless it diverged."""
    latest, _ = workdirs.check_workdir(member.workdir, member.config)
    if latest and workdirs.is_finished(member.workdir, latest):
        return True
    if not (member.workdir / "config.json").exists():
        return False
    try:
        return not math.isfinite(report.read_run(member.workdir).test_loss)
    except report.NotFinishedError:
        return False


def _train_group(group: list[Member], stop: signals.StopSignals) -> None:
    """Trains runs at once that stand at the same update, to the end or until a signal."""
    members = build_members.build_members([member.config for member in group])
    with contextlib.ExitStack() as stack:
        starts = _open_workdirs(group, members, stack)
        states, start_step = _first_states(members, starts), starts[0].step
        logs = [
            _Log(
                member,
                members,
                place,
                start_step,
                stack.enter_context(records.open_metrics(member.workdir, start_step)),
                training.stored_window(member.config, starts[place].latest),
            )
            for place, member in enumerate(group)
        ]
        origin = f"after step {start_step}" if start_step else "from the start"
        records.say(
            f"{members.configs[0].model} on {members.configs[0].data.name}, {origin}, "
            f"{members.num_steps:,} steps of {members.configs[0].batch_size}; compiling ..."
        )

        def should_stop(step: int) -> bool:
            stop.has_news |= step > start_step
            return bool(stop.received)

        segment: Segment | None = None
        for segment in train_members(
            members, states, start_step, starts[0].is_evaluated, should_stop
        ):
            stop.has_news = True  # a signal waits until all is written
            for log in logs:
                log.write_segment(segment)
            if segment.test:
                _tell(segment, members)
            _save([log for log in logs if log.save_due(segment.step)], segment)
            stop.has_news = segment.step > start_step
        if stop.received:
            if segment:
                _save([log for log in logs if log.saved_step < segment.step], segment)
            return
    for member in group:
        title = f"{member.config.model} on {member.config.data.name}"
        records.plot_curves(member.workdir, title)


@dataclasses.dataclass(frozen=True)
class _Start:
    """Where a run goes on.

    Attributes:
      step: updates done.
      latest: the newest whole checkpoint; None: there is none, or the run diverged since.
      damaged: what is wrong with newer ones, by step.
      is_evaluated: whether the evaluation after those updates, if one is due, is written.
    """

    step: int
    latest: checkpoint.Checkpoint | None
    damaged: dict[int, checkpoint.DamagedError]
    is_evaluated: bool


def _start(member: Member) -> _Start:
    """Raises `UsageError` if the workdir holds something else, or only what is damaged."""
    latest, damaged = workdirs.check_workdir(member.workdir, member.config)
    step = latest.step if latest else 0
    losses = {row["step"]: row["loss"] for row in records.read_evaluations(member.workdir)}
    # Of a run that diverged there are evaluations alone.
    lost = max((at for at, loss in losses.items() if loss is None), default=0)
    if lost > step:
        return _Start(lost, None, damaged, is_evaluated=True)
    return _Start(step, latest, damaged, is_evaluated=step == 0 or step in losses)


def _open_workdirs(
    group: list[Member], members: Members, stack: contextlib.ExitStack
) -> list[_Start]:
    """Where runs go on, all at one update; their workdirs are this process's alone."""
    steps = [checkpoint.list_steps(member.workdir) for member in group]
    starts = [_start(member) for member in group]
    for start, record in zip(starts, members.records, strict=True):
        if start.latest:
            build.check_data(record, start.latest.record)
    for member in group:
        workdirs.make_workdir(member.workdir)
        stack.enter_context(records.lock(member.workdir))
    now = [checkpoint.list_steps(member.workdir) for member in group]
    if now != steps or len({(start.step, start.is_evaluated) for start in starts}) > 1:
        raise UsageError(
            f"--workdir: another run has just written in {group[0].workdir.parent}; the "
            "same command goes on there"
        )
    for member, start in zip(group, starts, strict=True):
        workdirs.write_config(member.workdir, member.config)
        workdirs.put_aside(member.workdir, start.damaged)
    return starts


def _first_states(members: Members, starts: list[_Start]) -> TrainState:
    """The states of runs at the same update; NaN of those that have diverged."""
    states = members.init_states()
    if not starts[0].step:
        return states
    like = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), states)
    return members.shard([_read_state(start, like) for start in starts])


def _read_state(start: _Start, like: TrainState) -> TrainState:
    if start.latest is None:
        return jax.tree.map(
            lambda x: np.full(
                x.shape,
                start.step if jnp.issubdtype(x.dtype, jnp.integer) else np.nan,
                x.dtype,
            ),
            like,
        )
    arrays, path = start.latest.arrays, start.latest.path
    return TrainState(
        **checkpoint.to_tree(arrays["variables"], like.variables, path),
        **checkpoint.to_tree(arrays["optimizer"], like.optimizer, path),
    )


class _Log:
    """What one member of a group writes down."""

    def __init__(
        self,
        member: Member,
        members: Members,
        place: int,
        start_step: int,
        write: Callable[[records.Record], None],
        window: dict[str, float],
    ):
        config, workdir = member.config, member.workdir
        self.evaluations = training.read_evaluations(workdir)
        metric, tests = config.checkpoint.best_metric, self.evaluations["test"]
        best_step = functools.partial(records.best_step, tests, metric)
        self.keep, self.best_step = build.build_keep(config, best_step), best_step
        self.workdir, self.place, self.members = member.workdir, place, members
        self.saved_step, self.window = start_step, window
        self.log = hooks.TrainLog(
            write=write,
            every=config.log_every_steps,
            epochs_per_step=config.batch_size / members.num_examples,
            learning_rates=members.learning_rates[place],
            images_per_step=config.batch_size,
        )

    def write_segment(self, segment: Segment) -> None:
        """Writes the records of the updates and of the evaluation."""
        train = {name: sums[self.place] for name, sums in segment.train.items()}
        speed = segment.num_updates * self.log.images_per_step / segment.seconds
        for i in range(segment.num_updates):
            step = segment.step - segment.num_updates + i + 1
            sums = {name: float(values[i]) for name, values in train.items()}
            self.window = metrics.add_up([self.window, sums] if self.window else [sums])
            if step % self.log.every == 0 or step == self.members.num_steps:
                self._write(step, "train", self.window, speed)
                self.window = {}
        for split, tested in (("test_ema", segment.test_ema), ("test", segment.test)):
            if tested:
                own = {name: float(sums[self.place]) for name, sums in tested.items()}
                record = self._write(segment.step, split, own, speed)
                self.evaluations[split].append(record)

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is written after an update: as `train.py` has it."""
        best = self.best_step(self.members.eval_steps)
        return step > self.saved_step and (self.members.save_due(step) or step == best)

    def save(self, step: int, states: TrainState) -> None:
        """Writes a checkpoint, of `states` of all members; none of a run that diverged."""
        state = jax.tree.map(lambda x: x[self.place], states)
        record = {
            **self.members.records[self.place],
            **training.last_evaluations(self.evaluations),
            "window": self.window,
        }
        opened = checkpoint_writer.open_writer(self.workdir, self.keep)
        with contextlib.suppress(FloatingPointError), opened as writer:
            checkpoint_writer.save(writer, step, state.variables, state.optimizer, record)
        self.saved_step = step

    def _write(
        self, step: int, split: str, sums: dict[str, float], speed: float
    ) -> records.Record:
        record = self.log.record(step, split, metrics.summarize([sums]), speed)
        if not math.isfinite(record["loss"]):
            record["loss"] = None
        self.log.write(record)
        return record


def _save(logs: list[_Log], segment: Segment) -> None:
    """Writes checkpoints of some members."""
    if logs:
        states = jax.device_get(segment.states)
        for log in logs:
            log.save(segment.step, states)


def _tell(segment: Segment, members: Members) -> None:
    """Says how a group stands after an evaluation."""
    test = segment.test
    top1 = 100 * test["top1"] / test["num_examples"]
    diverged = int((~np.isfinite(test["loss"])).sum())
    epoch = segment.step * members.configs[0].batch_size / members.num_examples
    updates = segment.num_updates * len(members.configs)
    images = updates * members.configs[0].batch_size / segment.seconds
    records.say(
        f"step {segment.step:>6,}/{members.num_steps:,}  epoch {epoch:6.2f}  test top-1 "
        f"from {top1.min():.2f} to {top1.max():.2f} %, median {np.median(top1):.2f} %  "
        f"{images:,.0f} images/s" + (f"  {diverged} diverged" if diverged else "")
    )


def use_all_cores(members: list[Member]) -> None:
    """Makes a device of each core where the platform is a CPU, unless XLA_FLAGS does.

    Of as many as every minibatch can be divided by, for runs that are trained alone. To be
    called before jax has looked for devices. Members do not wait for each other, so one a
    core is faster than all cores for one.
    """
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    sizes = [member.config.batch_size for member in members]
    fitting = (n for n in range(num_cores(), 0, -1) if math.gcd(n, *sizes) == n)
    with contextlib.suppress(RuntimeError):  # jax has looked for devices already
        jax.config.update("jax_num_cpu_devices", next(fitting))


def compare(members: list[Member], name: str | None, folder: epath.Path) -> None:
    """Tabulates the finished runs, in text, CSV and a picture, and says the verdict.

    Raises:
      UsageError: there is no finished run.
    """
    rows = report.summarize([member.workdir for member in members])
    records.say("\n" + report.format_table(rows))
    missing = len(members) - sum(len(row.results) for row in rows)
    comparison = comparisons.get_comparison(name) if name else None
    (folder / "compare.txt").unlink(missing_ok=True)
    (folder / "compare.csv").write_text(report.format_csv(rows))
    (folder / "compare.png").write_bytes(comparison_pictures.draw(rows, comparison))
    if missing:
        records.warn(f"{missing} of {len(members)} runs are not finished, or diverged")
    elif comparison and (why := comparison.why_no_verdict(rows)):
        records.say(f"no verdict of {name}: {why}")
    elif comparison:
        text = f"{comparison.claim}\n{comparison.verdict(comparisons.Table(rows))}\n"
        records.say(f"\n{text}")
        (folder / "compare.txt").write_text(text)
    records.say(f"see {folder / 'compare.png'} and {folder / 'compare.csv'}")


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
        "--config",
        metavar="FILE",
        type=Path,
        help="what the runs share (default: the digits, as COMPARISON has them)",
    )
    parser.add_argument(
        "--vary",
        metavar="FIELD=VALUE,...",
        action="append",
        default=[],
        help="again for each further field; the runs are all combinations; a list as a "
        "value is in brackets: model_kwargs.stage_sizes=[1,1,1],[2,2,2]",
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
