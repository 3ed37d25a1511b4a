"""What `--details` writes of made-up predictions; the pictures were also looked at."""

import csv
import io

import cv2
import numpy as np
import pytest
from etils import epath
from test_evaluation import made

from resjax import evaluation, evaluation_pictures


def picture(index):
    return np.full((20, 30 + index % 3, 3), index % 256, np.uint8)


def size_of(png):
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR).shape


@pytest.mark.parametrize(
    ("num_classes", "strength"), [(2, 2.0), (10, 2.0), (10, 99.0), (600, 5.0)]
)
def test_all_is_written_for_few_and_many_classes_and_without_mistakes(
    num_classes, strength, tmp_path
):
    given = made(num_classes=num_classes, strength=strength)
    names = [f"class {i}, also known as $ or 猫" for i in range(num_classes)]
    folder = epath.Path(tmp_path / "new" / "eval")
    evaluation_pictures.write_details(folder, given, names, picture, "a $ title")
    files = {path.name for path in folder.iterdir()}
    assert files == {"classes.csv", "confusion.png", "calibration.png", "mistakes.png"}
    for name in files - {"classes.csv"}:
        assert min(size_of((folder / name).read_bytes())[:2]) > 200
    rows = list(csv.DictReader(io.StringIO((folder / "classes.csv").read_text())))
    assert [row["class"] for row in rows] == names


def test_the_table_of_classes_adds_up_to_the_total():
    given = made()
    counts = evaluation.per_class(given.labels, evaluation.best_classes(given), 9)
    text = evaluation_pictures.format_classes([f"class {i}" for i in range(9)], *counts)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert list(rows[0]) == ["class", "examples", "correct", "top1"]
    assert sum(int(row["examples"]) for row in rows) == len(given.labels)
    correct = sum(int(row["correct"]) for row in rows)
    top1 = evaluation.summarize(given)["top1"]
    assert 100 * correct / len(given.labels) == pytest.approx(top1)
    for row in rows:
        if row["examples"] == "0":
            assert row["top1"] == ""
            continue
        share = 100 * int(row["correct"]) / int(row["examples"])
        assert float(row["top1"]) == pytest.approx(share, abs=0.005)


def test_a_mistake_is_seen_among_a_thousand_classes():
    matrix = np.zeros((1000, 1000), np.int64)
    matrix[0, 0] = matrix[700, 701] = 50
    found = evaluation_pictures._largest(matrix, 4)
    assert found.shape == (250, 250)
    assert np.argwhere(found).tolist() == [[0, 0], [175, 175]]
    # 7 x 7 in squares of 3: the last rows and columns are not lost.
    assert evaluation_pictures._largest(np.eye(7), 3).tolist() == np.eye(3).tolist()


def test_the_sheet_shows_the_images_of_the_worst_mistakes():
    given, shown = made(), []

    def read(index):
        shown.append(index)
        return picture(index)

    names = [str(i) for i in range(7)]
    evaluation_pictures.draw_mistakes(given, names, read, "title")
    assert shown == evaluation.worst_mistakes(given, 24).tolist()
