"""ResNet-20 on 1,797 handwritten digits: the whole pipeline, in a minute, on any machine.

python train.py
"""

from resjax.config import Config, DataConfig


def get_config() -> Config:
    """A CIFAR net on 8 x 8 images, shifted by up to a pixel."""
    return Config(
        model="cifar_resnet20",
        num_classes=10,
        batch_size=128,
        lr_per_256=0.2,
        schedule="cosine",
        warmup="gradual",
        warmup_epochs=2,
        warmup_start_lr=0.01,
        num_epochs=30,
        data=DataConfig(name="digits", image_size=8),
        eval_every_epochs=5,
        log_every_steps=10,
    )
