"""One description of a residual network, and the table of models made from it.

To add a model, add a row to `MODELS`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from resjax import initializers
from resjax.config import UsageError, unknown_name
from resjax.models.blocks import BasicBlock, BottleneckBlock, Layer
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv, max_pool


class Stem(nn.Module):
    """The layers before the first stage.

    Attributes:
      width: output channels.
      downsample: a 7x7 convolution with stride 2 and a 3x3/2 max-pool (ImageNet);
        otherwise one 3x3 convolution (CIFAR).
      conv: makes a convolution.
      norm: makes a norm.
    """

    width: int
    downsample: bool
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, H, W, 3] -> [B, H / 4, W / 4, width], or [B, H, W, width] for CIFAR."""
        size, strides = (7, 2) if self.downsample else (3, 1)
        x = self.conv(self.width, size, strides, name="conv")(x)
        x = self.norm(name="norm")(x, train=train, update_stats=update_stats)
        x = nn.relu(x)
        return max_pool(x) if self.downsample else x


class Stage(nn.Module):
    """Blocks of one width, `block1`, `block2`, ...; the first of them strides.

    Attributes:
      size: number of blocks.
      strides: of the first block, in pixels.
      block: makes a block from (strides=, name=).
    """

    size: int
    strides: int
    block: Layer

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> [B, H / strides, W / strides, D]."""
        for i in range(self.size):
            block = self.block(strides=self.strides if i == 0 else 1, name=f"block{i + 1}")
            x = block(x, train=train, update_stats=update_stats)
        return x


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling, a linear classifier.

    Attributes:
      stage_sizes: blocks a stage; each stage but the first halves the map and doubles
        the width.
      block: the block's class.
      width: of the first stage, and channels of the stem.
      downsample: the ImageNet stem, which divides the map by 4.
      shortcut: "A", "B" or "C", see `blocks.shortcut_path`.
      num_classes: logits.
      dtype: of activations and products; parameters, statistics, logits are float32.
      conv: makes the convolutions.
      norm: makes the norms.

    Source: He et al. 2015 (arXiv:1512.03385), table 1 (ImageNet) and section 4.2 (CIFAR).
    """

    stage_sizes: tuple[int, ...]
    block: Layer
    width: int = 64
    downsample: bool = True
    shortcut: str = "B"
    num_classes: int = 1000
    dtype: jnp.dtype = jnp.float32
    conv: Layer = Conv
    norm: Layer = BatchNorm

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """Logits of a batch of normalised images.

        Args:
          x: [B, H, W, 3], any size.
          train: normalise with the batch's statistics.
          update_stats: move the running statistics; None = as `train`. With True,
            `apply` needs mutable=["batch_stats"] and returns (logits, updates).

        Returns:
          [B, num_classes] float32.
        """
        flags: dict[str, Any] = {"train": train, "update_stats": update_stats}
        conv = partial(self.conv, dtype=self.dtype)
        stem = Stem(self.width, self.downsample, conv, self.norm, name="stem")
        x = stem(x.astype(self.dtype), **flags)  # [B, H/4, W/4, width]
        for i, size in enumerate(self.stage_sizes):
            block = partial(
                self.block,
                width=self.width * 2**i,
                shortcut=self.shortcut,
                conv=conv,
                norm=self.norm,
            )
            strides = 1 if i == 0 else 2
            x = Stage(size, strides, block, name=f"stage{i + 1}")(x, **flags)
        x = x.astype(jnp.float32).mean(axis=(1, 2))  # [B, D]
        head = nn.Dense(
            self.num_classes,
            precision=lax.Precision.HIGHEST,  # float32 also where products default to less
            kernel_init=initializers.CLASSIFIER,
            name="head",
        )
        return head(x)  # [B, num_classes]


def _cifar(depth: int) -> Callable[..., ResNet]:
    """6n + 2 layers: three stages of n basic blocks, shortcut A, 16 to 64 channels."""
    sizes = ((depth - 2) // 6,) * 3
    make = partial(ResNet, sizes, BasicBlock, width=16, downsample=False)
    return partial(make, shortcut="A", num_classes=10)


MODELS: dict[str, Callable[..., ResNet]] = {
    "resnet18": partial(ResNet, (2, 2, 2, 2), BasicBlock),
    "resnet34": partial(ResNet, (3, 4, 6, 3), BasicBlock),
    "resnet50": partial(ResNet, (3, 4, 6, 3), BottleneckBlock),
    "resnet101": partial(ResNet, (3, 4, 23, 3), BottleneckBlock),
    "resnet152": partial(ResNet, (3, 8, 36, 3), BottleneckBlock),
    "cifar_resnet20": _cifar(20),
    "cifar_resnet32": _cifar(32),
    "cifar_resnet44": _cifar(44),
    "cifar_resnet56": _cifar(56),
    "cifar_resnet110": _cifar(110),
}

OPTIONS = ("num_classes", "dtype", "shortcut", "conv", "norm")


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(MODELS)


def create_model(name: str, **options: Any) -> ResNet:
    """The Flax module of a named model.

    Args:
      name: one of `list_models()`.
      **options: any of num_classes (1000, or 10 for CIFAR nets), dtype of the
        computation, shortcut ("A", "B", "C"), conv and norm (module classes or partials
        of them, e.g. `partial(BatchNorm, virtual_batch_size=32)`).

    Returns:
      A linen Module: images [B, H, W, 3] -> logits [B, num_classes].

    Raises:
      UsageError: an unknown name, option or shortcut; it is a ValueError.

    >>> create_model("resnet50", num_classes=10).stage_sizes
    (3, 4, 6, 3)
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    for option in options:
        if option not in OPTIONS:
            raise unknown_name(f"model {name}: option", option, OPTIONS)
    if options.get("shortcut", "A") not in ("A", "B", "C"):
        raise UsageError(f"shortcut: {options['shortcut']!r} is not one of A, B, C")
    return MODELS[name](**options)
