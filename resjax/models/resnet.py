"""One description of a residual network, and the table of models made from it.

To add a model, add a row to `MODELS`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from resjax import initializers
from resjax.config import RematPolicy, UsageError, remat_policy, unknown_name
from resjax.models.blocks import (
    Branch,
    Layer,
    PreActBlock,
    ResidualBlock,
    basic,
    bottleneck,
)
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv, max_pool


class Stem(nn.Module):
    """The layers before the first stage.

    Attributes:
      width: output channels.
      downsample: a 7x7 convolution with stride 2 and a 3x3/2 max-pool (ImageNet);
        otherwise one 3x3 convolution (CIFAR).
      conv: makes a convolution.
      norm: makes a norm, which a ReLU follows; None leaves both to the first block.
    """

    width: int
    downsample: bool
    conv: Layer
    norm: Layer | None

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, H, W, 3] -> [B, H / 4, W / 4, width], or [B, H, W, width] for CIFAR."""
        size, strides = (7, 2) if self.downsample else (3, 1)
        x = self.conv(self.width, size, strides, name="conv")(x)
        if self.norm:
            x = self.norm(name="norm")(x, train=train, update_stats=update_stats)
            x = nn.relu(x)
        return max_pool(x) if self.downsample else x


class Stage(nn.Module):
    """Blocks of one width, one after another: `block1`, `block2`, ...

    Attributes:
      first: makes the first block, which may stride, from its name.
      rest: makes each of the others, which all have the same shapes.
      survivals: of each block, the probability that a training step keeps its branch, with
        one draw for the whole minibatch; evaluation multiplies the branch by it.
      loop: run the others as a loop, which is compiled once however many they are; the
        makers should rematerialise.

    Source: Huang et al. 2016 (arXiv:1603.09382), equations 2 and 5, for the survivals.
    Differs: a dropped branch is computed all the same, so its running statistics move.
    """

    first: Layer
    rest: Layer
    survivals: tuple[float, ...]
    loop: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, H, W, C] -> [B, H / strides, W / strides, D]."""
        scales = None
        if min(self.survivals) < 1:
            scales = jnp.array(self.survivals)  # [number of blocks]
            if train:
                scales = jax.random.bernoulli(self.make_rng("dropout"), scales)
        loop = self.loop and self._can_loop()
        for i in range(1 if loop else len(self.survivals)):
            block = (self.rest if i else self.first)(name=f"block{i + 1}")
            x = block(x, train, update_stats, None if scales is None else scales[i])
        if loop:
            rest = None if scales is None else scales[1:]
            x = self._loop(x, train, update_stats, rest)
        return x

    def _can_loop(self) -> bool:
        """Whether all blocks have their variables, and nobody looks inside."""
        names = [f"block{i}" for i in range(2, len(self.survivals) + 1)]
        return (
            len(names) > 1
            and not self.is_initializing()
            and not self.is_mutable_collection("intermediates")
            and all(self.has_variable("params", name) for name in names)
        )

    def _loop(
        self,
        x: jax.Array,
        train: bool,
        update_stats: bool | None,
        scales: jax.Array | None,
    ) -> jax.Array:
        """All blocks but the first; their variables are stacked for the loop alone."""
        moves = train if update_stats is None else update_stats
        names = [f"block{i}" for i in range(2, len(self.survivals) + 1)]
        variables = {
            collection: jax.tree.map(
                lambda *leaves: jnp.stack(leaves),
                *(self.get_variable(collection, name) for name in names),
            )
            for collection in ("params", "batch_stats")
            if self.has_variable(collection, names[0])
        }
        moves = moves and "batch_stats" in variables

        def run_block(x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
            variables, scale = inputs
            return self.rest(parent=None).apply(
                variables,
                x,
                train,
                update_stats,
                scale,
                mutable=["batch_stats"] if moves else [],
            )

        x, updates = lax.scan(run_block, x, (variables, scales))
        for i, name in enumerate(names if moves else []):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], updates["batch_stats"])
            self.put_variable("batch_stats", name, own)
        return x


# What blocks keep beside their inputs, by the names that ops.py and norm.py give it.
_POLICIES = {
    "blocks": None,
    "convs": jax.checkpoint_policies.save_only_these_names("conv", "moments"),
}


def check_images(images: jax.Array | np.ndarray) -> None:
    """Raises `UsageError` if images are whole numbers, pixels that nobody normalised."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UsageError(
            f"images: {images.dtype} is no float; a net takes normalised images, such as "
            "`preprocess` of a restored run makes of pixels"
        )


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling, a linear classifier.

    Attributes:
      stage_sizes: blocks a stage; each stage but the first halves the map and doubles
        the width.
      branch: the convolutions of a block, see blocks.py.
      width: of the first stage, and channels of the stem.
      downsample: the ImageNet stem, which divides the map by 4.
      shortcut: "A", "B" or "C", see `blocks.shortcut_path`, or "none".
      preactivation: norms and ReLUs stand before the convolutions of a block; a last
        norm and ReLU follow the last block.
      stochastic_depth: the probability that a training step drops the last block's branch;
        it grows linearly with the block from 0.
      remat: what the backward pass finds kept. "none": all that it needs. "blocks": what
        blocks take, while the rest is computed again; a stage is compiled as a loop over
        its blocks. "convs": also what convolutions put out and the moments of norms, so
        that only elementwise work is done again; for accelerators, as the compiler for
        CPUs may do it early, which saves nothing. (True is "blocks", False "none".)
      num_classes: logits; 0 = no classifier.
      dtype: of activations and products; parameters, statistics, logits are float32.
      conv: makes the convolutions.
      norm: makes the norms.

    Source: He et al. 2015 (arXiv:1512.03385), table 1 (ImageNet) and section 4.2 (CIFAR);
      He et al. 2016 (arXiv:1603.05027), appendix (pre-activation); Huang et al. 2016
      (arXiv:1603.09382), equation 4 (stochastic depth).
    Differs: an ImageNet stem of a pre-activation net pools what its convolution puts out,
      as timm does; the code of He et al. 2016 normalises first.
    """

    stage_sizes: tuple[int, ...]
    branch: Branch
    width: int = 64
    downsample: bool = True
    shortcut: str = "B"
    preactivation: bool = False
    stochastic_depth: float = 0.0
    remat: RematPolicy = "none"
    num_classes: int = 1000
    dtype: jnp.dtype = jnp.float32
    conv: Layer = Conv
    norm: Layer = BatchNorm

    def __post_init__(self) -> None:
        self.remat = remat_policy(self.remat)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        train: bool = False,
        update_stats: bool | None = None,
        return_stages: bool = False,
        freeze_at: int = 0,
    ) -> Any:
        """Logits of a batch of normalised images.

        Args:
          x: [B, H, W, 3] float, any size.
          train: normalise with the batch's statistics. With `stochastic_depth`, `apply`
            needs rngs={"dropout": key}.
          update_stats: move the running statistics; None = as `train`. With True,
            `apply` needs mutable=["batch_stats"] and returns (result, updates).
          return_stages: also return what each stage puts out; the last is the map that
            the classifier averages.
          freeze_at: the layers of `frozen_layers` evaluate, whatever `train` says: they use
            their running statistics and leave them, and no gradient passes them.

        Returns:
          [B, num_classes] float32; the averaged map [B, D] float32 without a classifier.
          With `return_stages`, (that, {"stage1": [B, H/4, W/4, D1], ...}).

        Raises:
          UsageError: the images are whole numbers, so not normalised, or `freeze_at` is
            more than the net has layers for.
        """
        check_images(x)
        frozen = frozen_layers(self, freeze_at)

        def run(name: str, layer: Any, x: jax.Array) -> jax.Array:
            if name in frozen:
                return lax.stop_gradient(layer(x, train=False, update_stats=False))
            return layer(x, train=train, update_stats=update_stats)

        conv = partial(self.conv, dtype=self.dtype)
        stem_norm = None if self.preactivation else self.norm
        stem = Stem(self.width, self.downsample, conv, stem_norm, name="stem")
        x = run("stem", stem, x.astype(self.dtype))  # [B, H/4, W/4, width]
        stages = {}
        for i in range(len(self.stage_sizes)):
            name = f"stage{i + 1}"
            x = run(name, self._stage(i, conv, name), x)
            stages[name] = x  # [B, H/4 / 2**i, W/4 / 2**i, D]
        if self.preactivation:
            x = stages[name] = nn.relu(run("norm", self.norm(name="norm"), x))
        x = x.astype(jnp.float32).mean(axis=(1, 2))  # [B, D]
        if self.num_classes:
            head = nn.Dense(
                self.num_classes,
                precision=lax.Precision.HIGHEST,  # float32 where products default to less
                kernel_init=initializers.CLASSIFIER,
                name="head",
            )
            x = head(x)  # [B, num_classes]
        return (x, stages) if return_stages else x

    def _stage(self, i: int, conv: Layer, name: str) -> Stage:
        """The stage of that number, counted from 0."""
        block = PreActBlock if self.preactivation else ResidualBlock
        if self.remat != "none":
            flags = (2, 3)  # train, update_stats
            block = nn.remat(block, policy=_POLICIES[self.remat], static_argnums=flags)
        rest = partial(
            block,
            branch=self.branch,
            width=self.width * 2**i,
            strides=1,
            shortcut=self.shortcut,
            conv=conv,
            norm=self.norm,
        )
        first = partial(rest, strides=1 if i == 0 else 2, is_first=i == 0)
        before, total = sum(self.stage_sizes[:i]), sum(self.stage_sizes)
        survivals = tuple(
            1 - self.stochastic_depth * (before + j) / total
            for j in range(1, self.stage_sizes[i] + 1)
        )
        return Stage(first, rest, survivals, self.remat == "blocks", name=name)


def frozen_layers(model: nn.Module, freeze_at: int) -> tuple[str, ...]:
    """The names of the layers that `freeze_at` keeps as they are, from the input on.

    0: none; 1: the stem; 2: also stage1; ...; as many as there are stages, and 1: all but
    the classifier, also the last norm of a pre-activation net.

    Args:
      model: of `create_model`.
      freeze_at: layers, counting stem and stages.

    Raises:
      UsageError: less than 0, or more than there are; it says how many.

    Source: FREEZE_AT of Detectron2, by default 2, the stem and its res2, our stage1; He et
      al. 2015 (arXiv:1512.03385), appendix A, for norms that fine-tuning leaves.
    Differs: both fix the statistics and Detectron2 also scale and bias of all norms; here
      those above the border are trained.
    """
    if freeze_at == 0:
        return ()
    names = ["stem", *(f"stage{i + 1}" for i in range(len(model.stage_sizes)))]
    if not 0 < freeze_at <= len(names):
        raise UsageError(
            f"freeze_at: {freeze_at} is not from 0 (nothing) to {len(names)} (stem to "
            f"{names[-1]})"
        )
    if model.preactivation and freeze_at == len(names):
        names.append("norm")
        freeze_at += 1
    return tuple(names[:freeze_at])


def _cifar(depth: int, branch: Branch = basic, **options: Any) -> Callable[..., ResNet]:
    """Three equal stages: 6n + 2 layers of basic blocks, 9n + 2 of bottlenecks."""
    sizes = ((depth - 2) // (3 * len(branch(64, 1))),) * 3
    defaults: dict[str, Any] = {"width": 16, "shortcut": "A", "num_classes": 10}
    return partial(ResNet, sizes, branch, downsample=False, **(defaults | options))


def _resnext(groups: int, group_width: int) -> Branch:
    return partial(bottleneck, groups=groups, group_width=group_width)


_18, _34, _50 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3)
_101, _152, _200 = (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)
_V1 = partial(bottleneck, stride_in_1x1=True)

MODELS: dict[str, Callable[..., ResNet]] = {
    # He et al. 2015, table 1; strides in the 3x3, or as in the paper ("v1").
    "resnet18": partial(ResNet, _18, basic),
    "resnet34": partial(ResNet, _34, basic),
    "resnet50": partial(ResNet, _50, bottleneck),
    "resnet101": partial(ResNet, _101, bottleneck),
    "resnet152": partial(ResNet, _152, bottleneck),
    "resnet200": partial(ResNet, _200, bottleneck),
    "resnet50_v1": partial(ResNet, _50, _V1),
    "resnet101_v1": partial(ResNet, _101, _V1),
    "resnet152_v1": partial(ResNet, _152, _V1),
    "plain18": partial(ResNet, _18, basic, shortcut="none"),
    "plain34": partial(ResNet, _34, basic, shortcut="none"),
    # He et al. 2016, appendix.
    "preact_resnet18": partial(ResNet, _18, basic, preactivation=True),
    "preact_resnet34": partial(ResNet, _34, basic, preactivation=True),
    "preact_resnet50": partial(ResNet, _50, bottleneck, preactivation=True),
    "preact_resnet101": partial(ResNet, _101, bottleneck, preactivation=True),
    "preact_resnet152": partial(ResNet, _152, bottleneck, preactivation=True),
    "preact_resnet200": partial(ResNet, _200, bottleneck, preactivation=True),
    # Xie et al. 2016, table 2 (equal complexity) and section 5.1.
    "resnext50_2x40d": partial(ResNet, _50, _resnext(2, 40)),
    "resnext50_4x24d": partial(ResNet, _50, _resnext(4, 24)),
    "resnext50_8x14d": partial(ResNet, _50, _resnext(8, 14)),
    "resnext50_32x4d": partial(ResNet, _50, _resnext(32, 4)),
    "resnext101_32x4d": partial(ResNet, _101, _resnext(32, 4)),
    "resnext101_32x8d": partial(ResNet, _101, _resnext(32, 8)),
    "resnext101_64x4d": partial(ResNet, _101, _resnext(64, 4)),
    # Zagoruyko & Komodakis 2016, table 8.
    "wide_resnet50_2": partial(ResNet, _50, _resnext(1, 128)),
    # He et al. 2015, table 6; He et al. 2016, table 1; Xie et al. 2016, table 7.
    "cifar_resnet20": _cifar(20),
    "cifar_resnet32": _cifar(32),
    "cifar_resnet44": _cifar(44),
    "cifar_resnet56": _cifar(56),
    "cifar_resnet110": _cifar(110),
    "cifar_resnet1202": _cifar(1202),
    "cifar_plain20": _cifar(20, shortcut="none"),
    "cifar_plain32": _cifar(32, shortcut="none"),
    "cifar_plain44": _cifar(44, shortcut="none"),
    "cifar_plain56": _cifar(56, shortcut="none"),
    "cifar_plain110": _cifar(110, shortcut="none"),
    "cifar_preact_resnet110": _cifar(110, preactivation=True),
    "cifar_preact_resnet164": _cifar(164, bottleneck, shortcut="B", preactivation=True),
    "cifar_preact_resnet1001": _cifar(1001, bottleneck, shortcut="B", preactivation=True),
    # Equal complexity: the row of Xie et al. 2016, table 2, at this depth.
    "cifar_resnext29_1x64d": _cifar(29, _resnext(1, 64), shortcut="B", width=64),
    "cifar_resnext29_2x40d": _cifar(29, _resnext(2, 40), shortcut="B", width=64),
    "cifar_resnext29_4x24d": _cifar(29, _resnext(4, 24), shortcut="B", width=64),
    "cifar_resnext29_8x14d": _cifar(29, _resnext(8, 14), shortcut="B", width=64),
    "cifar_resnext29_32x4d": _cifar(29, _resnext(32, 4), shortcut="B", width=64),
    "cifar_resnext29_8x64d": _cifar(29, _resnext(8, 64), shortcut="B", width=64),
    "cifar_resnext29_16x64d": _cifar(29, _resnext(16, 64), shortcut="B", width=64),
}

# What a config may set, and what only a program can.
OPTIONS = (
    "num_classes",
    "dtype",
    "stage_sizes",
    "width",
    "shortcut",
    "stochastic_depth",
    "remat",
    "conv",
    "norm",
)


def list_models() -> list[str]:
    """The names that `create_model` knows, sorted."""
    return sorted(MODELS)


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def create_model(name: str, **options: Any) -> ResNet:
    """The Flax module of a named model.

    Args:
      name: one of `list_models()`.
      **options: any of num_classes (1000, or 10 for CIFAR nets; 0 = no classifier), dtype
        of the computation, stage_sizes, width, shortcut ("A", "B", "C", "none"),
        stochastic_depth, remat ("none", "blocks", "convs"), conv and norm (module classes
        or partials of them, e.g. `partial(BatchNorm, virtual_batch_size=32)`; `norm.Bias`
        is a net without); see `ResNet`.

    Returns:
      A linen Module: images [B, H, W, 3] -> logits [B, num_classes].

    Raises:
      UsageError: an unknown name or option, or a value that is not allowed; it is a
        ValueError.

    >>> create_model("resnet50", num_classes=10).stage_sizes
    (3, 4, 6, 3)
    """
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    for option in options:
        if option not in OPTIONS:
            raise unknown_name(f"model {name}: option", option, OPTIONS)
    model = MODELS[name]().clone(**options)
    if not isinstance(model.num_classes, int) or model.num_classes < 0:
        raise UsageError(f"num_classes: {model.num_classes!r} is not 0 or more")
    sizes, width = model.stage_sizes, model.width
    if not isinstance(sizes, tuple) or not sizes or not all(map(_is_count, sizes)):
        raise UsageError(f"stage_sizes: {sizes!r} is no tuple of whole numbers above 0")
    if not _is_count(width):
        raise UsageError(f"width: {width!r} is no whole number above 0")
    if model.shortcut not in ("A", "B", "C", "none"):
        raise UsageError(f"shortcut: {model.shortcut!r} is not one of A, B, C, none")
    if model.remat not in ("none", *_POLICIES):
        raise UsageError(f"remat: {model.remat!r} is not one of none, blocks, convs")
    depth = model.stochastic_depth
    if not isinstance(depth, int | float) or not 0 <= depth < 1:
        raise UsageError(
            f"stochastic_depth: {model.stochastic_depth!r} is not at least 0 and below 1"
        )
    if model.stochastic_depth and model.shortcut == "none":
        raise UsageError(
            f"stochastic_depth: {model.stochastic_depth!r}, but a plain net has no "
            "shortcut that would remain"
        )
    return model
