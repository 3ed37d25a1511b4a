"""Transfer: folders hold what they are said to, and nets differ in their start alone."""

import csv
import json

import cv2
import jax
import numpy as np
import pytest
from conftest import ROOT, random_variables
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

import resjax
from figures import transfer
from figures import transfer_nets as nets
from resjax import build, convert
from resjax import config as configs
from resjax.config import Config, DataConfig, ModelKwargs, UsageError
from resjax.data import sources
from resjax.data.datasets import get_dataset

SMALL = ("stage_sizes=1,1", "width=8")
WORDS = [f"--config.model_kwargs.{word}" for word in SMALL]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return nets.write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A workdir of a tiny net with random weights, as if trained on the digits 0 to 4."""
    workdir = tmp_path_factory.mktemp("pretrained") / "run"
    config = Config(
        model_kwargs=ModelKwargs(stage_sizes=(1, 1), width=8),
        num_classes=5,
        data=DataConfig("folder", recipe="shift"),
    )
    model = resjax.create_model(
        "cifar_resnet20", num_classes=5, stage_sizes=(1, 1), width=8
    )
    convert.write_checkpoint(workdir, random_variables(model), config)
    return workdir


# --- folders ------------------------------------------------------------------------


def test_every_digit_is_in_one_folder_and_split_and_comes_out_pixel_for_pixel(folders):
    digits = load_digits()
    crop, found = get_dataset("folder").eval_crop, {}
    for folder, classes in zip(folders, ["01234", "56789"], strict=True):
        names = sorted(path.name for path in (folder / "train").iterdir())
        assert names == [f"digit{n}" for n in classes]
        for path in folder.glob("*/*/*.png"):
            index = int(path.stem)
            assert index not in found
            found[index] = path.parent.parent.name
            assert digits.target[index] == int(path.parent.name.removeprefix("digit"))
            crops = crop(cv2.imread(str(path)), 8)
            expected = np.round(digits.images[index] * 255 / 16)
            np.testing.assert_array_equal(crops, expected[:, :, None].repeat(3, axis=2))
    assert len(found) == 1797
    drawn = [digits.target[i] for i, split in found.items() if split == "train"]
    assert np.bincount(drawn).tolist() == [140] * 5 + [50] * 5


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}


@pytest.mark.parametrize("can_link", [True, False])
def test_a_subset_is_those_images_alone(can_link, folders, tmp_path, monkeypatch):
    if not can_link:

        def fail(*paths):
            raise OSError("another file system")

        monkeypatch.setattr(nets.os, "link", fail)
    pool = sources.open_source("folder", str(folders[1]), "train")
    nets.write_subset(tmp_path / "sub", train=(pool, [1]), val=(pool, [3, 4, 5]))
    nets.write_subset(tmp_path / "sub", train=(pool, [0, 7]), val=(pool, [1]))
    expected = {
        f"{split}/{pool.where(i).removeprefix('train/')}": pool[i]["image"]
        for split, i in [("train", 0), ("train", 7), ("val", 1)]
    }
    assert files(tmp_path / "sub") == expected


# --- nets ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 10, 20])
def test_nets_have_the_same_updates_whatever_number_of_images_they_see(count, tmp_path):
    base = Config(data=DataConfig("digits"), norm=configs.NormConfig(64))
    config = nets.transfer_config(
        base, tmp_path, 5 * count, nets.Budget(updates=200, batch_size=32), num_classes=5
    )
    config = configs.validate(config)
    _, derived = build.build_schedule(config, 5 * count)
    assert derived["num_steps"] == 200
    assert build.build_eval_steps(config, 5 * count, 200) == {200}
    assert config.data == DataConfig("folder", str(tmp_path), recipe="shift")
    assert config.num_classes == 5


ROWS = [
    nets.make_row(method, count, seed, top1 + seed, updates)
    for (method, updates), curve in {
        ("probe", ""): {1: 60, 5: 75},
        ("fine-tuned", 40): {5: 85},
        ("from scratch", 40): {5: 70},
        ("fine-tuned", 200): {5: 90, 10: 95},
        ("from scratch", 200): {5: 80, 10: 94.9},
    }.items()
    for count, top1 in curve.items()
    for seed in (0, 1)
]


def test_the_verdict_and_the_table_say_means_and_deviations():
    said = transfer.verdict(ROWS)
    assert said.startswith("In part as in the paper: top-1 in percent, after 40 updates ")
    assert (
        "after 40 updates 85.50 +- 0.71 fine-tuned and 70.50 +- 0.71 from scratch of 5 "
        "images per class; after 200 updates 90.50 +- 0.71 fine-tuned and 80.50 +- 0.71 "
        "from scratch of 5 images per class, 95.50 +- 0.71 fine-tuned and"
    ) in said
    assert "a probe has 60.50 +- 0.71 of 1 and 75.50 +- 0.71 of 5." in said
    table = [line.split("  ") for line in transfer.format_table(ROWS).splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert table == [
        ["images per class", "1", "5", "10"],
        ["probe", "60.50 +- 0.71", "75.50 +- 0.71"],
        ["fine-tuned, 40 updates", "85.50 +- 0.71"],
        ["from scratch, 40 updates", "70.50 +- 0.71"],
        ["fine-tuned, 200 updates", "90.50 +- 0.71", "95.50 +- 0.71"],
        ["from scratch, 200 updates", "80.50 +- 0.71", "95.40 +- 0.71"],
    ]


def test_the_verdict_holds_as_a_whole_only_if_all_comparisons_do():
    short = [row for row in ROWS if row["updates"] in ("", 40)]
    assert transfer.verdict(short).startswith("As in the paper: ")
    probes = [row for row in ROWS if row["method"] == "probe"]
    assert transfer.verdict(probes).startswith("top-1 in percent, a probe has")


def test_the_curves_that_are_drawn_are_the_means():
    panel = transfer.draw(ROWS, "title", 20.0).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in panel.lines}
    assert drawn["probe"] == [[1, 60.5], [5, 75.5]]
    assert drawn["from scratch, 200 updates"] == [[5, 80.5], [10, pytest.approx(95.4)]]
    assert drawn["fine-tuned, 40 updates"] == [[5, 85.5]]
    assert [y for _, y in drawn["guesses"]] == [20, 20]


@pytest.mark.slow
@pytest.mark.long
def test_transfer_of_digits(tmp_path, capsys):
    """The whole figure with a tiny net, one number of images, two draws, two rates."""
    output = tmp_path / "out"
    flags = ["--train_at=5", "--probe_at=2,5", "--seeds=2", "--updates=60"]
    flags = [f"--output={output}", *flags, "--rates=0.1,0.8", *WORDS]
    assert transfer.main(flags) == 0
    with (output / "transfer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [(row["method"], row["images_per_class"], row["seed"]) for row in rows]
    probes = [("probe", count, seed) for count in "25" for seed in "01"]
    trained = [(m, "5", seed) for m in ("fine-tuned", "from scratch") for seed in "01"]
    assert keys == probes + trained
    assert (output / "transfer.png").read_bytes().startswith(b"\x89PNG")
    top1 = {key: float(row["top1"]) for key, row in zip(keys, rows, strict=True)}
    assert all(20 < value <= 100 for value in top1.values())  # of guesses, 20
    num_test = (load_digits().target >= 5).sum() - 250
    folders = output / "60_updates" / "folders"
    (runs,) = (output / "60_updates").glob("runs_*")
    digits = files(output / "new_digits")
    for key in trained:
        rate = float(rows[keys.index(key)]["lr_per_256"])
        name = f"{key[0].replace(' ', '_')},5_images,seed={key[2]},rate={rate:g}"
        last = json.loads((runs / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["split"], last["step"]) == ("test", 60)
        assert last["top1"] == pytest.approx(top1[key], abs=1e-3)
        # A probe and both ways of training have the same images of a seed.
        data = files(folders / f"5_images,seed={key[2]}")
        trained_on = {name for name in data if name.startswith("train/")}
        assert len(trained_on) == 25 and len(data) == 25 + num_test
        assert all(digits[name] == pixels for name, pixels in data.items())
    # The rate was chosen by images that are neither trained nor tested on.
    tuning = files(folders / f"5_images,seed={nets._TUNING_SEED}")
    tested = {name.partition("/")[2] for name in digits if name.startswith("val/")}
    used = {name: name.partition("/")[2] for name in tuning}
    assert len(set(used.values())) == 250 and not tested & set(used.values())
    # The probes are those of the two features and the draws, fitted anew.
    run = resjax.restore(output / "old_digits_run")
    rest = transfer.probe_curve(run, output / "new_digits", [5], [0, 1])
    assert [row["top1"] for row in rest] == [top1["probe", "5", seed] for seed in "01"]
    both = [resjax.restore(p) for p in output.glob("*/runs_*/*seed=0,rate=*")]
    one, other = (configs.flatten(run.config) for run in both)
    changed = {name for name in one if one[name] != other[name]}
    assert changed <= {"init_from", "lr_per_256"} and "init_from" in changed


# --- what a user can get wrong ------------------------------------------------------


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--probe_at=0", "'0' is no whole number from 1"),
        ("--train_at=5,x", "'x' is no whole number from 1"),
        ("--rates=0.1,-1", "no list of numbers above 0"),
        ("--seeds=0", "'0' is no whole number from 1"),
        ("--updates=40,0", "'0' is no whole number from 1"),
        ("--workdir=runs/x", "--workdir and --data_dir: give both"),
        ("--data_dir=photos", "--workdir and --data_dir: give both"),
        ("--config.seed=1", "config.seed: this script sets it"),
        ("--config.freeze_at=1", "config.freeze_at: this script sets it"),
        ("--config.model_kwarg=1", "model_kwargs"),
    ],
)
def test_a_wrong_flag_is_named_before_anything_is_done(flag, told, tmp_path):
    output = tmp_path / "new"
    with pytest.raises(UsageError, match=told):
        transfer.main([f"--output={output}", flag])
    assert not output.exists()


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--probe_at=51", "images_per_class: 51, but class 'digit5' has 50"),
        ("--train_at=50", "--train_at: 50 .*allowed: 1 to 49"),
    ],
)
@pytest.mark.parametrize("is_digits", [True, False])
def test_more_images_than_there_are_is_one_line_before_anything_is_trained(
    flag, told, is_digits, pretrained, folders, tmp_path
):
    mine = [f"--workdir={pretrained}", f"--data_dir={folders[1]}"]
    output = tmp_path / "out"
    with pytest.raises(UsageError, match=told) as error:
        transfer.main([f"--output={output}", flag, *([] if is_digits else mine)])
    assert "\n" not in str(error.value)
    assert not list(output.glob("*/runs")) and not (output / "old_digits_run").exists()


def test_a_probe_of_a_users_own_run_and_folder(pretrained, folders, tmp_path, capsys):
    flags = [f"--workdir={pretrained}", f"--data_dir={folders[1]}"]
    output = tmp_path / "out"
    assert transfer.main([*flags, f"--output={output}", "--probe_at=5,50"]) == 0
    with (output / "transfer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["images_per_class"] for row in rows] == ["5"] * 3 + ["50"] * 3
    assert {row["method"] for row in rows} == {"probe"}
    # All 50 of a class are the same whichever seed draws them.
    (last,) = {float(row["top1"]) for row in rows if row["images_per_class"] == "50"}
    assert f"{last:.2f} +- 0.00" in capsys.readouterr().out
    assert not list(output.glob("*_updates"))


# --- configs/finetune_folder.py -----------------------------------------------------

PHOTOS = ROOT / "configs" / "finetune_folder.py"


def write_photos(root):
    """Noise on a colour for each class, of several sizes; 8 and 4 of each."""
    rng = np.random.RandomState(0)
    colours = {"leaf": (30, 160, 40), "sea": (150, 90, 20), "sun": (40, 190, 230)}
    for split, count in (("train", 8), ("val", 4)):
        for name, colour in colours.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 60, (40 + i, 50, 3)) + np.array(colour) - 30
                path = root / split / name / f"{i}.jpg"
                cv2.imwrite(str(path), pixels.clip(0, 255).astype(np.uint8))
    return root


@pytest.mark.slow
@pytest.mark.long
def test_photos_are_fine_tuned_evaluated_and_restored(command, tmp_path):
    """The commands of the config's docstring, with a small net of the same kind."""
    photos = write_photos(tmp_path / "photos")
    small = [*WORDS, "--config.data.image_size=32"]
    small[0] = "--config.model_kwargs.stage_sizes=1,1,1,1"
    model = resjax.create_model("resnet50", stage_sizes=(1, 1, 1, 1), width=8)
    variables = resjax.init(model, jax.random.key(0))
    weights = resjax.to_torch(variables, "resnet50", stage_sizes=(1, 1, 1, 1), width=8)
    save_file(weights, tmp_path / "resnet50.safetensors")

    def run(*words):
        done = command(*words, cwd=tmp_path, variables={"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        return done

    convert_words = "-m", "resjax.convert", "resnet50.safetensors", "--model=resnet50"
    run(*convert_words, "--workdir=runs/resnet50", *small)
    train = ["train.py", f"--config={PHOTOS}", "--workdir=runs/photos", *small]
    train += [f"--config.data.dir={photos}", "--config.batch_size=8"]
    done = command(*train, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "config.num_classes: 2, but the data set folder has 3 classes" in done.stderr
    fields = ["--config.num_classes=3", "--config.num_epochs=4"]
    done = run(*train, *fields)
    assert "from the weights of runs/resnet50" in done.stdout
    assert "and a new classifier" in done.stdout
    done = run("eval.py", "--workdir=runs/photos", "--step=best")
    assert json.loads(done.stdout)["num_examples"] == 12
    restored = resjax.restore(tmp_path / "runs" / "photos", "best")
    assert restored.class_names == ["leaf", "sea", "sun"]
    first, last = (
        resjax.restore(tmp_path / "runs" / name).variables
        for name in ("resnet50", "photos")
    )
    frozen = [tree["params"]["stem"]["conv"]["kernel"] for tree in (first, last)]
    trained = [
        tree["params"]["stage4"]["block1"]["conv1"]["kernel"] for tree in (first, last)
    ]
    np.testing.assert_array_equal(*frozen)
    assert np.abs(trained[0] - trained[1]).max() > 0


def test_the_config_says_where_its_weights_should_be(tmp_path):
    from resjax import training

    photos = write_photos(tmp_path / "photos")
    words = [f"--config.data.dir={photos}", "--config.num_classes=3", *WORDS]
    words += ["--config.data.image_size=32", "--config.batch_size=8"]
    words += [f"--config.init_from={tmp_path / 'nowhere'}"]
    config = configs.override(configs.load_config(PHOTOS), words)
    with pytest.raises(UsageError, match=r"config.init_from: .*nowhere") as error:
        training.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
