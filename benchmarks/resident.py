"""Training steps a second with small data on the host, and in the memory of the devices.

  python -m benchmarks.resident
  python -m benchmarks.resident --config.data.name=cifar10 --config.data.image_size=32

The variants run in turns in one process, 32 steps a turn from batch to finished update, as
train.py makes them but without evaluation, logging and checkpoints. The first turn compiles
and is not timed; its first thirty losses are compared. Steps a second are the median of the
other turns.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax import build, build_data, loop
from resjax.config import (
    ArgumentParser,
    Config,
    UsageError,
    load_config,
    override,
    run_command,
)

DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"
TURN, COMPARED = 32, 30  # steps
HEAD = "data           steps a dispatch    steps/s    ratio    losses differ by up to"


@dataclasses.dataclass
class Variant:
    """One way to feed the same training, somewhere in it."""

    run: build.Run
    state: Any
    dispatches: Iterator[Any]
    steps_per_dispatch: int
    losses: list[Any] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def take_turn(self) -> None:
        """The next updates, timed until the last is finished."""

        def note(step: int, state: Any, sums: Any) -> None:
            self.losses.append(sums["loss"])

        start = time.perf_counter()
        turn = itertools.islice(self.dispatches, TURN // self.steps_per_dispatch)
        self.state = loop.fit(self.run.train_step, self.state, turn, [note])
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - start)


def start(config: Config, on_device: bool, steps_per_dispatch: int) -> Variant:
    """A variant before its first update."""
    data = dataclasses.replace(
        config.data, on_device=on_device, steps_per_dispatch=steps_per_dispatch
    )
    run = build.build_run(dataclasses.replace(config, data=data))
    return Variant(run, run.init_state(), iter(run.train_batches(0)), steps_per_dispatch)


def for_steps(config: Config, num_steps: int) -> Config:
    """The config with that many updates, and nothing to do beside them until the end."""
    num_examples = len(build_data.build_source(config, "train"))
    epochs = num_steps * config.batch_size / num_examples
    return dataclasses.replace(config, num_epochs=epochs, eval_every_epochs=epochs)


def table(variants: list[Variant]) -> str:
    """A line for each variant; the first is what the others are compared with."""
    speeds = [TURN / statistics.median(variant.seconds[1:]) for variant in variants]
    losses = np.array([np.array(v.losses[:COMPARED], np.float64) for v in variants])
    lines = [HEAD]
    for i, variant in enumerate(variants):
        difference = np.abs(losses[i] / losses[0] - 1).max()
        lines.append(
            f"{'on the device' if i else 'on the host':<14} "
            f"{variant.steps_per_dispatch:16} {speeds[i]:10.2f} "
            f"{speeds[i] / speeds[0]:8.3f} {difference:25.1e}"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.resident", description=__doc__)
    parser.add_argument("--config", metavar="FILE", type=Path, default=DIGITS)
    parser.add_argument(
        "--turns", type=int, default=7, help="of each variant (%(default)s)"
    )
    parser.add_argument(
        "--steps_per_dispatch",
        type=int,
        nargs="+",
        metavar="N",
        help=f"divisors of {TURN} (1 on a CPU, else 1 2 4 8 16)",
    )
    flags, words = parser.parse_known_args(arguments)
    on_cpu = jax.default_backend() == "cpu"
    sizes = flags.steps_per_dispatch or ([1] if on_cpu else [1, 2, 4, 8, 16])
    for size in sizes:
        if size < 1 or TURN % size:
            raise UsageError(f"--steps_per_dispatch: {size} is no divisor of {TURN}")
    if flags.turns < 1:
        raise UsageError(f"--turns: {flags.turns} is not greater than 0")
    config = override(load_config(flags.config), words)
    config = for_steps(config, TURN * (flags.turns + 1))
    variants = [start(config, False, 1), *(start(config, True, size) for size in sizes)]
    for _ in range(flags.turns + 1):
        for variant in variants:
            variant.take_turn()
    device = jax.devices()[0]
    print(
        f"{config.model} on {config.data.name}, {config.dtype}, steps of "
        f"{config.batch_size} on {jax.device_count()} x {device.device_kind}"
    )
    print(table(variants))
    return 0


if __name__ == "__main__":
    run_command(main)
