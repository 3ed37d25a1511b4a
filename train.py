"""Trains a residual network: flags, then one call.

python train.py                                              # ResNet-20 on digits
python train.py --config=configs/imagenet_resnet50.py --config.data.dir=/data/tfds
"""

from pathlib import Path
from typing import Any

from resjax import config as configs
from resjax import hosts, signals, training
from resjax.compilation_cache import use_compilation_cache

HERE = Path(__file__).resolve().parent


def parse(args: list[str]) -> tuple[configs.Config, str, dict[str, Any]]:
    """The config, the workdir and the place among several hosts that flags ask for."""
    parser = configs.ArgumentParser(
        prog="train.py", description=__doc__, epilog=configs.fields_help()
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=HERE / "configs" / "digits.py",
        help="a Python file with get_config() (default: configs/digits.py); single "
        "fields are set with --config.FIELD=VALUE",
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="where the run is written and resumed from (default: runs/NAME of the config)",
    )
    configs.add_cluster_flags(parser)
    flags, words = parser.parse_known_args(args)
    if flags.workdir == "":
        raise configs.UsageError("--workdir: '' is empty; give a folder")
    config = configs.override(configs.load_config(flags.config), words)
    place = {name: getattr(flags, name) for name in configs.CLUSTER_FLAGS}
    return config, flags.workdir or f"runs/{flags.config.stem}", place


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    config, workdir, place = parse(args)

    def run() -> int:
        use_compilation_cache()
        with signals.stop_signals() as stop:
            return training.train(config, workdir, stop)

    return hosts.run_together(run, **place)


if __name__ == "__main__":
    configs.run_command(main)
