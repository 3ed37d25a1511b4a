"""What the README and the docs say is there, runs, and is so."""

import csv
import dataclasses
import itertools
import re
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT, random_variables

import figures
import resjax
from figures import gallery, lesion
from resjax import build, convert, report, sweep
from resjax import config as configs
from resjax.comparisons import COMPARISONS
from resjax.config import ModelKwargs

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_named_is_there(page):
    text = page.read_text()
    named = set(re.findall(r"\]\(([\w/.]+)\)|`([\w/]+\.(?:py|md|txt))[`:]", text))
    for path in filter(None, (a or b for a, b in named)):
        places = [ROOT / path, ROOT / "resjax" / path, ROOT / "resjax/models" / path]
        places += [ROOT / "resjax/data" / path, page.parent / path]
        assert any(place.exists() for place in places), path
    for path, test in re.findall(r"`([\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_number_is_still_to_be_filled_in(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    assert not re.search(r"\b(TODO|FIXME|XXX)\b|\b[A-Z]+_[A-Z]+\b", prose)


def test_every_model_named_is_there():
    families = README[
        README.index("| family | models |") : README.index("Shortcuts A, B, C")
    ]
    assert set(re.findall(r"`(\w+)`", families)) <= set(resjax.list_models())


@pytest.mark.slow
@pytest.mark.long
def test_the_weights_recipe_runs(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from safetensors.numpy import save_file

    variables = resjax.init(resjax.create_model("resnet18"), jax.random.key(0))
    path = tmp_path / "model.safetensors"
    save_file(resjax.to_torch(variables, "resnet18"), path)
    hub = SimpleNamespace(hf_hub_download=lambda repository, file: path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    scope = {}
    exec(blocks("python")[4], scope)
    assert scope["logits"].shape == (1, 1000)
    shapes = jax.eval_shape(scope["model"].apply, scope["variables"], scope["images"])
    assert shapes.shape == (1, 10)
    assert list(scope["stages"]) == ["stage1", "stage2", "stage3", "stage4"]


def test_the_recipes_of_a_notebook_run(tmp_path, monkeypatch):
    config = configs.load_config(ROOT / "configs" / "digits.py")
    config = dataclasses.replace(config, model_kwargs=ModelKwargs(stage_sizes=(1, 1, 1)))
    variables = random_variables(build.build_model(config))
    convert.write_checkpoint(tmp_path / "runs" / "digits", variables, config)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(blocks("python")[2] + blocks("python")[3], scope)
    assert scope["probabilities"].shape == (2, 10)
    assert scope["maps"].shape == (2, 2, 2) and scope["pixels"].shape == (2, 8, 8)


@pytest.mark.slow
def test_the_ablation_recipe_runs():
    scope = {}
    exec(blocks("python")[0], scope)
    assert scope["logits"].shape == (8, 10)
    default, mine = scope["default"]["params"], scope["mine"]["params"]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a / 2, b), default, mine)
    assert not scope["zero_gamma"]["params"]["stage1"]["block1"]["norm_out"]["scale"].any()


@pytest.mark.slow
@pytest.mark.long
def test_the_sweep_recipe_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    load, shape = configs.load_config, configs.ModelKwargs(stage_sizes=(1,), width=4)

    def load_small(path):
        return dataclasses.replace(load(path), num_epochs=0.2, model_kwargs=shape)

    monkeypatch.setattr(configs, "load_config", load_small)
    scope = {}
    exec(blocks("python")[0] + blocks("python")[1], scope)
    result = scope["result"]
    assert result.members[-1] == {"init": "halved", "seed": 1, "lr_per_256": 0.2}
    assert result.train_loss.shape == (8, 2) and result.test_error.shape == (8, 1)


def test_the_sweep_commands_plan_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"^python -m resjax\.sweep (.*)$", README, re.MULTILINE)
    assert len(commands) == 3
    for words in map(str.split, commands):
        name = None if words[0].startswith("--") else words[0]
        vary = [word for flag, word in itertools.pairwise(words) if flag == "--vary"]
        own = [word for word in words if word.startswith("--config.")]
        members, _ = sweep.plan(name, sweep.parse_vary(vary), None, own)
        assert len(members) >= 4
    listed = re.search(r"comparisons of\s+the papers, ([`\w, \n]*?), which end", README)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == set(COMPARISONS)


def test_the_training_commands_parse():
    sys.path.insert(0, str(ROOT))
    import train

    commands = re.findall(r"python train\.py( --[^`\n]*)?$", README, re.MULTILINE)
    assert len(commands) >= 2
    for flags in commands:
        words = flags.replace("configs/", f"{ROOT}/configs/").split()
        config, _, place = train.parse([w for w in words if w.startswith("--")])
        assert config.model in resjax.list_models()
        assert len({value is None for value in place.values()}) == 1


GALLERY = ROOT / "docs/gallery.md"
HOLDS = {"As": "yes", "In part as": "in part", "Not as": "no", "Within the noise": "noise"}


def section_of(name):
    """A figure's part of the gallery, and its table."""
    sections = GALLERY.read_text().split("\n## ")[1:]
    (section,) = (text for text in sections if f"(figures/{name}.png)" in text)
    with open(ROOT / f"docs/figures/{name}.csv", newline="") as file:
        return section, list(csv.DictReader(file))


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_gallery_says_what_the_tables_of_the_comparisons_have(name):
    section, rows = section_of(name)
    assert COMPARISONS[name].title in section and COMPARISONS[name].claim in section
    table = {
        report.format_spread(
            (float(row[number]), float(row[f"{number}_std"] or "nan")), digits
        )
        for row in rows
        for number, digits in (("error", 2), ("train_error", 2), ("train_loss", 3))
    }
    said = re.findall(r"[\d.]+ ± [\d.]+", section)
    assert said and {text.replace("±", "+-") for text in said} <= table
    assert all(len(row["seeds"].split()) >= 3 for row in rows)


def test_the_gallery_says_what_the_tables_of_the_figures_have():
    section, rows = section_of("lesion")
    rows = [{**row, "error": float(row["error"])} for row in rows]
    for model in dict.fromkeys(row["model"] for row in rows):
        _, intact = lesion.by_seed(rows, model, "none", "count")
        _, deleted = lesion.by_seed(rows, model, "delete", "block")
        for errors in (intact[:, 0], np.median(deleted, axis=1), deleted.max(axis=1)):
            assert figures.text(errors).replace("+-", "±") in section

    section, rows = section_of("responses")
    for model in dict.fromkeys(row["model"] for row in rows):
        mean = np.mean([float(row["mean"]) for row in rows if row["model"] == model])
        assert f"{model} {mean:.3f} ± " in section

    section, rows = section_of("paths")
    shares = [
        sum(
            100 * float(row["share"])
            for row in rows
            if row["seed"] == seed and 5 <= int(row["lengths"]) <= 17
        )
        for seed in "012"
    ]
    assert figures.text(shares).replace("+-", "±") + " % of the gradient" in section


def test_the_gallery_begins_as_its_script_has_it():
    assert GALLERY.read_text().startswith(gallery.HEAD)


def test_the_gallery_of_the_readme_is_that_of_the_page():
    text = README[README.index("## Gallery") : README.index("## Recipes")]
    rows = re.findall(r"^\| `(\w+)` \|.*$", text, re.MULTILINE)
    assert rows == [*COMPARISONS, "responses", "lesion", "paths"]
    for name, line in zip(rows, re.findall(r"^\| `.*$", text, re.MULTILINE), strict=True):
        section, _ = section_of(name)
        outcome = re.search(r"\*\*(.+?)( in the paper)?: ", section)[1]
        assert line.endswith(f" | {HOLDS[outcome]} |"), name
        spreads = re.findall(r"([\d.]+) ± ([\d.]+)", line)
        assert spreads
        for mean, std in spreads:
            assert f"{mean} ± {std}" in section, (name, mean, std)
