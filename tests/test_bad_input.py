"""Bad command lines and config values: exit code 2, one line that says it, nothing done."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from resjax import hosts

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")

# A row: the words of a command line; then what the answer has to contain. RUN is a run with
# checkpoints of steps 10 and 22; FILE is a file, EMPTY a folder with notes.txt.
TRAIN = [
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
    ("--config.label_smoothing=1", "label_smoothing", "1.0", "at least 0 and below 1"),
    ("--config.ema_decay=-0.1", "ema_decay", "-0.1", "at least 0 and below 1"),
    ("--config.head_lr_multiplier=0", "head_lr_multiplier", "0.0", "greater than 0"),
    ("--config.freeze_at=-1", "freeze_at", "-1", "0 or more"),
    ("--config.freeze_at=2", "config.freeze_at", "2", "no config.init_from"),
    ("--config.freeze_at=5 --config.init_from=x", "config.freeze_at", "5", "4 (stem to"),
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
    ("--config.model_kwargs.remat=often", "remat", "'often'", "none, blocks, convs"),
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
    ("--config.checkpoint.every_steps=-1", "checkpoint.every_steps", "-1", "0 or more"),
    ("--config.checkpoint.keep=1.5", "checkpoint.keep", "1.5", "whole number"),
    ("--config.checkpoint.keep_every_steps=-1", "keep_every_steps", "-1", "0 or more"),
    ("--config.checkpoint.keep_every_steps=x", "keep_every_steps", "'x'", "whole number"),
    ("--config.checkpoint.best_metric=top2", "best_metric", "'top2'", "top1, top5, loss"),
    ("--config.checkpoint.best=top1", "'checkpoint.best'", "checkpoint.best_metric"),
    ("--config.init_from=", "config.init_from", "''", "empty"),
    ("--config.optimizer=adam", "config.optimizer", "'adam'", "sgd, lars"),
    ("--config.warmup=none,gradual", "config.warmup", "'none,gradual'", "gradual"),
    ("--config.drop_epochs=30,x", "config.drop_epochs", "30,x", "separated by commas"),
    ("--config.lr_per_256=1e999", "config.lr_per_256", "inf", "number"),
    ("--workdir=file/run", "--workdir", "file/run", "cannot be written"),
    ("--workdir=gs2://bucket/run", "--workdir", "gs2://bucket/run"),
    ("--config.data.dir=tfds --config.data.name=cifar10", "tfds", "resjax.data cifar10"),
]

EVAL = [
    ("", "--workdir"),
    ("--workdir=rnu", "rnu", "no directory", "'run'"),
    ("--workdir=empty", "empty", "checkpoints", "notes.txt"),
    ("--workdir=", "--workdir", "empty"),
    ("--workdir=nowhere/rnu", "nowhere/rnu", "no directory"),
    ("--workdir=file", "file", "no directory"),
    ("--workdir=gs2://bucket/run", "--workdir", "gs2://bucket/run"),
    ("--workdir=run --step=99", "99", "[10, 22]"),
    ("--workdir=run --step=20", "20", "[10, 22]"),
    ("--workdir=run --step=abc", "--step", "'abc'", "best"),
    ("--workdir=run --step=bset", "--step", "'bset'", "'best'"),
    ("--workdir=run --step=1.5", "--step", "'1.5'", "'best'"),
    ("--workdir=run --step=", "--step", "''", "'best'"),
    ("--workdir=run --step=-1", "step", "-1", "neither a step nor 'best'"),
    ("--workdir=run/checkpoints", "run/checkpoints", "['10', '22']"),
    ("--workdir=run/checkpoints/99", "run/checkpoints/99", "['10', '22']"),
    ("--workdir=run/checkpoints/22 --step=22", "step", "22", "one checkpoint", "workdir"),
    ("--workdir=run/checkpoints/22 --step=best", "step", "'best'", "one checkpoint"),
    ("--workdir=run --split=tset", "split", "'tset'", "test"),
    ("--workdir=run --split=", "split", "''", "test", "train"),
    ("--workdir=run --batch_size=0", "--batch_size", "0", "1 or more"),
    ("--workdir=run --batch_size=-7", "--batch_size", "-7", "1 or more"),
    ("--workdir=run --batch_size=x", "--batch_size", "'x'"),
    ("--workdir=run --data_dir=nowhere", "dir", "nowhere", "no directory"),
    ("--workdir=run --data_dir=file", "dir", "file", "no directory"),
    ("--workdir=run --data_dir=", "--data_dir", "empty"),
    ("--workdir=run --stpe=3", "--stpe=3"),
    ("--workdir=run quickly", "quickly"),
]

DATA = [
    ("", "DATASET"),
    ("dgits", "DATASET", "'dgits'", "digits"),
    ("digits cifar10", "cifar10"),
    ("digits --smaple=3", "--smaple=3"),
    ("digits --data_dir=nowhere", "data.dir", "nowhere", "no directory"),
    ("digits --data_dir=file", "data.dir", "file", "no directory"),
    ("digits --data_dir=", "--data_dir", "''", "empty"),
    ("digits --sample=0", "--sample", "0", "greater than 0"),
    ("digits --sample=-3", "--sample", "-3", "greater than 0"),
    ("digits --sample=x", "--sample", "'x'"),
    ("digits --splits=train,tset", "--splits", "'tset'", "test"),
    ("digits --splits=", "--splits", "''", "test", "train"),
    ("digits --shrink=0", "--shrink", "0", "16 to 8192"),
    ("digits --shrink=8193", "--shrink", "8193", "16 to 8192"),
    ("digits --shrink=x", "--shrink", "'x'"),
    ("digits --shrink=64 --quality=0", "--quality", "0", "1 to 100"),
    ("digits --quality=101", "--quality", "101", "1 to 100"),
    ("digits --to=new", "--to", "--shrink=SIDE"),
    ("digits --to=", "--to", "''", "empty"),
    ("digits --shrink=64 --to=", "--to", "''", "empty"),
    ("digits --shrink=64 --to=file", "--to", "file", "no directory"),
    ("digits --shrink=64 --to=file/new", "--to", "file/new"),
    ("folder", "data.dir", "None", "folder of images"),
    ("folder --data_dir=nowhere", "data.dir", "nowhere", "no directory"),
    ("folder --data_dir=empty", "data.dir", "empty/train", "train/CLASS/IMAGE"),
]

CONVERT = [
    ("", "WEIGHTS", "--model", "--workdir"),
    ("file --workdir=new", "--model"),
    ("file --model=resnet50", "--workdir"),
    ("file --model=resnet50 --workdir=", "--workdir", "''", "give a folder"),
    ("file --model=resnet50 --workdir=empty", "--workdir", "empty", "not empty"),
    ("file --model=resnet50 --workdir=file", "--workdir", "file"),
    ("file --model= --workdir=new", "model", "''", "empty"),
    ("file --model=resnet51 --workdir=new", "file", ".safetensors", ".pth"),
    ("file --model=resnet50 --workdir=new --steps=3", "--steps=3"),
    ("file more --model=resnet50 --workdir=new", "'more'"),
    ("file --model=resnet50 --workdir=new --config.batch_size=x", "batch_size", "'x'"),
    ("file --model=resnet50 --workdir=new --config.btch=8", "'btch'", "batch_size"),
    ("nowhere.pth --model=resnet50 --workdir=new", "weights", "nowhere.pth", "no file"),
    ("empty --model=resnet50 --workdir=new", "weights", "empty", "no file"),
]

REPORT = [
    ("", "RUN"),
    ("rnu", "no directory", "rnu", "'run'"),
    ("file", "file", "no directory"),
    ("empty", "empty", "no run", "notes.txt"),
    ("run empty", "empty", "no run", "notes.txt"),
    ("run run", "run and run", "config.seed=0"),
    ("run --json=new", "--json=new"),
    ("run --csv=", "--csv", "''", "empty"),
    ("run --csv=nowhere/new.csv", "--csv", "nowhere/new.csv", "cannot be written"),
    ("run --csv=empty", "--csv", "empty", "cannot be written"),
    ("run --plot=", "--plot", "''", "empty"),
    ("run --plot=nowhere/new.png", "--plot", "nowhere/new.png", "cannot be written"),
    ("run --plot=new.bmpp", "--plot", "new.bmpp", "png", "svg"),
    ("run --csv=new.csv --plot=new.bmpp", "--plot", "new.bmpp", "png"),
    ("run --csv=new.csv --plot=nowhere/new.png", "--plot", "nowhere/new.png"),
]

# For train.py and eval.py.
_HERE = "--coordinator_address=localhost:1"
CLUSTER = [
    ("--num_processes=2", "--coordinator_address, --process_id", "all three"),
    ("--process_id=0", "--coordinator_address, --num_processes", "all three"),
    (_HERE, "--num_processes, --process_id", "all three"),
    ("--num_processes=2 --process_id=1", "--coordinator_address", "all three"),
    (f"{_HERE} --num_processes=x --process_id=0", "--num_processes", "'x'"),
    (f"{_HERE} --num_processes=2 --process_id=1.5", "--process_id", "'1.5'"),
    (f"{_HERE} --num_processes=0 --process_id=0", "--num_processes", "0", "1 or more"),
    (f"{_HERE} --num_processes=2 --process_id=2", "--process_id", "2", "from 0 to 1"),
    (f"{_HERE} --num_processes=2 --process_id=-1", "--process_id", "-1", "from 0 to 1"),
    (f"{_HERE} --num_processes=2 --process_id=1", "localhost:1", "refused"),
    (
        "--coordinator_address=localhost --num_processes=2 --process_id=1",
        *("--coordinator_address", "localhost", "HOST:PORT"),
    ),
]

# Run as a user runs them.
IN_A_PROCESS = [
    ("train.py", "--config.batchsize=3", "config", "'batchsize'", "batch_size"),
    ("train.py", "--config.batch_size=130", "batch_size", "130", "4 dev", "128 or 132"),
    ("train.py", "--config.data.dir=nowhere", "data.dir", "nowhere", "no directory"),
    ("eval.py", "", "--workdir"),
]

# How the line begins.
PROGRAMS = {
    "train.py": "train.py",
    "eval.py": "eval.py",
    "resjax/data/__main__.py": "python -m resjax.data",
    "resjax/convert.py": "convert.py",
    "resjax/report.py": "report.py",
}
ROWS = [
    *(("train.py", *row) for row in TRAIN),
    *(("eval.py", *row) for row in EVAL),
    *(("resjax/data/__main__.py", *row) for row in DATA),
    *(("resjax/convert.py", *row) for row in CONVERT),
    *(("resjax/report.py", *row) for row in REPORT),
    *(
        (name, f"--workdir=run {flags}", *row)
        for name in ("train.py", "eval.py")
        for flags, *row in CLUSTER
    ),
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
def folder(tmp_path, digits_run, monkeypatch):
    """Where the command is started: files of all kinds, and the run `run`."""
    (tmp_path / "file").write_text("no folder")
    for name in ("empty", "tfds"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("no run")
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(digits_run.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")  # so that the list has a gap
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def check_refusal(script, code, out, err, words):
    assert (code, out) == (2, ""), err
    assert err.startswith(f"{PROGRAMS[script]}: error: ") and err.endswith("\n"), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


@pytest.fixture
def refuses(monkeypatch, capfd):
    """refuses("train.py", ["--flag"], ["word"]) runs it in this process: that is fast."""
    # A process 0 that is not there is not waited for.
    monkeypatch.setattr(hosts, "_MEET_SECONDS", 0)

    def check(script, flags, words):
        capfd.readouterr()  # what came before
        before = contents(Path.cwd())
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        check_refusal(script, stop.value.code, *capfd.readouterr(), words)
        assert contents(Path.cwd()) == before

    return check


def name_of(row):
    return " ".join(row[:2])


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_wrong_command_line_is_refused_in_one_line_and_changes_nothing(
    refuses, folder, row
):
    script, flags, *words = row
    refuses(script, flags.split(), words)


@pytest.mark.parametrize("row", IN_A_PROCESS, ids=name_of)
def test_a_process_refuses_in_one_line_and_changes_nothing(command, folder, row):
    script, flags, *words = row
    before = contents(folder)
    done = command(script, *flags.split(), devices=4, cwd=folder)
    check_refusal(script, done.returncode, done.stdout, done.stderr, words)
    assert contents(folder) == before


def test_rows_are_many_and_no_two_are_the_same():
    asked = [tuple(row[:2]) for row in ROWS]
    assert len(set(asked)) == len(asked) >= 110
