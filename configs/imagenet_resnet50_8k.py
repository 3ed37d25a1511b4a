"""ResNet-50 on ImageNet in an hour: minibatch 8,192, Goyal et al. 2017 (arXiv:1706.02677).

python train.py --config=configs/imagenet_resnet50_8k.py --config.data.dir=/data/tfds

The paper reports 23.74 +- 0.09 % top-1 error, as at minibatch 256 (23.60 +- 0.12), on 256
GPUs of 32 images. Statistics are over 32 examples, a backward pass holds 256 of a device:
one file trains the same net on one GPU and on any number that divides 8,192.
"""

import dataclasses
import runpy
from pathlib import Path

from resjax.config import CheckpointConfig, Config

_BASE = Path(__file__).with_name("imagenet_resnet50.py")


def get_config() -> Config:
    """The baseline with 32 times the minibatch and rate; warmup from 0.1 in 5 epochs."""
    base = runpy.run_path(str(_BASE))["get_config"]()
    return dataclasses.replace(
        base,
        batch_size=8192,
        microbatch=256,
        data=dataclasses.replace(base.data, prefetch=1),  # a batch has 1.2 GB
        checkpoint=CheckpointConfig(every_steps=150),
        log_every_steps=10,
        published_error="23.74 +- 0.09",
    )
