"""ResNet-56 on CIFAR-10 as He et al. 2015 (arXiv:1512.03385), section 4.2 trained it.

python train.py --config=configs/cifar10_resnet56.py --config.data.dir=/data/tfds

The paper reports 6.97 % test error.
"""

import dataclasses
import runpy
from pathlib import Path

from resjax.config import Config

_BASE = Path(__file__).with_name("cifar10_resnet20.py")


def get_config() -> Config:
    """The recipe of ResNet-20 on the deeper net."""
    return dataclasses.replace(
        runpy.run_path(str(_BASE))["get_config"](),
        model="cifar_resnet56",
        published_error="6.97",
    )
