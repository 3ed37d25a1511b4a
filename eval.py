"""Evaluates a run on a whole split, each image once; prints one JSON line.

python eval.py --workdir=runs/digits
python eval.py --workdir=runs/imagenet_resnet50 --step=450000 --batch_size=500
"""

import argparse
import json

from resjax import config as configs
from resjax import hosts, runs
from resjax.compilation_cache import use_compilation_cache


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'best'")
    return text if text == "best" else int(text)


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = configs.ArgumentParser(prog="eval.py", description=__doc__)
    parser.add_argument("--workdir", metavar="DIR", required=True, help="of the run")
    parser.add_argument(
        "--step",
        type=_step,
        metavar="N|best",
        help="checkpoint; the latest (default), or that which evaluated best in training",
    )
    parser.add_argument("--split", default="test", help="test (default) or train")
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="any number (default: as in training)"
    )
    parser.add_argument("--data_dir", metavar="DIR", help="where the data set is")
    parser.add_argument(
        "--fold_batch_norm",
        action="store_true",
        help="fold batch norm into the convolutions: the same numbers to rounding",
    )
    configs.add_cluster_flags(parser)
    flags = parser.parse_args(args)
    if flags.batch_size is not None and flags.batch_size < 1:
        raise configs.UsageError(f"--batch_size: {flags.batch_size} is not 1 or more")
    for name in ("workdir", "data_dir"):
        if getattr(flags, name) == "":
            raise configs.UsageError(f"--{name}: '' is empty; give a folder")
    values = vars(flags)
    place = {name: values.pop(name) for name in configs.CLUSTER_FLAGS}

    def run() -> int:
        use_compilation_cache()
        result = runs.evaluate(**values)
        if hosts.is_main():
            print(json.dumps(result))
        return 0

    return hosts.run_together(run, **place)


if __name__ == "__main__":
    configs.run_command(main)
