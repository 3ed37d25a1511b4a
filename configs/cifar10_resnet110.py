"""ResNet-110 on CIFAR-10 as He et al. 2015 (arXiv:1512.03385), section 4.2 trained it.

python train.py --config=configs/cifar10_resnet110.py --config.data.dir=/data/tfds

The paper reports 6.43 % test error (6.61 +- 0.16 over five runs). It warms up at a rate of
0.01 until the training error is below 80 %, about 400 updates, which are 1.024 epochs.
"""

import dataclasses
import runpy
from pathlib import Path

from resjax.config import Config

_BASE = Path(__file__).with_name("cifar10_resnet20.py")


def get_config() -> Config:
    """The recipe of the shallower nets after a warmup of 400 updates."""
    return dataclasses.replace(
        runpy.run_path(str(_BASE))["get_config"](),
        model="cifar_resnet110",
        warmup="constant",
        warmup_start_lr=0.01,
        warmup_epochs=1.024,
        published_error="6.61 +- 0.16",
    )
