"""The `digits` data set: 1,797 real 8 x 8 images of handwritten digits, in scikit-learn.

A tfds builder that yields PNG bytes, so it prepares and reads without TensorFlow.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """A fixed split that keeps the classes' shares.

    Args:
      labels: [N] int.

    Returns:
      {"train", "test"}: sorted indices. The examples are shuffled by a frozen random
      stream and sorted by class; every fifth of them is test (360 of the 1,797 digits).
    """
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    is_test = np.arange(len(labels)) % 5 == 0
    return {"train": np.sort(by_class[~is_test]), "test": np.sort(by_class[is_test])}


class Digits(tfds.core.GeneratorBasedBuilder):
    """Optical recognition of handwritten digits, 8 x 8 pixels, 10 classes.

    Source: Alpaydin & Kaynak 1998, UCI machine learning repository; the copy of
      `sklearn.datasets.load_digits`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 43 people, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        splits = split_indices(digits.target)
        return {
            name: self._generate_examples(digits.images, digits.target, indices)
            for name, indices in splits.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        import cv2

        pixels = np.round(images * (255 / 16)).astype(np.uint8)  # 17 grey levels
        for i in map(int, indices):
            _, png = cv2.imencode(".png", pixels[i])
            yield i, {"image": png.tobytes(), "label": int(labels[i])}
