"""What is timed: resjax and the peers a user would pick instead, on the same work.

  python -m benchmarks.contenders JSON    # a worker of turns.py

Each takes the same number of random images of the same size and is its own code's way to
train on them or to predict. Imports only what it times.
"""

import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import resjax
from benchmarks import turns
from benchmarks.turns import Absent
from resjax import optim, parallel, steps
from resjax.models import ops, resnet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4
STAND_INS = ("clu", "input_pipeline", "ml_collections", "tensorflow", "tensorflow_datasets")
Run = tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], Callable[[], int] | None]


def random_images(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, S, S, 3] uint8 and labels [B] int32."""
    random, size = np.random.RandomState(0), spec["image_size"]
    images = random.randint(0, 256, (spec["batch_size"], size, size, 3), np.uint8)
    return images, random.randint(0, 10, spec["batch_size"]).astype(np.int32)


def _normalize(images: Any) -> Any:
    shift, scale = np.array(MEAN, np.float32), np.array(STD, np.float32)
    return (images / np.float32(255) - shift) / scale


def _peak(device: Any) -> Callable[[], int] | None:
    """What tells the peak of a device's memory, if it can."""
    if not (device.memory_stats() or {}).get("peak_bytes_in_use"):
        return None
    return lambda: device.memory_stats()["peak_bytes_in_use"]


def _run_jax(step: Callable[[Any], Any], state: Any, facts: dict[str, Any]) -> Run:
    """Of a function from a state to the next, and what is to be waited for with it."""
    held = [state, None]

    def start() -> None:
        held[:] = step(held[0])

    device, count = jax.devices()[0], jax.device_count()
    if count > 1:
        raise Absent(f"is timed on one device, and there are {count}")
    facts = {"device": device.device_kind, "platform": device.platform, **facts}
    return start, lambda: jax.block_until_ready(held), facts, _peak(device)


def _seconds(run: Callable[[], Any], times: int = 5) -> float:
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def measure_floor(spec: dict[str, Any], model: Any) -> dict[str, float]:
    """The least that the convolutions of a step can take on this machine.

    All their multiply-adds at the rate of a large matrix product, or all bytes that each of
    them must read and write at the rate of a copy, whichever takes longer: forward its
    input and output; backward both gradients, the input and the output's gradient twice.
    """
    cpu = jax.default_backend() == "cpu"
    side, dtype = (4096 if cpu else 16384), jnp.dtype(spec["dtype"])
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    multiply = jax.jit(lambda x: x @ x)
    gflops = 2 * side**3 / _seconds(lambda: multiply(matrix)) / 1e9
    many = jnp.ones((2**26 if cpu else 2**29,), dtype)
    copy = jax.jit(lambda x: x + 1)
    gigabytes_a_second = 2 * many.nbytes / _seconds(lambda: copy(many)) / 1e9
    passes = 3 if spec["task"] == "train" else 1
    batch = spec["batch_size"]
    gflop = 2 * passes * batch * resjax.count_macs(model, spec["image_size"]) / 1e9
    read, written = _conv_values(model, spec["image_size"])
    values = 3 * read + 3 * written if passes == 3 else read + written
    gigabytes = batch * values * dtype.itemsize / 1e9
    times = {
        "product_seconds": gflop / gflops,
        "copy_seconds": gigabytes / gigabytes_a_second,
    }
    return {
        "seconds": max(times.values()),
        **times,
        "gflop": gflop,
        "gflops": gflops,
        "gigabytes": gigabytes,
        "gigabytes_a_second": gigabytes_a_second,
    }


def _floor(spec: dict[str, Any], model: Any) -> dict[str, Any]:
    return {"floor": measure_floor(spec, model)} if spec.get("floor") else {}


def _conv_values(model: Any, image_size: int) -> tuple[int, int]:
    """How many numbers the convolutions read and write forward, for one image."""
    read = written = 0

    def count(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal read, written
        out = call(*args, **kwargs)
        if isinstance(context.module, ops.Conv) and context.method_name == "__call__":
            read, written = read + args[0].size, written + out.size
        return out

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(count):
        jax.eval_shape(model.init, jax.random.key(0), images)
    return read, written


def _resjax_model(spec: dict[str, Any], **options: Any) -> Any:
    group = spec["virtual_batch_size"]
    norm = partial(resjax.BatchNorm, virtual_batch_size=group)
    dtype = jnp.dtype(spec["dtype"])
    return resjax.create_model(spec["model"], dtype=dtype, norm=norm, **options)


def _init(model: Any) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def _train(spec: dict[str, Any], model: Any, facts: dict[str, Any]) -> Run:
    """The step of resjax for a model, on one device, its state donated."""
    tx = optim.sgd(lambda step: jnp.float32(RATE), MOMENTUM, True, DECAY)
    batch_size = spec["batch_size"]
    step: Any = steps.make_train_step(
        model, tx, lambda batch: _normalize(batch["image"]), batch_size
    )
    per_call = spec.get("steps_per_call", 1)
    if per_call > 1:
        unroll = jax.default_backend() == "cpu"
        step = steps.make_train_steps(step, lambda data, *_, **__: data, per_call, unroll)
    run_step = parallel.run_on_devices(step, "pmap", donate_state=True)
    images, labels = random_images(spec)
    position = np.arange(batch_size, dtype=np.int32)
    batch = parallel.shard({"image": images, "label": labels, "position": position})
    state = parallel.replicate(steps.create_state(_init(model), tx))
    facts = {**facts, "jax": jax.__version__, "steps_per_call": per_call}
    return _run_jax(lambda state: run_step(state, batch), state, facts)


def train_resjax(spec: dict[str, Any], **options: Any) -> Run:
    """The step that train.py runs: uint8 images in, its state donated."""
    model = _resjax_model(spec, **options)
    return _train(spec, model, _floor(spec, model))


class FlaxConv(nn.Module):
    """The arguments of `ops.Conv` for `flax.linen.Conv`."""

    features: int
    kernel_size: int = 3
    strides: int = 1
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H / strides, W / strides, features]."""
        pad = (self.kernel_size - 1) // 2
        return nn.Conv(
            self.features,
            (self.kernel_size, self.kernel_size),
            self.strides,
            [(pad, pad), (pad, pad)],
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
        )(x)


class FlaxNorm(nn.Module):
    """The arguments of `norm.BatchNorm` for `flax.linen.BatchNorm`."""

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, ..., C] -> the same."""
        return nn.BatchNorm(not train, momentum=0.9, dtype=x.dtype)(x)


def _flax_model(spec: dict[str, Any]) -> Any:
    """The net of resjax's table of the modules of flax.linen."""
    window = {"window_shape": (3, 3), "strides": (2, 2), "padding": [(1, 1), (1, 1)]}
    vars(resnet)["max_pool"] = partial(nn.max_pool, **window)  # of this process alone
    return _resjax_model(spec).clone(conv=FlaxConv, norm=FlaxNorm)


def train_flax_modules(spec: dict[str, Any]) -> Run:
    """The same net of flax.linen's Conv and BatchNorm in the step of resjax."""
    return _train(spec, _flax_model(spec), {})


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


def train_flax_example(spec: dict[str, Any]) -> Run:
    """The ImageNet example of flax: its model, step, optimizer; images are normalised."""
    if not spec["flax_example"]:
        raise Absent("--flax_example=DIR says where it is")
    models, train = load_flax_example(Path(spec["flax_example"]))
    net = getattr(models, spec["model"].replace("resnet", "ResNet"), None)
    if net is None:
        raise Absent(f"it has no {spec['model']}")
    half = spec["dtype"] != "float32"
    recipe = types.SimpleNamespace(
        half_precision=half, momentum=MOMENTUM, warmup_epochs=0, num_epochs=1
    )
    model = train.create_model(model_cls=net, half_precision=half)
    schedule = train.create_learning_rate_fn(recipe, RATE, 100_000)
    key, size = jax.random.key(0), spec["image_size"]
    state = train.create_train_state(key, recipe, model, size, schedule)
    step = jax.pmap(
        partial(train.train_step, learning_rate_fn=schedule),
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=(None, 0),
        devices=jax.devices()[:1],
    )
    images, labels = random_images(spec)
    rows = {"image": _normalize(images), "label": labels}
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], rows)
    return _run_jax(lambda state: step(state, batch), state, {"jax": jax.__version__})


def predict_resjax(spec: dict[str, Any], fold: bool = False) -> Run:
    """Logits of uint8 images, as eval.py computes them."""
    model = _resjax_model(spec)
    return _predict(spec, model, fold, _floor(spec, model))


def predict_flax_modules(spec: dict[str, Any]) -> Run:
    """The same net of flax.linen's Conv and BatchNorm."""
    return _predict(spec, _flax_model(spec), False, {})


def _predict(spec: dict[str, Any], model: Any, fold: bool, facts: dict[str, Any]) -> Run:
    variables = _init(model)
    if fold:
        model, variables = resjax.fold_batch_norm(model, variables)
    images = jnp.asarray(random_images(spec)[0])
    logits = jax.jit(lambda variables, x: model.apply(variables, _normalize(x)))
    facts = {**facts, "jax": jax.__version__}
    return _run_jax(lambda v: (v, logits(v, images)), variables, facts)


def _import_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise Absent(str(error)) from error


def _torch_net(torch: Any, name: str) -> tuple[Any, str]:
    """A net and the library that it is of: torchvision, timm, or what stands below."""
    if name == "cifar_resnet20":
        return _torch_cifar(torch), "torch.nn"
    # torchvision's compiled operators, of no use here, do not load beside a torch for the
    # CPU alone, and registering their shapes would fail.
    with mock.patch.object(torch.library, "register_fake", lambda name: lambda f: f):
        try:
            models: Any = importlib.import_module("torchvision.models")
        except ImportError as error:
            raise Absent(str(error)) from error
    if hasattr(models, name):
        return getattr(models, name)(), "torchvision"
    try:
        return importlib.import_module("timm").create_model(name), "timm"
    except (ImportError, RuntimeError) as error:
        raise Absent(f"torchvision and timm: {error}") from error


def _torch_cifar(torch: Any, blocks: int = 3) -> Any:
    """He et al. 2015, section 4.2, with shortcuts A."""
    layers, functional = torch.nn, torch.nn.functional

    class Block(layers.Module):  # type: ignore[name-defined]
        def __init__(self, inputs: int, width: int) -> None:
            super().__init__()
            self.strides, self.more = 1 + (inputs != width), width - inputs
            self.conv1 = layers.Conv2d(inputs, width, 3, self.strides, 1, bias=False)
            self.norm1 = layers.BatchNorm2d(width)
            self.conv2 = layers.Conv2d(width, width, 3, 1, 1, bias=False)
            self.norm2 = layers.BatchNorm2d(width)

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
            y = self.norm2(self.conv2(y))
            if self.more:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))
            return functional.relu(y + x, inplace=True)

    widths = [16] * blocks + [32] * blocks + [64] * blocks
    pairs = zip([16, *widths[:-1]], widths, strict=True)
    return layers.Sequential(
        layers.Conv2d(3, 16, 3, 1, 1, bias=False),
        layers.BatchNorm2d(16),
        layers.ReLU(inplace=True),
        *(Block(inputs, width) for inputs, width in pairs),
        layers.AdaptiveAvgPool2d(1),
        layers.Flatten(),
        layers.Linear(64, 10),
    )


def _torch_parts(spec: dict[str, Any]) -> tuple[Any, ...]:
    torch = _import_torch()
    net, source = _torch_net(torch, spec["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = net.to(device, memory_format=torch.channels_last)
    images, labels = random_images(spec)
    images = torch.from_numpy(_normalize(images)).permute(0, 3, 1, 2).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    half = spec["dtype"] != "float32"
    cast = partial(torch.autocast, device, getattr(torch, spec["dtype"]), enabled=half)
    facts = {"torch": torch.__version__, "source": source, "platform": device}
    facts["threads"] = torch.get_num_threads()
    finish, peak = (lambda: None), None
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        torch.backends.cudnn.benchmark = True
        finish, peak = torch.cuda.synchronize, torch.cuda.max_memory_allocated
    labels = torch.from_numpy(labels).long().to(device)
    return torch, net, images, labels, cast, facts, finish, peak


def _compile(torch: Any, net: Any) -> None:
    if not torch.cuda.is_available():
        raise Absent("is timed on a GPU")
    net.compile()


def train_torch(spec: dict[str, Any], compiled: bool = False) -> Run:
    """Channels last, autocast below float32; images are normalised and float32."""
    torch, net, images, labels, cast, facts, finish, peak = _torch_parts(spec)
    if compiled:
        _compile(torch, net)
    optimizer = torch.optim.SGD(
        net.parameters(), RATE, MOMENTUM, weight_decay=DECAY, nesterov=True
    )
    net.train()

    def step() -> None:
        optimizer.zero_grad()
        with cast():
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return step, finish, facts, peak


def predict_torch(spec: dict[str, Any], fold: bool = False, compiled: bool = False) -> Run:
    """Evaluation mode; `fold` fuses convolutions with norms by torch.fx."""
    torch, net, images, _, cast, facts, finish, peak = _torch_parts(spec)
    net.eval()
    if fold:
        fuse: Any = importlib.import_module("torch.fx.experimental.optimization").fuse
        net = fuse(net).to(memory_format=torch.channels_last)
    if compiled:
        _compile(torch, net)

    def step() -> None:
        with torch.inference_mode(), cast():
            net(images)

    return step, finish, facts, peak


Contender = Callable[[dict[str, Any]], Run]
TRAIN: dict[str, Contender] = {
    "resjax": train_resjax,
    "flax example": train_flax_example,
    "flax modules": train_flax_modules,
    "PyTorch": train_torch,
    "PyTorch compiled": partial(train_torch, compiled=True),
}
REMAT: dict[str, Contender] = {
    "resjax remat=convs": partial(train_resjax, remat="convs"),
    "resjax remat=blocks": partial(train_resjax, remat="blocks"),
}
PREDICT: dict[str, Contender] = {
    "resjax folded": partial(predict_resjax, fold=True),
    "resjax": predict_resjax,
    "flax modules": predict_flax_modules,
    "PyTorch": predict_torch,
    "PyTorch folded": partial(predict_torch, fold=True),
    "PyTorch compiled": partial(predict_torch, fold=True, compiled=True),
}
TASKS = {"train": TRAIN | REMAT, "predict": PREDICT}


def main(spec: dict[str, Any]) -> None:
    """Serves a contender, or says that it is absent."""
    try:
        run = TASKS[spec["task"]][spec["contender"]](spec)
    except Absent as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return
    turns.serve(*run)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
