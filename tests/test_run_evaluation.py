"""10-crop, dense and ensemble evaluation of whole runs, against loops over the examples."""

import csv
import dataclasses
import json
import shutil
import sys
from functools import partial

import cv2
import jax
import numpy as np
import pytest
from conftest import ROOT, random_variables
from tiny_tfds import SIZES, encode, pixels, write_imagenet

import resjax
from resjax import build, convert, loop, parallel, run_evaluation
from resjax.config import Config, DataConfig, ModelKwargs, UsageError
from resjax.data.decode import decode

N, CLASSES, SIZE, TRAIN = 11, 5, 28, 24  # the test split begins with image 24
SHAPE = ModelKwargs(stage_sizes=(1, 1), width=8)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder, num_train=TRAIN, num_validation=N, num_classes=CLASSES)
    return folder


def config_of(folder, **fields):
    data = DataConfig("imagenet2012", dir=str(folder), image_size=SIZE)
    own = {"model": "cifar_resnet20", "model_kwargs": SHAPE, "num_classes": CLASSES}
    return Config(**{**own, "data": data, "batch_size": 8, **fields})


@pytest.fixture(scope="module")
def workdirs(data_folder, tmp_path_factory):
    """Two runs of one data set: a CIFAR net, and one that is normalised first."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in (("a", "cifar_resnet20"), ("b", "cifar_preact_resnet110")):
        config = config_of(data_folder, model=model)
        variables = random_variables(build.build_model(config))
        head = variables["params"]["head"]
        head["kernel"] = head["kernel"] / np.abs(head["kernel"]).max()
        convert.write_checkpoint(folder / name, variables, config)
    return {name: folder / name for name in ("a", "b")}


@pytest.fixture
def on_devices(monkeypatch):
    def limit(count):
        devices = jax.devices()[:count]
        monkeypatch.setattr(jax, "devices", lambda *args: devices)
        monkeypatch.setattr(jax, "device_count", lambda: count)
        monkeypatch.setattr(jax, "local_device_count", lambda: count)

    return limit


# --- the same, written out --------------------------------------------------------------


def decoded_images():
    """The test split as decoded, and its labels."""
    numbers = range(TRAIN, TRAIN + N)
    files = [encode(pixels(i, *SIZES[i % len(SIZES)]), ".jpg") for i in numbers]
    return [decode(file) for file in files], np.array([i % CLASSES for i in numbers])


def scaled(image, height, width):
    shrinks = height * width < image.shape[0] * image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=method)


def normalized(image):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return np.float32((image / 255.0 - mean) / std)


def crops_of(image, count, size=SIZE):
    """The middle, or ten crops, of an image whose shorter side is size * 256 / 224."""
    scale = size * 256 / 224 / min(image.shape[:2])
    height, width = (round(scale * n) for n in image.shape[:2])
    image = scaled(image, height, width)
    bottom, right = height - size, width - size
    places = [(bottom // 2, right // 2)]
    if count == 10:
        places += [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    crops = [image[y : y + size, x : x + size] for y, x in places]
    if count == 10:
        crops += [crop[:, ::-1] for crop in crops]
    return np.stack([normalized(crop) for crop in crops])


def whole_of(image, scale, stride):
    height, width = image.shape[:2]
    steps = scale * max(height, width) / min(height, width) / stride
    longer = int(steps + 0.5) * stride
    sides = (longer, scale) if height > width else (scale, longer)
    return normalized(scaled(image, *sides))[None]


def softmax(logits):
    powers = np.exp(np.float64(logits))
    return powers / powers.sum(axis=-1, keepdims=True)


def windows_of(last_map, side):
    """The means over all windows of a map [h, w, D]."""
    rows, columns = (n - side + 1 for n in last_map.shape[:2])
    return np.stack(
        [
            np.float64(last_map)[y : y + side, x : x + side].mean(axis=(0, 1))
            for y in range(rows)
            for x in range(columns)
        ]
    )


def written_out(workdir, crops=1, scales=()):
    """The probabilities of each example, one after the other, [N, K]."""
    run = resjax.restore(workdir)
    forward = jax.jit(partial(run.model.apply, return_stages=True))
    head = run.variables["params"]["head"]
    probabilities = []
    for image in decoded_images()[0]:
        each = []
        for scale in scales:
            _, stages = forward(run.variables, whole_of(image, scale, stride=2))
            means = windows_of(stages["stage2"][0], SIZE // 2)
            scores = means @ np.float64(head["kernel"]) + np.float64(head["bias"])
            each.append(softmax(scores.mean(axis=0)))
        if not scales:
            logits, _ = forward(run.variables, crops_of(image, crops))
            each += list(softmax(logits))
        probabilities.append(np.mean(each, axis=0))
    return np.array(probabilities)


def numbers_of(probabilities):
    labels = decoded_images()[1]
    of_label = probabilities[np.arange(N), labels]
    return {
        "top1": 100 * (probabilities.argmax(axis=1) == labels).mean(),
        "top5": 100.0,  # of five classes
        "loss": -np.log(of_label).mean(),
        "num_examples": N,
    }


def assert_reports(result, expected):
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name


# --- protocols --------------------------------------------------------------------------

# A row: workdirs, arguments, and what the file's name has in addition.
PROTOCOLS = {
    "plain": ("a", {}, ""),
    "crops": ("a", {"crops": 10}, "_crops10"),
    "scales": ("a", {"scales": (28, 40)}, "_scales28-40"),
    "ensemble": ("ab", {}, "_with_b-0"),
    "ensemble of crops": ("ab", {"crops": 10}, "_crops10_with_b-0"),
}


@pytest.fixture(scope="module")
def expected(workdirs):
    """The numbers of a protocol, written out."""
    return {
        name: numbers_of(
            np.mean([written_out(workdirs[n], **options) for n in members], axis=0)
        )
        for name, (members, options, _) in PROTOCOLS.items()
    }


@pytest.fixture
def evaluate(workdirs, tmp_path):
    """evaluate("ab", crops=10) -> the result, in copies of the workdirs in `tmp_path`."""

    def run(members, **options):
        for name in members:
            shutil.copytree(workdirs[name], tmp_path / name, dirs_exist_ok=True)
        return run_evaluation.evaluate([tmp_path / name for name in members], **options)

    return run


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize(
    ("num_devices", "batch_size"),
    [
        pytest.param(1, 3, marks=pytest.mark.slow),
        pytest.param(2, 8, marks=pytest.mark.slow),
        (4, 50),
    ],
)
def test_each_example_counts_once_for_any_minibatch_and_devices(
    name, num_devices, batch_size, on_devices, evaluate, expected, tmp_path
):
    on_devices(num_devices)
    members, options, suffix = PROTOCOLS[name]
    result = evaluate(members, batch_size=batch_size, **options)
    assert_reports(result, expected[name])
    (path,) = tmp_path.rglob("eval_*.json")
    assert path == tmp_path / "a" / f"eval_test_0{suffix}.json"
    assert json.loads(path.read_text()) == result
    assert result.get("crops") == options.get("crops")
    assert result.get("scales", []) == list(options.get("scales", []))


def test_an_ensemble_says_what_each_member_is_worth(evaluate, workdirs, tmp_path):
    result = evaluate("ba", batch_size=4)
    assert result["model"] == "cifar_preact_resnet110 + cifar_resnet20"
    for name, member in zip("ba", result["members"], strict=True):
        alone = numbers_of(written_out(workdirs[name]))["top1"]
        assert member["top1"] == pytest.approx(alone)
        assert (member["workdir"], member["step"]) == (str(tmp_path / name), 0)
    (path,) = tmp_path.rglob("eval_*.json")  # in the first of them
    assert path == tmp_path / "b" / "eval_test_0_with_a-0.json"


def test_the_plain_numbers_are_those_of_the_evaluation_in_training(
    evaluate, workdirs, data_folder
):
    result = evaluate("a", batch_size=8)
    eval_step, batches = build.build_evaluation(config_of(data_folder), "test", 8)
    variables = parallel.replicate(resjax.restore(workdirs["a"]).variables)
    means = loop.evaluate(eval_step, variables, batches())
    assert_reports(result, means)


def test_folded_and_plain_numbers_are_the_same_in_files_of_their_own(evaluate, tmp_path):
    plain, folded = evaluate("a"), evaluate("a", fold_batch_norm=True)
    cropped = evaluate("a", fold_batch_norm=True, crops=10)
    assert folded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    files = {p.name: json.loads(p.read_text()) for p in (tmp_path / "a").glob("eval_*")}
    assert files == {
        "eval_test_0.json": plain,
        "eval_test_0_folded.json": folded,
        "eval_test_0_crops10_folded.json": cropped,
    }
    assert cropped["fold_batch_norm"] is True and "fold_batch_norm" not in plain


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "eval_test_0"),
        pytest.param(
            {"scales": [28, 40]}, "eval_test_0_scales28-40", marks=pytest.mark.slow
        ),
    ],
)
def test_details_are_written_beside_the_numbers(options, name, evaluate, tmp_path):
    result = evaluate("a", details=True, **options)
    folder = tmp_path / "a" / name
    pictures = {"confusion.png", "calibration.png", "mistakes.png"}
    assert {path.name for path in folder.iterdir()} == pictures | {"classes.csv"}
    with open(folder / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["examples"]) for row in rows) == result["num_examples"] == N
    correct = sum(int(row["correct"]) for row in rows)
    assert 100 * correct / N == pytest.approx(result["top1"])


def test_details_that_cannot_be_written_are_told(evaluate, workdirs, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "eval_test_0").write_text("a file where the folder would be")
    assert evaluate("a", details=True)["num_examples"] == N
    (line,) = capsys.readouterr().err.splitlines()
    assert "--details" in line and "eval_test_0 cannot be written" in line


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"crops": 10}, marks=pytest.mark.slow), {"scales": [28, 40]}],
)
def test_damaged_examples_are_left_out_of_all_protocols(options, tmp_path, capsys):
    folder = tmp_path / "images"
    for i in range(6):
        jpeg = encode(pixels(i, *SIZES[i]), ".jpg")
        for split in ("train", "val"):
            path = folder / split / f"class {i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg[:-30] if i == 3 else jpeg)
    config = config_of(folder, num_classes=2)
    data = dataclasses.replace(config.data, name="folder", skip_errors=1)
    config = dataclasses.replace(config, data=data)
    variables = random_variables(build.build_model(config))
    convert.write_checkpoint(tmp_path / "run", variables, config)
    result = run_evaluation.evaluate(
        tmp_path / "run", batch_size=2, details=True, **options
    )
    assert result["num_examples"] == 5
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "left out, as 1 of at most 1" in lines[0]


# --- what does not go -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"crops": 5}, "--crops: 5 is not 1 or 10"),
        ({"crops": 10, "scales": [56]}, "--crops: 10 with --scales=56"),
        ({"scales": [56, 28, 56]}, "--scales: 56 is there twice"),
        ({"scales": [0]}, "--scales: 0 is not a whole number above 0"),
        ({"scales": [56.5]}, "--scales: 56.5 is not a whole number above 0"),
        ({"scales": [28, 1]}, "--scales: 1 is less than the stride of .*: 2 and more"),
    ],
)
def test_views_that_cannot_be_are_named_in_one_line(options, said, evaluate, tmp_path):
    with pytest.raises(UsageError, match=said) as error:
        evaluate("a", **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("eval_*"))


def test_images_that_are_evaluated_whole_leave_nothing_to_crop(tmp_path):
    data = DataConfig("cifar10", image_size=32)
    config = Config(model="cifar_resnet20", model_kwargs=SHAPE, data=data)
    variables = random_variables(build.build_model(config))
    convert.write_checkpoint(tmp_path / "run", variables, config)
    with pytest.raises(UsageError, match=r"--crops: 10, but images of cifar10 .*: 1$"):
        run_evaluation.evaluate(tmp_path / "run", crops=10)


def write_other(workdir, config):
    variables = random_variables(build.build_model(config))
    convert.write_checkpoint(workdir, variables, config)


def test_runs_that_do_not_go_together_are_named(evaluate, data_folder, tmp_path):
    evaluate("a")
    config = config_of(data_folder)
    data = dataclasses.replace(config.data, name="folder")
    write_other(tmp_path / "folder", dataclasses.replace(config, data=data))
    write_other(tmp_path / "six", dataclasses.replace(config, num_classes=6))
    for other, said in (
        ("a", "a is there twice"),
        ("folder", "folder is of folder, and .*/a of imagenet2012"),
        ("six", "six has 6 classes, and .*/a 5"),
    ):
        with pytest.raises(UsageError, match=said) as error:
            run_evaluation.evaluate([tmp_path / "a", tmp_path / other])
        assert str(error.value).startswith("--workdir: ")


def test_runs_of_classes_of_other_names_are_named(evaluate, workdirs, monkeypatch):
    opened = run_evaluation._open_member

    def rename(path, step, ema):
        member = opened(path, step, ema)
        names = ["cat", "dog", "cow", "pig", "emu"]
        if path.name == "b":
            names[3] = "hen"
        return dataclasses.replace(member, class_names=names)

    monkeypatch.setattr(run_evaluation, "_open_member", rename)
    with pytest.raises(UsageError, match=r"class 3 of .*/b is 'hen', and of .*/a 'pig'"):
        evaluate("ab")


# --- against PyTorch --------------------------------------------------------------------


@pytest.mark.peers
def test_ten_crops_and_scales_are_those_of_pytorch(data_folder, on_devices, tmp_path):
    on_devices(1)
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_torch_golden as golden
    import torch

    net = golden.load("resnet18", CLASSES).eval()
    arrays = {key: np.float32(x) for key, x in net.state_dict().items()}
    config = config_of(data_folder, model="resnet18", model_kwargs=ModelKwargs())
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, image_size=64)
    )
    variables = resjax.from_torch(arrays, "resnet18")
    convert.write_checkpoint(tmp_path / "run", variables, config)
    images, _ = decoded_images()
    body = torch.nn.Sequential(*list(net.children())[:-2])

    def ten_crops(image):
        return softmax(net(golden.tensor(crops_of(image, 10, 64))).numpy()).mean(axis=0)

    def dense(image, scale):
        last_map = body(golden.tensor(whole_of(image, scale, stride=32)))
        means = windows_of(last_map[0].permute(1, 2, 0).numpy(), 2)
        return softmax(net.fc(torch.from_numpy(means)).numpy().mean(axis=0))

    with torch.no_grad():
        crops = np.stack([ten_crops(image) for image in images])
        scales = np.stack([(dense(x, 64) + dense(x, 96)) / 2 for x in images])
    for options, expected in (({"crops": 10}, crops), ({"scales": (64, 96)}, scales)):
        result = run_evaluation.evaluate(tmp_path / "run", batch_size=16, **options)
        assert_reports(result, numbers_of(expected))
