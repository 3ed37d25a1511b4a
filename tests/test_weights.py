"""Weights go both ways between resjax and PyTorch, and what does not fit is named."""

import functools
import pickle
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file, save_file

import resjax
from resjax.config import UsageError
from resjax.weights import torch_name

NAME = "cifar_resnet20"  # small; its names are those of torchvision's basic blocks


@functools.cache
def torch_shapes(name, **options):
    model = resjax.create_model(name, **options)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
    return {key: array.shape for key, array in resjax.to_torch(zeros, name).items()}


@pytest.fixture(scope="module")
def state():
    """A state_dict with another number in every place."""
    shapes = torch_shapes(NAME)
    random = np.random.default_rng(0)
    return {
        key: np.zeros(shape, np.int64)
        if key.endswith("num_batches_tracked")
        else np.float32(random.uniform(0.1, 0.9, shape))
        for key, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(state, path)
    return path


def assert_same_state(found, wanted):
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)


# Names, layouts and shapes that torchvision and timm document in their sources.
@pytest.mark.parametrize(
    ("model", "ours", "theirs", "shape"),
    [
        ("resnet18", "stem/conv/kernel", "conv1.weight", (64, 3, 7, 7)),
        ("resnet18", "stem/norm/scale", "bn1.weight", (64,)),
        ("resnet18", "stage2/block1/conv1/kernel", "layer2.0.conv1.weight", None),
        ("resnet18", "stage1/block2/norm_out/bias", "layer1.1.bn2.bias", (64,)),
        ("resnet18", "head/kernel", "fc.weight", (1000, 512)),
        (
            "resnet50",
            "stage1/block1/shortcut_conv/kernel",
            "layer1.0.downsample.0.weight",
            (256, 64, 1, 1),
        ),
        (
            "resnet50",
            "stage1/block1/shortcut_norm/scale",
            "layer1.0.downsample.1.weight",
            (256,),
        ),
        ("resnet50", "stage4/block3/norm_out/scale", "layer4.2.bn3.weight", (2048,)),
        (
            "resnext50_32x4d",
            "stage1/block1/conv2/kernel",
            "layer1.0.conv2.weight",
            (128, 4, 3, 3),
        ),
        ("preact_resnet50", "stem/conv/kernel", "stem.conv.weight", (64, 3, 7, 7)),
        (
            "preact_resnet50",
            "stage1/block1/shortcut_conv/kernel",
            "stages.0.blocks.0.downsample.conv.weight",
            (256, 64, 1, 1),
        ),
        (
            "preact_resnet50",
            "stage3/block6/conv_out/kernel",
            "stages.2.blocks.5.conv3.weight",
            (1024, 256, 1, 1),
        ),
        ("preact_resnet50", "norm/scale", "norm.weight", (2048,)),
        ("preact_resnet50", "head/kernel", "head.fc.weight", (1000, 2048, 1, 1)),
    ],
)
def test_names_are_pytorchs(model, ours, theirs, shape):
    assert torch_name(f"params/{ours}", resjax.create_model(model)) == theirs
    if shape:
        assert torch_shapes(model)[theirs] == shape


def test_kernels_are_transposed_and_statistics_keep_their_place(state):
    variables = resjax.from_torch(state, NAME)
    params, stats = variables["params"], variables["batch_stats"]
    kernel = params["stage2"]["block1"]["conv1"]["kernel"]  # [3, 3, 16, 32]
    assert kernel[2, 1, 5, 30] == state["layer2.0.conv1.weight"][30, 5, 2, 1]
    assert params["head"]["kernel"][60, 7] == state["fc.weight"][7, 60]
    norm = stats["stage1"]["block3"]["norm_out"]
    np.testing.assert_array_equal(norm["mean"], state["layer1.2.bn2.running_mean"])
    np.testing.assert_array_equal(norm["var"], state["layer1.2.bn2.running_var"])


def test_there_and_back_is_bit_for_bit_the_same(state):
    assert_same_state(resjax.to_torch(resjax.from_torch(state, NAME), NAME), state)


def test_a_safetensors_file_is_bit_for_bit_its_arrays(state, weights, tmp_path):
    back = resjax.to_torch(resjax.from_torch(weights, NAME), NAME)
    save_file(back, tmp_path / "back.safetensors")
    assert_same_state(load_file(tmp_path / "back.safetensors"), state)


def test_bfloat16_becomes_the_same_numbers_in_float32(state, tmp_path):
    half = {
        key: array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array
        for key, array in state.items()
    }
    save_file(half, tmp_path / "half.safetensors")
    variables = resjax.from_torch(str(tmp_path / "half.safetensors"), NAME)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    wanted = {key: array.astype(state[key].dtype) for key, array in half.items()}
    assert_same_state(resjax.to_torch(variables, NAME), wanted)


def test_what_does_not_fit_is_listed(state):
    wrong = {**state, "conv1.weight": np.zeros((16, 3, 7, 7)), "fc2.bias": np.zeros(4)}
    del wrong["layer1.0.bn1.running_var"]
    with pytest.raises(UsageError) as error:
        resjax.from_torch(wrong, NAME)
    start, *differences = re.split(r"(?:: |; )(?=[-+] )", str(error.value))
    assert NAME in start
    assert sorted(differences) == [
        "+ conv1.weight [16, 3, 7, 7]",
        "+ fc2.bias [4]",
        "- conv1.weight [16, 3, 3, 3]",
        "- layer1.0.bn1.running_var [16]",
    ]


def test_weights_of_another_net_are_refused_briefly(state):
    prefixed = {f"module.{name}": array for name, array in state.items()}
    for model, weights in (("resnet50", state), (NAME, prefixed)):
        with pytest.raises(UsageError, match=r"; - \d+ more; \+ .*; \+ \d+ more$") as error:
            resjax.from_torch(weights, model)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_inside_a_checkpoint_are_asked_for(key, state):
    with pytest.raises(UsageError, match=f"{key!r} is a dict, not an array.*give those"):
        resjax.from_torch({key: state, "epoch": 3}, NAME)


def test_variables_of_another_net_are_refused(state):
    variables = resjax.from_torch(state, NAME)
    with pytest.raises(UsageError, match=r"- \S+/stage1/block4/norm1/mean \[16\]"):
        resjax.to_torch(variables, "cifar_resnet32")


def test_a_preactivation_net_of_basic_blocks_is_said_to_be_another():
    with pytest.raises(UsageError, match="resnetv2"):
        resjax.from_torch({}, "preact_resnet18")


def test_the_head_has_as_many_classes_as_the_weights(state):
    state = {**state, "fc.weight": np.ones((7, 64)), "fc.bias": np.ones(7)}
    head = resjax.from_torch(state, NAME)["params"]["head"]
    assert head["kernel"].shape == (64, 7)
    with pytest.raises(UsageError, match=r"\+ fc.bias \[7\]"):
        resjax.from_torch(state, NAME, num_classes=10)


@pytest.mark.parametrize("model", [NAME, "preact_resnet50"])
def test_the_head_can_be_left_out(model):
    state = {key: np.zeros(shape) for key, shape in torch_shapes(model).items()}
    variables = resjax.from_torch(state, model, num_classes=0)
    assert "head" not in variables["params"]
    heads = {key for key in state if key.rpartition(".")[0].endswith("fc")}
    body = {key: array for key, array in state.items() if key not in heads}
    assert set(resjax.to_torch(variables, model)) == set(body)
    again = resjax.from_torch(body, model)  # weights that never had one
    assert jax.tree.structure(again) == jax.tree.structure(variables)


def test_an_option_of_the_model_is_an_option_of_its_weights():
    state = {k: np.zeros(s) for k, s in torch_shapes(NAME).items()}
    with pytest.raises(UsageError, match=r"- layer2.0.downsample.0.weight"):
        resjax.from_torch(state, NAME, shortcut="B")


# --- files --------------------------------------------------------------------------


BAD_FILES = {
    "missing.safetensors": (None, "there is no file"),
    "cut.safetensors": (lambda data: data[:-100], "cannot be read"),
    "empty.safetensors": (lambda data: b"", "cannot be read"),
    "words.safetensors": (lambda data: b"no weights " * 99, "cannot be read"),
    "model.onnx": (lambda data: data, "neither .safetensors nor .pth"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_in_one_line(name, weights, tmp_path):
    make, message = BAD_FILES[name]
    if make:
        (tmp_path / name).write_bytes(make(weights.read_bytes()))
    with pytest.raises(UsageError, match=message) as error:
        resjax.from_torch(tmp_path / name, NAME)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pth_file_without_pytorch_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch fails
    (tmp_path / "model.pth").write_bytes(b"any")
    with pytest.raises(UsageError, match=r"not installed.*safetensors") as error:
        resjax.from_torch(tmp_path / "model.pth", NAME)
    assert "\n" not in str(error.value)


# --- beside PyTorch -----------------------------------------------------------------

PEERS = {
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{n: n for n in ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")},
    "wide_resnet50_2": "wide_resnet50_2",
    **{f"preact_resnet{depth}": f"resnetv2_{depth}" for depth in (50, 101, 152)},
}


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_torch_golden

    return make_torch_golden


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_pytorchs_state_goes_there_and_back_and_loads(name, peers):
    import torch

    library = "timm" if PEERS[name].startswith("resnetv2") else "torchvision"
    net = peers.create_net(library, PEERS[name], 10)
    state = {key: tensor.numpy() for key, tensor in net.state_dict().items()}
    back = resjax.to_torch(resjax.from_torch(state, name), name)
    assert_same_state(back, state)
    tensors = {key: torch.from_numpy(array) for key, array in back.items()}
    net.load_state_dict(tensors, strict=True)


@pytest.mark.peers
def test_a_pth_file_is_read_as_weights(state, tmp_path):
    import torch

    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    torch.save(tensors, tmp_path / "model.pth")
    back = resjax.to_torch(resjax.from_torch(tmp_path / "model.pth", NAME), NAME)
    assert_same_state(back, state)


@pytest.mark.peers
def test_tensors_are_taken_as_they_are(state):
    import torch

    tensors = {
        key: torch.nn.Parameter(torch.from_numpy(array).bfloat16())
        for key, array in state.items()
        if array.dtype == np.float32
    }
    params = resjax.from_torch(tensors, NAME)["params"]
    expected = state["fc.bias"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["head"]["bias"], expected)


@pytest.mark.peers
def test_a_pth_file_of_a_whole_checkpoint_is_refused_in_one_line(state, tmp_path):
    import torch

    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    torch.save({"model": tensors, "epoch": 3}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="'model' is a dict, not an array"):
        resjax.from_torch(tmp_path / "model.pth", NAME)


class Code:
    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.mark.peers
def test_a_pth_file_with_code_is_refused_and_not_run(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Code()}, "new.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"conv1.weight": Code()}))
    for name in ("new.pth", "old.pth"):
        with pytest.raises(UsageError, match="cannot be read") as error:
            resjax.from_torch(name, NAME)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
