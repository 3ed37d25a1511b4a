"""Nothing is unpickled or run, no name in data leads out of a folder, no secret is kept."""

import ast
import contextlib
import json
import shutil

import pytest
from conftest import ROOT
from tiny_tfds import write_imagenet

from resjax.config import UsageError
from resjax.data import shrink, sources

FILES = sorted([*(ROOT / "resjax").rglob("*.py"), *ROOT.glob("*.py")])
MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
}
CALLS = {"eval", "exec", "compile", "__import__"}
# A function -> the argument without which it unpickles.
SAFE = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "jnp.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}


def dangers(code):
    """What of it could run code that is in a file of data: (line, what)."""
    found = []
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            argument, value = SAFE.get(called, (None, None))
            given = {word.arg: word.value for word in node.keywords}
            safe = argument is None or (
                isinstance(given.get(argument), ast.Constant)
                and given[argument].value is value
            )
            if called in CALLS or not safe:
                found.append((node.lineno, called))
        names = [name for name in names if name.split(".")[0] in MODULES or name in SAFE]
        found += [(node.lineno, name) for name in names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_data_can_run_code(path):
    assert not dangers(path.read_text())


def test_the_search_finds_what_it_looks_for():
    for code in (
        "import pickle",
        "import os, marshal as m",
        "from yaml import load",
        "from joblib.numpy_pickle import load",
        "from numpy import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=unsafe)",
        "torch.load(path)",
        "def f():\n  return eval(text)",
    ):
        assert dangers(code), code
    assert not dangers("np.load(path, allow_pickle=False); ast.literal_eval(text)")


# --- names in data ------------------------------------------------------------------


def change_info(directory, change):
    path = directory / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_data_set_does_not_name_files_outside_its_folder(tmp_path, absolute, file_format):
    directory = write_imagenet(tmp_path / "tfds", file_format=file_format)
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in directory.glob(f"*.{file_format}-*"):
        shutil.copy(path, outside)
    where = str(outside) if absolute else "../../../outside"

    def lead_out(info):
        for split in info["splits"]:
            name = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            split["filepathTemplate"] = f"{where}/{name}"

    change_info(directory, lead_out)
    with pytest.raises(UsageError, match="outside"):
        sources.open_source("imagenet2012", str(tmp_path / "tfds"), "train")


def test_a_shrunk_data_set_stays_in_its_folder_whatever_name_its_source_gives(tmp_path):
    directory = write_imagenet(tmp_path / "tfds", num_train=2, num_validation=2)

    def lead_out(info):
        info["name"] = "../../out"
        for split in info["splits"]:
            name = "imagenet2012-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            split["filepathTemplate"] = name

    change_info(directory, lead_out)
    (tmp_path / "to").mkdir()
    before = set(tmp_path.rglob("*"))
    with contextlib.suppress(UsageError):
        shrink.shrink("imagenet2012", str(tmp_path / "tfds"), str(tmp_path / "to"), 32, 90)
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "to") for path in made)


def test_a_shrunk_folder_of_images_has_copies_and_follows_no_link_out(tmp_path, capfd):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jpg").write_bytes(b"private key")
    for split in ("train", "val"):
        folder = tmp_path / "pets" / split / "..cat"
        folder.mkdir(parents=True)
        folder = folder.rename(folder.with_name("cat.."))
        (folder / "-rf .jpg").write_bytes(b"picture")
        (folder / "key.jpg").symlink_to(tmp_path / "secret" / "key.jpg")
        (folder.parent / "all").symlink_to(tmp_path / "secret")
    assert (
        shrink.shrink("folder", str(tmp_path / "pets"), str(tmp_path / "to"), 32, 90) == 0
    )
    assert "left out" in capfd.readouterr().err
    made = {path for path in (tmp_path / "to").rglob("*") if not path.is_dir()}
    assert made == {tmp_path / "to" / s / "cat.." / "-rf .jpg" for s in ("train", "val")}
    assert {path.read_bytes() for path in made} == {b"picture"}


# --- the environment ----------------------------------------------------------------


@pytest.mark.slow  # trains
def test_no_value_of_the_environment_reaches_a_file_of_the_workdir(
    command, tiny_config, tmp_path, monkeypatch
):
    secret = "marker5f1c9e"
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GIT_ASKPASS", "JAX_NOTE"):
        monkeypatch.setenv(name, f"{name}-{secret}")
    flags = f"--config={tiny_config}", "--config.num_epochs=0.02", "--workdir=run"
    done = command("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {p.name.split(".")[0]: p for p in (tmp_path / "run").rglob("*") if p.is_file()}
    kinds = {"config", "metrics", "events", "record", "variables", "optimizer", "curves"}
    assert kinds <= set(files)
    for path in (tmp_path / "run").rglob("*"):
        assert secret not in path.name
        assert path.is_dir() or secret.encode() not in path.read_bytes()
    assert secret not in done.stdout + done.stderr
