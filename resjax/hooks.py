"""What happens beside the updates of a run: logging, evaluation, checkpoints, progress.

A hook is called as hook(step, state, sums) after every update, see `loop.fit`.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from resjax import hosts
from resjax.loop import Hook, Waits
from resjax.metrics import Sums, add_up, summarize
from resjax.records import Record
from resjax.steps import TrainState


@dataclasses.dataclass
class TrainLog:
    """A hook that writes the averages of every few steps, without stalling the devices.

    Sums are fetched one dispatch late, when the next updates are already under way.

    Attributes:
      write: takes the record of a window of steps.
      every: steps a window.
      epochs_per_step: to say where the run is.
      learning_rates: of every step of the run, [num_steps].
      images_per_step: the global minibatch.
      waits: of the loop that calls the hook.
      window: sums of the steps since the last record, of a run that goes on.
      latest: the last record written.
    """

    write: Callable[[Record], None]
    every: int
    epochs_per_step: float
    learning_rates: np.ndarray
    images_per_step: int
    waits: Waits = dataclasses.field(default_factory=Waits)
    window: dict[str, float] = dataclasses.field(default_factory=dict)
    latest: Record = dataclasses.field(default_factory=dict)
    _waiting: list[tuple[int, Sums]] = dataclasses.field(default_factory=list)
    _state: TrainState | None = None  # after the last dispatch
    _since: np.ndarray | None = None  # the last `_clock`; None before the first dispatch
    # Seconds passed and seconds waited for data, without pauses: of the window, and of
    # those written since `take_data_wait`.
    _spent: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))
    _unreported: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))
    _is_timed: bool = False  # not the first dispatch, which compiles
    _timed_steps: int = 0  # of the window

    def __call__(self, step: int, state: TrainState, sums: Sums) -> None:
        """Takes the sums of a step, and writes the records of windows that have ended."""
        if self._since is None:
            self._since, self._state = self._clock(), state
        if state is not self._state:  # the first step of another dispatch
            self._is_timed, self._state = True, state
            if any(waiting % self.every == 0 for waiting, _ in self._waiting):
                self._fetch()
        self._waiting.append((step, sums))
        self._timed_steps += self._is_timed

    def _clock(self) -> np.ndarray:
        return np.array([time.perf_counter(), self.waits.data])

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not timed; all losses so far are checked before."""
        self._fetch()
        yield
        self._since = self._clock()

    def take_data_wait(self) -> float:
        """Percent of the time, in the windows since it was last asked, without data."""
        unreported, self._unreported = self._unreported, np.zeros(2)
        return _percent_waited(unreported)

    def _fetch(self) -> None:
        """Fetches all that waits; writes a record where a window ends.

        Windows that end in one dispatch share its speed.

        Raises:
          FloatingPointError: a loss that is not finite.
        """
        steps = [step for step, _ in self._waiting]
        with self.waits.for_devices():
            fetched = jax.device_get([sums for _, sums in self._waiting])
        self._waiting = []
        if self._since is not None:
            now = self._clock()
            self._spent += now - self._since
            self._since = now
        has_written = False
        for step, sums in zip(steps, fetched, strict=True):
            if not math.isfinite(sums["loss"]):
                rate = self.learning_rates[step - 1]
                raise FloatingPointError(
                    f"the loss is {sums['loss']} at step {step} (learning rate {rate:g})"
                )
            self.window = add_up([self.window, sums] if self.window else [sums])
            if step % self.every == 0 or step == len(self.learning_rates):
                self._write(step)
                has_written = True
        if has_written:
            self._unreported += self._spent
            self._spent, self._timed_steps = np.zeros(2), 0

    def _write(self, step: int) -> None:
        speed = self._timed_steps * self.images_per_step / max(self._spent[0], 1e-9)
        record = self.record(step, "train", summarize([self.window]), speed)
        self.latest = {**record, "data_wait": round(_percent_waited(self._spent), 1)}
        self.window = {}
        self.write(self.latest)

    def record(
        self, step: int, split: str, means: dict[str, float], images_per_second: float
    ) -> Record:
        """A line of `metrics.jsonl`.

        Args:
          step: updates finished.
          split: "train", "test", or "test_ema" of the averaged weights.
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


def _percent_waited(spent: np.ndarray) -> float:
    seconds, waited = map(float, spent)
    return 100 * waited / max(seconds, 1e-9)


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
    from tqdm import tqdm

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
