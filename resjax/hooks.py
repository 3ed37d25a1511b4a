"""What happens beside the updates of a run: logging, evaluation, checkpoints, progress.

A hook is called as hook(step, state, sums) after every update, see `loop.fit`.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from resjax import hosts
from resjax.loop import Hook
from resjax.metrics import Sums, summarize
from resjax.records import Record
from resjax.steps import TrainState


@dataclasses.dataclass
class TrainLog:
    """A hook that writes the averages of every few steps, without stalling the devices.

    Sums are fetched one step late, when the next update is already under way.

    Attributes:
      write: takes the record of a window of steps.
      every: steps a window.
      epochs_per_step: to say where the run is.
      learning_rates: of every step of the run, [num_steps].
      images_per_step: the global minibatch.
      latest: the last record written.
    """

    write: Callable[[Record], None]
    every: int
    epochs_per_step: float
    learning_rates: np.ndarray
    images_per_step: int
    latest: Record = dataclasses.field(default_factory=dict)
    _waiting: list[tuple[int, Sums]] = dataclasses.field(default_factory=list)
    _window: list[Sums] = dataclasses.field(default_factory=list)
    _since: float | None = None  # when the clock was last read; None before the first step
    _seconds: float = 0.0  # of the window, without its pauses
    _timed_steps: int = 0  # of the window, without the first step, which compiles

    def __call__(self, step: int, state: TrainState, sums: Sums) -> None:
        """Takes the sums of a step, and writes a record if the window before has ended."""
        if (step - 1) % self.every == 0:
            self._fetch()
        self._waiting.append((step, sums))
        if self._since is None:
            self._since = time.perf_counter()
        else:
            self._timed_steps += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not timed; all losses so far are checked before."""
        self._fetch()
        yield
        self._since = time.perf_counter()

    def _fetch(self) -> None:
        """Fetches all that waits; writes a record where a window ends.

        Raises:
          FloatingPointError: a loss that is not finite.
        """
        steps = [step for step, _ in self._waiting]
        fetched = jax.device_get([sums for _, sums in self._waiting])
        self._waiting = []
        if self._since is not None:
            now = time.perf_counter()
            self._seconds += now - self._since
            self._since = now
        for step, sums in zip(steps, fetched, strict=True):
            if not math.isfinite(sums["loss"]):
                rate = self.learning_rates[step - 1]
                raise FloatingPointError(
                    f"the loss is {sums['loss']} at step {step} (learning rate {rate:g})"
                )
            self._window.append(sums)
            if step % self.every == 0 or step == len(self.learning_rates):
                self._write(step)

    def _write(self, step: int) -> None:
        images = self._timed_steps * self.images_per_step
        speed = images / max(self._seconds, 1e-9)
        self.latest = self.record(step, "train", summarize(self._window), speed)
        self._window, self._seconds, self._timed_steps = [], 0.0, 0
        self.write(self.latest)

    def record(
        self, step: int, split: str, means: dict[str, float], images_per_second: float
    ) -> Record:
        """A line of `metrics.jsonl`.

        Args:
          step: updates finished.
          split: "train" or "test".
          means: from `summarize`.
          images_per_second: by the wall clock.
        """
        return {
            "step": step,
            "epoch": round(step * self.epochs_per_step, 4),
            "split": split,
            **{name: means[name] for name in ("loss", "top1", "top5")},
            "lr": float(self.learning_rates[step - 1]),
            "images_per_second": round(images_per_second, 1),
        }


def make_hook(
    due: Callable[[int], bool], action: Callable[[int, TrainState], None], log: TrainLog
) -> Hook:
    """Calls action(step, state) when due(step), once all losses so far are known finite."""

    def hook(step: int, state: TrainState, sums: Sums) -> None:
        if due(step):
            with log.paused():
                action(step, state)

    return hook


def make_progress_hook(bar: Any, log: TrainLog) -> Hook:
    """Moves a tqdm bar that counts images, and shows the last training record on it."""

    def hook(step: int, state: TrainState, sums: Sums) -> None:
        bar.update(log.images_per_step)
        if log.latest:
            loss, top1 = log.latest["loss"], log.latest["top1"]
            bar.set_postfix_str(f"loss {loss:.3f} top1 {top1:.1f}%", refresh=False)

    return hook


def progress_bar(num_images: int, done: int, what: str) -> Any:
    """A bar on standard error with images/s and time left; none if that is no terminal."""
    return tqdm(
        total=num_images,
        initial=done,
        desc=what,
        unit="img",
        unit_scale=True,
        disable=None if hosts.is_main() else True,
        dynamic_ncols=True,
        leave=False,
    )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in a list; a second one of a kind ends the process."""
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
