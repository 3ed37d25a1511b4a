"""Makes the values of PyTorch that tests/test_parity.py compares resjax with.

python tests/golden/make_torch_golden.py          # writes tests/golden/torch_*.json
python tests/golden/make_torch_golden.py --check  # compares them with those committed

Needs requirements-peers.txt. PyTorch computes in float64, so that the values are exact to
all digits written and the same on every machine; the weights and images are float32.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import parity  # noqa: E402

TOLERANCE = 1e-6


def declare_torchvision_operators():
    """Lets torchvision's CUDA build be imported beside PyTorch's CPU build.

    Its compiled operators, of no use to these nets, cannot be loaded there, and its import
    fails unless their names are known.
    """
    package = Path(importlib.util.find_spec("torchvision").origin).parent
    source = (package / "_meta_registrations.py").read_text()
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r"torchvision(?:::|\.)(\w+)|meta\(\"(\w+)", source))):
        name = "".join(name)
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}() -> ()")
    return library  # it must outlive the import


def create_net(library, theirs, num_classes=parity.NUM_CLASSES):
    """The net of that name in torchvision or timm."""
    _operators = declare_torchvision_operators()
    if library == "timm":
        import timm

        return timm.create_model(theirs, num_classes=num_classes)
    import torchvision

    return getattr(torchvision.models, theirs)(num_classes=num_classes)


def load(name, num_classes=parity.NUM_CLASSES, dtype=torch.float64, **options):
    """The same with the weights of `parity.weights(..., **options)`."""
    net = create_net(*parity.MODELS[name], num_classes)
    shapes = {key: tuple(array.shape) for key, array in net.state_dict().items()}
    arrays = parity.weights(shapes, **options)
    state = {key: torch.from_numpy(array) for key, array in arrays.items()}
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    assert set(net.load_state_dict(state, strict=False).missing_keys) <= counters
    return net.to(dtype)


def tensor(images, dtype=torch.float64):
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(images).to(dtype).permute(0, 3, 1, 2).contiguous()


def values(name, dtype=torch.float64):
    """Logits, and the gradient and statistics of one training step, of a model."""
    net = load(name, dtype=dtype).eval()
    logits = {}
    for size in parity.SIZES:
        with torch.no_grad():
            images = tensor(parity.images(size, parity.EVAL_BATCH), dtype)
            logits[str(size)] = net(images).numpy()
    net.train()
    images = tensor(parity.images(parity.TRAIN_SIZE, parity.TRAIN_BATCH), dtype)
    loss = cross_entropy(net(images), torch.from_numpy(parity.labels(parity.TRAIN_BATCH)))
    loss.backward()
    digests = {
        "gradients": {key: p.grad.numpy() for key, p in net.named_parameters()},
        "statistics": {k: b.numpy() for k, b in net.named_buffers() if "running" in k},
    }
    return {
        "logits": {size: array.tolist() for size, array in logits.items()},
        "loss": loss.item(),
        **{
            kind: {key: parity.digest(key, array) for key, array in arrays.items()}
            for kind, arrays in digests.items()
        },
    }


def curve(name, dtype=torch.float64):
    """The loss before each update of SGD."""
    classes = parity.CURVE["num_classes"]
    net = load(name, classes, dtype, **parity.CURVE_WEIGHTS).train()
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1 or p is net.fc.bias]},
        {
            "params": [p for p in net.parameters() if p.ndim == 1 and p is not net.fc.bias],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.SGD(groups, lr=parity.RATE, **parity.SGD)
    losses = []
    for images, labels in parity.curve_batches():
        loss = cross_entropy(net(tensor(images, dtype)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses}


def make(name):
    """The contents of one file, by its name: "resnet18", "resnet18_curve"."""
    return curve(name.removesuffix("_curve")) if name.endswith("_curve") else values(name)


NAMES = [*parity.MODELS, *(f"{name}_curve" for name in parity.CURVES)]


def dumps(tree):
    """JSON with nine digits, a line an entry."""
    tree = json.loads(
        json.dumps(tree), parse_float=lambda text: float(f"{float(text):.9g}")
    )
    text = json.dumps(tree, separators=(",", ":"))
    return re.sub(r'(?<=[{,])"', '\n"', text) + "\n"


def differences(made, stored):
    """What differs by more than `TOLERANCE`, relative to the largest value of its list."""
    if isinstance(stored, dict):
        if set(made) != set(stored):
            return [f"names: {sorted(set(made) ^ set(stored))}"]
        return [f"{k}: {d}" for k in stored for d in differences(made[k], stored[k])]
    made, stored = np.array(made), np.array(stored)
    error = np.abs(made - stored).max() / np.abs(stored).max()
    return [] if error <= TOLERANCE else [f"differ by {error:.1e}"]


def main(args):
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {NAMES}")
    flags = parser.parse_args(args)
    failed = False
    for name in flags.names or NAMES:
        made, path = make(name), parity.golden_path(HERE, name)
        if not flags.check:
            path.write_text(dumps(made))
            continue
        wrong = differences(made, json.loads(path.read_text()))
        failed |= bool(wrong)
        print(f"{name}: {'; '.join(wrong[:5]) or 'the same'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
