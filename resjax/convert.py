"""Makes a workdir of PyTorch's weights, for eval.py and `resjax.restore`.

python -m resjax.convert resnet50.safetensors --model resnet50 --workdir runs/resnet50

WEIGHTS is a .safetensors file, read without PyTorch, or a .pth file, which PyTorch reads as
weights only; names are those of torchvision or timm.
"""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from resjax import build, build_data, checkpoint, records
from resjax import config as configs
from resjax.config import Config, DataConfig, UsageError
from resjax.weights import from_torch


def write_checkpoint(
    workdir: str | epath.Path, variables: dict[str, Any], config: Config
) -> None:
    """Makes a workdir whose only checkpoint, of step 0, holds `variables`.

    Args:
      workdir: of no run yet.
      variables: of the model of the config.
      config: what the weights were trained for: model, data set, image size.

    Raises:
      UsageError: the workdir holds something, or cannot be written.
    """
    from resjax import checkpoint_writer

    config = configs.validate(config)
    workdir = check_empty(workdir)
    finished = {"num_steps": 0}
    names = build_data.build_class_names(config)
    record = build.build_record(config, finished, names)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        records.write_json(workdir / "config.json", record["config"])
    except OSError as error:
        raise UsageError(f"--workdir: {workdir} cannot be written: {error}") from error
    with checkpoint_writer.open_writer(workdir, keep=set) as writer:
        optimizer = {"step": np.int32(0)}  # no buffers: nobody resumes it
        checkpoint_writer.save(writer, 0, variables, optimizer, record)


def check_empty(workdir: str | epath.Path) -> epath.Path:
    """The path of a workdir to be made; raises `UsageError` if something is there."""
    if not str(workdir):
        raise UsageError("--workdir: '' is empty; give a folder")
    workdir = checkpoint.to_path(workdir)
    if workdir.exists() and not (workdir.is_dir() and not any(workdir.iterdir())):
        raise UsageError(f"--workdir: {workdir} is not empty; choose another")
    return workdir


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = configs.ArgumentParser(
        prog="python -m resjax.convert",
        description=__doc__,
        epilog="what the weights were trained for is set with --config.FIELD=VALUE, e.g. "
        "--config.data.image_size=288",
    )
    parser.add_argument("weights", metavar="WEIGHTS", help="a .safetensors or .pth file")
    parser.add_argument("--model", required=True, metavar="NAME", help="e.g. resnet50")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="to be made")
    flags, words = parser.parse_known_args(args)
    config = Config(model=flags.model, data=DataConfig("imagenet2012", image_size=224))
    if flags.model.startswith("cifar_"):
        config = Config(model=flags.model, data=DataConfig("cifar10", image_size=32))
    config = configs.override(config, words)
    check_empty(flags.workdir)
    variables = from_torch(flags.weights, config.model, **build.model_options(config))
    if "head" not in variables["params"]:
        raise UsageError(f"weights: {flags.weights} has no classifier")
    num_classes = len(variables["params"]["head"]["bias"])
    asked = any(word.startswith("--config.num_classes=") for word in words)
    if asked and config.num_classes != num_classes:
        raise UsageError(
            f"config.num_classes: {config.num_classes}, but {flags.weights} has "
            f"{num_classes} classes; init_from makes a new classifier for others"
        )
    config = dataclasses.replace(config, num_classes=num_classes)
    write_checkpoint(flags.workdir, variables, config)
    records.say(
        f"{config.model} with {num_classes} classes is in {flags.workdir}, with images as "
        f"for {config.data.name}; weights trained on images of another mean, deviation or "
        "crop give other numbers"
    )
    return 0


if __name__ == "__main__":
    configs.run_command(main)
