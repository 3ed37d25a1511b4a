"""resjax.restore: somebody's checkpoint as a model, variables and predictions."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import ROOT, saved
from PIL import Image
from sklearn.datasets import load_digits

import resjax
from resjax import checkpoint, training
from resjax import config as configs
from resjax.config import UsageError
from resjax.data.datasets import DATASETS
from resjax.data.digits import split_indices

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")

# In a process of its own: predicts saved images and says which modules that loaded.
SCRIPT = f"""
import json, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
import resjax
run = resjax.restore(sys.argv[1])
np.save(sys.argv[3], run.predict(np.load(sys.argv[2])))
print(json.dumps([name.split(".")[0] for name in sys.modules]))
"""


@pytest.fixture(scope="module")
def digits():
    """The test digits as a user has them: [360, 8, 8, 3] uint8 and their labels."""
    data = load_digits()
    index = split_indices(data.target)["test"]
    grey = np.round(data.images[index] * (255 / 16)).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1), data.target[index]


@pytest.fixture(scope="module")
def run(digits_run):
    assert digits_run.done.returncode == 0, digits_run.done.stderr
    return resjax.restore(digits_run.workdir)


@pytest.fixture(scope="module")
def elsewhere(command, digits_run, digits, tmp_path_factory):
    """(probabilities, modules loaded) of a new process on one device."""
    folder = tmp_path_factory.mktemp("elsewhere")
    script, images, answer = (folder / name for name in ("open.py", "x.npy", "p.npy"))
    script.write_text(SCRIPT)
    np.save(images, digits[0])
    done = command(script, digits_run.workdir, images, answer, devices=1)
    assert (done.returncode, done.stderr) == (0, "")
    return np.load(answer), set(json.loads(done.stdout))


def test_a_run_from_four_devices_predicts_on_one_what_eval_reports(
    command, elsewhere, digits, digits_run, tmp_path
):
    shutil.copytree(digits_run.workdir, tmp_path / "run")
    reported = json.loads(command("eval.py", f"--workdir={tmp_path / 'run'}").stdout)
    probabilities, (_, labels) = elsewhere[0], digits
    of_label = probabilities[np.arange(360), labels]
    rank = (probabilities > of_label[:, None]).sum(axis=1)
    assert 100 * (rank < 1).mean() == pytest.approx(reported["top1"])
    assert 100 * (rank < 5).mean() == pytest.approx(reported["top5"])
    assert -np.log(of_label).mean() == pytest.approx(reported["loss"], rel=1e-4)


@pytest.mark.slow  # trains
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_eight_devices_opens_on_one_and_predicts_what_eval_reports(
    command, digits, tmp_path, dtype
):
    workdir, images = tmp_path / "run", tmp_path / "x.npy"
    words = f"--config.dtype={dtype}", "--config.num_epochs=4", f"--workdir={workdir}"
    done = command("train.py", *words, devices=8)
    assert (done.returncode, done.stderr) == (0, "")
    script, answer = tmp_path / "open.py", tmp_path / "p.npy"
    script.write_text(SCRIPT)
    np.save(images, digits[0])
    done = command(script, workdir, images, answer, devices=1)
    assert (done.returncode, done.stderr) == (0, "")
    hits = np.load(answer).argmax(axis=1) == digits[1]
    for devices in (1, 8):
        done = command("eval.py", f"--workdir={workdir}", devices=devices)
        assert json.loads(done.stdout)["top1"] == 100 * hits.mean()
    assert hits.mean() > 0.5
    (trained,) = {d["params/stem/conv/kernel"].dtype for d in [saved(workdir, 45)]}
    assert trained == np.float32  # the parameters, whatever computes


def test_opening_a_run_loads_no_data_set_library(elsewhere):
    _, modules = elsewhere
    assert {"resjax", "jax", "safetensors"} <= modules
    unwanted = {"orbax", "tensorflow_datasets", "grain", "sklearn", "tensorflow", "torch"}
    assert not modules & unwanted


def test_predictions_are_probabilities(elsewhere):
    probabilities, _ = elsewhere
    assert probabilities.shape == (360, 10) and probabilities.dtype == np.float32
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_predict_as_one(run, elsewhere, digits):
    np.testing.assert_allclose(run.predict(digits[0]), elsewhere[0], rtol=1e-4, atol=1e-6)


def test_a_run_has_its_model_variables_config_step_and_class_names(run, digits):
    assert (run.step, run.config.num_epochs, run.config.model) == (
        22,
        2.0,
        "cifar_resnet20",
    )
    assert run.class_names == [str(digit) for digit in range(10)]
    assert set(run.variables) == {"params", "batch_stats"}
    count = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    assert count == 269_722  # He et al. 2015, table 6: 0.27 M
    images = run.preprocess(digits[0][:3])
    logits = run.model.apply(run.variables, images, train=False)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(run.predict(images), expected, rtol=1e-4, atol=1e-6)


def test_a_step_picks_its_checkpoint(run, digits_run, digits):
    early = resjax.restore(digits_run.workdir, step=10)
    assert early.step == 10
    assert np.abs(early.predict(digits[0]) - run.predict(digits[0])).max() > 0.1
    path = digits_run.workdir / "checkpoints" / "10"
    assert resjax.restore(path).step == 10


def test_the_best_is_that_of_the_records(digits_run, tmp_path):
    copy = shutil.copytree(digits_run.workdir, tmp_path / "run")
    row = {"split": "test", "epoch": 1.0, "loss": 1.0, "top5": 99.0}
    rows = [{**row, "step": step, "top1": top1} for step, top1 in ((10, 98), (22, 97))]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert resjax.restore(copy, step="best").step == 10
    assert resjax.restore(copy).step == 22


def test_a_run_says_what_trained_it_and_how_it_evaluated(run, digits_run):
    assert run.versions["jax"] == jax.__version__ and "commit" in run.versions
    rows = (digits_run.workdir / "metrics.jsonl").read_text().splitlines()
    assert run.evaluation == [r for r in map(json.loads, rows) if r["split"] == "test"][-1]


@pytest.fixture(scope="module")
def averaged(tiny_config, data_dir, tmp_path_factory):
    """A short run with averages of its weights."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    fields = "ema_decay=0.9", "batch_size=64", "num_epochs=1", "lr_per_256=2"
    fields = *fields, f"data.dir={data_dir}"
    words = [f"--config.{field}" for field in fields]
    config = configs.override(configs.load_config(tiny_config), words)
    assert training.train(config, workdir) == 0
    return workdir


def test_averages_open_in_place_of_the_weights(averaged, digits):
    lines = (averaged / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] != "train"]
    images, labels = digits
    for ema, split in ((False, "test"), (True, "test_ema")):
        run = resjax.restore(averaged, ema=ema)
        (row,) = [row for row in rows if row["split"] == split]
        assert run.evaluation == row and run.step == row["step"] == 22
        p = np.float64(run.predict(images))
        assert row["top1"] == pytest.approx(100 * (p.argmax(axis=1) == labels).mean())
        loss = -np.log(p[np.arange(360), labels]).mean()
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
    stored = saved(averaged, 22, "optimizer")
    for name, leaf in checkpoint.to_arrays(run.variables).items():
        np.testing.assert_array_equal(leaf, stored[f"ema/{name}"])
        assert not np.array_equal(leaf, saved(averaged, 22)[name])


def test_a_run_without_averages_says_so(digits_run):
    match = r"^ema: .*/22 has no averaged weights; .*config\.ema_decay"
    with pytest.raises(UsageError, match=match):
        resjax.restore(digits_run.workdir, ema=True)


def test_a_checkpoint_opens_without_its_data_set_or_fields_of_another_version(
    digits_run, digits, run, monkeypatch, tmp_path
):
    # As if digits were somebody's own data set, and `lr_per_256` an older field's name.
    copy = shutil.copytree(digits_run.workdir, tmp_path / "run")
    path = copy / "checkpoints" / "22" / "state" / "record.json"
    record = json.loads(path.read_text())
    record["config"]["rate"] = record["config"].pop("lr_per_256")
    del record["digest"]
    record["digest"] = checkpoint._digest(record)
    path.write_text(json.dumps(record))
    monkeypatch.delitem(DATASETS, "digits")
    found = resjax.restore(copy)
    images = digits[0][:9]
    np.testing.assert_array_equal(found.predict(images), run.predict(images))


# --- what predict and preprocess take -----------------------------------------------


def normalized(images):
    row = DATASETS["digits"]
    return (images.astype(np.float64) / 255 - row.mean) / row.std


FORMS = {
    "batch": lambda images: images[:2],
    "list of images": lambda images: list(images[:2]),
    "tuple of grey images": lambda images: tuple(images[:2, :, :, 0]),
    "list of PIL": lambda images: [Image.fromarray(image) for image in images[:2]],
    "list of grey PIL": lambda images: [Image.fromarray(x[:, :, 0]) for x in images[:2]],
    "PIL with alpha": lambda images: [
        Image.fromarray(image).convert("RGBA") for image in images[:2]
    ],
    "batch with one channel": lambda images: images[:2, :, :, :1],
    "batch of grey images": lambda images: images[:2, :, :, 0],
    "jax array": lambda images: jax.numpy.asarray(images[:2]),
    "one image": lambda images: images[0],
    "one grey image": lambda images: images[0, :, :, 0],
    "one PIL": lambda images: Image.fromarray(images[0]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_images_come_in_many_forms(run, digits, form):
    given = form(digits[0])
    found = run.preprocess(given)
    assert found.dtype == np.float32 and found.shape[1:] == (8, 8, 3)
    np.testing.assert_allclose(found, normalized(digits[0][: len(found)]), atol=1e-5)
    np.testing.assert_array_equal(run.predict(given), run.predict(found))


def test_one_image_is_a_batch_of_one(run, digits):
    assert run.preprocess(digits[0][0]).shape == (1, 8, 8, 3)
    assert run.predict(Image.fromarray(digits[0][0])).shape == (1, 10)


def test_images_may_have_different_sizes(run, digits):
    small, large = digits[0][0], digits[0][1].repeat(5, axis=0).repeat(5, axis=1)
    found = run.preprocess([small, large, large[:, :30, 0]])
    assert found.shape == (3, 8, 8, 3)
    np.testing.assert_allclose(found[:2], normalized(digits[0][:2]), atol=0.02)
    assert run.predict([small, large]).argmax(1).tolist() == (
        run.predict(digits[0][:2]).argmax(1).tolist()
    )


def test_more_images_than_a_forward_pass_holds_keep_their_order(run, digits):
    images = digits[0][:104]
    backwards = run.predict(images[::-1])[::-1]
    np.testing.assert_allclose(run.predict(images), backwards, rtol=1e-4, atol=1e-6)


WRONG = {
    "float image": (np.zeros((8, 8, 3), np.float32), "float32"),
    "int32": (np.zeros((8, 8, 3), np.int32), "int32"),
    "alpha channel": (np.zeros((20, 20, 4), np.uint8), "(20, 20, 4)"),
    "two channels": (np.zeros((5, 8, 8, 2), np.uint8), "(8, 8, 2)"),
    "five axes": (np.zeros((1, 2, 8, 8, 3), np.uint8), "(2, 8, 8, 3)"),
    "a vector": ([np.zeros(8, np.uint8)], "(8,)"),
    "no image": ([], "at least one"),
    "empty batch": (np.zeros((0, 8, 8, 3), np.uint8), "at least one"),
    "empty float batch": (np.zeros((0, 8, 8, 3), np.float32), "at least one"),
    "an image without pixels": (np.zeros((0, 8, 3), np.uint8), "(0, 8, 3)"),
    "text": (["digit.png"], "uint8"),
    "floats of another size": (np.zeros((2, 28, 28, 3), np.float32), "[B, 8, 8, 3]"),
    "grey floats": (np.zeros((2, 8, 8, 1), np.float32), "[B, 8, 8, 3]"),
}


@pytest.mark.parametrize(("images", "word"), WRONG.values(), ids=WRONG)
def test_anything_else_is_refused_with_its_type_or_shape(run, images, word):
    with pytest.raises(UsageError, match="image") as error:
        run.predict(images)
    assert word in str(error.value) and "\n" not in str(error.value)


# --- what is not there --------------------------------------------------------------


def test_a_wrong_path_is_answered_with_what_is_beside_it(digits_run):
    with pytest.raises(UsageError, match=r"no directory .*digit; .*'digits'"):
        resjax.restore(digits_run.workdir.with_name("digit"))


def test_a_wrong_path_is_answered_with_few_names_all_of_folders(tmp_path):
    for i in range(50):
        (tmp_path / f"folder{i}").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    with pytest.raises(UsageError, match="no directory") as error:
        resjax.restore(tmp_path / "x")
    assert str(error.value).count("'folder") == 10
    with pytest.raises(UsageError, match=r"no directory .*notes\.txt, it is a file"):
        resjax.restore(tmp_path / "notes.txt")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UsageError, match=rf"no checkpoints; .*; give {tmp_path}$"):
        resjax.restore(tmp_path / "checkpoints")


def test_a_folder_without_a_run_is_answered_with_what_is_in_it(tmp_path):
    (tmp_path / "notes.txt").write_text("no run")
    with pytest.raises(UsageError, match=r"no checkpoints; .* \['notes.txt'\]"):
        resjax.restore(tmp_path)


def test_a_missing_step_is_answered_with_those_there_are(digits_run):
    with pytest.raises(UsageError, match=r"step 11 .*\[10, 20, 22\]"):
        resjax.restore(digits_run.workdir, step=11)
