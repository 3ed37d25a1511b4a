"""A folder of images is read as a data set; what is wrong with it is one line."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_tfds import encode, pixels

from resjax.config import UsageError
from resjax.data import sources
from resjax.data.decode import DataError, decode

FILES = [
    "train/dog/2.png",
    "train/dog/4.JPG",
    "train/cat/1.jpeg",
    "train/cat/3.WebP",
    "train/cat/10.jpg",
    "train/ant/2.PNG",
    "val/dog/1.png",
    "val/ant/1.png",
    "val/ant/0.png",
]


def write(root, files=FILES):
    """Writes the files, each of which holds its own name; returns the folder as text."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return str(root)


def content(source):
    """The names of the files and their labels, in order."""
    examples = [source[i] for i in range(len(source))]
    return [(example["image"].decode(), example["label"]) for example in examples]


def message(root, split="train", name="folder"):
    """The text of the `UsageError` that opening raises, which must be one line."""
    with pytest.raises(UsageError) as error:
        sources.open_source(name, root, split)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_files_are_in_the_order_of_their_names_then_their_classes(tmp_path):
    source = sources.open_source("folder", write(tmp_path), "train")
    assert source.class_names == ["ant", "cat", "dog"]
    assert content(source) == [
        ("train/cat/1.jpeg", 1),
        ("train/cat/10.jpg", 1),
        ("train/ant/2.PNG", 0),
        ("train/dog/2.png", 2),
        ("train/cat/3.WebP", 1),
        ("train/dog/4.JPG", 2),
    ]


def test_validation_has_the_labels_of_training_and_may_lack_a_class(tmp_path):
    source = sources.open_source("folder", write(tmp_path), "test")
    assert source.class_names == ["ant", "cat", "dog"]
    assert content(source) == [
        ("val/ant/0.png", 0),
        ("val/ant/1.png", 0),
        ("val/dog/1.png", 2),
    ]


def test_example_is_where_the_source_says(tmp_path):
    source = sources.open_source("folder", write(tmp_path), "train")
    for i in range(len(source)):
        assert source.where(i) == source[i]["image"].decode()


def test_file_of_every_kind_is_decoded(tmp_path):
    image = pixels(0, 40, 60)
    for extension in (".jpg", ".png", ".webp"):
        path = tmp_path / "train" / "cat" / f"0{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, extension))
    source = sources.open_source("folder", str(tmp_path), "train")
    assert len(source) == 3
    for i in range(3):
        assert np.abs(decode(source[i]["image"]).astype(int) - image).mean() < 3


def test_hidden_and_other_files_are_ignored(tmp_path):
    write(tmp_path)
    others = [
        "train/.DS_Store",
        "train/README.txt",
        "train/.cache/0.jpg",
        "train/cat/.0.jpg",
        "train/cat/Thumbs.db",
        "train/cat/notes.jpg.txt",
        "train/cat/.ipynb_checkpoints/0.jpg",
    ]
    write(tmp_path, others)
    source = sources.open_source("folder", str(tmp_path), "train")
    assert {name for name, _ in content(source)} == {f for f in FILES if "train" in f}


def test_source_is_pickled_and_read_by_many_threads(tmp_path):
    source = sources.open_source("folder", write(tmp_path), "train")
    other = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as threads:
        examples = list(threads.map(other.__getitem__, [5, 0, 3, 3, 1] * 20))
    assert examples == [source[i] for i in [5, 0, 3, 3, 1] * 20]


def test_links_that_lead_out_are_left_out_and_those_inside_are_read(tmp_path, capfd):
    root = tmp_path / "data"
    write(root)
    write(tmp_path, ["secret/0.jpg", "data2/0.jpg"])
    (root / "train" / "cat" / "9.jpg").symlink_to(tmp_path / "secret" / "0.jpg")
    (root / "train" / "cat" / "8.jpg").symlink_to("../../../data2/0.jpg")
    (root / "train" / "secret").symlink_to(tmp_path / "secret")
    (root / "train" / "dog" / "5.png").symlink_to("2.png")
    (root / "train" / "loop").symlink_to("loop")
    source = sources.open_source("folder", str(root), "train")
    assert source.class_names == ["ant", "cat", "dog"]
    assert ("train/dog/2.png", 2) in content(source)[6:]
    assert len(source) == 7
    (line,) = capfd.readouterr().err.splitlines()
    assert (
        "lead out of" in line
        and "left out: 4" in line
        and str(root / "train" / "cat" / "8.jpg") in line
    )


def test_folder_that_is_itself_reached_through_a_link_is_read(tmp_path, capfd):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert len(sources.open_source("folder", str(tmp_path / "link"), "train")) == 6
    assert capfd.readouterr().err == ""


def test_split_that_leads_out(tmp_path):
    write(tmp_path / "data")
    os.rename(tmp_path / "data" / "train", tmp_path / "elsewhere")
    (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out" in message(str(tmp_path / "data"))


def test_file_that_vanished_or_cannot_be_read_is_a_damaged_example(tmp_path):
    source = sources.open_source("folder", write(tmp_path), "train")
    (tmp_path / "train" / "cat" / "1.jpeg").unlink()
    (tmp_path / "train" / "cat" / "10.jpg").unlink()
    (tmp_path / "train" / "cat" / "10.jpg").mkdir()
    for i in (0, 1):
        with pytest.raises(DataError):
            source[i]
    assert source[2]["image"] == b"train/ant/2.PNG"


def test_no_folder_is_named():
    text = message(None)
    assert "config.data.dir: None" in text


def test_folder_that_is_not_there(tmp_path):
    missing = tmp_path / "nowhere"
    assert message(str(missing)) == f"config.data.dir: there is no directory {missing}"


@pytest.mark.parametrize(
    ("files", "split", "missing"),
    [
        (["val/cat/0.jpg"], "train", "train"),
        (["val/cat/0.jpg"], "test", "train"),
        (["train/cat/0.jpg"], "test", "val"),
    ],
)
def test_split_that_is_not_there(tmp_path, files, split, missing):
    text = message(write(tmp_path, files), split)
    assert f"there is no directory {tmp_path / missing};" in text


@pytest.mark.parametrize("files", [["train/0.jpg"], ["train/.cat/0.jpg"]])
def test_split_without_classes(tmp_path, files):
    text = message(write(tmp_path, files))
    assert f"{tmp_path / 'train'} has no folder" in text


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inside", [[], ["notes.txt"], [".0.jpg"]])
def test_class_folder_without_images_is_named(tmp_path, split, inside):
    write(tmp_path)
    folder = tmp_path / {"train": "train", "test": "val"}[split] / "cat"
    for path in folder.glob("*"):
        path.unlink()
    folder.mkdir(exist_ok=True)
    write(folder, inside)
    text = message(str(tmp_path), split)
    assert f"class folder {folder} has no image (.jpg .jpeg .png .webp)" in text


def test_class_that_training_does_not_have_is_named(tmp_path):
    text = message(write(tmp_path, [*FILES, "val/dogs/0.jpg"]), "test")
    assert str(tmp_path / "val" / "dogs") in text and "did you mean dog" in text


def test_folder_among_the_images_of_a_class_is_named(tmp_path):
    text = message(write(tmp_path, [*FILES, "train/cat/kittens/0.jpg"]))
    assert f"{tmp_path / 'train' / 'cat' / 'kittens'} is a folder" in text


def test_unknown_split(tmp_path):
    assert "did you mean test" in message(write(tmp_path), "tests")


def test_class_names_are_not_known_without_the_folder():
    assert sources.known_class_names("folder") == []
