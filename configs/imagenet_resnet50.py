"""ResNet-50 on ImageNet with the baseline recipe of Goyal et al. 2017 (arXiv:1706.02677).

python train.py --config=configs/imagenet_resnet50.py --config.data.dir=/data/tfds

The paper reports 23.60 +- 0.12 % top-1 error (single 224 crop, median of the last five
epochs, five runs). Minibatch 256, statistics over 32 examples.
"""

from resjax.config import CheckpointConfig, Config, DataConfig, NormConfig


def get_config() -> Config:
    """Minibatch 256, rate 0.1, divided by 10 after 30, 60 and 80 of 90 epochs."""
    return Config(
        model="resnet50",
        num_classes=1000,
        dtype="bfloat16",
        init="msra_fan_out_zero_gamma",
        norm=NormConfig(virtual_batch_size=32),
        batch_size=256,
        lr_per_256=0.1,
        schedule="step",
        warmup="goyal",
        warmup_epochs=5,
        drop_epochs=(30, 60, 80),
        num_epochs=90,
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        data=DataConfig(name="imagenet2012", image_size=224),
        checkpoint=CheckpointConfig(every_steps=2500),
        log_every_steps=100,
        published_error="23.60 +- 0.12",
    )
