"""Bad input: exit code 2, one line that names what is wrong, and nothing written."""

import runpy
import shutil
import sys

import pytest
from conftest import ROOT

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")

# Run as a user runs them; then what the answer has to contain.
TRAIN_COMMANDS = {
    "unknown field": (["--config.batchsize=3"], ["config", "'batchsize'", "batch_size"]),
    "devices": (["--config.batch_size=130"], ["batch_size", "130", "4 dev", "128 or 132"]),
    "data folder": (["--config.data.dir=nowhere"], ["data.dir", "nowhere", "no directory"]),
    "unwritable": (["--workdir=file/run"], ["--workdir", "file/run"]),
}

# More of them, run in this process, which is faster.
TRAIN_VARIANTS = [
    ("digits", "'digits'", "--help"),
    ("--config.num_classes=11", "num_classes", "11", "digits", "10 "),
    ("--config.batch_size=abc", "batch_size", "'abc'", "whole number"),
    ("--config.batch_size=-1", "batch_size", "-1", "greater than 0"),
    ("--config.batch_size=0", "batch_size", "0", "greater than 0"),
    ("--config.model=cifar_resnet21", "model", "'cifar_resnet21'", "cifar_resnet20"),
    ("--config.data.name=digit", "config.data.name", "'digit'", "digits"),
    ("--config.init=msra_fanout", "init", "'msra_fanout'", "msra_fan_out"),
    ("--config.norm.group=3", "'norm.group'"),
    ("--config.data.nam=digits", "'data.nam'", "data.name"),
    ("--config.batch_size=1.5", "batch_size", "1.5", "whole number"),
    ("--config.batch_size=", "batch_size", "''", "whole number"),
    ("--config.nesterov=7", "nesterov", "7", "true or false"),
    ("--config.momentum=1", "momentum", "1.0", "at least 0 and below 1"),
    ("--config.lr_per_256=-0.1", "lr_per_256", "-0.1", "greater than 0"),
    ("--config.lr_per_256=nan", "lr_per_256", "nan", "number"),
    ("--config.lr_per_256=inf", "lr_per_256", "inf", "number"),
    ("--config.num_epochs=0", "num_epochs", "0", "greater than 0"),
    ("--config.data.image_size=0", "data.image_size", "0", "greater than 0"),
    ("--config.data.recipe=cifra", "data.recipe", "'cifra'", "cifar"),
    ("--config.data.name=folder", "data.dir", "folder of images"),
    ("--config.data.skip_errors=-1", "data.skip_errors", "-1", "0 or more"),
    ("--config.data.num_workers=-1", "data.num_workers", "-1", "0 or more"),
    ("--config.data.prefetch=0", "data.prefetch", "0", "greater than 0"),
    ("--config.data.on_device=maybe", "data.on_device", "'maybe'", "true or false"),
    ("--config.data.steps_per_dispatch=-1", "steps_per_dispatch", "-1", "0 or more"),
    ("--config.num_classes=0", "num_classes", "0", "greater than 0"),
    ("--config.log_every_steps=0", "log_every_steps", "0", "greater than 0"),
    ("--config.eval_every_epochs=0", "eval_every_epochs", "0", "greater than 0"),
    ("--config.checkpoint.keep=0", "checkpoint.keep", "0", "greater than 0"),
    ("--config.weight_decay=-1", "weight_decay", "-1", "0 or more"),
    ("--config.seed=-1", "seed", "-1", "2**32"),
    ("--config.drop_epochs=60,30", "drop_epochs", "60", "increasing"),
    ("--config.schedule=cosin", "schedule", "'cosin'", "cosine"),
    ("--config.dtype=float8", "dtype", "'float8'", "bfloat16"),
    ("--config.parallel=pjit", "parallel", "'pjit'", "shard_map"),
    ("--config.model_kwargs.shortcut=D", "shortcut", "'D'", "A, B, C"),
    ("--config.batch_size", "--config.batch_size=VALUE"),
    ("--config.norm.virtual_batch_size=7", "norm.virtual_batch_size", "7", "128"),
    ("--config.microbatch=8", "virtual_batch_size", "128", "config.microbatch=8"),
    ("--config.microbatch=-8", "config.microbatch", "-8", "0 or more"),
    ("--config.batch_size=4", "config.batch_size", "4", "nearest", "8"),
    ("--config.model_kwargs.stochastic_depth=1", "stochastic_depth", "1.0", "below 1"),
    ("--config.model_kwargs.remat=often", "remat", "'often'", "true or false"),
    ("--config=zero.py", "init", "msra_fan_out_zero_gamma", "cifar_plain20", "norm_out"),
    ("--config=drop.py", "stochastic_depth", "0.5", "plain net"),
    ("--config.init=he", "init", "'he'", "msra_fan_out", "xavier"),
    ("--config.data.name=mnist", "data.name", "'mnist'", "cifar10", "imagenet2012"),
    ("--config.data.dir=file", "data.dir", "file", "no directory"),
    ("--workdir=file", "--workdir", "file"),
    ("--wrkdir=runs/digits", "--wrkdir"),
    ("--workdir", "--workdir", "argument"),
    ("--workdir=", "--workdir", "empty"),
    ("--config.data.dir=", "data.dir", "empty"),
    ("--config.num_epochs=1e9", "num_epochs", "2**31"),
    ("--config.eval_every_epochs=1e-6", "eval_every_epochs", "1e-06", "step"),
    ("--config=nowhere.py", "--config", "nowhere.py", "mine.py", "raises.py"),
    ("--config=raises.py", "--config", "raises.py", "KeyError", "oops"),
    ("--config=syntax.py", "--config", "syntax.py", "SyntaxError"),
    ("--config=empty.py", "--config", "empty.py", "get_config"),
    ("--config=mine.py", "--config", "mine.py", "Config"),
    ("--config=wrong.py", "batch_size", "-3", "greater than 0"),
]

EVAL_COMMANDS = {
    "no flag": ([], ["--workdir"]),
    "no step": (["--workdir=run", "--step=99"], ["99", "[10, 22]"]),
}

EVAL_VARIANTS = [
    (["--workdir=rnu"], ["rnu", "no directory", "'run'"]),
    (["--workdir=empty"], ["empty", "checkpoints", "notes.txt"]),
    (["--workdir="], ["--workdir", "empty"]),
    (["--workdir=nowhere/rnu"], ["nowhere/rnu", "no directory"]),
    (["--workdir=file"], ["file", "no directory"]),
    (["--workdir=run", "--step=abc"], ["--step", "'abc'"]),
    (["--workdir=run", "--step=-1"], ["-1", "[10, 22]"]),
    (["--workdir=run", "--split=tset"], ["split", "'tset'", "test"]),
    (["--workdir=run", "--batch_size=0"], ["--batch_size", "0", "1 or more"]),
    (["--workdir=run", "--batch_size=-7"], ["--batch_size", "-7", "1 or more"]),
    (["--workdir=run", "--batch_size=x"], ["--batch_size", "'x'"]),
    (["--workdir=run", "--data_dir=nowhere"], ["dir", "nowhere", "no directory"]),
    (["--workdir=run", "--stpe=3"], ["--stpe=3"]),
    (["--workdir=run", "quickly"], ["quickly"]),
]

CONFIGS = {
    "raises.py": "def get_config():\n    raise KeyError('oops')\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "mine.py": "def get_config():\n    return {'batch_size': 8}\n",
    "zero.py": "from resjax.config import Config\n"
    "def get_config():\n"
    "    return Config(model='cifar_plain20', init='msra_fan_out_zero_gamma')\n",
    "drop.py": "from resjax.config import Config, ModelKwargs\n"
    "def get_config():\n"
    "    kwargs = ModelKwargs(stochastic_depth=0.5)\n"
    "    return Config(model='cifar_plain20', model_kwargs=kwargs)\n",
    "wrong.py": "from resjax.config import Config\n"
    "def get_config():\n    return Config(batch_size=-3)\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder_with_run(folder, digits_run):
    shutil.copytree(digits_run.workdir, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "20")  # so that the list has a gap
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no run")
    return folder


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def run_here(monkeypatch, capfd):
    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return stop.value.code, *capfd.readouterr()

    return run


def check_refusal(script, code, out, err, words):
    assert (code, out) == (2, "")
    assert err.startswith(f"{script}: error: ") and err.endswith("\n")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.mark.parametrize(("flags", "words"), TRAIN_COMMANDS.values(), ids=TRAIN_COMMANDS)
def test_train_refuses_in_one_line_and_writes_nothing(command, folder, flags, words):
    before = contents(folder)
    done = command("train.py", *flags, devices=4, cwd=folder)
    check_refusal("train.py", done.returncode, done.stdout, done.stderr, words)
    assert contents(folder) == before


@pytest.mark.parametrize(("flag", "words"), [(flag, w) for flag, *w in TRAIN_VARIANTS])
def test_train_refuses_each_variant(run_here, folder, flag, words):
    before = contents(folder)
    check_refusal("train.py", *run_here("train.py", flag), words)
    assert contents(folder) == before


@pytest.mark.parametrize(("flags", "words"), EVAL_COMMANDS.values(), ids=EVAL_COMMANDS)
def test_eval_refuses_in_one_line_and_writes_nothing(
    command, folder_with_run, flags, words
):
    before = contents(folder_with_run)
    done = command("eval.py", *flags, cwd=folder_with_run)
    check_refusal("eval.py", done.returncode, done.stdout, done.stderr, words)
    assert contents(folder_with_run) == before


@pytest.mark.parametrize(("flags", "words"), EVAL_VARIANTS)
def test_eval_refuses_each_variant(run_here, folder_with_run, flags, words):
    before = contents(folder_with_run)
    check_refusal("eval.py", *run_here("eval.py", *flags), words)
    assert contents(folder_with_run) == before


def test_a_data_set_that_is_not_prepared_is_answered_with_what_to_run(run_here, folder):
    (folder / "tfds").mkdir()
    flags = "--config.data.name=cifar10", f"--config.data.dir={folder / 'tfds'}"
    words = ["cifar10", str(folder / "tfds"), "run: ", "python -m resjax.data cifar10"]
    check_refusal("train.py", *run_here("train.py", *flags), words)
    assert not list((folder / "tfds").iterdir())


def test_a_workdir_of_another_config_is_left_as_it_is(command, folder_with_run, digits_run):
    before = contents(folder_with_run)
    other = "--workdir=run", "--config.seed=3", "--config.dtype=bfloat16"
    done = command("train.py", *digits_run.flags, *other, cwd=folder_with_run)
    words = ["run", "config.seed", "0", "3", "config.dtype", "bfloat16", "--workdir"]
    check_refusal("train.py", done.returncode, done.stdout, done.stderr, words)
    assert contents(folder_with_run) == before


def test_a_workdir_whose_config_cannot_be_read_is_left_as_it_is(run_here, folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text('{"batch')
    before = contents(folder)
    answer = run_here("train.py", "--workdir=run")
    check_refusal("train.py", *answer, ["run/config.json"])
    assert contents(folder) == before


def test_a_workdir_without_a_finished_checkpoint_has_nothing_to_evaluate(run_here, folder):
    (folder / "run" / "checkpoints").mkdir(parents=True)
    answer = run_here("eval.py", "--workdir=run")
    check_refusal("eval.py", *answer, ["no checkpoint", "run/checkpoints"])
