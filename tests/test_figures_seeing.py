"""The page of a net: what stands on it is what the net says of what is shown."""

import io

import numpy as np
import pytest
from conftest import ROOT, random_variables
from PIL import Image

import resjax
from figures import seeing
from resjax import build_data, convert
from resjax.config import Config, DataConfig, ModelKwargs, UsageError
from resjax.data import pipeline

pytestmark = pytest.mark.xdist_group("seeing")  # one worker runs all that share a page

SMALL = {
    "digits": Config(
        model="cifar_preact_resnet110",
        model_kwargs=ModelKwargs(stage_sizes=(1, 1), width=4),
        data=DataConfig("digits", image_size=8),
    ),
    "imagenet": Config(
        model="resnet18",
        model_kwargs=ModelKwargs(stage_sizes=(1, 1), width=8),
        dtype="bfloat16",
        num_classes=1000,
        data=DataConfig("imagenet2012", image_size=48),
    ),
}


@pytest.fixture(
    scope="module",
    params=["digits", pytest.param("imagenet", marks=(pytest.mark.slow, pytest.mark.long))],
)
def run(request, tmp_path_factory):
    """A workdir of a net with random weights, and it restored: (workdir, run)."""
    workdir = tmp_path_factory.mktemp("seeing") / request.param
    config = SMALL[request.param]
    model = resjax.create_model(
        config.model,
        stage_sizes=(1, 1),
        width=config.model_kwargs.width,
        num_classes=config.num_classes,
    )
    convert.write_checkpoint(workdir, random_variables(model), config)
    return workdir, resjax.restore(workdir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of image files of several sizes, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for i, shape in enumerate([(50, 70, 3), (64, 64, 3), (90, 60)]):
        pixels = random.randint(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def page(run, pictures):
    """What is examined of the run, and of which images: (run, page, images, labels)."""
    _, run = run
    images, labels = run.preprocess(_open(pictures)), None
    if run.config.data.name == "digits":
        source = build_data.build_source(run.config, "test")
        images, labels = pipeline.load_all(build_data.build_reader(run.config, source))
        images, labels = run.preprocess(images[:100]), labels[:100]
    return run, seeing.examine(run, images, labels, steps=3), images, labels


def _open(folder):
    return [Image.open(file).convert("RGB") for file in sorted(folder.iterdir())]


def test_the_page_says_what_the_net_says_of_its_pictures(page):
    run, page, images, labels = page
    if labels is None:
        shown = np.arange(len(images))
    else:
        shown = np.array([np.flatnonzero(labels == k)[0] for k in range(10)])
    logits = np.asarray(run.model.apply(run.variables, images[shown], train=False))
    exponents = np.exp(np.float64(logits - logits.max(axis=1, keepdims=True)))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    tolerance = 0.06 if run.model.dtype == "float32" else 3
    for i, caption in enumerate(page.captions):
        *own, seen, percent = caption.split("\n")
        assert own == ([] if labels is None else [run.class_names[i]])
        predicted = run.class_names.index(seen.removeprefix("seen as "))
        assert probabilities[i, predicted] >= probabilities[i].max() - 0.01
        said = float(percent.removesuffix(" %"))
        assert said == pytest.approx(100 * probabilities[i].max(), abs=tolerance)
    described = build_data.describe_preprocess(run.config)
    pixels = images[shown] * np.array(described["std"]) + np.array(described["mean"])
    np.testing.assert_allclose(page.pictures, pixels, atol=1e-5)
    assert (np.asarray(page.maps["stage2"][1]).std(axis=(1, 2)) > 0).any()


def test_the_exciting_pictures_are_of_the_probability_that_is_told(page):
    run, page, *_ = page
    described = build_data.describe_preprocess(run.config)
    # As one would look at the file: eight bits a pixel.
    pictures = np.round(page.exciting * 255) / 255
    images = (pictures - described["mean"]) / np.array(described["std"])
    probabilities = run.predict(images.astype(np.float32))
    is_digits = run.config.data.name == "digits"
    for row, caption in zip(probabilities, page.exciting_captions, strict=True):
        name, percent = caption.split("\n")
        said = float(percent.removesuffix(" %"))
        found = 100 * row[run.class_names.index(name)]
        assert said == pytest.approx(found, abs=1 + 0.05 * found)
    assert len(page.exciting) == 10
    # Grey as the digits are, or not.
    assert (np.ptp(page.exciting, axis=-1).max() < 1e-5) == is_digits


def test_the_channels_shown_are_those_of_the_largest_weights(page):
    run, page, images, _ = page
    weights = np.asarray(run.variables["params"]["head"]["kernel"])
    _, stages = run.model.apply(run.variables, images, train=False, return_stages=True)
    maps = np.float32(stages["stage2"])
    described = build_data.describe_preprocess(run.config)
    for name, pictures, positions in page.tops:
        channel, label = name.removeprefix("channel ").split("\nfor ")
        channel, label = int(channel), run.class_names.index(label)
        assert weights[channel, label] == weights[:, label].max()
        largest = maps[..., channel].max(axis=(1, 2))
        first = (pictures[0] - described["mean"]) / np.array(described["std"])
        place = np.abs(images - first).max(axis=(1, 2, 3)).argmin()
        tolerance = 1e-4 if run.model.dtype == "float32" else 0.02
        assert largest[place] >= largest.max() * (1 - tolerance)
        assert len(pictures) == len(positions) == min(10, len(images))


def test_every_part_of_the_page_is_drawn(page):
    _, page, *_ = page
    figure = seeing.draw(page)
    titles = [part._suptitle.get_text() for part in figure.subfigs]
    assert len(titles) == 5
    drawn = [sum(len(axes.images) > 0 for axes in part.axes) for part in figure.subfigs]
    pictures = len(page.pictures)
    assert drawn == [
        len(page.filters),
        sum(1 + len(maps) for _, maps in page.maps.values()),
        sum(len(shown) for _, shown, _ in page.tops),
        5 * pictures,
        10,
    ]
    figure.savefig(io.BytesIO(), format="png")  # a layout that cannot be warns, and fails


@pytest.mark.slow
@pytest.mark.long
def test_the_command_writes_the_page(digits_run, command, pictures, tmp_path):
    out = tmp_path / "page.png"
    done = command(
        "-m",
        "figures.seeing",
        f"--workdir={digits_run.workdir}",
        "--step=10",
        f"--out={out}",
        "--images=60",
        "--steps=3",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"see {out}"
    with Image.open(out) as image:
        assert image.width > 1000


@pytest.mark.parametrize("run", ["digits"], indirect=True)
@pytest.mark.parametrize(
    "flags, told",
    [
        (["--workdir=nowhere"], "nowhere"),
        (["--images=0"], "'0' is no whole number from 1"),
        (["--steps=-1"], "'-1' is no whole number from 1"),
        (["--step=last"], "step: 'last' is neither a step nor 'best'"),
        (["--pictures=nowhere"], "--pictures: nowhere is no folder with image files"),
        (["--out=page.jpg"], "--out: page.jpg is no .png file"),
        (["--out=nowhere/page.png"], "--out: nowhere/page.png is no .png file"),
        (["--layer=stage1"], "--layer"),
    ],
)
def test_a_wrong_flag_is_named(run, flags, told):
    workdir, _ = run
    with pytest.raises(UsageError, match=told):
        seeing.main([f"--workdir={workdir}", *flags])


@pytest.mark.parametrize("run", ["digits"], indirect=True)
def test_a_picture_that_is_none_is_named(run, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"--pictures: .*a.png is no image"):
        seeing.main([f"--workdir={run[0]}", f"--pictures={tmp_path}"])
