"""Imports point down only, every module has its test, and importing resjax costs little."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# From the top to the bottom; a module may import only what stands below it.
ORDER = [
    "sweep",
    "comparison_pictures",
    "comparisons",
    "analysis.sweeps",
    "build_members",
    "analysis.propagation",
    "analysis.paths",
    "analysis.lesions",
    "analysis.excitation",
    "analysis.attribution",
    "analysis.seeing",
    "analysis.probe",
    "analysis.resnext",
    "run_evaluation",
    "runs",
    "evaluation_pictures",
    "evaluation",
    "build_prediction",
    "convert",
    "report",
    "training",
    "workdirs",
    "build",
    "build_data",
    "compilation_cache",
    "hooks",
    "loop",
    "records",
    "precise_bn",
    "steps",
    "checkpoint_writer",
    "checkpoint",
    "parallel",
    "hosts",
    "signals",
    "weights",
    "models.counting",
    "models.dense",
    "models.fold",
    "models.resnet",
    "models.blocks",
    "models.norm",
    "models.ops",
    "models.lowerings",
    "data.__main__",
    "data.shrink",
    "data.describe",
    "data.resident",
    "data.pipeline",
    "data.workers",
    "data.sources",
    "data.tfrecord",
    "data.folder",
    "data.digits",
    "data.datasets",
    "data.recipes",
    "data.crops",
    "data.augment",
    "data.views",
    "data.decode",
    "data.jpeg",
    "data.order",
    "initializers",
    "optim",
    "schedules",
    "metrics",
    "losses",
    "loss_scale",
    "config",
]
MODULES = sorted((ROOT / "resjax").rglob("*.py"))


def module_name(path):
    return ".".join(path.relative_to(ROOT / "resjax").with_suffix("").parts)


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resjax"):
            base = node.module.removeprefix("resjax").removeprefix(".")
            names = [f"{base}.{alias.name}".removeprefix(".") for alias in node.names]
            yield from (name if name in ORDER else base for name in names)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    if path.name == "__init__.py":
        return
    assert name in ORDER, f"{name} has no place in ORDER"
    for imported in imported_modules(path):
        assert ORDER.index(imported) > ORDER.index(name), f"{name} imports {imported}"


def test_order_lists_no_module_that_is_gone():
    assert set(ORDER) == {module_name(p) for p in MODULES if p.name != "__init__.py"}


@pytest.mark.parametrize("name", ORDER)
def test_every_module_has_its_test(name):
    *folders, last = name.split(".")
    assert ROOT.joinpath("tests", *folders, f"test_{last}.py").exists()


@pytest.mark.parametrize("name", ORDER)
def test_every_module_is_in_the_table_of_contributors(name):
    *folders, last = name.split(".")
    table = (ROOT / "CONTRIBUTING.md").read_text()
    named = f"`resjax/{folders[0]}/`" if folders else f"{last}.py`"
    assert named in table, f"CONTRIBUTING.md does not say where {name} belongs"


def test_exported_names():
    import resjax

    models = [
        "BatchNorm",
        "count_macs",
        "count_params",
        "create_model",
        "fold_batch_norm",
        "init",
        "list_models",
    ]
    assert sorted(resjax.__all__) == sorted([*models, "from_torch", "restore", "to_torch"])


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_import_loads_no_other_framework_and_touches_no_device():
    python(
        "import sys, resjax\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'tensorflow', 'torch', 'tensorflow_datasets', 'grain',"
        " 'cv2', 'orbax', 'sklearn', 'matplotlib'}, loaded\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )


def test_import_is_no_slower_than_what_it_stands_on():
    # Processor time, in turns, the least of each: other work on the machine only adds.
    clock = "import time; import {}; print(time.process_time())"
    ours, peers = clock.format("resjax"), clock.format("jax, flax.linen, optax")
    times = [(float(python(ours)), float(python(peers))) for _ in range(3)]
    our_time, peers_time = map(min, zip(*times, strict=True))
    assert our_time <= 1.25 * peers_time
