"""Times a training step of resjax and of its peers, in turns, on random images.

  python -m benchmarks.train_step --flax_example=flax/examples/imagenet --json=train.json
  python -m benchmarks.train_step --models resnext50_32x4d --contenders resjax PyTorch
  python -m benchmarks.train_step --dtype=bfloat16 --batch_size 128 256 512 --steps=20

Forward, backward, statistics and the update of SGD with Nesterov's momentum and weight
decay, each by its own code (contenders.py). Runs on the CPU or on the first GPU.
"""

from benchmarks import contenders, turns
from resjax.config import run_command


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    return turns.time_steps("train_step", __doc__, "train", contenders.TRAIN, arguments)


if __name__ == "__main__":
    run_command(main)
