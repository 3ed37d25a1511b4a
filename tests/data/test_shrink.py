"""A shrunk data set is the same but for its large JPEG files, and says what it saves."""

import io
import math
import resource

import cv2
import numpy as np
import pytest
from PIL import Image, JpegImagePlugin
from tiny_tfds import SIZES, encode, pixels, write_cifar10, write_imagenet

from resjax.config import UsageError
from resjax.data import sources
from resjax.data.__main__ import main
from resjax.data.shrink import compare, shrink, shrink_image

SIDE = 45


def jpeg(height, width, **options):
    """A JPEG file of that size, written by PIL."""
    file = io.BytesIO()
    Image.fromarray(pixels(0, height, width)).save(file, "JPEG", **options)
    return file.getvalue()


def opened(encoded):
    return Image.open(io.BytesIO(encoded))


def rotated(height, width):
    """A JPEG file that is to be shown turned by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(height, width, exif=exif, quality=95)


def write_folder(folder, files):
    """A folder data set of two classes with the same files in both splits."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i, data in enumerate(files):
                (folder / split / name / f"{2 * i + label}.jpg").write_bytes(data)


def assert_alike(image, reference):
    """Within the noise of JPEG: a peak signal-to-noise ratio above 30 dB."""
    error = np.mean((np.float64(image) - np.float64(reference)) ** 2)
    assert error < 255**2 / 10 ** (30 / 10)


# --- one image ----------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(90, 50), (64, 64), (47, 71), (300, 201)])
def test_shorter_side_becomes_the_one_asked_for(height, width):
    image = opened(shrink_image(encode(pixels(3, height, width), ".jpg"), SIDE, 95, False))
    scale = SIDE / min(height, width)
    assert image.size == (round(width * scale), round(height * scale))
    assert min(image.size) == SIDE
    reference = cv2.resize(pixels(3, height, width), image.size, None, 0, 0, cv2.INTER_AREA)
    assert_alike(image, reference)


def test_detail_is_averaged_and_not_sampled():
    # Columns of black and white: their mean is grey, any sample of them is not.
    stripes = np.zeros((200, 200, 3), np.uint8)
    stripes[:, ::2] = 255
    shrunk = np.asarray(opened(shrink_image(encode(stripes, ".jpg"), 100, 95, False)))
    np.testing.assert_allclose(shrunk, 127.5, atol=8)


@pytest.mark.parametrize("quality", [95, 50])
def test_quality_and_colour_resolution(quality):
    image = opened(shrink_image(jpeg(80, 90), SIDE, quality, False))
    assert image.quantization == opened(jpeg(80, 90, quality=quality)).quantization
    assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0


@pytest.mark.parametrize("encoded", [jpeg(45, 300), encode(pixels(0, 99, 99), ".png")])
def test_small_files_and_other_kinds_keep_their_bytes(encoded):
    assert shrink_image(encoded, SIDE, 95, False) == encoded


def test_damaged_file_keeps_its_bytes():
    cut = jpeg(80, 90)[:300]
    assert shrink_image(cut, SIDE, 95, False) == cut


@pytest.mark.parametrize(("rotate", "size"), [(False, (90, 45)), (True, (45, 90))])
def test_orientation_is_applied_where_training_applies_it(rotate, size):
    shrunk = opened(shrink_image(rotated(60, 120), SIDE, 95, rotate))
    assert shrunk.size == size and not shrunk.getexif()
    upright = pixels(0, 60, 120)
    if rotate:
        upright = np.rot90(upright, -1)
    assert_alike(shrunk, cv2.resize(upright, size, interpolation=cv2.INTER_AREA))


# --- a data set ---------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_shrunk_data_set_has_the_order_labels_and_names_of_its_source(
    tmp_path, file_format
):
    write_imagenet(tmp_path, num_shards=3, file_format=file_format)
    count = shrink("imagenet2012", str(tmp_path), str(tmp_path / "new"), SIDE, 95)
    larger = [i for i in range(34) if min(SIZES[i % len(SIZES)]) > SIDE]
    assert count == len(larger)
    for split in ("train", "test"):
        before = sources.open_source("imagenet2012", str(tmp_path), split)
        after = sources.open_source("imagenet2012", str(tmp_path / "new"), split)
        assert after.class_names == before.class_names and len(after) == len(before)
        for i in range(len(before)):
            assert after[i]["label"] == before[i]["label"]
            old, new = opened(before[i]["image"]), opened(after[i]["image"])
            if min(old.size) > SIDE:
                reference = cv2.resize(np.asarray(old), new.size, None, 0, 0, 3)
                assert min(new.size) == SIDE
                assert_alike(new, reference)
            else:
                assert after[i]["image"] == before[i]["image"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["imagenet2012"]


def test_data_set_without_jpeg_files_is_copied(tmp_path):
    write_cifar10(tmp_path)
    assert shrink("cifar10", str(tmp_path), str(tmp_path / "new"), 16, 95) == 0
    before = sources.open_source("cifar10", str(tmp_path), "train")
    after = sources.open_source("cifar10", str(tmp_path / "new"), "train")
    assert [after[i] for i in range(40)] == [before[i] for i in range(40)]
    assert after.class_names == before.class_names


def test_folder_becomes_a_folder_of_upright_images_in_the_same_order(tmp_path):
    write_folder(tmp_path / "old", [jpeg(30, 40), rotated(60, 120), jpeg(300, 200)])
    assert shrink("folder", str(tmp_path / "old"), str(tmp_path / "new"), SIDE, 95) == 8
    for split in ("train", "test"):
        before = sources.open_source("folder", str(tmp_path / "old"), split)
        after = sources.open_source("folder", str(tmp_path / "new"), split)
        assert after.class_names == ["cat", "dog"]
        for i in range(6):
            assert after.where(i) == before.where(i)
            assert after[i]["label"] == before[i]["label"]
        sizes = [opened(after[i]["image"]).size for i in (0, 2, 4)]
        assert sizes == [(40, 30), (45, 90), (45, 68)]


def test_damaged_record_is_named_and_nothing_is_left(tmp_path):
    directory = write_imagenet(tmp_path, file_format="array_record")
    (path,) = directory.glob("*-train*")
    data = bytearray(path.read_bytes())
    data[data.index(b"JFIF") + 50] ^= 255
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"train: example 0 .{path.name}, record 0. can"):
        shrink("imagenet2012", str(tmp_path), str(tmp_path / "new"), SIDE, 95)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["imagenet2012", "folder"])
def test_full_disk_is_one_line_and_nothing_is_left(tmp_path, name):
    if name == "folder":
        write_folder(tmp_path, [jpeg(400, 400, quality=100)])
        side, limit = 399, 2_000
    else:
        write_imagenet(tmp_path)
        side, limit = SIDE, 30_000
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "kept").touch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # of every file
    try:
        with pytest.raises(UsageError, match="new cannot be written: ") as error:
            shrink(name, str(tmp_path), str(tmp_path / "new"), side, 95)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["kept"]


def test_data_set_that_exists_is_left_alone(tmp_path):
    directory = write_imagenet(tmp_path)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    words = [f"--data_dir={tmp_path}", f"--shrink={SIDE}", f"--to={tmp_path}"]
    with pytest.raises(UsageError, match=f"--to: {tmp_path}/imagenet2012 exists"):
        main(["imagenet2012", *words])
    write_folder(tmp_path, [jpeg(60, 60)])
    with pytest.raises(UsageError, match=f"--to: {tmp_path}/train exists"):
        main(["folder", *words])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is no directory"):
        main(["folder", *words[:2], f"--to={tmp_path / 'file'}"])
    assert {path: path.read_bytes() for path in directory.iterdir()} == before


# --- what has changed ---------------------------------------------------------------


class Images(list):
    """A split of encoded images."""

    def __init__(self, encoded, count):
        super().__init__([{"image": encoded, "label": 0}] * count)


def share_below(size, height, width, count):
    """The share of windows of 8-100 % of the area with a side below `size` pixels."""
    random, below = np.random.default_rng(0), 0
    for _ in range(count):
        while True:
            area = random.uniform(0.08, 1) * height * width
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                break
        below += min(w, h) < size
    return below / count


def test_share_of_enlarged_crops_follows_from_the_sizes():
    before, after = compare(
        Images(jpeg(375, 500), 60), Images(jpeg(256, 341), 60), rotates=False
    )
    assert before.num_images == after.num_images == 60
    expected = share_below(224, 375, 500, 20_000), share_below(224, 256, 341, 20_000)
    found = before.enlarged_share, after.enlarged_share
    np.testing.assert_allclose(found, expected, atol=0.05)  # 3 sigma of 960 draws
    assert expected[1] - expected[0] > 0.2


def test_shares_at_the_ends():
    before, after = compare(
        Images(jpeg(1100, 1100), 1), Images(jpeg(223, 999), 1), rotates=True
    )
    assert (before.enlarged_share, after.enlarged_share) == (0, 1)


def test_smaller_file_is_decoded_sooner():
    before, after = compare(
        Images(jpeg(2000, 2000), 8), Images(jpeg(250, 250), 8), rotates=False
    )
    assert after.seconds < before.seconds
    assert after.images_per_second == 8 / after.seconds


def test_images_that_cannot_be_decoded_are_left_out():
    split = [{"image": b"nothing"}, {"image": jpeg(60, 60)}]
    before, after = compare(split, split, rotates=False)
    assert before.num_images == after.num_images == 1
    with pytest.raises(UsageError, match="no image of a sample can be decoded"):
        compare(split[:1], split[:1], rotates=False)


def test_command_says_what_has_changed(tmp_path, capsys):
    old = write_imagenet(tmp_path, num_train=60)
    words = [f"--data_dir={tmp_path}", f"--shrink={SIDE}", f"--to={tmp_path / 'new'}"]
    assert main(["imagenet2012", *words, "--splits=test"]) == 0
    out, err = capsys.readouterr()
    new = tmp_path / "new" / "imagenet2012" / "5.1.0"
    count = sum(min(SIZES[i % len(SIZES)]) > SIDE for i in range(70))
    assert f"imagenet2012 in {new}: {count} of 70 images re-encoded" in out
    sizes = [
        sum(path.stat().st_size for path in folder.glob("*.array_record-*"))
        for folder in (old, new)
    ]
    rows = [line.split() for line in out.splitlines()]
    assert ["bytes", "on", "disk", *(f"{size:,}" for size in sizes)] in rows
    assert f"bytes x {sizes[1] / sizes[0]:.2f}, decoding x " in out
    assert ["crops", "that", "are", "enlarged", "100.0%", "100.0%"] in rows
    assert f"--config.data.name=imagenet2012 --config.data.dir={tmp_path / 'new'}" in out
    assert not err


def test_shrunk_data_set_lands_beside_its_source_if_not_told(tmp_path, capsys):
    write_imagenet(tmp_path / "tfds", num_train=6, num_validation=2)
    main(["imagenet2012", f"--data_dir={tmp_path / 'tfds'}", f"--shrink={SIDE}"])
    assert (tmp_path / f"tfds-{SIDE}" / "imagenet2012" / "5.1.0").is_dir()
