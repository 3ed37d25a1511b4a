"""What is timed: resjax and the peers a user would pick instead, on the same work.

  python -m benchmarks.contenders JSON    # a worker of turns.py

Each takes the same number of random images of the same size and is its own code's way to
train on them or to predict. Imports only what it times.
"""

import importlib
import json
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import turns
from benchmarks.turns import Absent

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4
STAND_INS = ("clu", "input_pipeline", "ml_collections", "tensorflow", "tensorflow_datasets")
Steps = tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]


def random_images(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, S, S, 3] uint8 and labels [B] int32."""
    random, size = np.random.RandomState(0), spec["image_size"]
    images = random.randint(0, 256, (spec["batch_size"], size, size, 3), np.uint8)
    return images, random.randint(0, 10, spec["batch_size"]).astype(np.int32)


def _normalize(images: Any) -> Any:
    return (images / np.float32(255) - np.float32(MEAN)) / np.float32(STD)


def _jax_facts() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
    }


def _chain(step: Callable[[Any], tuple[Any, Any]], state: Any) -> tuple[Callable, Callable]:
    """(start a step, wait for all) of a function from a state to the next and metrics."""
    import jax

    held = [state, None]

    def start() -> None:
        held[0], held[1] = step(held[0])

    return start, lambda: jax.block_until_ready(held)


def _resjax_model(spec: dict[str, Any]) -> Any:
    import jax.numpy as jnp

    import resjax

    norm = partial(resjax.BatchNorm, virtual_batch_size=spec.get("virtual_batch_size", 0))
    return resjax.create_model(
        spec["model"], dtype=jnp.dtype(spec["dtype"]), norm=norm, **spec.get("options", {})
    )


def _train_with_resjax(spec: dict[str, Any], model: Any) -> Steps:
    import jax

    import resjax
    from resjax import optim, parallel, steps

    tx = optim.sgd(lambda step: np.float32(RATE), MOMENTUM, True, DECAY)
    step = steps.make_train_step(
        model, tx, lambda batch: _normalize(batch["image"]), spec["batch_size"]
    )
    one = jax.devices()[:1]
    with mock.patch.object(jax, "local_device_count", lambda: 1):
        run_step = jax.pmap(
            step,
            parallel.AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=one,
            donate_argnums=0,
        )
    images, labels = random_images(spec)
    batch = {"image": images[None], "label": labels[None], "position": labels[None]}
    batch = jax.device_put(batch, one[0])
    size = min(spec["image_size"], 64)
    state = steps.create_state(resjax.init(model, jax.random.key(0), image_size=size), tx)
    return (*_chain(lambda state: run_step(state, batch), state), _jax_facts())


def train_resjax(spec: dict[str, Any]) -> Steps:
    """resjax: the step that train.py runs, uint8 images in, its state donated."""
    return _train_with_resjax(spec, _resjax_model(spec))


def _flax_net(spec: dict[str, Any]) -> Any:
    """The net of resjax's table with the convolutions, norms and pooling of flax.linen."""
    from flax import linen as nn

    from resjax.models import resnet

    class Conv(nn.Module):
        features: int
        kernel_size: int = 3
        strides: int = 1
        groups: int = 1
        dtype: Any = np.float32

        @nn.compact
        def __call__(self, x: Any) -> Any:
            pad = (self.kernel_size - 1) // 2
            return nn.Conv(
                self.features,
                (self.kernel_size,) * 2,
                self.strides,
                [(pad, pad)] * 2,
                feature_group_count=self.groups,
                use_bias=False,
                dtype=self.dtype,
            )(x)

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x: Any, *, train: bool, update_stats: bool | None = None) -> Any:
            dtype = x.dtype
            norm = nn.BatchNorm(not train, momentum=0.9, dtype=dtype)
            return norm(x)

    def max_pool(x: Any) -> Any:
        return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])

    resnet.max_pool = max_pool  # type: ignore[assignment]  # in this process alone
    return _resjax_model(spec).clone(conv=Conv, norm=Norm)


def train_flax_modules(spec: dict[str, Any]) -> Steps:
    """The same net of flax.linen's modules in resjax's step."""
    return _train_with_resjax(spec, _flax_net(spec))


def load_flax_example(folder: Path) -> tuple[Any, Any]:
    """Its modules (models, train), as they lie there."""
    for name in ("models.py", "train.py"):
        if not (folder / name).is_file():
            raise Absent(f"there is no {folder / name}")
    # What train.py imports to read ImageNet and to log, and the step does not use, gets a
    # stand-in, installed or not. This module would look into TensorFlow's, so it is first.
    importlib.import_module("flax.training.checkpoints")
    stand_ins = {name: mock.MagicMock() for name in STAND_INS}
    path = [str(folder), *sys.path]
    with mock.patch.dict(sys.modules, stand_ins), mock.patch.object(sys, "path", path):
        return importlib.import_module("models"), importlib.import_module("train")


def train_flax_example(spec: dict[str, Any]) -> Steps:
    """The ImageNet example of flax: its model, step, optimizer; images are normalised."""
    import jax

    if spec["model"] not in ("resnet18", "resnet50", "resnet101"):
        raise Absent(f"has no {spec['model']}")
    if not spec.get("flax_example"):
        raise Absent("needs --flax_example")
    models, train = load_flax_example(Path(spec["flax_example"]))
    half = spec["dtype"] != "float32"
    recipe = types.SimpleNamespace(
        half_precision=half, momentum=MOMENTUM, warmup_epochs=0, num_epochs=1
    )
    net = getattr(models, spec["model"].replace("resnet", "ResNet"))
    model = train.create_model(model_cls=net, half_precision=half)
    schedule = train.create_learning_rate_fn(recipe, RATE, 100_000)
    key, one = jax.random.key(0), jax.devices()[:1]
    state = train.create_train_state(key, recipe, model, spec["image_size"], schedule)
    step = jax.pmap(
        partial(train.train_step, learning_rate_fn=schedule),
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=(None, 0),
        devices=one,
    )
    images, labels = random_images(spec)
    images = np.asarray(_normalize(images), np.float32)
    batch = jax.device_put({"image": images[None], "label": labels[None]}, one[0])
    return (*_chain(lambda state: step(state, batch), state), _jax_facts())


def _torch(spec: dict[str, Any]) -> Any:
    try:
        import torch
    except ImportError as error:
        raise Absent(str(error)) from error
    return torch


def _torch_net(spec: dict[str, Any]) -> tuple[Any, str]:
    torch = _torch(spec)
    from unittest import mock

    if spec["model"] == "cifar_resnet20":
        return _torch_cifar(torch, 3), "torch.nn"
    # torchvision's compiled operators, of no use here, do not load beside a torch for the
    # CPU alone, and registering their shapes would fail.
    with mock.patch.object(torch.library, "register_fake", lambda name: lambda f: f):
        try:
            from torchvision import models
        except ImportError as error:
            raise Absent(str(error)) from error
    if not hasattr(models, spec["model"]):
        raise Absent(f"torchvision has no {spec['model']}")
    return getattr(models, spec["model"])(), "torchvision"


def _torch_cifar(torch: Any, blocks: int) -> Any:
    """He et al. 2015, section 4.2, with shortcuts A."""
    nn, functional = torch.nn, torch.nn.functional

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int) -> None:
            super().__init__()
            self.strides, self.more = 1 + (inputs != width), width - inputs
            self.conv1 = nn.Conv2d(inputs, width, 3, self.strides, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
            y = self.norm2(self.conv2(y))
            if self.more:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
            return functional.relu(y + x, inplace=True)

    widths = [16] * blocks + [32] * blocks + [64] * blocks
    pairs = zip([16, *widths[:-1]], widths, strict=True)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        *(Block(inputs, width) for inputs, width in pairs),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _torch_setup(spec: dict[str, Any]) -> tuple[Any, ...]:
    torch = _torch(spec)
    net, source = _torch_net(spec)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device, memory_format=torch.channels_last)
    images, labels = random_images(spec)
    images = torch.from_numpy(np.asarray(_normalize(images), np.float32))
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(labels).long().to(device)
    half = getattr(torch, spec["dtype"])
    cast = partial(torch.autocast, device, half, enabled=spec["dtype"] != "float32")
    facts = {"torch": torch.__version__, "source": source, "device": device}
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if spec.get("compile"):
        net.compile()
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    return torch, net, images.to(device), labels, cast, finish, facts


def train_torch(spec: dict[str, Any]) -> Steps:
    """The net of torchvision under PyTorch, channels last, autocast below float32."""
    torch, net, images, labels, cast, finish, facts = _torch_setup(spec)
    optimizer = torch.optim.SGD(
        net.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    net.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with cast():
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return step, finish, facts


TRAIN: dict[str, Callable[[dict[str, Any]], Steps]] = {
    "resjax": train_resjax,
    "flax example": train_flax_example,
    "flax modules": train_flax_modules,
    "PyTorch": train_torch,
    "PyTorch compiled": lambda spec: train_torch({**spec, "compile": True}),
}
TASKS = {"train": TRAIN}


def main(spec: dict[str, Any]) -> None:
    """Serves a contender, or says that it is absent."""
    name = spec.get("base") or spec["contender"]
    try:
        parts = TASKS[spec["task"]][name](spec)
    except Absent as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    turns.serve(*parts)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
