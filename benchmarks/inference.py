"""Times the logits of resjax and of its peers, in turns, on random images.

  python -m benchmarks.inference --json=inference.json
  python -m benchmarks.inference --dtype=bfloat16 --batch_size 1 32 256 --steps=50

Batch norm is folded into the convolutions where a name says so, and normalises with its
running statistics elsewhere. Runs on the CPU or on the first GPU.
"""

from benchmarks import contenders, turns
from resjax.config import run_command


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return turns.time_steps("inference", __doc__, "predict", contenders.PREDICT, arguments)


if __name__ == "__main__":
    run_command(main)
