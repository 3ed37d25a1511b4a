"""ResNet-20 on CIFAR-10 as He et al. 2015 (arXiv:1512.03385), section 4.2 trained it.

python train.py --config=configs/cifar10_resnet20.py --config.data.dir=/data/tfds

The paper reports 8.75 % test error. 64,000 updates of 128, the rate divided by 10 after
32,000 and 48,000.
"""

from resjax.config import Config, DataConfig


def get_config() -> Config:
    """The recipe of the paper; statistics over the whole minibatch of 128."""
    return Config(
        model="cifar_resnet20",
        num_classes=10,
        batch_size=128,
        lr_per_256=0.2,
        schedule="step",
        warmup="none",
        drop_epochs=(81.92, 122.88),
        num_epochs=163.84,
        momentum=0.9,
        nesterov=False,
        weight_decay=1e-4,
        data=DataConfig(name="cifar10", image_size=32),
        log_every_steps=100,
        published_error="8.75",
    )
