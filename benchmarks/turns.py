"""Contenders in processes of their own, which take turns, so that drift hits all alike.

A worker builds its contender (contenders.py), tells when it is warm and then runs so many
steps whenever it is asked. One alone works at a time; what is compared are ratios of
medians over rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # for malloc; read when a process starts


class Absent(Exception):
    """A contender cannot be had here; says why."""


class Worker:
    """A contender in its own process.

    Attributes:
      name: of the contender.
      facts: what it told when it was warm: seconds to the first and the second step,
        device, version and whatever it measured.
    """

    def __init__(self, spec: dict[str, Any], huge_pages: bool) -> None:
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = HUGE_PAGES
        environment |= spec.get("environment", {})
        self.name = spec["contender"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders", json.dumps(spec)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                answer = json.loads(line)
                if "absent" in answer:
                    raise Absent(f"{self.name}: {answer['absent']}")
                return answer
        raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}")

    def seconds(self, steps: int) -> float:
        """A step takes, on average over so many."""
        assert self._process.stdin
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def serve(
    step: Callable[[], Any], finish: Callable[[], Any], facts: dict[str, Any]
) -> None:
    """What a worker does: a first and a second step, then those it is asked for.

    Args:
      step: starts a step.
      finish: waits for all steps that were started.
      facts: to be told, with the seconds of the first two steps.
    """
    for name in ("first_seconds", "second_seconds"):
        start = time.perf_counter()
        step()
        finish()
        facts[name] = time.perf_counter() - start
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        finish()
        print(
            json.dumps({"seconds": (time.perf_counter() - start) / int(line)}), flush=True
        )


def compare(
    specs: Sequence[dict[str, Any]], rounds: int, steps: int, huge_pages: bool
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The step times of all contenders, in turns.

    Args:
      specs: of the workers, what contenders.py takes; the names must differ.
      rounds: turns of each.
      steps: of a turn.
      huge_pages: ask malloc for huge pages.

    Returns:
      {name: its facts, with `seconds`, the median step, and `all_seconds`}, and a line for
      each that is absent.
    """
    workers, absent = [], []
    bar = tqdm(total=len(specs) * (1 + rounds), unit="turn", file=sys.stderr)
    with bar:
        for spec in specs:
            bar.set_description(f"compiling {spec['contender']}")
            try:
                workers.append(Worker(spec, huge_pages))
            except Absent as error:
                absent.append(str(error))
            bar.update()
        times: dict[str, list[float]] = {worker.name: [] for worker in workers}
        for _ in range(rounds):
            for worker in workers:
                bar.set_description(worker.name)
                times[worker.name].append(worker.seconds(steps))
                bar.update()
    for worker in workers:
        worker.close()
    results = {
        worker.name: {
            **worker.facts,
            "seconds": statistics.median(times[worker.name]),
            "all_seconds": times[worker.name],
        }
        for worker in workers
    }
    return results, absent
