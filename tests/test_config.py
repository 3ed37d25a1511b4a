"""Config fields, their ranges, and what a command line makes of them."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from resjax import config as configs
from resjax.config import Config, DataConfig, NormConfig, UsageError
from resjax.data.datasets import DATASETS
from resjax.data.recipes import RECIPES
from resjax.initializers import SCHEMES


def error_of(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "word, field, value",
    [
        ("--config.batch_size=64", "batch_size", 64),
        ("--config.lr_per_256=1", "lr_per_256", 1.0),
        ("--config.lr_per_256=1e-3", "lr_per_256", 1e-3),
        ("--config.warmup_start_lr=none", "warmup_start_lr", None),
        ("--config.warmup_start_lr=0.5", "warmup_start_lr", 0.5),
        ("--config.data.recipe=none", "data.recipe", "none"),  # no augmentation
        ("--config.nesterov=false", "nesterov", False),
        ("--config.nesterov=True", "nesterov", True),
        ("--config.drop_epochs=30,60", "drop_epochs", (30.0, 60.0)),
        ("--config.drop_epochs=(30,)", "drop_epochs", (30.0,)),
        ("--config.drop_epochs=30", "drop_epochs", (30.0,)),
        ("--config.drop_epochs=()", "drop_epochs", ()),
        ("--config.schedule=cosine", "schedule", "cosine"),
        ("--config.data.name=cifar10", "data.name", "cifar10"),
        ("--config.data.dir=/a=b", "data.dir", "/a=b"),
        ("--config.data.dir=3", "data.dir", "3"),
        ("--config.model_kwargs.shortcut=B", "model_kwargs.shortcut", "B"),
        ("--config.model_kwargs.shortcut=none", "model_kwargs.shortcut", "none"),
        (
            "--config.model_kwargs.stochastic_depth=0.2",
            "model_kwargs.stochastic_depth",
            0.2,
        ),
        ("--config.model_kwargs.remat=convs", "model_kwargs.remat", "convs"),
        ("--config.model_kwargs.remat=none", "model_kwargs.remat", "none"),
        ("--config.model_kwargs.remat=true", "model_kwargs.remat", "blocks"),
        ("--config.model_kwargs.remat=False", "model_kwargs.remat", "none"),
        ("--config.norm.virtual_batch_size=32", "norm.virtual_batch_size", 32),
    ],
)
def test_override_sets_the_field_and_no_other(word, field, value):
    changed = configs.override(Config(), [word])
    before, after = configs.flatten(Config()), configs.flatten(changed)
    assert after == {**before, field: value}
    assert type(after[field]) is type(value)


@pytest.mark.parametrize(
    "word, parts",
    [
        ("--config.batchsize=3", ["batchsize", "batch_size"]),
        ("--config.data.nam=x", ["data.nam", "data.name"]),
        ("--config.data=x", ["'data'", "data.dir"]),
        ("--config.batch_size=abc", ["config.batch_size", "'abc'", "whole number"]),
        ("--config.batch_size=1.5", ["config.batch_size", "1.5", "whole number"]),
        ("--config.batch_size=true", ["config.batch_size", "True", "whole number"]),
        ("--config.batch_size=0", ["config.batch_size", "0", "greater than 0"]),
        ("--config.batch_size=-1", ["config.batch_size", "-1", "greater than 0"]),
        ("--config.nesterov=7", ["config.nesterov", "7", "true or false"]),
        ("--config.lr_per_256=1e999", ["config.lr_per_256", "inf", "number"]),
        ("--config.momentum=1", ["config.momentum", "1.0", "below 1"]),
        ("--config.seed=-1", ["config.seed", "-1", "from 0"]),
        ("--config.schedule=linear", ["config.schedule", "'linear'", "step, cosine"]),
        ("--config.schedule=true", ["config.schedule", "True", "step, cosine"]),
        ("--config.model_kwargs.remat=1", ["remat", "'1'", "none, blocks, convs"]),
        ("--config.drop_epochs=30,x", ["config.drop_epochs", "list of numbers"]),
        ("--config.drop_epochs=30,-1", ["config.drop_epochs", "greater than 0"]),
        ("--config.drop_epochs=60,30", ["config.drop_epochs", "increasing"]),
        (
            "--config.norm.virtual_batch_size=48",
            ["virtual_batch_size", "batch_size=128"],
        ),
        ("--config.batch_size", ["--config.batch_size=VALUE"]),
        ("--batch_size=3", ["--batch_size=3", "--help"]),
        ("digits", ["'digits'", "--help"]),
    ],
)
def test_what_does_not_fit_is_named(word, parts):
    message = error_of(configs.override, Config(), [word])
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "word, published",
    [
        ("--config.seed=3", "8.75"),
        ("--config.log_every_steps=7", "8.75"),
        ("--config.batch_size=256", None),
        ("--config.published_error=9.1", "9.1"),
    ],
)
def test_what_is_published_is_of_the_recipe_as_it_stands(word, published):
    config = configs.override(Config(published_error="8.75"), [word])
    assert config.published_error == published


def test_the_order_of_overrides_does_not_matter_to_joint_checks():
    words = ["--config.norm.virtual_batch_size=48", "--config.batch_size=96"]
    assert configs.override(Config(), words).norm.virtual_batch_size == 48


def test_a_config_survives_json():
    config = Config(
        drop_epochs=(1.5, 2.5), norm=NormConfig(32), data=DataConfig(dir="/x"), seed=7
    )
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert configs.from_dict(stored) == config


@pytest.mark.parametrize("before, now", [(True, "blocks"), (False, "none"), (None, "none")])
def test_what_remat_was_called_before_is_understood(before, now):
    stored = dataclasses.asdict(Config())
    stored["model_kwargs"]["remat"] = before
    config = configs.from_dict(json.loads(json.dumps(stored)))
    assert config.model_kwargs.remat == now
    again = configs.override(Config(), [f"--config.model_kwargs.remat={now}"])
    assert configs.differences(config, again) == []  # so that a run goes on


def test_a_stored_config_of_another_version_is_named():
    stored = {**dataclasses.asdict(Config()), "bach_size": 3}
    assert "bach_size" in error_of(configs.from_dict, stored)


def test_a_python_config_is_checked_like_a_command_line():
    assert "config.batch_size" in error_of(configs.validate, Config(batch_size="64"))
    assert configs.validate(Config(num_epochs=3)).num_epochs == 3.0


def test_differences_name_what_changes_the_numbers_and_nothing_else():
    free = dataclasses.replace(
        Config(), parallel="shard_map", log_every_steps=1, data=DataConfig(dir="/elsewhere")
    )
    assert configs.differences(Config(), free) == []
    (line,) = configs.differences(Config(), dataclasses.replace(Config(), seed=3))
    assert line == "config.seed was 0 and is now 3"


NEW = {
    "freeze_at": 0,
    "head_lr_multiplier": 1.0,
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
}


def test_a_run_from_before_these_fields_goes_on_with_their_defaults_alone():
    stored = dataclasses.asdict(Config(init_from="x"))
    for name, default in NEW.items():
        assert stored.pop(name) == default
    config = configs.from_dict(json.loads(json.dumps(stored)))
    assert config == Config(init_from="x")
    for name, value in zip(NEW, (1, 2.0, 0.1, 0.9), strict=True):
        changed = configs.override(config, [f"--config.{name}={value}"])
        (line,) = configs.differences(config, changed)
        assert line == f"config.{name} was {NEW[name]!r} and is now {value!r}"


def test_layers_are_frozen_only_of_weights_that_were_given():
    message = error_of(configs.override, Config(), ["--config.freeze_at=2"])
    assert "config.freeze_at: 2" in message and "config.init_from" in message
    words = ["--config.freeze_at=2", "--config.init_from=runs/x"]
    assert configs.override(Config(), words).freeze_at == 2


@pytest.mark.parametrize(
    "words, unread",
    [
        ([], {"warmup_epochs", "warmup_start_lr"}),  # goyal, of 128
        (["batch_size=512"], set()),
        (["batch_size=512", "schedule=cosine"], {"drop_epochs"}),
        (["warmup=gradual", "warmup_epochs=0"], {"warmup_start_lr"}),
    ],
)
def test_fields_of_the_schedule_that_a_run_does_not_read_are_known(words, unread):
    config = configs.override(Config(), [f"--config.{word}" for word in words])
    assert configs.unread_fields(config).keys() == unread


def test_free_fields_exist():
    assert set(configs.FREE_FIELDS) <= set(configs.fields())


def test_help_lists_every_field_and_what_it_means():
    text = configs.fields_help()
    assert all(f"  {name} = " in text for name in configs.fields())
    words = " ".join(text.split())
    assert all(f["about"] in words for f in (x.metadata for x in configs.fields().values()))


def test_help_names_the_rows_of_the_tables():
    words = re.split(r"[ ,;:()]+", " ".join(configs.fields_help().split()))
    schemes = {name.removesuffix("_zero_gamma") for name in SCHEMES}
    assert not {*schemes, *RECIPES, *DATASETS} - {*words}


@pytest.mark.parametrize(
    "code, part",
    [
        ("def get_config(): return 3", "no resjax Config"),
        ("x = 3", "get_config"),
        ("def get_config(): raise OSError('a\\nb')", "OSError: a b"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_a_config_file_that_does_not_work_is_named(tmp_path, code, part):
    path = tmp_path / "mine.py"
    path.write_text(code)
    message = error_of(configs.load_config, path)
    assert str(path) in message and part in message


def test_a_missing_config_file_names_those_that_are_there(tmp_path):
    (tmp_path / "one.py").write_text("")
    assert "one.py" in error_of(configs.load_config, tmp_path / "two.py")


@pytest.mark.parametrize("given", ["digits", "digits.py", "configs/digits", "digits.yaml"])
def test_a_config_without_its_folder_or_ending_is_guessed(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").write_text("")
    (tmp_path / "train.py").write_text("")
    message = error_of(configs.load_config, Path(given))
    assert message.endswith(f"no file {given}; did you mean configs/digits.py?")
    message = error_of(configs.load_config, Path("mnist"))
    assert message.endswith("there are ['configs/digits.py']")


def test_of_many_config_files_ten_are_named(tmp_path):
    for i in range(12):
        (tmp_path / f"c{i:02}.py").write_text("")
    message = error_of(configs.load_config, tmp_path / "two.py")
    assert "c09.py'] and 2 more" in message and "c10.py" not in message


@pytest.mark.parametrize(
    "name, near",
    [
        ("lr", "lr_per_256"),
        ("shortcut", "model_kwargs.shortcut"),
        ("dir", "data.dir"),
        ("norm", "norm.kind or norm.virtual_batch_size"),
    ],
)
def test_a_field_is_found_by_its_last_part_or_its_beginning(name, near):
    message = error_of(configs.override, Config(), [f"--config.{name}=1"])
    assert message.endswith(f"no {name!r}; did you mean {near}?")


def test_unknown_name_offers_the_nearest_or_all():
    assert "did you mean alpha?" in str(configs.unknown_name("x", "alpa", ["alpha", "b"]))
    assert "['alpha', 'b']" in str(configs.unknown_name("x", "zzz", ["alpha", "b"]))
