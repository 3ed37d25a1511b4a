"""Evaluates a run on a whole split, each image once; prints one JSON line.

python eval.py --workdir=runs/digits
python eval.py --workdir=runs/r50 --step=450000 --batch_size=500 --crops=10
python eval.py --workdir=runs/r50 --scales=224,256,384,480,640
python eval.py --workdir=runs/a --workdir=runs/b --details
"""

import argparse
import json

from resjax import config as configs
from resjax import hosts, run_evaluation
from resjax.compilation_cache import use_compilation_cache

_HELP = {
    "workdir": "of the run; given several times, the softmax of the runs is averaged",
    "step": "checkpoint; the latest (default), or that which evaluated best in training",
    "batch_size": "images of the training's size at a time (default: as in training, but a "
    "device takes no more than config.microbatch, or 256)",
    "fold_batch_norm": "fold batch norm into the convolutions: the same but for rounding",
    "crops": "10: average over four corners, the middle and their mirror images",
    "scales": "whole images with shorter sides of so many pixels, densely; averaged",
    "ema": "the averaged weights of a run with --config.ema_decay",
    "precise_bn": "take batch norm's statistics anew over so many training images",
    "details": "also write a table of the classes, the confusion matrix, the calibration "
    "and the worst mistakes into a folder beside the JSON file",
}


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor 'best'")
    return text if text == "best" else int(text)


def _scales(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 224,256: whole numbers")
    return tuple(map(int, words))


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = configs.ArgumentParser(prog="eval.py", description=__doc__)
    add, told = parser.add_argument, _HELP
    add("--workdir", action="append", metavar="DIR", required=True, help=told["workdir"])
    add("--step", type=_step, metavar="N|best", help=told["step"])
    add("--split", default="test", help="test (default) or train")
    add("--batch_size", type=int, metavar="N", help=told["batch_size"])
    add("--data_dir", metavar="DIR", help="where the data set is")
    add("--fold_batch_norm", action="store_true", help=told["fold_batch_norm"])
    add("--crops", type=int, default=1, metavar="1|10", help=told["crops"])
    add("--scales", type=_scales, default=(), metavar="S,S,...", help=told["scales"])
    add("--ema", action="store_true", help=told["ema"])
    add("--precise_bn", type=int, default=0, metavar="N", help=told["precise_bn"])
    add("--details", action="store_true", help=told["details"])
    configs.add_cluster_flags(parser)
    flags = parser.parse_args(args)
    if flags.batch_size is not None and flags.batch_size < 1:
        raise configs.UsageError(f"--batch_size: {flags.batch_size} is not 1 or more")
    for name, folders in (("workdir", flags.workdir), ("data_dir", [flags.data_dir])):
        if "" in folders:
            raise configs.UsageError(f"--{name}: '' is empty; give a folder")
    values = vars(flags)
    place = {name: values.pop(name) for name in configs.CLUSTER_FLAGS}

    def run() -> int:
        use_compilation_cache()
        result = run_evaluation.evaluate(**values)
        if hosts.is_main():
            print(json.dumps(result))
        return 0

    return hosts.run_together(run, **place)


if __name__ == "__main__":
    configs.run_command(main)
