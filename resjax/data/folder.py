"""Folders of images: DIR/train and DIR/val, with one subfolder per class.

Files are .jpg, .jpeg, .png or .webp, and what begins with a dot is ignored.
"""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from resjax.config import UsageError, unknown_name
from resjax.data.decode import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Examples by index, ordered by file name, then class.

    So files that were numbered when they were exported keep the order of those numbers.

    Attributes:
      class_names: the subfolders of train, sorted.
      directory: of the split.
      file_names: of the images, within the folders of their classes.
      labels: their classes, [N] int32.
    """

    class_names: list[str]
    directory: Path
    file_names: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads an example: {"image": the bytes of the file, "label": int}.

        Raises:
          DataError: the file cannot be read.
        """
        path = self.directory / self._path(index)
        try:
            return {"image": path.read_bytes(), "label": int(self.labels[index])}
        except OSError as error:
            raise DataError(str(error.strerror)) from error

    def _path(self, index: int) -> str:
        return f"{self.class_names[self.labels[index]]}/{self.file_names[index]}"

    def where(self, index: int) -> str:
        """The path of an example below the folder of the data set."""
        return f"{self.directory.name}/{self._path(index)}"


def _leads_out(path: Path, root: Path) -> bool:
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _inside(directory: Path, root: Path, strangers: list[Path]) -> Iterator[os.DirEntry]:
    """What is in a directory and not hidden; links that leave `root` go to `strangers`."""
    try:
        entries = list(os.scandir(directory))
    except OSError as error:
        raise UsageError(f"config.data.dir: {directory}: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_symlink() and (_leads_out(path, root) or not path.exists()):
            strangers.append(path)
        else:
            yield entry


def _class_folders(root: Path, split: str, strangers: list[Path]) -> list[str]:
    """The names of the classes of a split, sorted."""
    directory = root / split
    if not directory.is_dir():
        raise UsageError(
            f"config.data.dir: there is no directory {directory}; a folder data set has "
            "train/CLASS/IMAGE and val/CLASS/IMAGE"
        )
    if _leads_out(directory, root):
        raise UsageError(f"config.data.dir: {directory} is a link that leads out of {root}")
    entries = _inside(directory, root, strangers)
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise UsageError(f"config.data.dir: {directory} has no folder, one for each class")
    return names


def _images(directory: Path, root: Path, strangers: list[Path]) -> list[str]:
    """The names of the images of a class."""
    names = []
    for entry in _inside(directory, root, strangers):
        if entry.is_dir():
            raise UsageError(
                f"config.data.dir: {entry.path} is a folder; the images of a class lie in "
                f"{directory} itself"
            )
        if entry.name.lower().endswith(EXTENSIONS):
            names.append(entry.name)
    if not names:
        left_out = any(path.parent == directory for path in strangers)
        why = f"; links that lead out of {root} are not followed" if left_out else ""
        raise UsageError(
            f"config.data.dir: the class folder {directory} has no image "
            f"({' '.join(EXTENSIONS)}){why}"
        )
    return names


def open_folder(data_dir: str | None, split: str) -> FolderSource:
    """The images of DIR/train or DIR/val.

    Symbolic links that lead out of DIR, or nowhere, are left out, and a line on standard
    error says so.

    Args:
      data_dir: DIR.
      split: "train" or "val".

    Raises:
      UsageError: no folder is named; it, a split or the classes are not there; a class
        has no image, or is not in train.
    """
    if not data_dir:
        raise UsageError("config.data.dir: None; data.name=folder needs a folder of images")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UsageError(f"config.data.dir: there is no directory {data_dir}")
    strangers: list[Path] = []
    class_names = _class_folders(root, "train", strangers)
    names = class_names if split == "train" else _class_folders(root, split, strangers)
    labels = {name: label for label, name in enumerate(class_names)}
    images = []
    for name in names:
        if name not in labels:
            raise unknown_name(f"class folder {root / split / name} in train", name, labels)
        found = _images(root / split / name, root, strangers)
        images += [(file_name, labels[name]) for file_name in found]
    if strangers:
        print(
            f"data: links that lead out of {root}, or nowhere, are left out: "
            f"{len(strangers):,}, the first being {min(strangers)}",
            file=sys.stderr,
        )
    images.sort()
    file_names, image_labels = zip(*images, strict=True)
    return FolderSource(
        class_names, root / split, list(file_names), np.array(image_labels, np.int32)
    )
