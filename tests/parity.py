"""What both sides of the parity with PyTorch start from: weights, images, a digest.

Numpy alone, so that the same numbers are made with and without PyTorch.
"""

import math
import re
import zlib

import numpy as np

# Ours -> the library that has the same net, and its name there.
MODELS = {
    "resnet18": ("torchvision", "resnet18"),
    "resnet34": ("torchvision", "resnet34"),
    "resnet50": ("torchvision", "resnet50"),
    "resnet101": ("torchvision", "resnet101"),
    "resnet152": ("torchvision", "resnet152"),
    "resnext50_32x4d": ("torchvision", "resnext50_32x4d"),
    "wide_resnet50_2": ("torchvision", "wide_resnet50_2"),
    "preact_resnet50": ("timm", "resnetv2_50"),
}
NUM_CLASSES = 100  # not 1000: the files stay small
SIZES = (224, 193)  # of images; the odd one tells where layers pad
EVAL_BATCH = 2
TRAIN_SIZE, TRAIN_BATCH = 193, 2

CURVES = ("resnet18", "resnext50_32x4d")
CURVE = {"steps": 50, "size": 32, "batch": 16, "num_classes": 10}
# Training is chaotic: from PyTorch's own initial weights its float32 and float64 losses
# part by 1 to 10 % within 50 steps. Large kernels, which batch norm makes slow to turn,
# and small features keep rounding errors from growing.
CURVE_WEIGHTS = {"gain": 8.0, "norm": 0.02, "head": 0.1}
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
RATE = 0.01
MOMENTUM = 0.1  # of PyTorch's running statistics


def _random(seed, name):
    # RandomState, not default_rng: numpy promises that its stream never changes.
    return np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))


def weights(shapes, bias=2.0, gain=0.2, norm=1.0, head=1.0, seed=0):
    """{PyTorch's name: float32 array} for {name: shape}; each from its name alone.

    Float32 cannot tell on which side of zero a value of 1e-7 lies, and one ReLU that
    differs moves a gradient by 1e-3. So norms have a `bias` of twice their scale: few
    values come near zero, and still 2 % lie below. Not the stem's: it would pass all, and
    the gradient of its bias be zero. The last layer of a branch is scaled by a quarter,
    for nets of 50 blocks, and kernels suit what enters them.
    """
    last = 3 if any(".conv3." in name for name in shapes) else 2
    end = re.compile(rf"(layer.*\.bn{last}|blocks.*\.conv{last})\.weight")

    def scale(name):
        values = norm * _random(seed, name).uniform(0.5, 1.5, shapes[name])
        return values / 4 if end.fullmatch(name) else values

    arrays = {}
    for name, shape in shapes.items():
        random = _random(seed, name)
        weight = name.replace(".bias", ".weight")
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            array = random.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean") or len(shapes.get(weight, ())) != 1:
            fan_in = math.prod(shape[1:])  # 1 for a vector
            array = random.standard_normal(shape) * math.sqrt(gain / fan_in)
            array = array / 4 if end.fullmatch(name) else array
            array = array * head if "fc." in name else array
        elif name == weight:
            array = scale(name)
        elif name == "bn1.bias":
            array = 0.1 * random.standard_normal(shape)
        else:
            array = scale(weight) * (bias / 2 if end.fullmatch(weight) else bias)
        arrays[name] = np.float32(array)
    return arrays


def images(size, batch, seed=0):
    """[batch, size, size, 3] float32: noise on a colour of each image's own."""
    random = _random(seed, f"images {size}")
    colour = random.standard_normal((batch, 1, 1, 3))
    return np.float32(colour + random.standard_normal((batch, size, size, 3)))


def labels(batch, num_classes=NUM_CLASSES, seed=0):
    """[batch] int64."""
    return _random(seed, "labels").randint(num_classes, size=batch)


def curve_batches():
    """(images, labels) of each step of a loss curve; a class has a colour to learn."""
    batch, classes = CURVE["batch"], CURVE["num_classes"]
    colours = np.float32(_random(0, "colours").standard_normal((classes, 1, 1, 3)))
    for step in range(CURVE["steps"]):
        y = labels(batch, classes, seed=step)
        yield np.float32(0.3) * images(CURVE["size"], batch, seed=step) + colours[y], y


def digest(name, array):
    """[norm of an array, its product with a random vector of its name's own]."""
    array = np.asarray(array, np.float64).ravel()
    vector = _random(1, name).standard_normal(array.size)
    return [float(np.sqrt(array @ array)), float(array @ vector)]


def golden_path(folder, name):
    """The file of a model, or of the loss curve of one ("resnet18_curve")."""
    return folder / f"torch_{name}.json"
