"""Residual blocks: a branch, a shortcut and their sum.

What differs between the papers' blocks is data: `basic` and `bottleneck` list the
convolutions of a branch, `shortcut_path` knows the shortcuts, and two modules say where
norms and ReLUs stand. Blocks take their convolution and norm as arguments (classes or
partials of them) and know nothing of initialisation, devices or the network around them.

The last layer of a residual branch, whose zero makes the block its shortcut, is called
`norm_out`, or `conv_out` in a pre-activation block. Names are public (parameter paths).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Layer = Callable[..., Any]  # a Module class, or a partial of one


class ConvSpec(NamedTuple):
    """One convolution of a branch; the arguments of `ops.Conv`."""

    features: int
    kernel_size: int
    strides: int = 1
    groups: int = 1


Branch = Callable[[int, int], list[ConvSpec]]  # (width, strides) -> its convolutions


def basic(width: int, strides: int) -> list[ConvSpec]:
    """Two 3x3 convolutions, of which the first strides.

    Source: He et al. 2015 (arXiv:1512.03385), figure 5 left.
    """
    return [ConvSpec(width, 3, strides), ConvSpec(width, 3)]


def bottleneck(
    width: int,
    strides: int,
    *,
    groups: int = 1,
    group_width: int = 64,
    stride_in_1x1: bool = False,
) -> list[ConvSpec]:
    """1x1 down, 3x3 in groups, 1x1 up to 4 * `width`.

    Args:
      width: of the stage, in channels; 64 in the first one of an ImageNet net.
      strides: of the block, in pixels.
      groups: of the 3x3, the cardinality of ResNeXt.
      group_width: channels of a group where `width` is 64; they grow with it. 64 is a
        ResNet, 128 a wide one, 4 with 32 groups ResNeXt 32x4d.
      stride_in_1x1: where the block strides: in the first 1x1 as in the paper, or in the
        3x3.

    Source: He et al. 2015, figure 5 right; Xie et al. 2016 (arXiv:1611.05431), figure 3c;
      Zagoruyko & Komodakis 2016 (arXiv:1605.07146) for the wide one.
    Differs: the stride in the 3x3 is fb.resnet.torch's choice, which Goyal et al. 2017 and
      torchvision follow.
    """
    inner = groups * (group_width * width // 64)
    first, second = (strides, 1) if stride_in_1x1 else (1, strides)
    return [
        ConvSpec(inner, 1, first),
        ConvSpec(inner, 3, second, groups),
        ConvSpec(4 * width, 1),
    ]


def shortcut_path(
    x: jax.Array, features: int, strides: int, kind: str, conv: Layer, norm: Layer | None
) -> jax.Array:
    """The input of a block brought to the shape of its branch.

    A: every `strides`-th pixel, missing channels appended as zeros; no parameters.
    B: a 1x1 convolution and a norm where the shape changes, else the input itself.
    C: a 1x1 convolution and a norm always.

    Args:
      x: [B, H, W, C].
      features: channels of the branch's output.
      strides: of the branch, in pixels.
      kind: "A", "B" or "C".
      conv: makes the convolution.
      norm: makes the norm, from a name alone; None leaves it out.

    Returns:
      [B, ceil(H / strides), ceil(W / strides), features].

    Source: He et al. 2015, section 3.3 and table 3.
    """
    if is_identity(x, features, strides, kind):
        return x
    if kind == "A":
        x = x[:, ::strides, ::strides, :]
        return jnp.pad(x, [(0, 0)] * 3 + [(0, features - x.shape[-1])])
    x = conv(features, 1, strides, name="shortcut_conv")(x)
    return norm("shortcut_norm")(x) if norm else x


def is_identity(x: jax.Array, features: int, strides: int, kind: str) -> bool:
    """Whether the shortcut of that kind is the input itself."""
    return kind != "C" and strides == 1 and x.shape[-1] == features


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), each convolution followed by a norm.

    Attributes:
      branch: lists the convolutions from (width, strides), e.g. `basic`.
      width: of the stage, in channels.
      strides: of the block, in pixels.
      shortcut: "A", "B", "C", see `shortcut_path`; "none" for a plain net, whose last norm
        ends no residual branch and is numbered like the others.
      conv: makes a convolution from (features, kernel_size, strides, groups, name=).
      norm: makes a norm from (name=).
      is_first: the first block of the network (of interest to `PreActBlock`).

    Source: He et al. 2015, figure 2.
    """

    branch: Branch
    width: int
    strides: int
    shortcut: str
    conv: Layer
    norm: Layer
    is_first: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        update_stats: bool | None = None,
        scale: jax.Array | None = None,
    ) -> jax.Array:
        """Adds the branch to the shortcut.

        Args:
          x: [B, H, W, C].
          train: normalise with the batch's statistics.
          update_stats: move the running statistics; None = as `train`.
          scale: [], a factor of the branch; None = 1. Not for plain nets.

        Returns:
          [B, ceil(H / strides), ceil(W / strides), D], D of the last convolution.
        """
        norm = self._norm(train, update_stats)
        specs = self.branch(self.width, self.strides)
        y = x
        for i, spec in enumerate(specs[:-1], start=1):
            y = self.conv(*spec, name=f"conv{i}")(y)
            y = nn.relu(norm(f"norm{i}")(y))
        last = len(specs)
        y = self.conv(*specs[-1], name=f"conv{last}")(y)
        if self.shortcut == "none":
            return nn.relu(norm(f"norm{last}")(y))
        y = _scaled(norm("norm_out")(y), scale)
        shape = (specs[-1].features, self.strides)
        return nn.relu(shortcut_path(x, *shape, self.shortcut, self.conv, norm) + y)

    def _norm(self, train: bool, update_stats: bool | None) -> Layer:
        """norm(name) -> a function of x alone."""
        return lambda name: partial(
            self.norm(name=name), train=train, update_stats=update_stats
        )


def _scaled(y: jax.Array, scale: jax.Array | None) -> jax.Array:
    return y if scale is None else (y * scale).astype(y.dtype)


class PreActBlock(ResidualBlock):
    """shortcut + branch(x), each convolution preceded by a norm and a ReLU.

    Where the shortcut changes the shape, and in the first block of a network, it takes the
    activated input; a projection has no norm of its own.

    Source: He et al. 2016 (arXiv:1603.05027), figure 4e and appendix.
    """

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        update_stats: bool | None = None,
        scale: jax.Array | None = None,
    ) -> jax.Array:
        """As `ResidualBlock`."""
        norm = self._norm(train, update_stats)
        specs = self.branch(self.width, self.strides)
        y = activated = nn.relu(norm("norm1")(x))
        for i, spec in enumerate(specs[:-1], start=1):
            y = self.conv(*spec, name=f"conv{i}")(y)
            y = nn.relu(norm(f"norm{i + 1}")(y))
        if self.shortcut == "none":
            return self.conv(*specs[-1], name=f"conv{len(specs)}")(y)
        y = _scaled(self.conv(*specs[-1], name="conv_out")(y), scale)
        shape = (specs[-1].features, self.strides)
        if self.is_first or not is_identity(x, *shape, self.shortcut):
            x = activated
        return shortcut_path(x, *shape, self.shortcut, self.conv, None) + y
