"""Bad workdirs, checkpoints, data sets and weights: one line that says it, nothing done."""

# ruff: noqa: F401, F811 (the fixtures are those of test_bad_input.py)

import fcntl
import json
import shutil
import sys
import zlib
from types import SimpleNamespace

import jax
import pytest
from safetensors.numpy import save_file
from test_bad_input import contents, folder, refuses
from tiny_tfds import encode, pixels, write_cifar10

import resjax
from resjax.config import UsageError

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")

# --- what is wrong with a run -------------------------------------------------------


def write(name, text):
    """Another file of that name in the folder of a run or data set."""
    return lambda root: (root / name).write_text(text)


def as_folder(name):
    def change(root):
        (root / name).unlink(missing_ok=True)
        (root / name).mkdir()

    return change


def fields(**new):
    """Other fields in config.json."""

    def change(run):
        old = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**old, **new}))

    return change


def only(change=None, name="variables.safetensors"):
    """Checkpoint 22 is the only one, and a file of it has other bytes, or is gone."""

    def damage(run):
        shutil.rmtree(run / "checkpoints" / "10")
        path = run / "checkpoints" / "22" / "state" / name
        data = path.read_bytes()
        path.unlink()
        if change:
            path.write_bytes(change(data))

    return damage


def cut(data):
    return data[:-100]


def flip(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def record(**new):
    """Another record of checkpoint 22, with the digest that is right for it."""

    def change(run):
        path = run / "checkpoints" / "22" / "state" / "record.json"
        changed = {**json.loads(path.read_text()), **new}
        del changed["digest"]
        digest = zlib.crc32(json.dumps(changed, sort_keys=True).encode())
        path.write_text(json.dumps({"digest": digest, **changed}))

    return change


def of_another_model(run):
    config = json.loads((run / "config.json").read_text())
    record(config={**config, "model": "cifar_resnet32"})(run)


def as_it_is(run):
    pass


def without_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()


def checkpoints_are_a_file(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")


def foreign(run):
    shutil.rmtree(run)
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"loss": 3}\n')


DAMAGED = ("run/checkpoints/22", "damaged")
NEWER = ("run/checkpoints/22", "format 99", "up to 2", "newer version")


def rows(table):
    """Of (change, flags, words ...), the parameters of a test."""
    return [
        pytest.param(change, flags, words, id=" ".join([flags, *words]).strip())
        for change, flags, *words in table
    ]


# What happens to the run; flags; what the answer has to contain.
TRAIN = [
    (as_it_is, "--config.seed=3", "config.seed was 0 and is now 3", "--workdir"),
    (as_it_is, "--config.seed=3", "--config.init_from=run"),
    (
        as_it_is,
        "--config.model=cifar_resnet32 --config.dtype=bfloat16",
        *("'cifar_resnet20'", "'cifar_resnet32'", "config.dtype", "'bfloat16'"),
    ),
    (write("config.json", '{"batch'), "", "run/config.json", "no config"),
    (write("config.json", "[1]"), "", "run/config.json", "[1]", "no set of fields"),
    (as_folder("config.json"), "", "run/config.json", "directory"),
    (fields(mixup=0.9), "", "run/config.json", "'mixup'", "this version"),
    (fields(batch_size=None), "", "run/config.json", "batch_size", "None"),
    (write("metrics.jsonl", '{"step": 1\n'), "", "run/metrics.jsonl", "damaged"),
    (write("metrics.jsonl", "3\n"), "", "run/metrics.jsonl", "damaged"),
    (write("metrics.jsonl", '{"loss": 3}\n'), "", "run/metrics.jsonl", "damaged"),
    (write("metrics.jsonl", '{"split": "test"}\n'), "", "run/metrics.jsonl", "damaged"),
    (as_folder("metrics.jsonl"), "", "run/metrics.jsonl", "directory"),
    (foreign, "", "--workdir", "run", "metrics.jsonl of something else"),
    (checkpoints_are_a_file, "", "run/checkpoints"),
    (only(cut), "", *DAMAGED),
    (only(flip), "", *DAMAGED, "params/stem/"),
    (only(flip, "optimizer.safetensors"), "", *DAMAGED, "opt_state/"),
    (only(cut, "record.json"), "", *DAMAGED),
    (only(lambda data: b"[]", "record.json"), "", *DAMAGED),
    (only(flip, "record.json"), "", *DAMAGED),
    (only(None), "", *DAMAGED, "variables.safetensors"),
    (record(format=99), "", *NEWER),
]
INIT_FROM = [
    (as_it_is, "nowhere", "no directory nowhere", "'run'", "resjax.convert"),
    (as_it_is, "file", "no directory file"),
    (as_it_is, "empty", "empty has no checkpoints", "notes.txt"),
    (as_it_is, "run/checkpoints", "run/checkpoints has no checkpoints", "'22'"),
    (as_it_is, "run/checkpoints/99", "no directory run/checkpoints/99", "'22'"),
    (as_it_is, "gs2://bucket/run", "gs2://bucket/run"),
    (
        as_it_is,
        "run --config.model=cifar_resnet32",
        *("run", "stage1/block4", "missing"),
    ),
    (without_checkpoints, "run", "no checkpoint", "run/checkpoints"),
    (only(cut), "run", *DAMAGED),
    (only(flip), "run/checkpoints/22", *DAMAGED, "params/stem/"),
    (record(format=99), "run", *NEWER),
]
EVAL = [
    (without_checkpoints, "", "no checkpoint", "run/checkpoints"),
    (only(cut), "", *DAMAGED),
    (only(flip), "", *DAMAGED, "params/stem/"),
    (only(None), "", *DAMAGED, "variables.safetensors"),
    (record(format=99), "", *NEWER),
    (record(format=99), "--step=22", *NEWER),
    (write("checkpoints/22/state/record.json", "{"), "--step=22", *DAMAGED, "[10]"),
    (of_another_model, "", "run/checkpoints/22", "stage1/block4", "missing"),
    (lambda run: (run / "metrics.jsonl").unlink(), "--step=best", "'best'", "[10, 22]"),
    (write("metrics.jsonl", "x\n"), "--step=best", "run/metrics.jsonl", "damaged"),
    (write("metrics.jsonl", "3\n"), "--step=best", "run/metrics.jsonl", "damaged"),
]
REPORT = [
    (write("metrics.jsonl", "x\n"), "", "run/metrics.jsonl", "damaged"),
    (write("metrics.jsonl", "3\n"), "", "run/metrics.jsonl", "damaged"),
    (as_folder("metrics.jsonl"), "", "run/metrics.jsonl", "directory"),
    (write("config.json", "{"), "", "run/config.json"),
    (fields(mixup=0.9), "", "run/config.json", "'mixup'"),
]


@pytest.mark.parametrize(("change", "flags", "words"), rows(TRAIN))
def test_a_bad_workdir_is_left_as_it_is(refuses, folder, digits_run, change, flags, words):
    change(folder / "run")
    refuses("train.py", [*digits_run.flags, "--workdir=run", *flags.split()], words)


@pytest.mark.parametrize(("change", "path", "words"), rows(INIT_FROM))
def test_weights_to_start_from_that_are_not_there_or_do_not_fit(
    refuses,
    folder,
    digits_run,
    change,
    path,
    words,
):
    change(folder / "run")
    flags = f"--workdir=new --config.init_from={path}".split()
    refuses("train.py", [*digits_run.flags, *flags], ["config.init_from", *words])


@pytest.mark.parametrize(("change", "flags", "words"), rows(EVAL))
def test_a_checkpoint_that_cannot_be_evaluated(refuses, folder, change, flags, words):
    change(folder / "run")
    refuses("eval.py", ["--workdir=run", *flags.split()], words)


@pytest.mark.parametrize(("change", "flags", "words"), rows(REPORT))
def test_a_run_that_cannot_be_tabulated(refuses, folder, change, flags, words):
    change(folder / "run")
    refuses("resjax/report.py", ["run", *flags.split()], words)


@pytest.mark.parametrize("said", ["process 77 on host5", ""])
def test_a_workdir_in_use_is_refused_and_its_holder_named(
    refuses,
    folder,
    digits_run,
    said,
):
    (folder / "run" / ".lock").write_text(said)
    with (folder / "run" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        words = ["--workdir: run is in use by", said or "another process"]
        refuses("train.py", [*digits_run.flags, "--workdir=run"], words)


# --- resjax.restore -----------------------------------------------------------------

RESTORE = [
    (("nowhere",), "no directory nowhere", "'run'"),
    (("file",), "no directory file"),
    (("empty",), "empty has no checkpoints", "notes.txt"),
    (("run/metrics.jsonl",), "run/metrics.jsonl", "checkpoints"),
    (("gs2://bucket/run",), "gs2://bucket/run"),
    (("run", 99), "99", "[10, 22]"),
    (("run", -1), "-1 is neither a step nor 'best'"),
    (("run", "bset"), "'bset' is neither a step nor 'best'"),
    (("run", "22"), "'22' is neither a step nor 'best'"),
    (("run", 22.0), "22.0 is neither a step nor 'best'"),
    (("run", 1.5), "1.5 is neither a step nor 'best'"),
    (("run", True), "True is neither a step nor 'best'"),
    (("run", [22]), "[22] is neither a step nor 'best'"),
    (("run/checkpoints/22", 10), "step", "10", "one checkpoint"),
    (("run/checkpoints/22", "best"), "step", "'best'", "one checkpoint"),
]


@pytest.mark.parametrize(("given", "words"), [(given, w) for given, *w in RESTORE], ids=str)
def test_restore_refuses_in_one_line(folder, given, words):
    before = contents(folder)
    with pytest.raises(UsageError) as error:
        resjax.restore(*given)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert contents(folder) == before


# --- data sets ----------------------------------------------------------------------


def gone(name):
    return lambda root: shutil.rmtree(root / name)


def emptied(name):
    def change(root):
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return change


def file_instead(name):
    def change(root):
        shutil.rmtree(root / name)
        (root / name).write_text("")

    return change


def link_out(name):
    def change(root):
        shutil.rmtree(root / name)
        (root / name).symlink_to(root.parent / "empty")

    return change


def renamed(name, other):
    return lambda root: (root / name).rename(root / other)


FOLDERS = [
    (gone("train"), "no directory", "pets/train", "train/CLASS/IMAGE"),
    (gone("val"), "no directory", "pets/val", "val/CLASS/IMAGE"),
    (file_instead("train"), "no directory", "pets/train"),
    (emptied("train"), "pets/train", "no folder"),
    (emptied("train/dog"), "pets/train/dog", "no image", ".jpg"),
    (emptied("val/dog"), "pets/val/dog", "no image", ".jpg"),
    (lambda root: (root / "train/dog/sub").mkdir(), "pets/train/dog/sub", "is a folder"),
    (renamed("val/dog", "val/dgo"), "pets/val/dgo", "'dgo'", "dog"),
    (link_out("val"), "pets/val", "leads out of pets"),
]


@pytest.fixture
def pets(folder):
    for split in ("train", "val"):
        for i in range(8):
            path = folder / "pets" / split / ("cat", "dog")[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(pixels(i, 8, 8), ".jpg"))
    return folder / "pets"


TWO = "--config.num_classes=2 --config.batch_size=8"
PETS = ["--workdir=new", "--config.data.name=folder", "--config.data.dir=pets"]


@pytest.mark.parametrize(("change", "words"), [(change, w) for change, *w in FOLDERS])
def test_a_folder_of_images_that_is_none(refuses, pets, change, words):
    change(pets)
    refuses("train.py", [*PETS, *TWO.split()], words)
    refuses("resjax/data/__main__.py", ["folder", "--data_dir=pets"], words)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (as_it_is, "", ["config.num_classes", "10", "2 classes"]),
        (file_instead("train/dog"), TWO, ["num_classes", "1 class"]),
        (as_it_is, f"{TWO} --config.data.on_device=true", ["on_device", "crops"]),
    ],
)
def test_a_config_that_does_not_fit_the_folder(refuses, pets, change, flags, words):
    change(pets)
    refuses("train.py", [*PETS, *flags.split()], words)


@pytest.mark.parametrize("place", ["pets", "out"])
def test_shrinking_never_writes_over_a_data_set(refuses, pets, place):
    (pets.parent / "out" / "train").mkdir(parents=True)
    flags = "folder", "--data_dir=pets", "--shrink=64", f"--to={place}"
    refuses("resjax/data/__main__.py", flags, ["--to", f"{place}/train exists"])


INFO = "tfds/cifar10/3.0.2"
TFDS = [
    (write("dataset_info.json", "{"), INFO, "cannot be read"),
    (write("dataset_info.json", "[]"), INFO, "cannot be read"),
    (write("features.json", "{"), INFO, "cannot be read"),
    (lambda root: (root / "features.json").unlink(), INFO, "cannot be read"),
    (lambda root: next(root.glob("*train*")).unlink(), "cifar10-train", "missing"),
    (lambda root: next(root.glob("*test*")).write_text("x"), "cifar10-test", "damaged"),
]


@pytest.mark.parametrize(("change", "words"), [(change, w) for change, *w in TFDS])
def test_a_data_set_of_tfds_that_is_damaged(refuses, folder, change, words):
    change(write_cifar10(folder / "tfds", num_train=8, num_test=4))
    flags = "--config.data.name=cifar10", "--config.data.dir=tfds", "--workdir=new"
    refuses("train.py", [*flags, "--config.batch_size=8"], words)
    refuses("resjax/data/__main__.py", ["cifar10", "--data_dir=tfds"], words)


# --- weights ------------------------------------------------------------------------

NET = "cifar_resnet20"


@pytest.fixture(scope="module")
def state():
    """{PyTorch's name: array} of the net."""
    return resjax.to_torch(resjax.init(resjax.create_model(NET), jax.random.key(0)), NET)


def bytes_of(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


WEIGHTS = [
    (as_it_is, "--model=cifar_resnet32", "do not fit", "- layer1.3.bn1.bias [16]"),
    (as_it_is, "--model=resnet50", "do not fit", "+ conv1.weight [16, 3, 3, 3]"),
    (as_it_is, f"--model={NET} --config.model_kwargs.shortcut=B", "layer2.0.downsample"),
    (as_it_is, "--model=resnet51", "model", "'resnet51'", "resnet50"),
    (as_it_is, "--model=preact_resnet18", "resnetv2", "another net"),
    (as_it_is, f"--model={NET} --config.data.name=digit", "data.name", "'digit'"),
    (bytes_of(cut), f"--model={NET}", "w.safetensors cannot be read"),
    (bytes_of(lambda data: b""), f"--model={NET}", "w.safetensors cannot be read"),
    (bytes_of(lambda data: b"words " * 99), f"--model={NET}", "w.safetensors cannot be"),
    (lambda path: path.unlink() or path.mkdir(), f"--model={NET}", "no file w.safe"),
]


@pytest.mark.parametrize(("change", "flags", "words"), rows(WEIGHTS))
def test_weights_that_cannot_be_converted(refuses, folder, state, change, flags, words):
    save_file(state, folder / "w.safetensors")
    change(folder / "w.safetensors")
    flags = ["w.safetensors", "--workdir=new", *flags.split()]
    refuses("resjax/convert.py", flags, words)


def test_weights_without_a_classifier(refuses, folder, state):
    headless = {name: state[name] for name in state if not name.startswith("fc.")}
    save_file(headless, folder / "w.safetensors")
    flags = "w.safetensors", f"--model={NET}", "--workdir=new"
    refuses("resjax/convert.py", flags, ["w.safetensors", "no classifier"])


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        (None, ["w.pth", "PyTorch", "not installed", "safetensors"]),
        (SimpleNamespace(load=lambda *a, **k: [3]), ["w.pth", "list", "no weights"]),
    ],
)
def test_a_pth_file_that_is_no_weights(refuses, folder, monkeypatch, torch, words):
    monkeypatch.setitem(sys.modules, "torch", torch)  # None: import torch fails
    (folder / "w.pth").write_bytes(b"any")
    flags = "w.pth", f"--model={NET}", "--workdir=new"
    refuses("resjax/convert.py", flags, words)
