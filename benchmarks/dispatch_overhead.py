"""What the loop of train.py costs beside its compiled step.

  python -m benchmarks.dispatch_overhead
  python -m benchmarks.dispatch_overhead --config=configs/cifar10_resnet20.py

Two ways through the same compiled step take turns in one process, on data that the devices
hold: the loop of train.py with its log, records and progress, and the step called again and
again with one batch, which is waited for only at the end of a turn. The first turn of each
compiles and is not counted.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from etils import epath

from benchmarks import resident, turns
from resjax import build, build_data, hooks, loop, records, training
from resjax.config import (
    ArgumentParser,
    Config,
    UsageError,
    load_config,
    override,
    run_command,
)


def train_loop(
    run: build.Run, config: Config, state: Any, dispatches: Any, write: Any
) -> Any:
    """The state after so many dispatches of `loop.fit`, with the hooks of every step."""
    waits = loop.Waits()
    log = training.make_log(config, run, write, waits, window={})
    with hooks.progress_bar(run.num_steps * config.batch_size, 0, "training") as bar:
        own: Any = [log, hooks.make_progress_hook(bar, log)]
        return loop.fit(run.train_step, state, dispatches, own, waits=waits)


def bare_loop(run: build.Run, state: Any, batch: Any, count: int) -> Any:
    """The state after so many calls of the compiled step."""
    for _ in range(count):
        state, _ = run.train_step(state, batch)
    return state


def take_turns(
    run: build.Run, config: Config, num_turns: int, count: int
) -> list[list[float]]:
    """The seconds of each turn of so many dispatches, of the loop and of the bare step."""
    dispatches = iter(run.train_batches(0))
    batch = next(iter(run.train_batches(0)))
    with (
        tempfile.TemporaryDirectory() as folder,
        records.open_metrics(epath.Path(folder), 0) as write,
    ):

        def in_loop(state: Any) -> Any:
            own = itertools.islice(dispatches, count)
            return train_loop(run, config, state, own, write)

        ways = [in_loop, lambda state: bare_loop(run, state, batch, count)]
        states = [run.init_state() for _ in ways]
        seconds: list[list[float]] = [[] for _ in ways]
        for turn in range(num_turns):
            turns.say(f"turn {turn + 1} of {num_turns}")
            for i, way in enumerate(ways):
                start = time.perf_counter()
                states[i] = jax.block_until_ready(way(states[i]))
                seconds[i].append(time.perf_counter() - start)
    turns.say("")
    return seconds


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(
        prog="python -m benchmarks.dispatch_overhead", description=__doc__
    )
    parser.add_argument("--config", metavar="FILE", type=Path, default=resident.DIGITS)
    parser.add_argument("--turns", type=int, default=9, help="of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of a turn (%(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="writes all numbers there"
    )
    flags, words = parser.parse_known_args(arguments)
    config = override(load_config(flags.config), words)
    per_call = build_data.build_steps_per_dispatch(config, on_device=True)
    if flags.turns < 1:
        raise UsageError(f"--turns: {flags.turns} is not 1 or more")
    if flags.steps < 1 or flags.steps % per_call:
        raise UsageError(f"--steps: {flags.steps} is no multiple of {per_call}")
    config = resident.for_steps(config, flags.steps * (flags.turns + 1))
    run, count = build.build_run(config), flags.steps // per_call
    times = take_turns(run, config, flags.turns + 1, count)
    in_loop, bare = (own[1:] for own in times)
    shares = sorted(100 * b / a for a, b in zip(in_loop, bare, strict=True))
    device = jax.devices()[0]
    print(
        f"{config.model} on {config.data.name}, steps of {config.batch_size}, "
        f"{jax.device_count()} x {device.device_kind}\n"
        f"train.py's loop {flags.steps / statistics.median(in_loop):10.2f} steps/s\n"
        f"bare step       {flags.steps / statistics.median(bare):10.2f} steps/s\n"
        f"the loop makes {statistics.median(shares):.1f} % of the bare steps a second, "
        f"median of {flags.turns} pairs ({shares[0]:.1f} to {shares[-1]:.1f} %)"
    )
    if flags.json:
        flags.json.write_text(json.dumps({"loop": in_loop, "bare": bare}) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
